"""Paths of the API: each id is one segment, encoded so that nothing on the way takes it for anything else."""

from __future__ import annotations

from urllib.parse import quote

from ..errors import SpecError
from ..specs import check_service_id, check_user_id

__all__ = ["file_path", "sandbox_path", "user_path"]


def user_path(user_id: str, what: str = "") -> str:
    """Of a user, or of `what` it has.

    Raises:
        SpecError: it is no id.
    """
    return f"/runner/isolation/user/{_segment(check_user_id(user_id))}{what and '/'}{what}"


def sandbox_path(user_id: str, service_id: str, what: str = "") -> str:
    """Of a sandbox, or of `what` it has.

    Raises:
        SpecError: these are no ids.
    """
    user, service = _segment(check_user_id(user_id)), _segment(check_service_id(service_id))
    return f"/runner/sandboxes/{user}/{service}{what and '/'}{what}"


def file_path(user_id: str, service_id: str, path: str) -> str:
    """Of a file in a sandbox's directory. Where it must not lead is the server's to say.

    Raises:
        SpecError: these are no ids, or the path cannot be written as UTF-8.
    """
    try:
        parts = "/".join(map(_segment, path.split("/")))
    except UnicodeEncodeError as error:
        raise SpecError(f"path {path!r} cannot be written as UTF-8") from error
    return sandbox_path(user_id, service_id, f"files/{parts}")


def _segment(text: str) -> str:
    # Dots need no escape, but without one clients and proxies take `..` for the segment before.
    return quote(text, safe="") if text.strip(".") else "%2E" * len(text)
