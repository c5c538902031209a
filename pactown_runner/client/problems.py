"""What a server refuses, `application/problem+json` (RFC 9457), as the error that the library has for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .. import errors
from ..errors import AdmissionError, BlockedError, RunnerError, StartError
from .errors import BadAnswerError, ClientError, Fault, ForbiddenError, ServerStoppingError

__all__ = ["error_of", "error_of_answer"]

_OWN = {kind.code: kind for kind in (ForbiddenError, ServerStoppingError)}
_EXCERPT = 200


def error_of_answer(status: int, content: bytes, retry_after: str | None = None) -> RunnerError:
    """The error for an answer that is none of what was asked for.

    Args:
        status: of the answer.
        content: its body.
        retry_after: its header of that name, if there is one.
    """
    try:
        problem = json.loads(content)
        code, detail = problem["code"], problem["detail"]
    except (KeyError, TypeError, ValueError):
        code = detail = None
    if not (isinstance(code, str) and isinstance(detail, str)):
        text = content[:_EXCERPT].decode("utf-8", "replace")
        return BadAnswerError(
            f"what answered, with status {status}, is no server of this kind: {text!r}",
            status=status,
            retry_after=_seconds(retry_after),
            remedy="see that the address leads to `pactown-runner serve`",
        )
    return error_of(problem, retry_after=_seconds(retry_after))


def error_of(problem: Mapping[str, Any], *, retry_after: float | None = None) -> RunnerError:
    """The error for a problem that has a `code` and a `detail`."""
    code, message = str(problem["code"]), str(problem["detail"])
    remedy = None if problem.get("remedy") is None else str(problem["remedy"])
    kind = _library_errors().get(code)
    if kind is BlockedError:
        return BlockedError(message)
    if kind is AdmissionError:
        limit = str(problem.get("limit", ""))
        return AdmissionError(message, limit=limit, retry_after=retry_after, remedy=remedy)
    if kind is StartError:
        step, errno = str(problem.get("step", "")), problem.get("errno") or 0
        return StartError(message, step=step, errno=errno, remedy=remedy)
    if kind is not None:
        return kind(message, remedy=remedy)
    return _OWN.get(code, ClientError)(
        message,
        code=code,
        status=problem.get("status"),
        retry_after=retry_after,
        faults=tuple(Fault(fault["where"], fault["message"]) for fault in problem.get("errors") or ()),
        remedy=remedy,
    )


def _library_errors() -> Mapping[str, type[RunnerError]]:
    # It takes packages along that a client otherwise has no use for.
    from ..archives.errors import ArchiveError  # noqa: PLC0415
    from ..logs.errors import LogError  # noqa: PLC0415

    kinds = (*(getattr(errors, name) for name in errors.__all__), ArchiveError, LogError)
    return {kind.code: kind for kind in kinds if kind is not RunnerError}


def _seconds(header: str | None) -> float | None:
    # A date, as proxies may give it, is not read.
    return float(header) if header is not None and header.isascii() and header.isdecimal() else None
