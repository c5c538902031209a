"""Commands that are interrupted: what they do is given up in order, and the exit code tells by which signal."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from .messages import Ended

__all__ = ["SIGNALS", "hearing", "interruptible"]

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def hearing(interrupt: Callable[[int], object]) -> Iterator[None]:
    """Call this, on the loop that runs, with the number of each of `SIGNALS` that comes while the block lasts."""
    loop = asyncio.get_running_loop()
    # What we were started to ignore stays ignored: nohup(1), and shells that start a job in the background.
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in heard:
        loop.add_signal_handler(number, interrupt, number)
    try:
        yield
    finally:
        for number in heard:
            loop.remove_signal_handler(number)


async def interruptible(work: Coroutine[Any, Any, T], also: Callable[[], object] | None = None) -> T:
    """Do this; a signal cancels it, and then the command ends as soon as nothing of it is under way any more.

    What came to its end all the same, a moment before, counts.

    Args:
        also: what is to be done at a signal besides.

    Raises:
        Ended: it was interrupted; 128 and the signal's number.
    """
    task = asyncio.get_running_loop().create_task(work)
    received: list[int] = []

    def interrupt(number: int) -> None:
        received.append(number)
        if also is not None:
            also()
        task.cancel()

    with hearing(interrupt):
        try:
            return await task
        except asyncio.CancelledError:
            if received:
                raise Ended(128 + received[0]) from None
            raise
