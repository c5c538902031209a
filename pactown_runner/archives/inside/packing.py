"""Pack the home that this process finds itself in, and send it to whoever started it."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from . import manifest, wire
from .blocks import (
    BLOCK,
    FILE,
    FOLDER,
    HARDLINK,
    MAX_NAME_BYTES,
    MAX_SEGMENTS,
    SYMLINK,
    Member,
    Segment,
    header,
    padding,
    sparse_map,
)
from .looking import look, open_to_read
from .wire import Refused, Skips, send, show

Path = tuple[bytes, ...]

_LEVEL = 6
_CHUNK_BYTES = 1 << 18
_SMALLEST_GAP = 4096
_KINDS = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
_VENVS: Path = (b".cache", b"venvs")


class _Folder(NamedTuple):
    path: Path
    fd: int
    names: Iterator[bytes]


class Packer:
    """One home on its way out.

    Args:
        arguments: `name`, that of the top folder in the archive; `home`, where it is on this host; `user_id`; the
            bounds `max_bytes`, `max_entries` and `max_depth`.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._name = os.fsencode(arguments["name"])
        self._home = os.fsencode(arguments["home"])
        self._user_id: str = arguments["user_id"]
        self._max_bytes: int = arguments["max_bytes"]
        self._max_entries: int = arguments["max_entries"]
        self._max_depth: int = arguments["max_depth"]
        self._out = _Gzip()
        self._lines = manifest.KeptLines()
        self._skips = Skips()
        self._links: dict[tuple[int, int], bytes] = {}
        self._buffer = memoryview(bytearray(_CHUNK_BYTES))

    def pack(self) -> dict[str, Any]:
        """Send all of it; returns what there was."""
        # Not recursively: the depth that is allowed may be more than the interpreter's.
        within = [self._enter((), os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))]
        while within:
            name = next(within[-1].names, None)
            if name is None:
                os.close(within.pop().fd)
            elif (folder := self._take(within[-1], name)) is not None:
                within.append(folder)
        self._write_manifest()
        self._out.close()
        self._skips.send()
        lines = self._lines
        return {"entries": lines.entries, "files": lines.files, "bytes": lines.bytes, "skipped": self._skips.count}

    def _take(self, folder: _Folder, name: bytes) -> _Folder | None:
        """Send what has this name; if it is a folder, it is the one to go on with."""
        path = (*folder.path, name)
        try:
            looked = look(folder.fd, name)
        except OSError as error:
            self._skip_if_expected(error, path)
            return None
        try:
            found = os.fstat(looked)
            if self._is_venv(path, looked, found):
                self._skip("venv", path)
            elif stat.S_ISDIR(found.st_mode):
                return self._enter(path, open_to_read(looked, os.O_DIRECTORY))
            elif stat.S_ISLNK(found.st_mode):
                self._send_symlink(path, looked, found)
            elif stat.S_ISREG(found.st_mode):
                self._send_file(path, looked, found)
            else:
                self._skip(_KINDS[stat.S_IFMT(found.st_mode)], path)
        except OSError as error:
            self._skip_if_expected(error, path)
        finally:
            os.close(looked)
        return None

    def _skip_if_expected(self, error: OSError, path: Path) -> None:
        if error.errno == errno.ENOENT:
            self._skip("vanished", path)
        elif error.errno in (errno.EACCES, errno.EPERM):
            # The operator's, since of its own files the tenant reads all.
            self._skip("unreadable", path)
        else:
            raise Refused(f"cannot read {_shown(path)}: {error.strerror}") from error

    def _skip(self, reason: str, path: Path) -> None:
        self._skips.add(reason, b"/".join(path))

    def _is_venv(self, path: Path, looked: int, found: os.stat_result) -> bool:
        """Whether it is an environment of the runner's own making: it works only where it was made."""
        if path == _VENVS:
            return True
        if len(path) != 3 or path[0] != b"sandboxes" or path[2] != b".venv":
            return False
        if stat.S_ISLNK(found.st_mode):
            target = os.path.normpath(os.path.join(self._home, *path[:-1], os.readlink(b"", dir_fd=looked)))
            return os.path.dirname(target) == os.path.join(self._home, *_VENVS)
        if not stat.S_ISDIR(found.st_mode):
            return False
        folder = open_to_read(looked, os.O_DIRECTORY)
        try:
            os.close(look(folder, b"pyvenv.cfg"))
        except FileNotFoundError:
            return False
        finally:
            os.close(folder)
        return True

    # Entries --------------------------------------------------------------------------------------------------------

    def _enter(self, path: Path, fd: int) -> _Folder:
        if len(path) > self._max_depth:
            raise Refused(f"{_shown(path)}: more than {self._max_depth} folders within each other (archive_max_depth)")
        found = os.fstat(fd)
        self._send_header(path, FOLDER, found)
        self._note("folder", path, found, mode=f"{found.st_mode & 0o777:04o}")
        return _Folder(path, fd, iter(sorted(map(os.fsencode, os.listdir(fd)))))

    def _send_symlink(self, path: Path, looked: int, found: os.stat_result) -> None:
        target = os.readlink(b"", dir_fd=looked)
        self._send_header(path, SYMLINK, found, link=target)
        self._note("symlink", path, found, target=target)

    def _send_file(self, path: Path, looked: int, found: os.stat_result) -> None:
        identity = (found.st_dev, found.st_ino)
        first = self._links.get(identity)
        if first is not None:
            self._send_header(path, HARDLINK, found, link=self._archived(first))
            self._note("hardlink", path, None, target=first)
            return
        fd = open_to_read(looked)
        try:
            self._send_content(path, fd, os.fstat(fd))
        finally:
            os.close(fd)
        if found.st_nlink > 1:
            self._links[identity] = b"/".join(path)

    def _send_content(self, path: Path, fd: int, found: os.stat_result) -> None:
        length = found.st_size
        segments = [(0, length)]
        if found.st_blocks * 512 < length:
            segments = _segments(fd, length)
        sparse = segments != [(0, length)]
        head = sparse_map(segments) if sparse else b""
        size = len(head) + sum(count for _, count in segments)
        if self._lines.bytes + size > self._max_bytes:
            raise Refused(f"there are more than {self._max_bytes} bytes (archive_max_bytes)")
        self._send_header(path, FILE, found, size=size, length=length if sparse else None)
        self._out.write(head)
        digest = hashlib.sha256(head)
        for start, count in segments:
            if sparse:
                os.lseek(fd, start, os.SEEK_SET)
            self._copy(path, fd, count, digest)
        self._out.write(padding(size))
        values: dict[str, Any] = {"mode": f"{found.st_mode & 0o777:04o}", "size": size}
        if sparse:
            values["length"] = length
        self._note("file", path, found, **values, sha256=digest.hexdigest())

    def _copy(self, path: Path, fd: int, left: int, digest: Any) -> None:
        while left:
            # What the file has grown by meanwhile stays out: its size has been told.
            count = os.readv(fd, [self._buffer[:left]])
            if not count:
                raise Refused(f"{_shown(path)} became shorter while it was read")
            digest.update(self._buffer[:count])
            self._out.write(self._buffer[:count])
            left -= count

    def _send_header(
        self,
        path: Path,
        kind: bytes,
        found: os.stat_result,
        *,
        size: int = 0,
        link: bytes = b"",
        length: int | None = None,
    ) -> None:
        if self._lines.entries >= self._max_entries:
            raise Refused(f"there are more than {self._max_entries} files and folders (archive_max_entries)")
        name = self._archived(b"/".join(path))
        if len(name) >= MAX_NAME_BYTES:
            raise Refused(f"{show(name)}: the path is longer than any that can be opened")
        self._out.write(header(Member(name, kind, found.st_mode & 0o777, found.st_mtime_ns, size, link, length)))

    def _archived(self, path: bytes) -> bytes:
        return self._name + b"/" * bool(path) + path

    def _note(self, kind: str, path: Path, found: os.stat_result | None, **values: Any) -> None:
        if found is not None:
            values = {"mtime_ns": found.st_mtime_ns, **values}
        self._lines.add(kind, b"/".join(path), **values)

    def _write_manifest(self) -> None:
        self._lines.finish()
        head = manifest.head(self._user_id)
        size = len(head) + self._lines.length
        self._out.write(header(Member(manifest.NAME, FILE, 0o600, 0, size)) + head)
        for piece in self._lines.read():
            self._out.write(piece)
        self._out.write(padding(size) + bytes(2 * BLOCK))


