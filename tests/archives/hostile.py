"""Hostile archives, as the functions that make them. Each names what it is about; none is kept as a file.

An attacker knows the layout of the host: `victim` is a folder that everybody may write in, with a `canary` that
everybody may write, so that not even the tenant's own permissions would keep a careless reader from it.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HOME = "pactown_0123abcd"
END = bytes(1024)

Make = Callable[["Aim"], "bytes | Iterator[bytes]"]


@dataclass(frozen=True)
class Aim:
    """What an attacker aims at, and what it has of an honest archive of the tenant's home."""

    victim: Path
    base: Path
    home: Path
    honest: bytes

    @property
    def up(self) -> str:
        """From a home to the victim, wherever the new home may be beside the old one."""
        return f"../{self.victim.name}"


@dataclass(frozen=True)
class Case:
    make: Make
    says: str
    """What the refusal says; empty where the archive is taken, harmless as it then is."""


REFUSED: dict[str, Case] = {}
TAKEN: dict[str, Case] = {}


def refused(name: str, says: str) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        assert name not in REFUSED
        REFUSED[name] = Case(make, says)
        return make

    return add


def taken(name: str) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        assert name not in TAKEN
        TAKEN[name] = Case(make, "")
        return make

    return add


# ---- Parts


def pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def block(name: str | bytes, kind: bytes = tarfile.REGTYPE, link: str = "", **values: object) -> bytes:
    """One header. `raw_size` and the like are bytes put where a number belongs."""
    info = tarfile.TarInfo("x")
    info.type, info.mode = kind, 0o644
    raw = {key[4:]: values.pop(key) for key in list(values) if key.startswith("raw_")}
    for key, value in values.items():
        setattr(info, key, value)
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    text = os.fsencode(name)
    assert len(text) <= 100
    assert len(link) <= 100
    head[:100] = text.ljust(100, b"\0")
    head[157:257] = os.fsencode(link).ljust(100, b"\0")
    for key, value in raw.items():
        at = {"size": 124, "mode": 100, "mtime": 136}[key]
        assert isinstance(value, bytes)
        head[at : at + len(value)] = value
    return checked(head)


def checked(head: bytes | bytearray) -> bytes:
    head = bytearray(head)
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def member(name: str | bytes, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **values: object) -> bytes:
    return block(name, kind, "", size=len(content), **values) + pad(content)


def folder(name: str = "", **values: object) -> bytes:
    return entry(name + "/", tarfile.DIRTYPE, "", **{"mode": 0o755, **values}) if name else top(**values)


def top(**values: object) -> bytes:
    return block(HOME + "/", tarfile.DIRTYPE, "", **{"mode": 0o755, **values})


def file(name: str, content: bytes = b"evil", **values: object) -> bytes:
    return member(f"{HOME}/{name}", content, tarfile.REGTYPE, **values)


def symlink(name: str, target: str | Path) -> bytes:
    return entry(name, tarfile.SYMTYPE, str(target))


def hardlink(name: str, target: str | Path, **values: object) -> bytes:
    return entry(name, tarfile.LNKTYPE, str(target), **values)


def entry(name: str, kind: bytes, target: str = "", **values: object) -> bytes:
    """An entry in the home without content, whose name and target may be of any length."""
    name = f"{HOME}/{name}"
    before = long_name(os.fsencode(name)) if len(name) > 100 else b""
    before += long_name(os.fsencode(target), tarfile.GNUTYPE_LONGLINK) if len(target) > 100 else b""
    return before + block(name[:100], kind, target[:100], **values)


def long_name(name: bytes, kind: bytes = tarfile.GNUTYPE_LONGNAME) -> bytes:
    return member("././@LongLink", name + b"\0", kind)


def named(name: str | Path, content: bytes = b"evil") -> bytes:
    """A file with a name of any length."""
    return long_name(os.fsencode(str(name))) + member("x", content)


def record(key: str, value: bytes) -> bytes:
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest + len(str(rest))))
    return b"%d %s=%s\n" % (length, key.encode(), value)


def pax(*records: tuple[str, str | bytes], kind: bytes = tarfile.XHDTYPE) -> bytes:
    body = b"".join(record(key, os.fsencode(value)) for key, value in records)
    return member("PaxHeaders/x", body, kind)


def sparse(name: str, length: int | str, sparse_map: str, data: bytes = b"") -> bytes:
    head = pax(
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.name", f"{HOME}/{name}"),
        ("GNU.sparse.realsize", str(length)),
    )
    return head + member("x", pad(sparse_map.encode()) + data)


