"""All routes: one table, whose rows say what they need. The router and the OpenAPI document are made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from cgroups import Stats

from ..config import Settings
from . import examples, problems, sse
from .access import Access
from .guarding import GuardedRoute
from .routes import executions, files, health, homes, metrics, sandboxes, streams, tiers, users
from .schemas import (
    Deleted,
    ExecOut,
    Health,
    ImportOut,
    SandboxesPage,
    SandboxView,
    SignalOut,
    TierOut,
    TiersOut,
    TransferOut,
    User,
    UsersPage,
    UserStatsOut,
)

__all__ = ["ROWS", "Row", "add_routes"]

READ, ADMIN = Access("read"), Access("admin")
OPERATOR, OVERSEER = Access("admin", whole_host=True), Access("read", whole_host=True)

Body = Literal["json", "file", "archive"]
"""How large a request's body may be: as the settings `api_body_bytes`, `api_file_bytes`, `archive_max_bytes` say."""

_ANYWHERE = (400, 401, 403, 421, 422, 431, 500, 503)
_WHY = {
    400: "The path or the query is malformed, or the caller went away",
    401: "A token is needed that is known here and has not expired",
    403: "The caller may not do this, or the tenant is blocked",
    404: "There is no such user, sandbox or file",
    408: "The body did not come in time",
    409: "It does not fit the state that it is in, or this host",
    413: "The body is too large",
    421: "This is not the host that was asked for",
    422: "The request is malformed, or can never be right",
    429: "A cap or a rate is reached",
    431: "The request's head is too large",
    500: "Something that nobody foresaw, or a setting that is not usable here",
    503: "The server stops, too many callers are connected, or the registry cannot be read",
    505: "This needs HTTP/1.1",
}
"""What statuses mean here."""

