"""To look again and again, on a screen of its own if there is a terminal, and to hear what happens."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from .messages import write_line
from .tables import show_grid

if TYPE_CHECKING:
    from ..client import Client
    from .tables import Grid

__all__ = ["watched"]

T = TypeVar("T")

_SECONDS = 1.0


def watched(
    look: Callable[[Client], Awaitable[T]],
    grid_of: Callable[[T], Grid],
    document: Callable[[T], dict[str, Any]],
    *,
    as_json: bool,
) -> Callable[[Client], Awaitable[NoReturn]]:
    """What a client does that looks every second, until it is interrupted.

    Args:
        look: asks the server.
        grid_of: what came of it as a table.
        document: what came of it as a line of JSON.
        as_json: write these.
    """

    async def forever(client: Client, show: Callable[[T], None]) -> NoReturn:
        while True:
            show(await look(client))
            await asyncio.sleep(_SECONDS)

    async def on_screen(client: Client) -> NoReturn:
        from rich.live import Live  # noqa: PLC0415 - only for a terminal

        with Live(screen=True, auto_refresh=False) as live:
            await forever(client, lambda found: live.update(grid_of(found).for_terminal(), refresh=True))

    async def on_pipe(client: Client) -> NoReturn:
        await forever(client, lambda found: show_grid(grid_of(found)))

    async def as_lines(client: Client) -> NoReturn:
        await forever(client, lambda found: write_line(json.dumps(document(found))))

    return as_lines if as_json else on_screen if sys.stdout.isatty() else on_pipe
