"""A file that appears whole, or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

__all__ = ["WholeFile"]

_NO_TMPFILE = (errno.EISDIR, errno.EOPNOTSUPP)


class WholeFile:
    """A new file, which takes its name, and that of an older one, when it is finished, within the block.

    Until then it has none, where the file system can do that, so that also a crash leaves nothing. Nobody else may read
    it. All of it raises OSError; writing and finishing are for a thread.

    Attributes:
        fd: the file's, within the block.
    """

    fd: int

    def __init__(self, target: Path) -> None:
        self._target = target
        self._passing = f".pactown-export-{secrets.token_hex(8)}"
        self._held = ExitStack()

    def __enter__(self) -> Self:
        if self._target.is_dir():  # to say so at the end, perhaps after an hour, would be late
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self._target))
        with ExitStack() as held:
            self._folder = os.open(self._target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(os.close, self._folder)
            self.fd, self._named = self._made()
            held.callback(self._forget)
            held.callback(os.close, self.fd)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def write(self, data: bytes) -> None:
        """Write all of it behind what is there."""
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self.fd, rest) :]

    def finish(self) -> None:
        """It is whole: give it its name. It is on the disk then."""
        os.fsync(self.fd)
        if self._named or not self._linked():
            os.rename(self._passing, self._target.name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        os.fsync(self._folder)

    def _linked(self) -> bool:
        """Give it its name, or, where another file has that, the passing one. Returns whether it is its own."""
        link = f"/proc/self/fd/{self.fd}"
        try:
            os.link(link, self._target.name, dst_dir_fd=self._folder, follow_symlinks=True)
        except FileExistsError:
            os.link(link, self._passing, dst_dir_fd=self._folder, follow_symlinks=True)
            return False
        return True

    def _made(self) -> tuple[int, bool]:
        """A new file, and whether it has the passing name, as it must have on some file systems."""
        try:
            return os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=self._folder), False
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self._passing, flags, 0o600, dir_fd=self._folder), True

    def _forget(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._passing, dir_fd=self._folder)
