"""Tar headers: as they are written for a home, and as they are read, with all suspicion, from anybody's archive.

Written is the interchange format of POSIX (pax(1)): a header of 512 bytes, and before it an extended one with what
does not fit there: long names, nanoseconds, sparse files in the form that GNU tar calls PAX 1.0. GNU tar and Python's
`tarfile` read it. Read are that and the format of GNU tar, of each only what these two write for files, folders,
symbolic and hard links and FIFOs; everything else is refused, and whatever stands twice or in two ways.

Names are bytes throughout. Owners are neither written nor read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from .wire import Refused, show

BLOCK = 512
FILE, FOLDER, SYMLINK, HARDLINK, FIFO = b"0", b"5", b"2", b"1", b"6"
MAX_NAME_BYTES = 4096
"""The kernel takes no longer path (PATH_MAX)."""
MAX_SEGMENTS = 1 << 17
"""Of one sparse file."""

Segment = tuple[int, int]
"""Where data begins in a sparse file, and how many bytes there are."""

_MAX_OCTAL = 8**11
_MAX_EXTENDED_BYTES = 64 << 10
_MAX_TIME = 10**9 << 62
_MAX_LENGTH = (1 << 63) - 1
_LONG_NAME, _LONG_LINK, _EXTENDED = b"L", b"K", b"x"
_IGNORED = frozenset((b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname", b"hdrcharset", b"comment"))
_SPARSE = frozenset((b"GNU.sparse.major", b"GNU.sparse.minor", b"GNU.sparse.name", b"GNU.sparse.realsize"))
_KNOWN = _IGNORED | _SPARSE | {b"path", b"linkpath", b"size", b"mtime"}
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
_DECIMAL = re.compile(rb"(0|[1-9][0-9]{0,18})")
_TIME = re.compile(rb"(-?)([0-9]{1,19})(?:\.([0-9]{1,30}))?")


class Member(NamedTuple):
    """One entry of an archive.

    Attributes:
        name: the path, as bytes; that of a folder without a slash at its end.
        kind: `FILE`, `FOLDER`, `SYMLINK`, `HARDLINK` or `FIFO`.
        mode: permission bits.
        mtime: nanoseconds since the epoch.
        size: bytes that follow, padding not counted; of a sparse file its map and its data.
        link: the target of a link.
        length: the size of a sparse file with its holes; None for all others.
    """

    name: bytes
    kind: bytes
    mode: int
    mtime: int
    size: int = 0
    link: bytes = b""
    length: int | None = None


def padding(size: int) -> bytes:
    """What follows `size` bytes up to the next block."""
    return bytes(-size % BLOCK)


# Writing ------------------------------------------------------------------------------------------------------------


def header(member: Member) -> bytes:
    """The header of a member, or both."""
    name, link = member.name + b"/" * (member.kind == FOLDER), member.link
    seconds, nanoseconds = divmod(member.mtime, 10**9)
    records: list[tuple[bytes, bytes]] = []
    if member.length is not None:
        records += [
            (b"GNU.sparse.major", b"1"),
            (b"GNU.sparse.minor", b"0"),
            (b"GNU.sparse.name", name),
            (b"GNU.sparse.realsize", b"%d" % member.length),
        ]
        name = b"GNUSparseFile.0/" + name.rpartition(b"/")[2][:80]
    elif len(name) > 100:
        records.append((b"path", name))
    if len(link) > 100:
        records.append((b"linkpath", link))
    if nanoseconds or not 0 <= seconds < _MAX_OCTAL:
        records.append((b"mtime", _decimal_time(member.mtime)))
        seconds = min(max(seconds, 0), _MAX_OCTAL - 1)
    size = member.size
    if size >= _MAX_OCTAL:
        records.append((b"size", b"%d" % size))
        size = 0
    return _extended(records) + _block(name, member.kind, link, mode=member.mode, size=size, seconds=seconds)


def sparse_map(segments: list[Segment]) -> bytes:
    """The map that precedes the data of a sparse file, whole blocks of it."""
    text = b"".join(b"%d\n%d\n" % segment for segment in segments)
    text = b"%d\n" % len(segments) + text
    return text + padding(len(text))


def _decimal_time(time: int) -> bytes:
    seconds, nanoseconds = divmod(abs(time), 10**9)
    return b"%s%d.%09d" % (b"-" * (time < 0), seconds, nanoseconds)


def _extended(records: list[tuple[bytes, bytes]]) -> bytes:
    if not records:
        return b""
    if any(not _is_utf8(value) for _, value in records):
        records.insert(0, (b"hdrcharset", b"BINARY"))
    body = b"".join(_record(key, value) for key, value in records)
    return _block(b"PaxHeaders.0/entry", _EXTENDED, mode=0o644, size=len(body)) + body + padding(len(body))


def _record(key: bytes, value: bytes) -> bytes:
    # Its length counts the digits of its length.
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _block(name: bytes, kind: bytes, link: bytes = b"", *, mode: int, size: int, seconds: int = 0) -> bytes:
    fields = (
        name[:100].ljust(100, b"\0"),
        b"%07o\0" % mode,
        b"%07o\0%07o\0" % (0, 0),
        b"%011o\0%011o\0" % (size, seconds),
        b" " * 8,
        kind,
        link[:100].ljust(100, b"\0"),
        b"ustar\x0000",
    )
    block = b"".join(fields).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


# Reading ------------------------------------------------------------------------------------------------------------


def next_member(read: Callable[[int], bytes]) -> Member | None:
    """The next member of an archive, its `size` bytes not yet read; None at its end.

    Names are as they stand there, but for one slash at the end of a folder's; whether they lead elsewhere is for the
    caller to see.

    Args:
        read: gives as many bytes as it is asked for, and raises `Refused` if there are not so many.

    Raises:
        Refused: there is something else than what is understood here.
    """
    before: dict[bytes, bytes] = {}
    while True:
        block = read(BLOCK)
        if not any(block):
            if before or any(read(BLOCK)):
                raise Refused("the archive goes on behind its end")
            return None
        _check_sum(block)
        kind = block[156:157]
        if kind not in (_LONG_NAME, _LONG_LINK, _EXTENDED):
            return _member(block, before)
        size = _number(block[124:136])
        if kind in before or not 0 < size <= _MAX_EXTENDED_BYTES:
            raise Refused("the archive holds a header that is repeated, empty or too long")
        before[kind] = read(size)
        read(len(padding(size)))


def read_sparse_map(read: Callable[[int], bytes], member: Member) -> tuple[list[Segment], list[bytes]]:
    """The map of a sparse file, and the blocks that it was read from.

    Raises:
        Refused: it is malformed, or does not fit the member's size and length.
    """
    raw: list[bytes] = []
    numbers: list[int] = []
    wanted, rest = 1, b""
    while len(numbers) < wanted:
        if (len(raw) + 1) * BLOCK > member.size:
            raise _bad_sparse(member)
        raw.append(read(BLOCK))
        *lines, rest = (rest + raw[-1]).split(b"\n")
        numbers += [_sparse_number(member, line) for line in lines]
        if numbers[:1] > [MAX_SEGMENTS]:
            raise _bad_sparse(member)
        wanted = 1 + 2 * sum(numbers[:1])
    segments = list(zip(numbers[1::2], numbers[2::2]))  # noqa: B905 - strict= is newer
    if len(numbers) > wanted or rest.strip(b"\0") or not _fits(member, segments, len(raw) * BLOCK):
        raise _bad_sparse(member)
    return segments, raw


def _fits(member: Member, segments: list[Segment], map_bytes: int) -> bool:
    at = 0
    for start, count in segments:
        if start < at:
            return False
        at = start + count
    assert member.length is not None
    return at <= member.length and map_bytes + sum(count for _, count in segments) == member.size


def _sparse_number(member: Member, text: bytes) -> int:
    if not _DECIMAL.fullmatch(text):
        raise _bad_sparse(member)
    return int(text)


def _bad_sparse(member: Member) -> Refused:
    return Refused(f"the archive holds a malformed sparse file, {show(member.name)}")


def _check_sum(block: bytes) -> None:
    if _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        raise Refused("it is no tar archive, or is damaged: the checksum of a header is wrong")
    if block[257:265] not in (b"ustar\x0000", b"ustar  \0"):
        raise Refused("it is a tar archive of an unknown format")


def _number(field: bytes) -> int:
    if field[0] in (0x80, 0xFF):  # GNU tar, for what octal digits cannot say
        return int.from_bytes(field[1:], "big") - (1 << 8 * (len(field) - 1)) * (field[0] == 0xFF)
    match = _OCTAL.fullmatch(field)
    if match is None:
        raise Refused("the archive holds a header with a malformed number")
    return int(match[1] or b"0", 8)


def _member(block: bytes, before: dict[bytes, bytes]) -> Member:
    kind = FILE if block[156:157] == b"\0" else block[156:157]
    if kind not in (FILE, FOLDER, SYMLINK, HARDLINK, FIFO):
        raise Refused(f"the archive holds an entry of the kind {kind!r}: a device, or what is not understood here")
    records = _records(before.get(_EXTENDED, b""))
    name = _one_of(_own_name(block), before.get(_LONG_NAME), records.get(b"path"))
    link = _one_of(_text(block[157:257]), before.get(_LONG_LINK), records.get(b"linkpath"))
    length = _sparse_length(records, kind)
    if length is not None:
        name = records[b"GNU.sparse.name"]
    if not name or b"\0" in name or b"\0" in link or max(len(name), len(link)) > MAX_NAME_BYTES:
        raise Refused("the archive holds a name that is empty, too long or has a NUL in it")
    size = _size(block, records)
    if size < 0 or (size and kind != FILE):
        raise Refused(f"the archive holds an entry, {show(name)}, that claims {size} bytes")
    time = _time(records[b"mtime"]) if b"mtime" in records else _number(block[136:148]) * 10**9
    if abs(time) > _MAX_TIME:
        raise Refused(f"the archive holds an entry, {show(name)}, with a time that is none")
    if kind == FOLDER:
        name = name[: -1 if name.endswith(b"/") else None]
    return Member(name, kind, _number(block[100:108]) & 0o777, time, size, link, length)


def _own_name(block: bytes) -> bytes:
    prefix = _text(block[345:500]) if block[257:265] == b"ustar\x0000" else b""
    return prefix + b"/" * bool(prefix) + _text(block[:100])


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _one_of(own: bytes, long: bytes | None, extended: bytes | None) -> bytes:
    """A name by whichever of the three ways of saying it is used."""
    if long is not None and extended is not None:
        raise Refused("the archive holds an entry with two names")
    if long is not None:
        return long[: -1 if long.endswith(b"\0") else None]
    return own if extended is None else extended


def _size(block: bytes, records: dict[bytes, bytes]) -> int:
    """The one size that there is: an extended header may tell only what the other one cannot."""
    own = _number(block[124:136])
    if b"size" not in records:
        return own
    if not _DECIMAL.fullmatch(records[b"size"]):
        raise Refused("the archive holds a malformed size")
    size = int(records[b"size"])
    if own not in ((0, size) if size >= _MAX_OCTAL else (size,)):
        raise Refused("the archive holds an entry with two sizes")
    return size


def _sparse_length(records: dict[bytes, bytes], kind: bytes) -> int | None:
    if not _SPARSE & records.keys():
        return None
    if (
        kind != FILE
        or not records.keys() >= _SPARSE
        or (records[b"GNU.sparse.major"], records[b"GNU.sparse.minor"]) != (b"1", b"0")
        or not _DECIMAL.fullmatch(records[b"GNU.sparse.realsize"])
        or b"path" in records
    ):
        raise Refused("the archive holds a sparse file in a form that is not understood here")
    length = int(records[b"GNU.sparse.realsize"])
    if length > _MAX_LENGTH:
        raise Refused("the archive holds a sparse file that is larger than files can be")
    return length


def _time(text: bytes) -> int:
    match = _TIME.fullmatch(text)
    if match is None:
        raise Refused("the archive holds a malformed time")
    nanoseconds = int(match[2]) * 10**9 + int((match[3] or b"")[:9].ljust(9, b"0"))
    return -nanoseconds if match[1] else nanoseconds


def _records(raw: bytes) -> dict[bytes, bytes]:
    """The records of an extended header."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(raw):
        digits = raw[at : at + 8].partition(b" ")[0]
        length = int(digits) if _DECIMAL.fullmatch(digits) else 0
        key, equals, value = raw[at : at + length][len(digits) + 1 :].partition(b"=")
        if not equals or not value.endswith(b"\n") or at + length > len(raw):
            raise Refused("the archive holds a malformed extended header")
        if key in records or key not in _KNOWN:
            raise Refused(f"the archive holds an extended header with {show(key)}")
        records[key] = value[:-1]
        at += length
    return records
