"""One FIFO: the end that a sandbox writes to, and the end that we take from.

Both ends are opened read-write, `fifo(7)`. The sandbox's, so that a reader that dies neither kills it with
SIGPIPE nor loses what it wrote; ours, so that a program that closes its output does not leave a hang-up
that `epoll` reports forever. `O_NONBLOCK` belongs to an open file description, so the two ends are opened
apart: ours never blocks, the sandbox's does, and that is the back-pressure.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import termios

from .errors import LogError
from .paths import private_directory

__all__ = ["Fifo"]

_OURS = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
_THEIRS = os.O_RDWR | os.O_CLOEXEC


class Fifo:
    """One stream's FIFO. Descriptors are -1 while closed; closing twice is harmless."""

    __slots__ = ("child_fd", "fd", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = -1
        self.child_fd = -1

    def create(self, uid: int, gid: int) -> None:
        """Make the FIFO for a tenant and open both ends.

        It belongs to the tenant, with mode 0600, so that a program can open `/dev/stdout` again: a magic
        link in `/proc/self/fd` checks the inode's permissions, not those of the directories that lead to
        it.

        Raises:
            OSError: and nothing is left of it.
        """
        try:
            os.mkfifo(self.path, 0o600)
        except FileNotFoundError:
            private_directory(os.path.dirname(self.path))
            os.mkfifo(self.path, 0o600)
        try:
            self.fd = os.open(self.path, _OURS)
            if uid != os.geteuid() or gid != os.getegid():
                os.chown(self.fd, uid, gid)
            self.child_fd = os.open(self.path, _THEIRS)
        except BaseException:
            self.close()
            self.unlink()
            raise

    def open_existing(self) -> None:
        """Open our end of a FIFO that a living sandbox writes to.

        Raises:
            LogError: it is not there any more.
        """
        try:
            self.fd = os.open(self.path, _OURS | os.O_NOFOLLOW)
        except FileNotFoundError as error:
            raise LogError(f"cannot take the output of a running sandbox: {self.path} is gone") from error

    def waiting(self) -> int:
        """Bytes that can be taken now."""
        return waiting(self.fd) if self.fd >= 0 else 0

    def close_child(self) -> None:
        """Close the sandbox's end here; it has its own copy."""
        if self.child_fd >= 0:
            os.close(self.child_fd)
            self.child_fd = -1

    def close(self) -> None:
        """Close what is open. What nobody else holds open is lost with its contents."""
        self.close_child()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def unlink(self) -> None:
        """Remove the name, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def waiting(fd: int) -> int:
    """Bytes that can be read from a FIFO now, `FIONREAD` in `ioctl_pipe(2)`."""
    answer = fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0")
    return int(struct.unpack("i", answer)[0])
