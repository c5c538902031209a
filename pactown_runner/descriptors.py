"""Reading and writing what somebody else opened, pipes and sockets among it, without waiting for ever."""

from __future__ import annotations

import os
import select
import stat
from collections.abc import Iterator
from contextlib import suppress

from .jobs import Stop

__all__ = ["Sink", "pieces"]

_LOOK_AGAIN = 500
"""Milliseconds between two looks at whether to give up."""
_CHUNK_BYTES = 1 << 18


class Sink:
    """Where something is written to.

    Attributes:
        written: bytes so far.
    """

    def __init__(self, fd: int, stop: Stop) -> None:
        self.written = 0
        self._fd = fd
        self._stop = stop
        # Into a pipe that can be written, so much goes without waiting, pipe(7); and into a socket about as well.
        self._at_once = _CHUNK_BYTES if stat.S_ISREG(os.fstat(fd).st_mode) else select.PIPE_BUF
        self._ready = select.poll()
        self._ready.register(fd, select.POLLOUT)

    def write(self, data: bytes) -> None:
        """Write all of it.

        Raises:
            FilesError: it was stopped.
            OSError: it cannot be written.
        """
        view = memoryview(data)
        while view:
            self._stop.check()
            if self._ready.poll(_LOOK_AGAIN):
                with suppress(BlockingIOError):
                    count = os.write(self._fd, view[: self._at_once])
                    view = view[count:]
                    self.written += count


def pieces(fd: int, stop: Stop) -> Iterator[bytes]:
    """What a descriptor gives, up to its end.

    Raises:
        FilesError: it was stopped.
        OSError: it cannot be read.
    """
    ready = select.poll()
    ready.register(fd, select.POLLIN)
    while True:
        stop.check()
        if ready.poll(_LOOK_AGAIN):
            with suppress(BlockingIOError):
                if not (data := os.read(fd, _CHUNK_BYTES)):
                    return
                yield data
