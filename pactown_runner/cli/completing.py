"""What shells offer for ids and names: those that a running server knows of. Without one it is nothing.

An id is what somebody on the internet may have chosen, and typer's script for zsh evaluates what is offered. So only
ids of harmless characters are offered at all.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ..client import Client

__all__ = ["complete_service", "complete_user"]

_HARMLESS = re.compile(r"[A-Za-z0-9@._+/:,|-]+", re.ASCII)
_SPECIAL = re.compile(r"([|])")
_SECONDS = 2.0
"""So long a person waits for a key to do something."""


class _ForBash(str):
    """As bash is to have it, which puts it where the word was; it begins as what it stands for does.

    Bash alone inserts what it is given as it is.
    """

    __slots__ = ("stands_for",)
    stands_for: str

    def __new__(cls, text: str) -> _ForBash:
        escaped = super().__new__(cls, _SPECIAL.sub(r"\\\1", text))
        escaped.stands_for = text
        return escaped

    def startswith(self, *words: Any) -> bool:
        """What is typed already comes without its escapes."""
        return self.stands_for.startswith(*words)


def complete_user(ctx: typer.Context) -> list[str]:
    """The ids of all users."""

    async def look(client: Client) -> list[str]:
        return [user.saas_user_id for user in await client.list_users()]

    return _offered(ctx, look)


def complete_service(ctx: typer.Context) -> list[str]:
    """The names of the user's services that are alive."""
    user_id = ctx.params.get("user")

    async def look(client: Client) -> list[str]:
        return [sandbox.service_id for sandbox in await client.list_sandboxes(user_id)]

    return _offered(ctx, look)


def _offered(ctx: typer.Context, look: Callable[[Client], Awaitable[list[str]]]) -> list[str]:
    found: list[str] = []
    with contextlib.suppress(Exception):  # nobody is there to be told, in the middle of a line
        from .connecting import asked  # noqa: PLC0415

        server = ctx.params.get("server") or os.environ.get("PACTOWN_SERVER")
        found = asked(server, ctx.params.get("users_base"), ctx.params.get("config"), look, timeout=_SECONDS)
    harmless = [name for name in found if _HARMLESS.fullmatch(name)]
    # typer's own variable: `_PROGRAM_NAME_COMPLETE`.
    in_bash = os.environ.get("_PACTOWN_RUNNER_COMPLETE") == "complete_bash"
    return [_ForBash(name) for name in harmless] if in_bash else harmless
