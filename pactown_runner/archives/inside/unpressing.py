"""The stream within an archive: one gzip member (RFC 1952), and nothing behind it."""

from __future__ import annotations

import zlib
from typing import IO

from .wire import Refused

_CHUNK_BYTES = 1 << 16
_PIECE_BYTES = 1 << 18
_UNRATED_BYTES = 64 << 20
"""So much may come of an archive before the ratio counts: a home that is small but for zeros is no bomb."""
_MAX_TRAILER_BYTES = 1 << 20
"""tar fills its last record, which its user may make large."""


class Unpressed:
    """What is in an archive, read once from its beginning to its end.

    Args:
        file: the archive.
        max_ratio: how many bytes may come of each byte of it.
    """

    def __init__(self, file: IO[bytes], max_ratio: int) -> None:
        self._file = file
        self._max_ratio = max_ratio
        self._release = zlib.decompressobj(16 + zlib.MAX_WBITS)
        self._taken = self._given = 0
        self._piece = memoryview(b"")

    def some(self, most: int) -> memoryview:
        """At least one and at most so many bytes.

        Raises:
            Refused: there are none, what is there is damaged, or it is a bomb.
        """
        while not self._piece:
            self._piece = memoryview(self._more())
        piece, self._piece = self._piece[:most], self._piece[most:]
        return piece

    def exactly(self, count: int) -> bytes:
        """So many bytes; raises `Refused` as `some`."""
        pieces: list[memoryview] = []
        while count:
            pieces.append(self.some(count))
            count -= len(pieces[-1])
        return b"".join(pieces)

    def finish(self) -> None:
        """See that nothing follows but the zeros that tar fills its last record with; raises `Refused`."""
        left = _MAX_TRAILER_BYTES
        piece = self._piece
        while True:
            left -= len(piece)
            if left < 0 or any(piece):
                raise Refused("the archive goes on behind its end")
            if self._release.eof:
                break
            piece = memoryview(self._more())
        if self._release.unused_data or self._file.read(1):
            raise Refused("the archive is followed by something else")

    def _more(self) -> bytes:
        if self._release.eof:
            raise Refused("the archive ends in the middle")
        data = self._release.unconsumed_tail
        if not data:
            data = self._file.read(_CHUNK_BYTES)
            self._taken += len(data)
            if not data:
                raise Refused("the archive is cut off")
        try:
            piece = self._release.decompress(data, _PIECE_BYTES)
        except zlib.error as error:
            raise Refused(f"it is no gzip file, or is damaged: {error}") from error
        self._given += len(piece)
        taken = self._taken - len(self._release.unconsumed_tail)
        if self._given > max(_UNRATED_BYTES, self._max_ratio * taken):
            raise Refused(f"more than {self._max_ratio} bytes come of each byte of it (archive_max_ratio)")
        return piece
