"""What goes wrong, as `application/problem+json` (RFC 9457), with the library's own `code` and `remedy`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from math import ceil
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cgroups import CgroupError, FormatError

from ..errors import (
    AccountError,
    AdmissionError,
    AlreadyRunningError,
    BlockedError,
    ConfigError,
    LauncherError,
    NotFoundError,
    RegistryError,
    RunnerError,
    StartError,
    StateError,
    TreeError,
)

__all__ = ["MEDIA_TYPE", "Fault", "Problem", "ProblemError", "add_handlers", "problem", "problem_of"]

_log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"

_STATUS: dict[type[RunnerError], int] = {
    NotFoundError: 404,
    AlreadyRunningError: 409,
    StateError: 409,
    # What this host is like, or has been made into, stands in the way; the same request may be right later.
    AccountError: 409,
    TreeError: 409,
    BlockedError: 403,
    AdmissionError: 429,
    ConfigError: 500,
    LauncherError: 500,
    RegistryError: 503,
}
"""Of errors that are the caller's to mend by another request: 422."""


class Fault(BaseModel):
    """One thing that is wrong with a request."""

    where: str = Field(description="Which part of the request: `body.limits.memory_max`.")
    message: str


class Problem(BaseModel):
    """What could not be done, and why (RFC 9457)."""

    type: str = Field("about:blank", description="Always this: `code` tells the kinds apart.")
    title: str = Field(description="What the status means.")
    status: int
    detail: str = Field(description="What could not be done, and why; for people.")
    code: str = Field(description="The kind of error, as the library calls it; stable.")
    remedy: str | None = Field(None, description="What can be done about it.")
    errors: list[Fault] | None = Field(None, description="With `bad-request`: what is wrong, by place.")
    step: str | None = Field(None, description="With `failed-to-start`: where the launcher got to.")
    errno: int | None = Field(None, description="With `failed-to-start`: the kernel's error number.")
    limit: str | None = Field(None, description="With `refused`: the setting that stands in the way.")


class ProblemError(HTTPException):
    """Raised by what answers a request, to answer with a problem instead."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        remedy: str | None = None,
        headers: Mapping[str, str] | None = None,
        errors: Sequence[Mapping[str, str]] | None = None,
    ) -> None:
        super().__init__(status, detail, headers)
        self.code = code
        self.remedy = remedy
        self.errors = errors


def problem(status: int, code: str, detail: str, *, headers: Mapping[str, str] | None = None, **more: Any) -> Response:
    """The answer that tells of a problem; of what is None it tells nothing."""
    values = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    values |= {"code": code, **{name: value for name, value in more.items() if value is not None}}
    # In ASCII: a name that a tenant gave a file need not be text.
    return Response(json.dumps(values), status, dict(headers or {}), MEDIA_TYPE)


def problem_of(error: Exception) -> Response:
    """The answer for an error."""
    if isinstance(error, RunnerError):
        return _runner_problem(error)
    if isinstance(error, FormatError):
        return problem(422, "bad-limits", error.message, remedy=error.remedy)
    if isinstance(error, CgroupError):
        return problem(409, "cgroup", error.message, remedy=error.remedy)
    if isinstance(error, ProblemError):
        more = {"remedy": error.remedy, "errors": error.errors}
        return problem(error.status_code, error.code, error.detail, headers=error.headers, **more)
    # Whoever serves the application is given the error as well, and logs it.
    return problem(500, "internal", "something went wrong here that nobody foresaw; the server's log tells of it")


def _runner_problem(error: RunnerError) -> Response:
    status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 422)
    headers: dict[str, str] = {}
    more: dict[str, Any] = {}
    if isinstance(error, AdmissionError):
        more = {"limit": error.limit}
        if error.retry_after is not None:
            headers["Retry-After"] = str(max(1, ceil(error.retry_after)))
    if isinstance(error, StartError):
        more = {"step": error.step, "errno": error.errno or None}
    if status >= 500:
        _log.error("an answer failed: %s", error)
    return problem(status, error.code, error.message, remedy=error.remedy, headers=headers, **more)


def add_handlers(app: FastAPI) -> None:
    """Have all that goes wrong in an application answered with a problem."""

    async def told(_: Request, error: Exception) -> Response:
        return problem_of(error)

    async def by_http(request: Request, error: Exception) -> Response:
        if isinstance(error, ProblemError):
            return problem_of(error)
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            return problem(404, "not-found", "there is nothing under this path")
        if error.status_code == 405:
            return problem(405, "bad-method", "this path has no such method", headers={"Allow": _methods(request)})
        return problem(error.status_code, "bad-request", str(error.detail), headers=error.headers)

    async def gone(_: Request, __: Exception) -> Response:
        return problem(400, "caller-gone", "the caller went away before the body's end")

    async def malformed(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        # What was given is not repeated: it may be secret, or no text.
        faults = [{"where": ".".join(map(str, fault["loc"])), "message": fault["msg"]} for fault in error.errors()]
        detail = "; ".join(f"{fault['where']}: {fault['message']}" for fault in faults[:3])
        return problem(422, "bad-request", f"the request is malformed: {detail}", errors=faults[:32])

    for kind in (RunnerError, CgroupError, Exception):
        app.add_exception_handler(kind, told)
    app.add_exception_handler(HTTPException, by_http)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(RequestValidationError, malformed)


def _methods(request: Request) -> str:
    """What could be asked of this path."""
    scope = dict(request.scope)
    found = {
        method
        for route in request.app.router.routes
        for method in getattr(route, "methods", None) or ()
        if route.matches({**scope, "method": method})[0].value
    }
    return ", ".join(sorted(found))