def packed(*parts: bytes) -> bytes:
    """A whole archive of these, in a home's folder."""
    return gzip.compress(folder() + b"".join(parts) + END, 1)


def bare(*parts: bytes) -> bytes:
    """A whole archive of these alone."""
    return gzip.compress(b"".join(parts) + END, 1)


# ---- Names that lead elsewhere

ELSEWHERE = "not in its first folder|no tar writes|does not begin with a folder|twice|without its folder"


@refused("absolute", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(named(aim.victim / "evil"))


@refused("absolute, with two slashes", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(named(f"/{aim.victim}/evil"))


@refused("above", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(member(f"{aim.up}/evil", b"evil"))


@refused("above, from within", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(file(f"../{aim.victim.name}/evil"))


@refused("above, from further within", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(folder("a"), folder("a/b"), file(f"a/b/../../../{aim.victim.name}/evil"))


@refused("out and in again", ELSEWHERE)  # CVE-2026-19672
def _(aim: Aim) -> bytes:
    return packed(file(f"../evil/../{HOME}/sub/file"))


@refused("out and in again, to the home's own name", ELSEWHERE)  # CVE-2026-19672
def _(aim: Aim) -> bytes:
    return packed(member(f"../evil/../{aim.home.name}/f", b"evil"))


@refused("chmod above", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(folder("..", mode=0o777))


@refused("the home again, by a dot", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(folder(".", mode=0o777))


@refused("the home again", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(folder(mode=0o777))


@refused("a dot within", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(folder("a"), file("a/./b"))


@refused("two slashes within", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(folder("a"), file("a//b"))


@refused("two slashes at a folder's end", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(folder("a//"))


@refused("a file with a slash at its end", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(file("a/"))


@refused("only a slash", ELSEWHERE + "|empty")
def _(aim: Aim) -> bytes:
    return packed(block("/", tarfile.DIRTYPE))


@refused("no name", "empty")
def _(aim: Aim) -> bytes:
    return packed(member("", b"evil"))


@refused("beside the home", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(member("evil", b"evil"))


@refused("a second home", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(block("pactown_99999999/", tarfile.DIRTYPE, mode=0o755), member("pactown_99999999/f", b"evil"))


@refused("begins with a file", "does not begin with a folder")
def _(aim: Aim) -> bytes:
    return bare(file("f"))


@refused("the home is a link", "does not begin with a folder")
def _(aim: Aim) -> bytes:
    return bare(block(HOME, tarfile.SYMTYPE, aim.up), file("evil"))


@refused("the home is a file", "does not begin with a folder")
def _(aim: Aim) -> bytes:
    return bare(member(HOME, b"evil"))


@refused("the home is above", "does not begin with a folder")
def _(aim: Aim) -> bytes:
    return bare(block("../", tarfile.DIRTYPE), member("../evil", b"evil"))


@refused("the home is the root", "does not begin with a folder|empty")
def _(aim: Aim) -> bytes:
    return bare(block("/", tarfile.DIRTYPE), named(aim.victim / "evil"))


@refused("no archive of a home", "does not begin with a folder")
def _(aim: Aim) -> bytes:
    return bare(block("project/", tarfile.DIRTYPE), member("project/main.py", b"print()"))


@refused("dotted names", "does not begin with a folder")
def _(aim: Aim) -> bytes:
    return bare(block("./", tarfile.DIRTYPE), member("./main.py", b"print()"))


# ---- Links


@refused("through a link", ELSEWHERE)  # CVE-2007-4559
def _(aim: Aim) -> bytes:
    return packed(symlink("l", aim.victim), file("l/evil"))


@refused("through a relative link", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(symlink("l", aim.up), file("l/evil"))


@refused("through a chain of links", ELSEWHERE)  # CVE-2025-4330
def _(aim: Aim) -> bytes:
    return packed(folder("d"), symlink("d/a", ".."), symlink("d/b", f"a/../{aim.victim.name}"), file("d/b/evil"))


@refused("through a link to a link", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(symlink("a", aim.victim), symlink("b", "a"), symlink("c", "b"), file("c/evil"))


@refused("a folder through a link", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(symlink("l", aim.victim), folder("l/evil"))


@refused("a link through a link", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(symlink("l", aim.victim), symlink("l/evil", "/etc"))


@refused("a link where a folder is", "twice")
def _(aim: Aim) -> bytes:
    return packed(folder("d"), symlink("d", aim.victim), file("d/evil"))


@refused("a folder where a link is", "twice")  # CVE-2024-12718
def _(aim: Aim) -> bytes:
    return packed(symlink("d", aim.victim), folder("d", mode=0o700, mtime=7), file("d/evil"))


@refused("a file where a link is", "twice")
def _(aim: Aim) -> bytes:
    return packed(symlink("f", aim.victim / "canary"), file("f"))


@refused("a file where a dangling link is", "twice")
def _(aim: Aim) -> bytes:
    return packed(symlink("f", aim.victim / "new"), file("f"))


@refused("mode and time through a link", "twice")  # CVE-2024-12718
def _(aim: Aim) -> bytes:
    return packed(symlink("f", aim.victim / "canary"), file("f", b"", mode=0o4777, mtime=7))


@refused("longer than realpath takes", ELSEWHERE)  # CVE-2025-4517
def _(aim: Aim) -> bytes:
    part, parts, here = "d" * 247, [], ""
    for step in "abcdefghijklmnop":
        parts += [folder(f"{here}{part}"), symlink(f"{here}{step}", part)]
        here += part + "/"
    up = "/".join("abcdefghijklmnop") + "/" + "l" * 254
    parts += [symlink(up, "../" * 16), symlink("escape", f"{up}/../{aim.victim.name}")]
    return packed(*parts, file("escape/evil"))


@refused("a hard link to elsewhere", ELSEWHERE + "|hard link")
def _(aim: Aim) -> bytes:
    return packed(hardlink("h", aim.victim / "canary"))


@refused("a hard link to above", ELSEWHERE + "|hard link")
def _(aim: Aim) -> bytes:
    return packed(hardlink("h", f"{HOME}/../{aim.victim.name}/canary"))


@refused("a hard link to above, without the home", ELSEWHERE + "|hard link")
def _(aim: Aim) -> bytes:
    return packed(hardlink("h", f"{aim.up}/canary"))


@refused("a hard link to a link", "hard link")  # CVE-2025-4138
def _(aim: Aim) -> bytes:
    return packed(symlink("l", aim.victim / "canary"), hardlink("h", f"{HOME}/l"))


@refused("a hard link to a link, then written", "hard link")
def _(aim: Aim) -> bytes:
    return packed(symlink("l", aim.victim / "canary"), hardlink("h", f"{HOME}/l"), file("h"))


@refused("a hard link through a link", "hard link")
def _(aim: Aim) -> bytes:
    return packed(symlink("l", aim.victim), hardlink("h", f"{HOME}/l/canary"), file("h"))


@refused("a hard link, then written", "twice")
def _(aim: Aim) -> bytes:
    return packed(file("f", b"1"), hardlink("h", f"{HOME}/f"), file("h", b"2"))


@refused("a hard link to a folder", "hard link")
def _(aim: Aim) -> bytes:
    return packed(folder("d"), hardlink("h", f"{HOME}/d"))


@refused("a hard link to the home", ELSEWHERE + "|hard link")
def _(aim: Aim) -> bytes:
    return packed(hardlink("h", HOME))


@refused("a hard link to what comes later", "hard link")  # CVE-2025-4330: tarfile would copy it
def _(aim: Aim) -> bytes:
    return packed(hardlink("h", f"{HOME}/f"), file("f"))


@refused("a hard link to itself", "hard link")
def _(aim: Aim) -> bytes:
    return packed(hardlink("h", f"{HOME}/h"))


@refused("a hard link to nothing", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(hardlink("h", ""))


@refused("a hard link with content", "claims")
def _(aim: Aim) -> bytes:
    return packed(file("f"), hardlink("h", f"{HOME}/f", size=512), b"e" * 512)


@refused("a hard link through a file", "hard link")
def _(aim: Aim) -> bytes:
    return packed(file("f"), hardlink("h", f"{HOME}/f/f"))


@refused("a hard link to a FIFO", "hard link")
def _(aim: Aim) -> bytes:
    return packed(block(f"{HOME}/p", tarfile.FIFOTYPE), hardlink("h", f"{HOME}/p"))


@refused("a link to nothing", "link to nothing")
def _(aim: Aim) -> bytes:
    return packed(symlink("l", ""))


@refused("a link with content", "claims")
def _(aim: Aim) -> bytes:
    return packed(block(f"{HOME}/l", tarfile.SYMTYPE, "f", size=512), b"e" * 512)


@refused("a link longer than a path", "too long|malformed|File name too long")
def _(aim: Aim) -> bytes:
    return packed(symlink("l", "x/" * 2100))


# ---- Kinds

for _kind in (
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.CONTTYPE,
    tarfile.GNUTYPE_SPARSE,
    *map(str.encode, "MDVNAZ9"),
):

    @refused(f"of the kind {_kind.decode()}", "of the kind")
    def _(aim: Aim, kind: bytes = _kind) -> bytes:
        return packed(block(f"{HOME}/x", kind, mode=0o666, devmajor=1, devminor=3))


@refused("a global header", "of the kind b'g'")
def _(aim: Aim) -> bytes:
    return packed(pax(("path", str(aim.victim / "evil")), kind=tarfile.XGLTYPE), file("f"))


@refused("Solaris' extended header", "of the kind b'X'")
def _(aim: Aim) -> bytes:
    return packed(pax(("path", str(aim.victim / "evil")), kind=tarfile.SOLARIS_XHDTYPE), file("f"))


@refused("a folder with content", "claims")
def _(aim: Aim) -> bytes:
    return packed(folder("d", size=512), b"e" * 512)


@refused("a FIFO with content", "claims")
def _(aim: Aim) -> bytes:
    return packed(block(f"{HOME}/p", tarfile.FIFOTYPE, size=512), b"e" * 512)


# ---- Twice, or out of order


@refused("a file twice", "twice")  # CVE-2025-4435: what was rejected first is taken then
def _(aim: Aim) -> bytes:
    return packed(file("f", b"1"), file("f", b"2"))


@refused("a folder twice", "twice|without its folder")
def _(aim: Aim) -> bytes:
    return packed(folder("d"), folder("d"))


@refused("a link twice", "twice")
def _(aim: Aim) -> bytes:
    return packed(symlink("l", "a"), symlink("l", "b"))


@refused("a folder where a file is", "twice")
def _(aim: Aim) -> bytes:
    return packed(file("f"), folder("f"))


@refused("a file where a folder is", "twice")
def _(aim: Aim) -> bytes:
    return packed(folder("d"), file("d"))


@refused("below a file", "without its folder")
def _(aim: Aim) -> bytes:
    return packed(file("f"), file("f/g"))


@refused("without its folder", "without its folder")
def _(aim: Aim) -> bytes:
    return packed(file("d/f"))


@refused("into a folder that was left", "without its folder")
def _(aim: Aim) -> bytes:
    return packed(folder("a"), folder("b"), file("a/f"))


# ---- Extended headers


@refused("a path in an extended header", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(pax(("path", str(aim.victim / "evil"))), file("f"))


@refused("a path above in an extended header", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(pax(("path", f"{HOME}/{aim.up}/evil")), file("f"))


@refused("a link's target in an extended header", ELSEWHERE + "|hard link")
def _(aim: Aim) -> bytes:
    return packed(file("f"), pax(("linkpath", str(aim.victim / "canary"))), hardlink("h", f"{HOME}/f"))


@refused("no path in an extended header", "empty")
def _(aim: Aim) -> bytes:
    return packed(pax(("path", "")), file("f"))


@refused("a NUL in an extended header's path", "NUL")
def _(aim: Aim) -> bytes:
    return packed(pax(("path", f"{HOME}/a\0b")), file("f"))


@refused("a NUL in a long name", "NUL")
def _(aim: Aim) -> bytes:
    return packed(long_name(f"{HOME}/a\0b".encode()), member("x"))


@refused("a long name that leads elsewhere", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(long_name(f"{HOME}/../{aim.victim.name}/evil".encode()), file("f"))


@refused("two names", "two names")
def _(aim: Aim) -> bytes:
    return packed(long_name(f"{HOME}/a".encode()), pax(("path", str(aim.victim / "evil"))), file("f"))


@refused("two long names", "repeated")
def _(aim: Aim) -> bytes:
    return packed(long_name(f"{HOME}/a".encode()), long_name(os.fsencode(aim.victim / "evil")), file("f"))


@refused("two extended headers", "repeated")
def _(aim: Aim) -> bytes:
    return packed(pax(("path", f"{HOME}/a")), pax(("path", str(aim.victim / "evil"))), file("f"))


@refused("a key twice", "extended header with path")
def _(aim: Aim) -> bytes:
    return packed(pax(("path", f"{HOME}/a"), ("path", str(aim.victim / "evil"))), file("f"))


@refused("an unknown key", "extended header with SCHILY")
def _(aim: Aim) -> bytes:
    return packed(pax(("SCHILY.xattr.security.capability", b"\1\0\0\2")), file("f"))


@refused("a larger size in an extended header", "two sizes")
def _(aim: Aim) -> bytes:
    return packed(pax(("size", "2048")), file("f", b"e" * 512), member("evil", b"evil"), bytes(512))


@refused("a smaller size in an extended header", "two sizes")
def _(aim: Aim) -> bytes:
    hidden = member("hidden", b"evil")
    return packed(pax(("size", "0")), file("f", hidden))


@refused("a size in an extended header alone", "two sizes")  # one reader sees an archive in a file, one sees files
def _(aim: Aim) -> bytes:
    hidden = file("hidden")
    return packed(pax(("size", str(len(hidden)))), block(f"{HOME}/f", size=0), hidden)


@refused("a negative size in an extended header", "malformed size")
def _(aim: Aim) -> bytes:
    return packed(pax(("size", "-512")), file("f"))


@refused("a size that is no number", "malformed size")
def _(aim: Aim) -> bytes:
    return packed(pax(("size", "5_12")), file("f"))


@refused("a record with a wrong length", "malformed extended header")
def _(aim: Aim) -> bytes:
    return packed(member("x", b"99 path=evil\n", tarfile.XHDTYPE), file("f"))


@refused("a record of no length", "malformed extended header")
def _(aim: Aim) -> bytes:
    return packed(member("x", b"0 path=evil\n", tarfile.XHDTYPE), file("f"))


@refused("a record with a negative length", "malformed extended header")
def _(aim: Aim) -> bytes:
    return packed(member("x", b"-5 path=evil\n", tarfile.XHDTYPE), file("f"))


@refused("a record without a value", "malformed extended header")
def _(aim: Aim) -> bytes:
    return packed(member("x", b"8 path\n\n", tarfile.XHDTYPE), file("f"))


@refused("a huge extended header", "too long")
def _(aim: Aim) -> bytes:
    return packed(block("x", tarfile.XHDTYPE, size=1 << 33), bytes(4096))


@refused("a huge long name", "too long")
def _(aim: Aim) -> bytes:
    return packed(block("x", tarfile.GNUTYPE_LONGNAME, size=1 << 33), bytes(4096))


@refused("a header before the end", "behind its end")
def _(aim: Aim) -> bytes:
    return packed(pax(("path", f"{HOME}/a")))


for _time in ("nan", "inf", "1e999", "-", "0x7", "9" * 25, "1." + "9" * 40):

    @refused(f"the time {_time[:8]}", "malformed time|time that is none")
    def _(aim: Aim, time: str = _time) -> bytes:
        return packed(pax(("mtime", time)), file("f"))


@refused("a time beyond all clocks", "time that is none")
def _(aim: Aim) -> bytes:
    return packed(file("f", raw_mtime=b"\x80" + b"\x7f" + bytes(10)))


# ---- Sparse files

SPARSE = "malformed sparse|larger than files|in a form"


@refused("segments that overlap", SPARSE)
def _(aim: Aim) -> bytes:
    return packed(sparse("f", 4096, "2\n0\n512\n256\n512\n", b"e" * 1024))


@refused("segments out of order", SPARSE)
def _(aim: Aim) -> bytes:
    return packed(sparse("f", 4096, "2\n1024\n512\n0\n512\n", b"e" * 1024))


@refused("a segment beyond the end", SPARSE)
def _(aim: Aim) -> bytes:
    return packed(sparse("f", 1024, "1\n1024\n512\n", b"e" * 512))


@refused("a negative segment", SPARSE)
def _(aim: Aim) -> bytes:
    return packed(sparse("f", 1024, "1\n-512\n512\n", b"e" * 512))


@refused("segments of more than there is", SPARSE)
def _(aim: Aim) -> bytes:
    return packed(sparse("f", 1 << 40, f"1\n0\n{1 << 39}\n", b"e" * 512))


@refused("segments of less than there is", SPARSE)
def _(aim: Aim) -> bytes:
    return packed(sparse("f", 4096, "1\n0\n512\n", b"e" * 512 + file("hidden")))


@refused("too many segments", SPARSE)
def _(aim: Aim) -> bytes:
    return packed(sparse("f", 4096, f"{10**9}\n" + "0\n0\n" * 5000))


@refused("more segments than are told", SPARSE)
def _(aim: Aim) -> bytes:
    return packed(sparse("f", 4096, "1\n0\n512\n512\n512\n", b"e" * 512))


@refused("a map that does not end", SPARSE)
def _(aim: Aim) -> bytes:
    return packed(sparse("f", 4096, "1" * 1024))


@refused("a map that is no map", SPARSE)
def _(aim: Aim) -> bytes:
    return packed(sparse("f", 4096, "one\n"))


@refused("a sparse file larger than files can be", SPARSE)
def _(aim: Aim) -> bytes:
    return packed(sparse("f", "9" * 19, "0\n"))


@refused("a sparse file that leads elsewhere", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(sparse(f"../{aim.victim.name}/evil", 512, "1\n0\n512\n", b"e" * 512))


@refused("an older form of sparse files", SPARSE + "|extended header with")
def _(aim: Aim) -> bytes:
    return packed(pax(("GNU.sparse.size", "512"), ("GNU.sparse.map", "0,512")), file("f", b"e" * 512))


@refused("half a sparse header", SPARSE)
def _(aim: Aim) -> bytes:
    return packed(pax(("GNU.sparse.major", "1"), ("GNU.sparse.name", str(aim.victim / "evil"))), file("f"))


@refused("a sparse link", SPARSE)
def _(aim: Aim) -> bytes:
    head = sparse("l", 0, "0\n")[:-1024]
    return packed(head, symlink("l", aim.victim))


# ---- Numbers and blocks


@refused("a negative size", "claims")  # CVE-2019-20907, CVE-2025-8194: a reader that goes back and never ends
def _(aim: Aim) -> bytes:
    return packed(block(f"{HOME}/f", raw_size=b"\xff" * 10 + b"\xfe\x00"))


@refused("a negative size of a long name", "too long")
def _(aim: Aim) -> bytes:
    return packed(block("x", tarfile.GNUTYPE_LONGNAME, raw_size=b"\xff" * 10 + b"\xfe\x00"), file("f"))


@refused("a size with a sign", "malformed number")
def _(aim: Aim) -> bytes:
    return packed(block(f"{HOME}/f", raw_size=b"-0000001000\0"))


@refused("a size with an underscore", "malformed number")
def _(aim: Aim) -> bytes:
    return packed(block(f"{HOME}/f", raw_size=b"0000_000010\0"))


@refused("a size that goes on behind a NUL", "malformed number")
def _(aim: Aim) -> bytes:
    return packed(block(f"{HOME}/f", raw_size=b"10\0 7777777\0"))


@refused("a wrong checksum", "checksum")
def _(aim: Aim) -> bytes:
    return packed(file("f").replace(HOME.encode(), b"pactown_9999ffff", 1))


@refused("no magic", "unknown format")
def _(aim: Aim) -> bytes:
    head = bytearray(block(f"{HOME}/f"))
    head[257:265] = bytes(8)
    return packed(checked(head))


@refused("a prefix that leads elsewhere", ELSEWHERE)
def _(aim: Aim) -> bytes:
    head = bytearray(block("evil"))
    head[257:265] = b"ustar\x0000"
    head[345:500] = os.fsencode(f"../{aim.victim.name}").ljust(155, b"\0")
    return packed(checked(head))


@refused("a name longer than the disk takes", ELSEWHERE)
def _(aim: Aim) -> bytes:
    return packed(long_name(f"{HOME}/{'n' * 256}".encode()), member("x"))


@refused("a path longer than the kernel takes", "too long|empty")
def _(aim: Aim) -> bytes:
    return packed(long_name(f"{HOME}/{'n/' * 2100}n".encode()), member("x"))


# ---- Too much


@refused("too many bytes", "archive_max_bytes")
def _(aim: Aim) -> bytes:
    return packed(block(f"{HOME}/f", size=1 << 40), bytes(1 << 16))


@refused("too many bytes together", "archive_max_bytes")
def _(aim: Aim) -> bytes:
    return packed(*(file(f"f{number}", os.urandom(1 << 10) * 1024) for number in range(9)))


@refused("too many entries", "archive_max_entries")
def _(aim: Aim) -> bytes:
    return packed(*(file(f"f{number}", b"") for number in range(3000)))


@refused("too many FIFOs", "archive_max_entries")
def _(aim: Aim) -> bytes:
    return packed(*(block(f"{HOME}/f{number}", tarfile.FIFOTYPE) for number in range(3000)))


@refused("too deep", "archive_max_depth")
def _(aim: Aim) -> bytes:
    return packed(*(folder("/".join("d" * depth)) for depth in range(1, 40)))


@refused("a bomb", "archive_max_ratio")
def _(aim: Aim) -> Iterator[bytes]:
    # Beyond what may be in a home anyway this is about what has no size of its own.
    press = zlib.compressobj(9, zlib.DEFLATED, 31)
    yield press.compress(folder())
    empty = pax(("comment", " " * 60000)) + block(f"{HOME}/p", tarfile.FIFOTYPE)
    for _ in range(2000):
        yield press.compress(empty)
    yield press.flush()


@refused("a bomb behind the end", "behind its end")
def _(aim: Aim) -> bytes:
    return gzip.compress(folder() + END + bytes(8 << 20))


# ---- Ends

for _kept in (0.1, 0.5, 0.9, 0.999):

    @refused(f"cut off at {_kept}", "cut off|no gzip")
    def _(aim: Aim, kept: float = _kept) -> bytes:
        return aim.honest[: int(len(aim.honest) * kept)]


@refused("without the checksum of gzip", "cut off")
def _(aim: Aim) -> bytes:
    return aim.honest[:-4]


@refused("a wrong checksum of gzip", "damaged")
def _(aim: Aim) -> bytes:
    return aim.honest[:-8] + bytes(4) + aim.honest[-4:]


@refused("no end", "ends in the middle")
def _(aim: Aim) -> bytes:
    return gzip.compress(folder() + file("f"))


@refused("ends in a file", "ends in the middle")
def _(aim: Aim) -> bytes:
    return gzip.compress(folder() + file("f", b"e" * 4096)[:-1000])


@refused("ends in a header", "ends in the middle")
def _(aim: Aim) -> bytes:
    return gzip.compress(folder() + file("f")[:100])


@refused("half an end", "behind its end")
def _(aim: Aim) -> bytes:
    return gzip.compress(folder() + bytes(512) + file("f") + END)


@refused("two archives joined", "followed by something else")
def _(aim: Aim) -> bytes:
    return packed(file("a")) + packed(file("b"))


@refused("an honest archive and another", "followed by something else")
def _(aim: Aim) -> bytes:
    return aim.honest + packed(named(aim.victim / "evil"))


@refused("two archives in one", "behind its end")
def _(aim: Aim) -> bytes:
    return gzip.compress(folder() + file("a") + END + folder() + file("b") + END)


@refused("an archive in two members", "ends in the middle")
def _(aim: Aim) -> bytes:
    return gzip.compress(folder() + file("a")) + gzip.compress(file("b") + END)


@refused("noise behind it", "followed by something else")
def _(aim: Aim) -> bytes:
    return aim.honest + b"noise"


@refused("zeros behind it", "followed by something else")
def _(aim: Aim) -> bytes:
    return aim.honest + bytes(512)


@refused("noise behind the end", "behind its end")
def _(aim: Aim) -> bytes:
    return gzip.compress(folder() + file("f") + END + b"noise")


@refused("nothing", "cut off")
def _(aim: Aim) -> bytes:
    return b""


@refused("gzip of nothing", "ends in the middle")
def _(aim: Aim) -> bytes:
    return gzip.compress(b"")


@refused("an end alone", "does not begin with a folder")
def _(aim: Aim) -> bytes:
    return gzip.compress(END)


@refused("noise", "no gzip")
def _(aim: Aim) -> bytes:
    return os.urandom(4096)


@refused("gzip of noise", "no tar|malformed")
def _(aim: Aim) -> bytes:
    return gzip.compress(os.urandom(4096))


@refused("not pressed", "no gzip")
def _(aim: Aim) -> bytes:
    return folder() + file("f") + END


@refused("gzip in gzip", "no tar|malformed|ends in the middle")
def _(aim: Aim) -> bytes:
    return gzip.compress(aim.honest)


# ---- Manifests


def opened(archive: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(archive))) as tar:
        return [(info, tar.extractfile(info).read() if info.isreg() else b"") for info in tar]  # type: ignore[union-attr]


def closed(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(out.getvalue())


UNLIKE = "does not hold what its manifest lists"


@refused("another content than the manifest's", UNLIKE)
def _(aim: Aim) -> bytes:
    return closed([(info, content.replace(b"honest", b"forged")) for info, content in opened(aim.honest)])


@refused("another mode than the manifest's", UNLIKE)
def _(aim: Aim) -> bytes:
    members = opened(aim.honest)
    next(info for info, _ in members if info.name.endswith("main.py")).mode = 0o777
    return closed(members)


@refused("another link than the manifest's", UNLIKE)
def _(aim: Aim) -> bytes:
    members = opened(aim.honest)
    next(info for info, _ in members if info.issym()).linkname = "/etc/shadow"
    return closed(members)


@refused("less than the manifest's", UNLIKE)
def _(aim: Aim) -> bytes:
    return closed([(info, content) for info, content in opened(aim.honest) if not info.name.endswith("main.py")])


@refused("more than the manifest's", UNLIKE)
def _(aim: Aim) -> bytes:
    members = opened(aim.honest)
    more = tarfile.TarInfo(f"{members[0][0].name}/zzz")
    return closed([*members[:-1], (more, b"evil"), members[-1]])


@refused("more behind the manifest", "behind its manifest")
def _(aim: Aim) -> bytes:
    members = opened(aim.honest)
    return closed([*members, (tarfile.TarInfo(f"{members[0][0].name}/zzz"), b"evil")])


@refused("two manifests", "behind its manifest")
def _(aim: Aim) -> bytes:
    members = opened(aim.honest)
    return closed([*members, members[-1]])


@refused("the manifest of nothing", UNLIKE)
def _(aim: Aim) -> bytes:
    members = opened(aim.honest)
    return closed([members[0], members[-1]])


@refused("the home of another user", "was made of the home of 'auth0|another'")
def _(aim: Aim) -> bytes:
    return manifested(aim, user_id="auth0|another")


@refused("a newer manifest", "version 2")
def _(aim: Aim) -> bytes:
    return manifested(aim, version=2)


@refused("a manifest of another format", "manifest is malformed")
def _(aim: Aim) -> bytes:
    return manifested(aim, format="tar")


@refused("a manifest that is no text", "manifest is malformed")
def _(aim: Aim) -> bytes:
    members = opened(aim.honest)
    return closed([*members[:-1], (members[-1][0], b"\xff" * 5000)])


@refused("a manifest that nests", "manifest is malformed")
def _(aim: Aim) -> bytes:
    members = opened(aim.honest)
    return closed([*members[:-1], (members[-1][0], b"[" * 15000 + b"\n")])


@refused("a manifest in one long line", "manifest is malformed")
def _(aim: Aim) -> bytes:
    members = opened(aim.honest)
    return closed([*members[:-1], (members[-1][0], b" " * (1 << 20))])


@refused("an empty manifest", "manifest is malformed")
def _(aim: Aim) -> bytes:
    members = opened(aim.honest)
    return closed([*members[:-1], (members[-1][0], b"")])


@refused("a manifest that is a link", "manifest is no file")
def _(aim: Aim) -> bytes:
    return packed(block("pactown-manifest.jsonl", tarfile.SYMTYPE, "/etc/passwd"))


@refused("a manifest that is a folder", "manifest is no file")
def _(aim: Aim) -> bytes:
    return packed(block("pactown-manifest.jsonl", tarfile.DIRTYPE))


@refused("a manifest first", "does not begin with a folder")
def _(aim: Aim) -> bytes:
    members = opened(aim.honest)
    return closed([members[-1], *members[:-1]])


def manifested(aim: Aim, **values: object) -> bytes:
    members = opened(aim.honest)
    info, content = members[-1]
    head, _, rest = content.partition(b"\n")
    return closed([*members[:-1], (info, json.dumps({**json.loads(head), **values}).encode() + b"\n" + rest)])


# ---- Taken, and harmless


@taken("links that lead anywhere")
def _(aim: Aim) -> bytes:
    return packed(
        symlink("a", aim.victim),
        symlink("b", aim.victim / "canary"),
        symlink("c", aim.up),
        symlink("d", "/etc/shadow"),
        symlink("e", "e"),
        symlink("f", "../" * 30 + "etc"),
        symlink("sandboxes", aim.victim),
    )


@taken("set-id and sticky bits")
def _(aim: Aim) -> bytes:
    return packed(file("s", mode=0o6755), folder("d", mode=0o7777), file("d/s", mode=0o4711))


@taken("foreign owners")
def _(aim: Aim) -> bytes:
    return packed(file("r", uid=0, gid=0, uname="root", gname="root"), folder("d", uid=0, gid=0, uname="root"))


@taken("owners beyond all numbers")
def _(aim: Aim) -> bytes:
    return packed(pax(("uid", "99999999999999999999"), ("gid", "-1"), ("uname", "root\0")), file("r"))


@taken("FIFOs")
def _(aim: Aim) -> bytes:
    return packed(block(f"{HOME}/p", tarfile.FIFOTYPE), file("f"))


@taken("folders that shut out their owner")
def _(aim: Aim) -> bytes:
    return packed(folder("d", mode=0), folder("d/e", mode=0o200), file("d/e/f", mode=0), hardlink("h", f"{HOME}/d/e/f"))


@taken("a huge sparse file")
def _(aim: Aim) -> bytes:
    return packed(sparse("f", 1 << 42, f"2\n0\n512\n{1 << 42}\n0\n", b"e" * 512))


@taken("a manifest of the tenant's own")
def _(aim: Aim) -> bytes:
    return packed(file("pactown-manifest.jsonl", b"not yours to read"))


@taken("the largest trailer that tar writes")
def _(aim: Aim) -> bytes:
    return gzip.compress(folder() + file("f") + bytes(1 << 20))
