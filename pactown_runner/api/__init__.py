"""The REST API: what a supervisor can do, over HTTP, on a Unix socket and by TCP. Needs the extra `api`.

What a request passes, from the outside in:

    listening    the sockets; who is at the other end of one; time for a request's head
    gate         from where (`Host`, `Origin`), by whom (`access`), and for what: the path, taken undecoded (`paths`)
    guarding     each route: whether this caller may, and how large a body
    routes       what is done; `table` lists them all, with the access that they need
    problems     what goes wrong, as `application/problem+json`

`app` puts these together. Routing, reading bodies and the OpenAPI document are FastAPI's.
"""

from __future__ import annotations

from .app import create_app
from .listening import Listening, listening, served

__all__ = ["Listening", "create_app", "listening", "served"]
