"""Read a tar stream that a tenant may have forged, and write what it holds into a fresh private directory.

Only what GNU tar writes with `--format=gnu` is understood, and of that only files and folders are made. The reader is
our own: `tarfile` reads extended headers of any size into memory, follows them into one another, and has a history of
ways out of the destination. From it comes no more than the decoding of one block of 512 bytes, `TarInfo.frombuf`.

Nobody else can change the directory that is written into, and no link is ever made in it. Yet every name is opened
relative to a descriptor and without following links, and what exists is never opened again.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from tarfile import BLOCKSIZE, TarInfo
from typing import Any, NamedTuple, TypeAlias

from ..errors import FilesError

__all__ = ["CONTENT", "Bounds", "Entry", "Extracted", "StreamEndError", "entries", "extract", "finish"]

Stream: TypeAlias = "io.BufferedReader[Any]"

CONTENT = "content"
"""What is extracted is called so at first."""

MAX_DEPTH = 128
"""Folders within folders."""

MAX_NAME_BYTES = 4096
"""The kernel takes no longer path (PATH_MAX)."""

MAX_SKIPPED_BYTES = 16 << 20
"""The names of all that was skipped."""

_MAX_TRAILER_BYTES = 1 << 20
_MAX_TIME = 1 << 33  # the year 2242
_CHUNK_BYTES = 1 << 18
_FILES = frozenset({tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE})
_SKIPPED = frozenset({tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE})
_LONG = frozenset({tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK})
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class StreamEndError(FilesError):
    """The stream ended before it should."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a stream may hold: bytes of content in all files together, and entries."""

    bytes: int
    entries: int


class Entry(NamedTuple):
    """One entry: its path below what was asked for, empty for that itself, and what its header says."""

    path: tuple[str, ...]
    folder: bool
    skipped: bool
    size: int
    mode: int
    mtime: int


@dataclass(slots=True)
class Extracted:
    """What has been written so far."""

    files: int = 0
    bytes: int = 0
    skipped: list[str] = field(default_factory=list)


def entries(stream: Stream, asked: str, bounds: Bounds) -> Iterator[Entry]:
    """The entries of a stream, each checked. Before the next is asked for, its `size` bytes have to be read.

    Args:
        asked: the first part that all names have, `.` if there is none.

    Raises:
        StreamEndError: the stream is cut off.
        FilesError: it holds what no honest tar writes for us, or more than the bounds allow.
    """
    count = 0
    left = bounds.bytes
    while (info := _member(stream)) is not None:
        count += 1
        if count > bounds.entries:
            raise FilesError(f"there are more than {bounds.entries} files and folders")
        entry = _entry(info, asked)
        if entry.size > left:
            raise FilesError(f"there are more than {bounds.bytes} bytes")
        left -= entry.size
        yield entry
        _exactly(stream, -entry.size % BLOCKSIZE)


def finish(stream: Stream) -> None:
    """Read what tar adds to fill its last record."""
    left = _MAX_TRAILER_BYTES
    while data := stream.read1(65536):
        left -= len(data)
        if left < 0:
            raise FilesError("the stream goes on behind its end")


def extract(
    stream: Stream,
    asked: str,
    into: int,
    bounds: Bounds,
    *,
    on_bytes: Callable[[int], None] | None = None,
) -> Extracted:
    """Write the one file or folder that a stream holds into a directory that is empty and ours alone, as `CONTENT`.

    Args:
        asked: see `entries`.
        into: the directory's descriptor.
        on_bytes: is told how many bytes were written.

    Raises:
        FilesError: as `entries`; or it cannot be written.
    """
    writer = _Writer(stream, into, on_bytes)
    try:
        for entry in entries(stream, asked, bounds):
            writer.take(entry)
        writer.leave_all()
    except OSError as error:
        raise FilesError(f"cannot write what was got: {error.strerror or error}") from error
    finally:
        writer.close()
    return writer.done


