"""The manifest: the last member of an archive, which says what all the others are.

It is text, one JSON object a line. The first line names the format, its version and the user; then there is one line
for each entry, in the archive's order; the last one sums up. Who exports writes the lines as it goes, who imports
writes them anew from what it has made of the archive: they have to be the same, byte by byte.

    {"format": "pactown-home", "version": 1, "user_id": "auth0|123456"}
    {"path": "", "kind": "folder", "mode": "0700", "mtime_ns": 1700000000123456789}
    {"path": "main.py", "kind": "file", "mode": "0644", "mtime_ns": ..., "size": 12, "sha256": "..."}
    {"path": "same.py", "kind": "hardlink", "target": "main.py"}
    {"path": "latest", "kind": "symlink", "mtime_ns": ..., "target": "../../run/7"}
    {"entries": 4, "files": 1, "bytes": 12}

Paths are relative to the home; where they are no UTF-8, `path_b64` and `target_b64` stand for them. `sha256` is that of
the content; with `length`, the size of a sparse file, it is that of its map and its data as the archive holds them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterator
from typing import Any

from .wire import Refused

NAME = b"pactown-manifest.jsonl"
VERSION = 1

_FORMAT = "pactown-home"
MAX_HEAD_BYTES = 16 << 10
_CHUNK_BYTES = 1 << 18


class Lines:
    """The lines behind the first one, as they are written: their digest and their length.

    Attributes:
        entries, files, bytes: what they list; content is counted as the archive holds it.
    """

    def __init__(self) -> None:
        self.length = 0
        self.entries = self.files = self.bytes = 0
        self._digest = hashlib.sha256()

    def add(self, kind: str, path: bytes, **values: Any) -> None:
        """Write the line of an entry. Bytes among the values are paths."""
        self.entries += 1
        if kind == "file":
            self.files += 1
            self.bytes += values["size"]
        line: dict[str, Any] = {}
        for name, value in {"path": path, "kind": kind, **values}.items():
            line.update(_path(name, value) if isinstance(value, bytes) else {name: value})
        self._write(line)

    def finish(self) -> bytes:
        """Write the last line; returns the digest of all."""
        self._write({"entries": self.entries, "files": self.files, "bytes": self.bytes})
        return self._digest.digest()

    def _write(self, line: dict[str, Any]) -> None:
        self._take(json.dumps(line).encode() + b"\n")

    def _take(self, line: bytes) -> None:
        self.length += len(line)
        self._digest.update(line)


class KeptLines(Lines):
    """Lines that are kept, in little memory, to be read once."""

    def __init__(self) -> None:
        super().__init__()
        self._press = zlib.compressobj(1)
        self._kept: list[bytes] = []

    def _take(self, line: bytes) -> None:
        super()._take(line)
        self._kept.append(self._press.compress(line))

    def read(self) -> Iterator[bytes]:
        """All of it, in pieces."""
        self._kept.append(self._press.flush())
        release = zlib.decompressobj()
        for piece in self._kept:
            left = piece
            while left:
                yield release.decompress(left, _CHUNK_BYTES)
                left = release.unconsumed_tail
        yield release.flush()


def head(user_id: str) -> bytes:
    """The first line."""
    return json.dumps({"format": _FORMAT, "version": VERSION, "user_id": user_id}).encode() + b"\n"


def read_head(line: bytes) -> str:
    """The user id in a first line.

    Raises:
        Refused: it is none, or one of another version.
    """
    try:
        values = json.loads(line) if len(line) <= MAX_HEAD_BYTES else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise Refused("the archive's manifest is malformed")
    version = values.get("version")
    if version != VERSION:
        raise Refused(f"the archive's manifest has version {version!r}, and this program knows {VERSION}")
    user_id = values.get("user_id")
    if not isinstance(user_id, str) or head(user_id) != line:
        raise Refused("the archive's manifest is malformed")
    return user_id


def _path(name: str, value: bytes) -> dict[str, str]:
    try:
        return {name: value.decode()}
    except UnicodeDecodeError:
        return {name + "_b64": base64.b64encode(value).decode()}
