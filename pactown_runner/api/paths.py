"""Paths, taken undecoded: a slash that is a part of an id is no separator, and no two ids are ever taken for one.

ASGI's `path` is decoded as a whole, and lossily: there `a%2Fstats` is `a/stats`, and bytes that are no UTF-8 become
U+FFFD. So routes are matched against what `canonical` makes of the raw path, in which each segment has exactly one
form, and each parameter is decoded by itself afterwards.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote, unquote_to_bytes

__all__ = ["MalformedPathError", "canonical", "check_query", "decoded"]

_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


class MalformedPathError(ValueError):
    """A path that names nothing: it is no absolute one, it or its query has a malformed escape, or no UTF-8."""


def canonical(raw_path: bytes) -> str:
    """The raw path of a request with each segment decoded, and encoded again in the one way there is.

    Raises:
        MalformedPathError: it cannot be decoded without a loss.
    """
    if not raw_path.startswith(b"/"):
        raise MalformedPathError("the path does not begin with a slash")
    if _ESCAPE.search(raw_path):
        raise MalformedPathError("the path has a % that begins no escape")
    try:
        return "/".join(quote(unquote_to_bytes(segment).decode(), safe="") for segment in raw_path.split(b"/"))
    except UnicodeDecodeError as error:
        raise MalformedPathError("the path has bytes that are not UTF-8") from error


def check_query(query: bytes) -> None:
    """See that a query holds text, which is all that it will be taken for.

    Raises:
        MalformedPathError: it cannot be decoded without a loss.
    """
    if _ESCAPE.search(query):
        raise MalformedPathError("the query has a % that begins no escape")
    try:
        unquote_to_bytes(query).decode()
    except UnicodeDecodeError as error:
        raise MalformedPathError("the query has bytes that are not UTF-8") from error


def decoded(segments: str) -> str:
    """What one or more segments of a canonical path stand for."""
    return unquote(segments, errors="strict")
