"""Make a home of an archive, in the empty folder that this process finds itself in.

What an archive may hold is a short list: one folder, named as homes are, and in it folders, files, symbolic links and
hard links to files that came before; each in the folder that was named last or one that this one is in, as tar walks
them; no name twice, and none that leads elsewhere. Anything else is refused, FIFOs aside, which are left out. In our
own archives the manifest comes last.

Names are opened one by one, relative to a descriptor and without following links, and everything is made anew, so a
link of the archive's is only ever text: it is kept as it is, wherever it leads, and whoever follows it later is the
tenant. Modes lose their set-id and sticky bits.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
from typing import Any, NamedTuple

from . import manifest, wire
from .blocks import FIFO, FILE, FOLDER, HARDLINK, SYMLINK, Member, next_member, padding, read_sparse_map
from .unpressing import Unpressed
from .wire import Refused, Skips, show

Path = tuple[bytes, ...]

_HOME = re.compile(rb"pactown_[0-9a-f]{8,32}")
_MAX_PART_BYTES = 255
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK_BYTES = 1 << 18


class _Folder(NamedTuple):
    path: Path
    fd: int
    member: Member


class Extractor:
    """One home on its way in.

    Args:
        archive: the stream.
        arguments: `user_id`, that which the manifest has to name, if there is a manifest; the bounds `max_bytes`,
            `max_entries` and `max_depth`.
    """

    def __init__(self, archive: Unpressed, arguments: dict[str, Any]) -> None:
        self._archive = archive
        self._user_id: str = arguments["user_id"]
        self._max_bytes: int = arguments["max_bytes"]
        self._max_entries: int = arguments["max_entries"]
        self._max_depth: int = arguments["max_depth"]
        self._lines = manifest.Lines()
        self._skips = Skips()
        self._top = b""
        self._within: list[_Folder] = []
        self._closed: list[tuple[Path, int]] = []

    def extract(self) -> dict[str, Any]:
        """Write all of it; returns what there was."""
        self._take_top()
        verified = False
        while (member := next_member(self._archive.exactly)) is not None:
            if verified:
                raise Refused("the archive goes on behind its manifest")
            if member.name == manifest.NAME:
                self._verify(member)
                verified = True
            else:
                self._take(member, self._path(member.name))
            self._archive.exactly(len(padding(member.size)))
        self._archive.finish()
        self._settle_all()
        self._skips.send()
        lines = self._lines
        return {
            "entries": lines.entries,
            "files": lines.files,
            "bytes": lines.bytes,
            "skipped": self._skips.count,
            "verified": verified,
        }

    def _take_top(self) -> None:
        member = next_member(self._archive.exactly)
        if member is None or member.kind != FOLDER or not _HOME.fullmatch(member.name):
            raise Refused("it is no archive of a home: it does not begin with a folder pactown_<key>")
        self._top = member.name
        self._within.append(_Folder((), os.open(".", _FOLDER_FLAGS), member))
        self._note("folder", (), member, mode=f"{member.mode:04o}")

    def _path(self, name: bytes) -> Path:
        """The parts of a name below the top folder."""
        top, *path = name.split(b"/")
        if top != self._top or not path:
            raise Refused(f"the archive holds {show(name)}, which is not in its first folder, or is that again")
        for part in path:
            if part in (b"", b".", b"..") or len(part) > _MAX_PART_BYTES:
                raise Refused(f"the archive holds the name {show(name)}, which no tar writes for a home")
        return tuple(path)

    def _take(self, member: Member, path: Path) -> None:
        if self._lines.entries + self._skips.count >= self._max_entries:
            raise Refused(f"there are more than {self._max_entries} files and folders (archive_max_entries)")
        parent = self._parent_of(path)
        try:
            if member.kind == FOLDER:
                self._make_folder(parent, path, member)
            elif member.kind == FILE:
                self._write_file(parent, path, member)
            elif member.kind == SYMLINK:
                self._make_symlink(parent, path, member)
            elif member.kind == HARDLINK:
                self._make_hardlink(parent, path, member)
            else:
                assert member.kind == FIFO
                self._skips.add("FIFO", b"/".join(path))
        except FileExistsError:
            raise Refused(f"the archive holds {show(member.name)} twice") from None

    def _parent_of(self, path: Path) -> int:
        """Go to the folder that this is in, and return its descriptor."""
        parent = path[:-1]
        while self._within[-1].path != parent[: len(self._within[-1].path)]:
            self._leave()
        if self._within[-1].path != parent:
            # tar names a folder before what is in it, and goes through it before the next one.
            raise Refused(f"the archive holds {_shown(path)} without its folder, or out of order")
        return self._within[-1].fd

    # Entries --------------------------------------------------------------------------------------------------------

    def _make_folder(self, parent: int, path: Path, member: Member) -> None:
        if len(path) > self._max_depth:
            raise Refused(f"more than {self._max_depth} folders within each other (archive_max_depth)")
        os.mkdir(path[-1], 0o700, dir_fd=parent)
        self._within.append(_Folder(path, os.open(path[-1], _FOLDER_FLAGS, dir_fd=parent), member))
        self._note("folder", path, member, mode=f"{member.mode:04o}")

    def _make_symlink(self, parent: int, path: Path, member: Member) -> None:
        if not member.link:
            raise Refused(f"the archive holds {show(member.name)}, a link to nothing")
        os.symlink(member.link, path[-1], dir_fd=parent)
        os.utime(path[-1], ns=(member.mtime, member.mtime), dir_fd=parent, follow_symlinks=False)
        self._note("symlink", path, member, target=member.link)

    def _make_hardlink(self, parent: int, path: Path, member: Member) -> None:
        target = self._path(member.link)
        folder = self._open_folder(target[:-1], member)
        try:
            if not stat.S_ISREG(os.stat(target[-1], dir_fd=folder, follow_symlinks=False).st_mode):
                raise _no_target(member)
            os.link(target[-1], path[-1], src_dir_fd=folder, dst_dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            raise _no_target(member) from None
        finally:
            os.close(folder)
        self._note("hardlink", path, None, target=b"/".join(target))

    def _open_folder(self, path: Path, member: Member) -> int:
        fd = os.dup(self._within[0].fd)
        for part in path:
            try:
                below = os.open(part, _FOLDER_FLAGS, dir_fd=fd)
            except (FileNotFoundError, NotADirectoryError):
                raise _no_target(member) from None
            finally:
                os.close(fd)
            fd = below
        return fd

    def _write_file(self, parent: int, path: Path, member: Member) -> None:
        if self._lines.bytes + member.size > self._max_bytes:
            raise Refused(f"there are more than {self._max_bytes} bytes (archive_max_bytes)")
        segments = [(0, member.size)]
        digest = hashlib.sha256()
        values: dict[str, Any] = {"mode": f"{member.mode:04o}", "size": member.size}
        if member.length is not None:
            segments, head = read_sparse_map(self._archive.exactly, member)
            for block in head:
                digest.update(block)
            values["length"] = member.length
        fd = os.open(path[-1], _FILE_FLAGS, 0o600, dir_fd=parent)
        try:
            for start, count in segments:
                if member.length is not None:
                    os.lseek(fd, start, os.SEEK_SET)
                self._copy(fd, count, digest)
            if member.length is not None:
                os.ftruncate(fd, member.length)
            os.utime(fd, ns=(member.mtime, member.mtime))
            os.fchmod(fd, member.mode)
        finally:
            os.close(fd)
        self._note("file", path, member, **values, sha256=digest.hexdigest())

    def _copy(self, fd: int, left: int, digest: Any) -> None:
        while left:
            piece = self._archive.some(min(left, _CHUNK_BYTES))
            left -= len(piece)
            digest.update(piece)
            while piece:
                piece = piece[os.write(fd, piece) :]

    def _note(self, kind: str, path: Path, member: Member | None, **values: Any) -> None:
        if member is not None:
            values = {"mtime_ns": member.mtime, **values}
        self._lines.add(kind, b"/".join(path), **values)

    # The end --------------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        """Give a folder its time and its mode, now that nothing more will be made in it."""
        path, fd, member = self._within.pop()
        os.utime(fd, ns=(member.mtime, member.mtime))
        if member.mode & 0o700 == 0o700:
            os.fchmod(fd, member.mode)
        else:
            # Hard links may still lead to what is in it.
            self._closed.append((path, member.mode))
        os.close(fd)

    def _settle_all(self) -> None:
        while len(self._within) > 1:
            self._leave()
        # Folders in it have been left before a folder is.
        for path, mode in self._closed:
            folder = self._open_folder(path, self._within[0].member)
            os.fchmod(folder, mode)
            os.close(folder)
        top = self._within[0]
        os.utime(top.fd, ns=(top.member.mtime, top.member.mtime))

    def _verify(self, member: Member) -> None:
        """See that the manifest is what the archive itself says."""
        if member.kind != FILE or member.length is not None:
            raise Refused("the archive's manifest is no file")
        left = member.size
        line = bytearray()
        while left and not line.endswith(b"\n") and len(line) <= manifest.MAX_HEAD_BYTES:
            line += self._archive.some(1)
            left -= 1
        made_for = manifest.read_head(bytes(line))
        if made_for != self._user_id:
            raise Refused(f"the archive was made of the home of {made_for!r}, not of that of {self._user_id!r}")
        expected = self._lines.finish()
        digest = hashlib.sha256()
        if left == self._lines.length:
            while left:
                piece = self._archive.some(min(left, _CHUNK_BYTES))
                digest.update(piece)
                left -= len(piece)
        if digest.digest() != expected:
            raise Refused("the archive does not hold what its manifest lists")


def _shown(path: Path) -> str:
    return show(b"/".join(path))


def _no_target(member: Member) -> Refused:
    return Refused(
        f"the archive holds {show(member.name)}, a hard link to what is no file before it: {show(member.link)}"
    )


def serve(arguments: dict[str, Any]) -> None:
    """Do it, in a process of its own, which reads the archive from its standard input."""
    archive = Unpressed(sys.stdin.buffer, arguments["max_ratio"])
    wire.serve(lambda _: Extractor(archive, arguments).extract(), arguments)
