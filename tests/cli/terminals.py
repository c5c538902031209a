"""A terminal, for commands to show themselves on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import termios
from collections.abc import Iterator

__all__ = ["Terminal", "terminal"]


class Terminal:
    """The side of it that a person has.

    Attributes:
        text: all that has appeared.
        theirs: the side that a program has.
    """

    def __init__(self, ours: int, theirs: int) -> None:
        self.text = b""
        self.theirs = theirs
        self._ours = ours

    def type(self, words: bytes) -> None:
        os.write(self._ours, words)

    def until(self, words: bytes) -> bytes:
        """Wait for these words; returns all that has appeared."""
        while words not in self.text:
            self._read()
        return self.text

    def rest(self) -> bytes:
        """All that has appeared when nobody has the other side any more."""
        self.hang_up()
        with contextlib.suppress(OSError):  # EIO
            while True:
                self._read()
        return self.text

    def hang_up(self) -> None:
        """Give our own hold on the other side up."""
        if self.theirs >= 0:
            os.close(self.theirs)
            self.theirs = -1

    def _read(self) -> None:
        self.text += os.read(self._ours, 4096)


@contextlib.contextmanager
def terminal() -> Iterator[Terminal]:
    """A terminal of 200 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    screen = Terminal(ours, theirs)
    try:
        yield screen
    finally:
        screen.hang_up()
        os.close(ours)