_USER = "/runner/isolation/user/{user_id}"
_SANDBOX = "/runner/sandboxes/{user_id}/{service_id}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A route.

    Attributes:
        method, path: what is asked for. A part in braces stands for one segment of the raw path, decoded by itself;
            with `:path` for all that are left.
        handler: answers; its docstring is the description.
        summary: the same in a few words.
        tag: what it is about.
        access: what the caller needs.
        status: of an answer in which all went well.
        model: what that holds.
        media_type: instead of a model: what it is.
        example: of it.
        body: how large a body may come.
        raw_body: what a body is that is no JSON.
        problems: statuses of what else can go wrong here, but for those of each route of its kind; see `statuses`.
    """

    method: str
    path: str
    handler: Callable[..., Any]
    summary: str
    tag: str
    access: Access = READ
    status: int = 200
    model: Any = None
    media_type: str = "application/json"
    example: Any = None
    body: Body = "json"
    raw_body: str | None = None
    problems: tuple[int, ...] = ()

    @property
    def statuses(self) -> tuple[int, ...]:
        """All that an answer can have which tells of a problem."""
        found = {*_ANYWHERE, *self.problems}
        if "{user_id}" in self.path:
            found |= {404, 409}
        if self.method in ("POST", "PUT", "PATCH"):
            found |= {408, 413}
        return tuple(sorted(found))

    @property
    def name(self) -> str:
        """Tells it from all others."""
        return f"{self.tag}-{self.handler.__name__.rstrip('_')}".replace("_", "-")


def _users(method: str, path: str, handler: Callable[..., Any], summary: str, **more: Any) -> Row:
    return Row(method=method, path=path, handler=handler, summary=summary, tag="users", **more)


def _sandboxes(method: str, path: str, handler: Callable[..., Any], summary: str, **more: Any) -> Row:
    return Row(method=method, path=path, handler=handler, summary=summary, tag="sandboxes", **more)


def _acts(path: str, handler: Callable[..., Any], summary: str, **more: Any) -> Row:
    return _sandboxes(
        "POST", _SANDBOX + path, handler, summary, access=ADMIN, model=SandboxView, example=examples.SANDBOX, **more
    )


ROWS: tuple[Row, ...] = (
    _users(
        "GET",
        "/runner/isolation/users",
        users.list_users,
        "List users",
        model=UsersPage,
        example=examples.USERS,
    ),
    _users("GET", _USER, users.get_or_create, "Get or create a user", model=User, example=examples.USER),
    _users("PUT", _USER, users.create, "Create a user", access=ADMIN, model=User, example=examples.USER),
    _users("GET", _USER + "/stats", users.stats, "Count", model=UserStatsOut, example=examples.USER_STATS),
    _users(
        "DELETE",
        _USER,
        users.delete,
        "Delete a user",
        access=ADMIN,
        model=Deleted,
        example={"success": True, "user_id": "auth0|123456"},
    ),
    _users(
        "POST",
        _USER + "/export",
        homes.export,
        "Export a home",
        access=ADMIN,
        media_type=homes.MEDIA_TYPE,
        problems=(505,),
    ),
    _users(
        "POST",
        _USER + "/import",
        homes.import_,
        "Import a home",
        access=ADMIN,
        model=ImportOut,
        example={"entries": 7, "files": 3, "bytes": 1234},
        body="archive",
        raw_body=homes.MEDIA_TYPE,
    ),
    _users("GET", _USER + "/tier", tiers.show, "Show a user's tier", model=TierOut, example=examples.TIER),
    _users(
        "PUT",
        _USER + "/tier",
        tiers.assign,
        "Give a user a tier",
        access=OPERATOR,
        model=TierOut,
        example=examples.TIER,
    ),
    Row(
        method="GET",
        path="/runner/tiers",
        handler=tiers.list_tiers,
        summary="List tiers",
        tag="tiers",
        model=TiersOut,
        example=examples.TIERS,
    ),
    _sandboxes(
        "GET",
        "/runner/sandboxes",
        sandboxes.list_sandboxes,
        "List sandboxes",
        model=SandboxesPage,
        example=examples.SANDBOXES,
    ),
    _sandboxes(
        "POST",
        "/runner/sandboxes",
        sandboxes.start,
        "Start",
        access=ADMIN,
        status=201,
        model=SandboxView,
        example=examples.SANDBOX,
        problems=(404, 409, 429),
    ),
    _sandboxes("GET", _SANDBOX, sandboxes.show, "Show", model=SandboxView, example=examples.SANDBOX),
    _sandboxes("DELETE", _SANDBOX, sandboxes.stop, "Stop", access=ADMIN, model=SandboxView, example=examples.SANDBOX),
    _acts("/freeze", sandboxes.freeze, "Freeze"),
    _acts("/thaw", sandboxes.thaw, "Thaw"),
    _acts("/restart", sandboxes.restart, "Restart", problems=(429,)),
    _sandboxes(
        "POST",
        _SANDBOX + "/signal",
        executions.send_signal,
        "Send a signal",
        access=ADMIN,
        model=SignalOut,
        example={"signalled": 3},
    ),
    _sandboxes(
        "POST",
        _SANDBOX + "/exec",
        executions.execute,
        "Execute a further program",
        access=ADMIN,
        model=ExecOut,
        example=examples.EXECUTED,
    ),
    _sandboxes(
        "POST",
        _SANDBOX + "/exec/stream",
        executions.execute_stream,
        "Execute a further program, and hear it",
        access=ADMIN,
        media_type=sse.MEDIA_TYPE,
        example=examples.HEARD,
    ),
    _sandboxes(
        "PATCH",
        _SANDBOX + "/limits",
        sandboxes.set_limits,
        "Change limits",
        access=ADMIN,
        model=SandboxView,
        example=examples.SANDBOX,
    ),
    _sandboxes("GET", _SANDBOX + "/stats", sandboxes.stats, "Show what it uses", model=Stats, example=examples.STATS),
    _sandboxes(
        "GET", _SANDBOX + "/logs", streams.logs, "Read the log", media_type=sse.MEDIA_TYPE, example=examples.RECORDS
    ),
    _sandboxes(
        "PUT",
        _SANDBOX + "/files/{path:path}",
        files.put,
        "Put a file",
        access=ADMIN,
        model=TransferOut,
        example={"files": 1, "bytes": 5},
        body="file",
        raw_body="application/octet-stream",
    ),
    _sandboxes("GET", _SANDBOX + "/files/{path:path}", files.get, "Get a file", media_type="application/octet-stream"),
    Row(
        method="GET",
        path="/runner/events",
        handler=streams.events,
        summary="Hear of what happens",
        tag="events",
        media_type=sse.MEDIA_TYPE,
        example=examples.EVENTS,
        problems=(409,),
    ),
    Row(
        method="GET",
        path="/healthz",
        handler=health.alive,
        summary="Whether it answers",
        tag="health",
        model=Health,
        example={"status": "ok"},
    ),
    Row(
        method="GET",
        path="/readyz",
        handler=health.ready,
        summary="Whether it works",
        tag="health",
        model=Health,
        example={"status": "ready"},
    ),
    Row(
        method="GET",
        path="/metrics",
        handler=metrics.metrics,
        summary="Metrics for Prometheus",
        tag="health",
        access=OVERSEER,
        media_type="text/plain",
        example=examples.METRICS,
    ),
    Row(
        method="GET",
        path="/openapi.json",
        handler=health.document,
        summary="This document",
        tag="health",
        model=dict[str, Any],
    ),
)


def add_routes(app: FastAPI, settings: Settings, rows: tuple[Row, ...] = ROWS) -> None:
    """Give an application these routes."""
    sizes: dict[Body, int] = {
        "json": settings.api_body_bytes,
        "file": settings.api_file_bytes,
        "archive": settings.archive_max_bytes,
    }
    for row in rows:
        route = GuardedRoute(
            row.path,
            row.handler,
            access=row.access,
            max_body=sizes[row.body],
            timeout=settings.api_timeout,
            methods=[row.method],
            status_code=row.status,
            summary=row.summary,
            tags=[row.tag],
            name=row.name,
            operation_id=row.name,
            response_model=row.model,
            # The reference has nothing where we would have null.
            response_model_exclude_none=row.model in (UsersPage, UserStatsOut),
            response_class=JSONResponse if row.model is not None else Response,
            responses=_responses(row),
            openapi_extra=_extra(row),
        )
        app.router.routes.append(route)


def _responses(row: Row) -> dict[int | str, dict[str, Any]]:
    content: dict[str, Any] = {} if row.example is None else {"example": row.example}
    if row.media_type == sse.MEDIA_TYPE:
        # As OpenAPI 3.2 has it, and FastAPI: of each event.
        content["itemSchema"] = sse.EVENT
    elif row.model is None:
        content["schema"] = {"type": "string", "format": "binary"}
    good = {"description": HTTPStatus(row.status).phrase, "content": {row.media_type: content}}
    return {row.status: good, **{status: _bad(status) for status in row.statuses}}


def _bad(status: int) -> dict[str, Any]:
    response: dict[str, Any] = {"description": _WHY[status], "model": problems.Problem}
    if status in (429, 503):
        seconds = {"description": "Seconds, where they are known.", "schema": {"type": "integer", "minimum": 1}}
        response["headers"] = {"Retry-After": seconds}
    return response


def _extra(row: Row) -> dict[str, Any] | None:
    needs = {"x-role": row.access.role, "x-whole-host": row.access.whole_host}
    if row.raw_body is None:
        return needs
    return needs | {
        # An empty file is one, an empty archive is none.
        "requestBody": {
            "required": row.body == "archive",
            "content": {row.raw_body: {"schema": {"type": "string", "format": "binary"}}},
        }
    }
