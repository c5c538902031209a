"""The spool: a file that holds a stream's raw bytes from when they leave the FIFO until they are in the log.

`splice(2)` moves them inside the kernel, so there is no moment at which they are only in our memory: a pump
that is killed between two system calls loses nothing. Offsets only grow. What is in the log already is
given back to the file system by punching holes, so that a service that writes for a year holds no year of
output.
"""

from __future__ import annotations

import contextlib
import os

from .errors import LogError
from .paths import private_directory

__all__ = ["BLOCK_BYTES", "PUNCH_STEP", "Spool", "in_blocks"]

PUNCH_STEP = 1 << 20
"""Bytes, a multiple of every usual block size: a hole that ends inside a block does not free that block."""

BLOCK_BYTES = 4096
"""What a file takes on the disk is a multiple of this."""

_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2


class Spool:
    """One stream's spool.

    Attributes:
        size: bytes taken from the FIFO since the run began, whether still here or not.
    """

    __slots__ = ("_fd", "_punched", "path", "size")

    def __init__(self, path: str) -> None:
        self.path = path
        self.size = 0
        self._fd = -1
        self._punched = 0

    def open(self, start: int) -> None:
        """Open the spool, made if it is missing; everything before offset `start` is in the log.

        Raises:
            OSError: it cannot be made or opened.
            LogError: bytes from `start` on are gone, as can happen when the whole host lost power.
        """
        if self._fd >= 0:
            return
        try:
            fd = os.open(self.path, _FLAGS | os.O_CREAT, 0o600)
        except FileNotFoundError:
            private_directory(os.path.dirname(self.path))
            fd = os.open(self.path, _FLAGS | os.O_CREAT, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size > start and os.lseek(fd, start, os.SEEK_DATA) != start:
                raise LogError(
                    f"{self.path} has lost bytes from offset {start} on that are not in the log",
                    remedy="move the file away to go on without them",
                )
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self.size = max(size, start)
        self._punched = start - start % PUNCH_STEP

    @property
    def room(self) -> int:
        """The most bytes that it takes of the disk."""
        return in_blocks(self.size) - self._punched

    def take(self, fifo_fd: int, limit: int) -> int:
        """Move up to `limit` bytes from a FIFO to the end of the spool; 0 if none wait.

        Raises:
            OSError: the disk is full or broken; the bytes are still in the FIFO.
        """
        try:
            # An explicit offset, because splice refuses a file that was opened to append.
            moved = os.splice(fifo_fd, self._fd, limit, offset_dst=self.size, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            return 0
        self.size += moved
        return moved

    def read(self, offset: int, limit: int) -> bytes:
        """Up to `limit` bytes from `offset` on."""
        return os.pread(self._fd, min(limit, self.size - offset), offset) if offset < self.size else b""

    def give_back(self, upto: int) -> None:
        """Let the file system have the space before offset `upto`, in steps of `PUNCH_STEP`."""
        if upto - self._punched < PUNCH_STEP:
            return
        # Each time from the beginning: what is a hole already costs nothing, and what failed once is tried again.
        self._punched = upto - upto % PUNCH_STEP
        _punch(self._fd, self._punched)

    def close(self) -> None:
        """Close it; the file stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Close and remove it."""
        self.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def in_blocks(size: int) -> int:
    """The bytes of the disk that so many bytes of a file take."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _punch(fd: int, upto: int) -> None:
    """Deallocate what lies before an offset, `fallocate(2)`.

    Where that fails, as on a file system that knows no holes, the spool takes more room, and is right all the same.
    """
    import ctypes  # noqa: PLC0415 - 10 ms that a process without chatty sandboxes need not pay

    libc = ctypes.CDLL(None)
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    libc.fallocate64(fd, mode, ctypes.c_int64(0), ctypes.c_int64(upto))
