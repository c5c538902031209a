"""The gate: what every request passes before anything of it is looked at more closely."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ..config import Settings
from .access import Caller, Callers, Peer
from .paths import MalformedPathError, canonical, check_query
from .problems import problem

__all__ = ["Gate"]

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Gate:
    """Lets through who may call, from where they may, for a path that means one thing only.

    The connection is described by what `listening` puts into the scope's `state`: the `peer` at the other end of a Unix
    socket, and `admit`, which says whether there is room for a caller. Under another server nothing is there, and a
    token is needed.
    """

    def __init__(self, app: ASGIApp, settings: Settings, callers: Callers) -> None:
        self._app = app
        self._callers = callers
        self._most = settings.api_head_bytes
        self._origins = frozenset(settings.api_origins)
        self._hosts = _LOOPBACK | {host.lower() for host in settings.api_hosts}
        if settings.api_listen is not None:
            self._hosts |= {_name_of(settings.api_listen)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request (https://asgi.readthedocs.io)."""
        if scope["type"] == "http":
            refusal = self._too_large(scope) or self._refuse(scope)
            await (self._app if refusal is None else refusal)(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._app(scope, receive, send)

    def _too_large(self, scope: Scope) -> Response | None:
        """Refuse a head that is larger than it may be: h11 bounds only what has come of one that is not whole."""
        target = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
        if target + sum(len(name) + len(value) + len(": \r\n") for name, value in scope["headers"]) <= self._most:
            return None
        return problem(431, "large-head", f"the request's head has more than {self._most} bytes")

    def _refuse(self, scope: Scope) -> Response | None:
        """What to say instead, if anything; else the scope knows the caller and the canonical path."""
        state: Mapping[str, object] = scope.get("state", {})
        headers = Headers(scope=scope)
        if (foreign := self._foreign(headers)) is not None:
            return foreign
        peer = state.get("peer")
        caller = self._caller(peer if isinstance(peer, Peer) else None, headers)
        if caller is None and peer is not None:
            return problem(403, "forbidden", "this socket is not for you", remedy="become a member of api_group")
        if caller is None:
            challenge = {"WWW-Authenticate": "Bearer"}
            return problem(401, "unauthorised", "a bearer token is needed that is known here", headers=challenge)
        admit = state.get("admit")
        if callable(admit) and not admit(caller):
            later = {"Retry-After": "1", "Connection": "close"}
            return problem(503, "crowded", "too many callers are connected, of all or of this tenant", headers=later)
        try:
            scope["path"] = canonical(scope.get("raw_path") or b"")
            check_query(scope.get("query_string") or b"")
        except MalformedPathError as error:
            return problem(400, "bad-path", str(error))
        scope["pactown.caller"] = caller
        return None

    def _caller(self, peer: Peer | None, headers: Headers) -> Caller | None:
        if peer is not None:
            return self._callers.by_peer(peer)
        # Of several the first could be seen here and the last elsewhere.
        given = headers.getlist("authorization")
        return self._callers.by_header(given[0]) if len(given) == 1 else None

    def _foreign(self, headers: Headers) -> Response | None:
        """Refuse what another host's name led here, and what a browser's page sends: a page gets nothing."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or _name_of(hosts[0]) not in self._hosts:
            return problem(421, "foreign-host", "this is not the host that was asked for", remedy="see api_hosts")
        origins = headers.getlist("origin")
        from_page = bool(origins) or headers.get("sec-fetch-site", "none") != "none"
        if from_page and not (len(origins) == 1 and origins[0] in self._origins):
            return problem(403, "foreign-origin", "web pages get nothing here", remedy="see api_origins")
        return None


def _name_of(host: str) -> str:
    """A host without its port."""
    name, colon, port = host.lower().rpartition(":")
    return name if colon and not port.endswith("]") else host.lower()