class _Gzip:
    """Presses what is written, and sends it in pieces."""

    def __init__(self) -> None:
        self._press = zlib.compressobj(_LEVEL, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        self._pieces: list[bytes] = []
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        self._take(self._press.compress(data))
        if self._bytes >= _CHUNK_BYTES:
            self._send()

    def close(self) -> None:
        self._take(self._press.flush())
        self._send()

    def _take(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._bytes += len(piece)

    def _send(self) -> None:
        whole = memoryview(b"".join(self._pieces))
        for at in range(0, len(whole), wire.MAX_FRAME_BYTES):
            send(wire.DATA, whole[at : at + wire.MAX_FRAME_BYTES])
        self._pieces, self._bytes = [], 0


def _shown(path: Path) -> str:
    return show(b"/".join(path))


def _segments(fd: int, length: int) -> list[Segment]:
    """Where the data of a file is; the last segment, perhaps an empty one, reaches to its end.

    Where there is more than an archive can say, what lies in small holes counts as data.
    """
    found: list[Segment] = []
    gap = at = 0
    while at < length:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # there is no more data
                raise
            break
        at = min(os.lseek(fd, start, os.SEEK_HOLE), length)
        _add(found, (start, at - start), gap)
        while len(found) >= MAX_SEGMENTS:
            gap = max(2 * gap, _SMALLEST_GAP)
            finer, found = found, []
            for segment in finer:
                _add(found, segment, gap)
    if not found or sum(found[-1]) < length:
        found.append((length, 0))
    return found


def _add(segments: list[Segment], segment: Segment, gap: int) -> None:
    """Add a segment, to the last one if there is no more than `gap` between them."""
    start, count = segment
    if segments and start - sum(segments[-1]) <= gap:
        begin = segments.pop()[0]
        start, count = begin, start + count - begin
    segments.append((start, count))


def serve(arguments: dict[str, Any]) -> None:
    """Do it, in a process of its own."""
    wire.serve(lambda _: Packer(arguments).pack(), arguments)
