"""All routes: one table, whose rows say what they need. The router and the OpenAPI document are made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Tells it from all others."""
        return f"{self.tag}-{self.handler.__name__.rstrip('_')}".replace("_", "-")


def _users(method: str, path: str, handler: Callable[..., Any], summary: str, **more: Any) -> Row:
    return Row(method=method, path=path, handler=handler, summary=summary, tag="users", **more)


def _sandboxes(method: str, path: str, handler: Callable[..., Any], summary: str, **more: Any) -> Row:
    return Row(method=method, path=path, handler=handler, summary=summary, tag="sandboxes", **more)


def _acts(path: str, handler: Callable[..., Any], summary: str) -> Row:
    return _sandboxes(
        "POST", _SANDBOX + path, handler, summary, access=ADMIN, model=SandboxView, example=examples.SANDBOX
    )


ROWS: tuple[Row, ...] = (
    _users("GET", "/runner/isolation/users", users.list_users, "List users", model=UsersPage, example=examples.USERS),
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
    ),
    _sandboxes("GET", _SANDBOX, sandboxes.show, "Show", model=SandboxView, example=examples.SANDBOX),
    _sandboxes("DELETE", _SANDBOX, sandboxes.stop, "Stop", access=ADMIN, model=SandboxView, example=examples.SANDBOX),
    _acts("/freeze", sandboxes.freeze, "Freeze"),
    _acts("/thaw", sandboxes.thaw, "Thaw"),
    _acts("/restart", sandboxes.restart, "Restart"),
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
    content: dict[str, Any] = {row.media_type: {} if row.example is None else {"example": row.example}}
    if row.model is None:
        content[row.media_type]["schema"] = {"type": "string"}
    good = {"description": HTTPStatus(row.status).phrase, "content": content}
    bad = {"description": "Why not", "model": problems.Problem}
    return {row.status: good, "4XX": bad, "5XX": bad}


def _extra(row: Row) -> dict[str, Any] | None:
    needs = {"x-role": row.access.role, "x-whole-host": row.access.whole_host}
    if row.raw_body is None:
        return needs
    return needs | {
        "requestBody": {"required": True, "content": {row.raw_body: {"schema": {"type": "string", "format": "binary"}}}}
    }
