"""The application: the table's routes behind the gate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..config import Settings
from ..metrics import Metrics
from ..release import installed_version
from ..supervisor import Supervisor
from . import problems
from .access import Callers
from .gate import Gate
from .problems import add_handlers, problem_of
from .server import HEARTBEAT, Server, server_stopping
from .table import add_routes

__all__ = ["Application", "create_app", "openapi"]

_DESCRIPTION = (
    "Runs other people's code on this host: each tenant with an account of its own, each service in a cgroup."
)


class Application:
    """The API as an ASGI application, for `listening`.

    Attributes:
        server: what its routes work with.
        routes: the application behind the gate.
    """

    def __init__(self, app: ASGIApp, routes: FastAPI, server: Server) -> None:
        self._app = app
        self.routes = routes
        self.server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request (https://asgi.readthedocs.io)."""
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            # It took longer than a server that stops has time for.
            if begun or scope["type"] != "http" or not self.server.stopping.is_set():
                raise
            await problem_of(server_stopping())(scope, receive, send)


def create_app(
    supervisor: Supervisor,
    settings: Settings | None = None,
    *,
    heartbeat: float = HEARTBEAT,
    longest_stream: float | None = None,
    clock: Callable[[], float] = time.time,
) -> Application:
    """The API of a supervisor that runs, or will when the first request comes.

    Args:
        settings: by default the supervisor's.
        heartbeat: seconds after which a stream that has nothing to say says so.
        longest_stream: seconds after which a stream ends and says so; its reader may come back. None for never.
        clock: seconds since the epoch, by which tokens expire.

    Raises:
        ConfigError: the group that may use the socket is not there.
    """
    settings = settings or supervisor.settings
    server = Server(
        supervisor, settings, Metrics(supervisor), heartbeat=heartbeat, longest_stream=longest_stream, clock=clock
    )
    routes = _routes(settings)
    routes.state.server = server
    app: ASGIApp = Gate(routes, settings, Callers(settings, clock))
    if settings.api_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.api_origins,
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["authorization", "content-type", "last-event-id"],
        )
    return Application(app, routes, server)


def openapi() -> dict[str, Any]:
    """The OpenAPI document."""
    return _routes(Settings()).openapi()


def _routes(settings: Settings) -> FastAPI:
    app = FastAPI(
        title="pactown-runner",
        description=_DESCRIPTION,
        version=installed_version() or "0",
        # A page that shows the document would load its scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    add_handlers(app)
    add_routes(app, settings)
    made = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _with_problems(made())
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # as FastAPI's documentation has it
    return app


def _with_problems(document: dict[str, Any]) -> dict[str, Any]:
    """What FastAPI cannot be told: problems have a media type of their own, and callers a token."""
    for path in document["paths"].values():
        for operation in path.values():
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    response["content"] = {problems.MEDIA_TYPE: response["content"].pop("application/json")}
    document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"token": []}]
    return document
