"""Our standard input on its way to a program."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError as LoopEndedError
from typing import Any, Protocol

from ..errors import StateError

__all__ = ["Fed", "feed"]

READ_BYTES = 1 << 16


class Fed(Protocol):
    """What has a standard input of its own."""

    def send(self, data: bytes) -> Coroutine[Any, Any, None]:
        """Write to it; `StateError` if that is wanted no more."""

    def close_stdin(self) -> None:
        """Give it end-of-file."""


def feed(program: Fed, loop: asyncio.AbstractEventLoop) -> None:
    """Pass our standard input on in a thread: regular files and terminals cannot all be waited for in the loop."""
    threading.Thread(target=_feed_all, args=(program, loop), name="pactown-input", daemon=True).start()


def _feed_all(program: Fed, loop: asyncio.AbstractEventLoop) -> None:
    # The program has ended, or wants no more: then there is nothing left to do here, nor anything to tell.
    with contextlib.suppress(StateError, LoopEndedError, RuntimeError):
        while data := _read():
            sending = program.send(data)
            try:
                asyncio.run_coroutine_threadsafe(sending, loop).result()
            except RuntimeError:
                sending.close()
                raise
        loop.call_soon_threadsafe(program.close_stdin)


def _read() -> bytes:
    try:
        return os.read(0, READ_BYTES)
    except OSError:
        return b""
