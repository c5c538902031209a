"""A tenant's bytes on an operator's terminal: what would be an instruction to it is made visible instead.

Escape sequences can retitle a window, rewrite what was printed before, or answer into the shell's input. So only
newline, tab and printable characters pass; all else is shown as `\\x1b` and the like. That takes in U+202E, which turns
the order of letters round, and other characters that nobody sees.
"""

from __future__ import annotations

import re

__all__ = ["one_line", "visible"]

_UNUSUAL = re.compile(r"[^\n\t -~]")


def visible(data: bytes) -> bytes:
    """Return `data` as UTF-8 in which every character but newline and tab is printable."""
    text = data.decode("utf-8", "backslashreplace")
    return _UNUSUAL.sub(_shown, text).encode()


def one_line(text: str) -> str:
    """Return what somebody else chose, within a line of ours: a line break in it must not begin one that seems ours."""
    return text if text.isprintable() else repr(text)


def _shown(found: re.Match[str]) -> str:
    character = found[0]
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
