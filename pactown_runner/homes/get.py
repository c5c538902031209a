"""Files out of a sandbox: a `tar` with the tenant's uid packs, this process distrusts it and writes."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ..descriptors import Sink
from ..errors import FilesError, NotFoundError
from ..host import Host
from ..jobs import Job, Stop, job
from .transfer import Inside, OnProgress, Transfer, explained, how
from .unpacking import CONTENT, Bounds, Extracted, StreamEndError, entries, extract, finish

__all__ = ["Get"]

T = TypeVar("T")

_PIECE_BYTES = 1 << 18

_PACK = (
    "--create",
    "--file=-",
    "--format=gnu",
    "--hard-dereference",
    "--blocking-factor=128",
    "--no-unquote",  # else tar takes a backslash in the name it is given for the beginning of an escape
)


class Get:
    """One transfer out of a sandbox: the tenant's `tar`, and what it sends."""

    def __init__(self, host: Host, stop: Stop, timeout: float) -> None:
        self._host = host
        self._stop = stop
        self._timeout = timeout

    def fetch(
        self, user_id: str, where: Inside, destination: Path, bounds: Bounds, on_progress: OnProgress | None
    ) -> Transfer:
        """Get a file or folder as `destination`: wholly, or not at all."""
        got = 0

        def on_bytes(count: int) -> None:
            nonlocal got
            got += count
            if on_progress is not None:
                on_progress(got, None)

        with _private_beside(destination) as (parent, private):

            def receive(child: Job) -> Extracted:
                return extract(child.output, where.name or ".", private, bounds, on_bytes=on_bytes)

            done, remarks = self._take(user_id, where, receive)
            _set_in_place(parent, private, destination)
        return Transfer(done.files, done.bytes, tuple(done.skipped), remarks)

    def read(self, user_id: str, where: Inside, max_bytes: int) -> bytes:
        """Get the content of a file."""
        content: list[bytes] = []
        self._pass_on(user_id, where, max_bytes, lambda _: None, content.append)
        return b"".join(content)

    def read_stream(
        self, user_id: str, where: Inside, max_bytes: int, output: int, on_size: Callable[[int], object]
    ) -> None:
        """Write the content of a file into a descriptor, and tell its size before."""
        self._pass_on(user_id, where, max_bytes, on_size, Sink(output, self._stop).write)

    def _pass_on(
        self,
        user_id: str,
        where: Inside,
        max_bytes: int,
        on_size: Callable[[int], object],
        write: Callable[[bytes], object],
    ) -> None:
        """Hand on the content of a file, and its last piece only when all has gone well."""

        def receive(child: Job) -> bytes:
            last: bytes | None = None
            for entry in entries(child.output, where.name or ".", Bounds(max_bytes, 1)):
                if entry.path or entry.folder or entry.skipped:
                    raise FilesError("it is no file")
                on_size(entry.size)
                last, left = b"", entry.size
                while left:
                    write(last)
                    last = child.output.read(min(left, _PIECE_BYTES))
                    if not last:
                        raise StreamEndError("the stream ended in the middle")
                    left -= len(last)
            if last is None:
                raise StreamEndError("nothing came")
            return last

        write(self._take(user_id, where, receive)[0])

    def _take(self, user_id: str, where: Inside, receive: Callable[[Job], T]) -> tuple[T, str]:
        """Start `tar`, hand its output to `receive`, and see it end well; returns the result, and what it remarked."""
        user = self._host.users.get(user_id)
        if user is None:
            raise NotFoundError(f"there is no user {user_id!r}")
        self._host.users.verify(user)
        with (
            explained("get"),
            job(
                self._host,
                user,
                self.argv(f"./{where.name}" if where.name else "."),
                directories=where.directories(user, make=False),
                stdout=True,
                timeout=self._timeout,
                stop=self._stop,
            ) as child,
        ):
            try:
                result = receive(child)
                finish(child.output)
            except StreamEndError as error:
                code = child.wait()
                raise _tar_error(code, child) if code else error from None
            code = child.wait()
            # 1: something changed or vanished while it was read.
            if code not in (0, 1):
                raise _tar_error(code, child)
            return result, child.message()

    def argv(self, operand: str) -> tuple[str, ...]:
        """What runs as the tenant."""
        return ("/bin/tar", *_PACK, "--", operand)


def _tar_error(code: int, child: Job) -> FilesError | NotFoundError:
    text = how(code, child)
    if "Cannot stat: No such file or directory" in text:
        return NotFoundError(f"cannot get it: {text}")
    return FilesError(f"cannot get it: {text}")


@contextmanager
def _private_beside(destination: Path) -> Iterator[tuple[int, int]]:
    """A fresh directory for us alone beside `destination`; removed at the end with what is still in it."""
    destination = Path(os.path.abspath(destination))
    try:
        if destination.is_dir() and not destination.is_symlink():
            raise FilesError(f"{destination} is there already", remedy="name a destination that is not")
        parent = os.open(destination.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            private_path = tempfile.mkdtemp(prefix=".pactown-get-", dir=destination.parent)
            private = os.open(private_path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                yield parent, private
            finally:
                os.close(private)
                _remove_tree(private_path)
        finally:
            os.close(parent)
    except OSError as error:
        raise FilesError(f"cannot write {destination}: {error.strerror or error}") from error


def _set_in_place(parent: int, private: int, destination: Path) -> None:
    mode = os.stat(CONTENT, dir_fd=private, follow_symlinks=False).st_mode
    name = Path(os.path.abspath(destination)).name
    if not stat.S_ISDIR(mode):
        os.rename(CONTENT, name, src_dir_fd=private, dst_dir_fd=parent)
        return
    if os.path.lexists(destination):
        raise FilesError(f"{destination} is there already", remedy="name a destination that is not")
    # Moving a folder writes to it, its `..`; without root that takes permission.
    os.chmod(CONTENT, 0o700, dir_fd=private)
    folder = os.open(CONTENT, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=private)
    try:
        os.rename(CONTENT, name, src_dir_fd=private, dst_dir_fd=parent)
        os.fchmod(folder, stat.S_IMODE(mode))
    finally:
        os.close(folder)


def _remove_tree(path: str) -> None:
    """Remove what we made ourselves, and nobody else could change."""
    if os.geteuid() != 0:
        # Only root may empty a folder without write permission.
        for folder, names, _ in os.walk(path):
            for name in names:
                os.chmod(os.path.join(folder, name), 0o700)
    shutil.rmtree(path)
