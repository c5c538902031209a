"""Write a tar stream of the operator's own files: in one pass, in bounded memory, with nothing of their owner in it.

What is packed belongs to whoever runs this process, and is not the tenant's: links are not followed below the source
and nothing special is opened, but nobody is expected to race us for it.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tarfile import BLOCKSIZE, DIRTYPE, GNU_FORMAT, LNKTYPE, RECORDSIZE, REGTYPE, SYMTYPE, TarInfo
from typing import NamedTuple

from ..errors import FilesError, SpecError

__all__ = ["MAX_DEPTH", "Survey", "pack", "pack_bytes", "survey"]

MAX_DEPTH = 128
"""Folders within folders. Each is a descriptor while it is walked."""

_CHUNK_BYTES = 1 << 18
_NAMED_SPECIALS = 10
_KINDS = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}

Write = Callable[[bytes | memoryview], object]


@dataclass(frozen=True, slots=True)
class Survey:
    """What there is to pack: whether the source is a folder, and how many files and bytes of content it has."""

    folder: bool
    files: int
    bytes: int


class _Entry(NamedTuple):
    name: str  # relative to the source
    parent: int  # the descriptor of the folder that it is in
    base: str
    found: os.stat_result


def survey(source: Path) -> Survey:
    """Look at all of a file or folder before anything of it is sent.

    Raises:
        FilesError: it is not there, cannot be read, is nested too deep, or holds sockets, FIFOs or devices.
    """
    files = size = 0
    specials: list[str] = []
    with _open(source) as (fd, found):
        folder = stat.S_ISDIR(found.st_mode)
        if not folder:
            return Survey(False, 1, found.st_size)
        for entry in _walk(fd, "", MAX_DEPTH):
            mode = entry.found.st_mode
            if stat.S_ISREG(mode):
                files += 1
                size += entry.found.st_size
            elif kind := _KINDS.get(stat.S_IFMT(mode)):
                specials.append(f"{entry.name} ({kind})")
    if specials:
        more = f" and {len(specials) - _NAMED_SPECIALS} more" if len(specials) > _NAMED_SPECIALS else ""
        raise FilesError(
            f"cannot put {source}: it holds what is neither file, folder nor link: "
            f"{', '.join(specials[:_NAMED_SPECIALS])}{more}",
            remedy="move it away",
        )
    return Survey(True, files, size)


def pack(source: Path, write: Write, *, file_name: str = "") -> Survey:
    """Write `source` as a tar stream; returns what was written.

    Of a folder all that is in it is written, not itself. Links stay links, files with several names stay so. Modes are
    kept without set-id and sticky bits, times in whole seconds, owners not at all.

    Args:
        write: takes all that it is given; what it raises goes through, but for a broken pipe at the very end.
        file_name: the name that a single file gets.

    Raises:
        FilesError: it cannot be read, or changed in a way that spoils the stream.
    """
    with _open(source) as (fd, found):
        if not stat.S_ISDIR(found.st_mode):
            size = _pack_file(file_name, fd, write)
            _finish(write)
            return Survey(False, 1, size)
        files = size = 0
        linked: dict[tuple[int, int], str] = {}
        for entry in _walk(fd, "", MAX_DEPTH):
            identity = (entry.found.st_dev, entry.found.st_ino)
            mode = entry.found.st_mode
            if stat.S_ISDIR(mode):
                write(_header(entry.name, DIRTYPE, entry.found))
            elif stat.S_ISLNK(mode):
                target = os.readlink(entry.base, dir_fd=entry.parent)
                write(_header(entry.name, SYMTYPE, entry.found, link=target))
            elif identity in linked:
                write(_header(entry.name, LNKTYPE, entry.found, link=linked[identity]))
                files += 1
            else:
                if entry.found.st_nlink > 1:
                    linked[identity] = entry.name
                with _open_file(entry) as file:
                    size += _pack_file(entry.name, file, write)
                files += 1
        _finish(write)
        return Survey(True, files, size)


def pack_bytes(content: bytes, write: Write, *, file_name: str) -> None:
    """Write a tar stream of one file, mode 0600, with this content."""
    info = _info(file_name, REGTYPE)
    info.mode, info.size = 0o600, len(content)
    write(_block(info))
    write(content)
    write(bytes(-len(content) % BLOCKSIZE))
    _finish(write)


@contextmanager
def _open(source: Path) -> Iterator[tuple[int, os.stat_result]]:
    """Open the source itself; here, a link is what the operator named, and is followed."""
    try:
        # Without waiting for the other end, should it be a FIFO.
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.fstat(fd)
            if not stat.S_ISDIR(found.st_mode) and not stat.S_ISREG(found.st_mode):
                raise FilesError(f"cannot put {source}: it is neither a file nor a folder")
            yield fd, found
        finally:
            os.close(fd)
    except BrokenPipeError:  # the reader's, not the source's
        raise
    except OSError as error:
        raise FilesError(f"cannot read {error.filename or source}: {error.strerror or error}") from error


@contextmanager
def _open_file(entry: _Entry) -> Iterator[int]:
    fd = os.open(entry.base, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=entry.parent)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise FilesError(f"{entry.name} is no file any more: it changed while it was put")
        yield fd
    finally:
        os.close(fd)


def _walk(folder: int, prefix: str, depth: int) -> Iterator[_Entry]:
    """All that is below a folder, each folder before what is in it."""
    for base in sorted(os.listdir(folder)):
        name = prefix + base
        found = os.stat(base, dir_fd=folder, follow_symlinks=False)
        yield _Entry(name, folder, base, found)
        if stat.S_ISDIR(found.st_mode):
            if depth <= 1:
                raise FilesError(f"cannot put {name}: more than {MAX_DEPTH} folders within each other")
            fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                yield from _walk(fd, name + "/", depth - 1)
            finally:
                os.close(fd)


def _pack_file(name: str, fd: int, write: Write) -> int:
    found = os.fstat(fd)
    info = _info(name, REGTYPE, found)
    info.size = left = found.st_size
    head = _block(info)
    if left <= _CHUNK_BYTES:
        # Most files are small: one write for all of it.
        content = os.read(fd, left) if left else b""
        _check_whole(name, len(content), left)
        write(head + content + bytes(-left % BLOCKSIZE))
        return left
    write(head)
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while left:
        # What the file has grown by meanwhile stays out: its size has been told.
        count = os.readv(fd, [buffer[:left]])
        _check_whole(name, count, 1)
        write(buffer[:count])
        left -= count
    write(bytes(-info.size % BLOCKSIZE))
    return info.size


def _check_whole(name: str, count: int, expected: int) -> None:
    if count < expected:
        raise FilesError(f"{name} became shorter while it was put")


def _header(name: str, kind: bytes, found: os.stat_result, *, link: str = "") -> bytes:
    info = _info(name, kind, found)
    info.linkname = link
    return _block(info)


def _info(name: str, kind: bytes, found: os.stat_result | None = None) -> TarInfo:
    info = TarInfo(name)
    info.type = kind
    if found is not None:
        info.mode = found.st_mode & 0o777
        info.mtime = int(found.st_mtime)
    return info


def _block(info: TarInfo) -> bytes:
    # GNU's format holds names as the bytes that they are; pax would have them in UTF-8, and tar recode them.
    try:
        return info.tobuf(GNU_FORMAT, sys.getfilesystemencoding(), "surrogateescape")
    except UnicodeEncodeError as error:
        raise SpecError(f"{info.name!r} cannot be a file's name: {error}") from error


def _finish(write: Write) -> None:
    # tar ends with the record that the first two empty blocks are in, which may be before the last of these is written.
    with suppress(BrokenPipeError):
        write(bytes(RECORDSIZE))