class _Writer:
    """Makes files and folders in the order in which tar comes by them.

    It holds one descriptor, that of the folder it is in, and knows the folders that this one is in.
    """

    def __init__(self, stream: Stream, into: int, on_bytes: Callable[[int], None] | None) -> None:
        self.done = Extracted()
        self._stream = stream
        self._into = into
        self._on_bytes = on_bytes
        self._buffer = memoryview(bytearray(_CHUNK_BYTES))
        self._fd = -1
        self._within: list[Entry] = []
        self._skipped_bytes = 0

    def take(self, entry: Entry) -> None:
        """Write the next entry."""
        if not entry.path:
            self._take_first(entry)
        elif not self._within:
            raise FilesError("the stream holds more than the file that was asked for, or begins with something else")
        elif entry.skipped:
            self._skip("/".join(entry.path))
        elif entry.folder:
            self._enter(entry)
        else:
            self._write_file(self._parent_of(entry), entry.path[-1], entry)

    def _take_first(self, entry: Entry) -> None:
        if entry.skipped:
            raise FilesError("it is neither a file nor a folder")
        if entry.folder:
            self._make_folder(self._into, CONTENT, entry)
        else:
            self._write_file(self._into, CONTENT, entry)

    def _skip(self, name: str) -> None:
        self.done.skipped.append(name)
        self._skipped_bytes += len(name)
        if self._skipped_bytes > MAX_SKIPPED_BYTES:
            raise FilesError("there is too much that is neither file nor folder")

    def leave_all(self) -> None:
        """Finish all folders."""
        if not self._within and not self.done.files:
            raise StreamEndError("nothing came")
        while self._within:
            self._leave()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _parent_of(self, entry: Entry) -> int:
        """Go to the folder that this entry is in, and return its descriptor."""
        parent = entry.path[:-1]
        while (here := self._within[-1].path) != parent[: len(here)]:
            self._leave()
        if here != parent:
            # tar names a folder before what is in it, and goes through it before the next one.
            raise FilesError(f"the stream holds {'/'.join(entry.path)!r} without its folder, or out of order")
        return self._fd

    def _enter(self, entry: Entry) -> None:
        self._make_folder(self._parent_of(entry), entry.path[-1], entry)

    def _make_folder(self, parent: int, name: str, entry: Entry) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            raise _twice(entry) from None
        below = os.open(name, _FOLDER_FLAGS, dir_fd=parent)
        self.close()
        self._fd = below
        self._within.append(entry)

    def _leave(self) -> None:
        # Before the mode may forbid it. Nobody moves folders here, so `..` is where we came from.
        above = os.open("..", _FOLDER_FLAGS, dir_fd=self._fd)
        try:
            _settle(self._fd, self._within.pop())
        finally:
            self.close()
            self._fd = above

    def _write_file(self, parent: int, name: str, entry: Entry) -> None:
        try:
            fd = os.open(name, _FILE_FLAGS, 0o600, dir_fd=parent)
        except FileExistsError:
            raise _twice(entry) from None
        try:
            left = entry.size
            while left:
                count = self._stream.readinto(self._buffer[:left])
                if not count:
                    raise _cut_off()
                _write_all(fd, self._buffer[:count])
                left -= count
                if self._on_bytes is not None:
                    self._on_bytes(count)
            _settle(fd, entry)
        finally:
            os.close(fd)
        self.done.files += 1
        self.done.bytes += entry.size


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _settle(fd: int, entry: Entry) -> None:
    """Give it its mode and time, now that nothing will be written to it any more."""
    os.utime(fd, (entry.mtime, entry.mtime))
    os.fchmod(fd, entry.mode)


def _member(stream: Stream) -> TarInfo | None:
    """The next header, with its long name if it has one; None at the end."""
    names: dict[bytes, str] = {}
    while True:
        block = _exactly(stream, BLOCKSIZE)
        if not any(block):
            if names or any(_exactly(stream, BLOCKSIZE)):
                raise FilesError("the stream is no tar stream: it goes on behind its end")
            return None
        try:
            info = TarInfo.frombuf(block, sys.getfilesystemencoding(), "surrogateescape")
        except tarfile.TarError as error:
            raise FilesError(f"the stream is no tar stream: {error}") from error
        if info.type not in _LONG:
            info.name = names.get(tarfile.GNUTYPE_LONGNAME, info.name)
            return info
        if info.type in names or not 0 < info.size <= MAX_NAME_BYTES + 1:
            raise FilesError(f"the stream holds a name of {info.size} bytes")
        raw = _exactly(stream, info.size)
        _exactly(stream, -info.size % BLOCKSIZE)
        names[info.type] = os.fsdecode(raw.removesuffix(b"\0"))


def _entry(info: TarInfo, asked: str) -> Entry:
    if info.type not in _FILES | _SKIPPED | {tarfile.DIRTYPE}:
        raise FilesError(f"the stream holds an entry of the unexpected type {info.type!r}")
    folder = info.type == tarfile.DIRTYPE
    skipped = info.type in _SKIPPED
    if info.size < 0 or (info.size and (folder or skipped)):
        raise FilesError(f"the stream holds an entry that claims {info.size} bytes")
    return Entry(
        path=_path(info.name, asked),
        folder=folder,
        skipped=skipped,
        size=info.size,
        mode=info.mode & 0o777,
        mtime=int(min(max(info.mtime, 0), _MAX_TIME)),
    )


def _path(name: str, asked: str) -> tuple[str, ...]:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name or len(name) > MAX_NAME_BYTES:
        raise FilesError(f"the stream holds the name {name[:100]!r}, which leads elsewhere")
    if len(parts) > MAX_DEPTH:
        raise FilesError(f"more than {MAX_DEPTH} folders within each other")
    if asked != ".":
        if parts[:1] != [asked]:
            raise FilesError(f"the stream holds {name[:100]!r}, which was not asked for")
        del parts[0]
    return tuple(parts)


def _exactly(stream: Stream, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise _cut_off()
    return data


def _cut_off() -> StreamEndError:
    return StreamEndError("the stream ended in the middle")


def _twice(entry: Entry) -> FilesError:
    return FilesError(f"the stream holds {'/'.join(entry.path)!r} twice")
