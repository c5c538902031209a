"""Bars for what takes long, on a terminal only."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..homes import OnProgress

__all__ = ["bar"]

SHOWN_AFTER = 0.5
"""Seconds. What is over sooner needs no bar."""

_PAUSE = 0.1
"""Seconds between two updates: there may be thousands of steps in a second."""


@contextlib.contextmanager
def bar(what: str) -> Iterator[OnProgress | None]:
    """A bar on standard error for as long as the block lasts; None if that is no terminal. It leaves no trace.

    To be used on an event loop; told of progress, in bytes, from any thread.

    Args:
        what: is done; one word.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415 - only for a terminal
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = progress.add_task(what, total=None)
    next_update = 0.0

    def update(done: int, total: int | None) -> None:
        nonlocal next_update
        if time.monotonic() >= next_update or done == total:
            next_update = time.monotonic() + _PAUSE
            progress.update(task, completed=done, total=total)

    start = asyncio.get_running_loop().call_later(SHOWN_AFTER, progress.start)
    try:
        yield update
    finally:
        start.cancel()
        progress.stop()
