"""Trees of every odd kind, made by the tenant whose they are, and a look at all that an archive is to keep of them."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pactown_runner.models import IsolatedUser

PYTHON = "/usr/bin/python3"

MAKE = r"""
import os, random, socket, sys
top, count = os.fsencode(sys.argv[1]), int(sys.argv[2])
random.seed(count)
os.makedirs(top)
os.chdir(top)

def write(name, content=b"", mode=0o644, mtime=None):
    with open(name, "wb") as file:
        file.write(content)
    os.chmod(name, mode)
    os.utime(name, ns=(0, mtime if mtime is not None else random.randrange(-(10**17), 2 * 10**18)))

ODD = [b"-rf", b"a\\b", b"a\nb", "\u00fc".encode(), b"*", b"'\"$(id)`id`;", b" ", b"...", b"@LongLink", b"\xff\xfe",
       b"x" * 255, b"\xc3\x28 " + b"y" * 200, b"path=evil\n20 size=7", b"pactown-manifest.jsonl", b"\x01\x7f", b"~",
       b"PaxHeaders.0", b"GNUSparseFile.0", bytes(range(1, 47)) + bytes(range(48, 128))]
for number, name in enumerate(ODD):
    write(name, b"content of " + name)
    os.mkdir(b"d" + name[:254])
    write(b"d" + name[:254] + b"/" + name, name * 10)
    os.symlink(name, b"to%d" % number)

for mode in range(0o1000):
    if mode % 7 == 0 or mode in (0, 0o200, 0o400, 0o777):
        write(b"mode%03o" % mode, b"m" * mode, mode)
        os.mkdir(b"folder%03o" % mode)
        write(b"folder%03o/in" % mode, b"in")
        os.mkdir(b"folder%03o/empty" % mode)
        os.link(b"folder%03o/in" % mode, b"linked%03o" % mode)
        os.chmod(b"folder%03o/in" % mode, mode)
for mtime in (0, 1, -1, 999999999, -999999999, -10**9, 10**9, 2**33 * 10**9, 2**33 * 10**9 + 1, -(2**31) * 10**9):
    write(b"time%d" % mtime, b"", mtime=mtime)
os.symlink(b"/etc/passwd", b"away")
os.symlink(b"../../../../../../etc", b"up")
os.symlink(b"nowhere/" + b"l" * 4000, b"long")
os.symlink(b"\xff\xfe", b"raw")
os.symlink(b"loop", b"loop")
for number in range(5):
    os.link(b"-rf", b"same%d" % number)
for name, segments, length in (
    (b"hole", [], 1 << 20), (b"holes", [(1 << 16, 4096), (1 << 20, 70000), (1 << 40, 1)], (1 << 40) + 1),
    (b"ends in a hole", [(0, 4096)], 1 << 20), (b"begins with one", [(1 << 20, 4096)], (1 << 20) + 4096),
    (b"many holes", [(number * 8192, 4096) for number in range(3000)], 3000 * 8192),
    (b"not a block", [(12288, 5)], 12293),
    (b"h" * 250, [(8192, 1)], 1 << 33),
):
    with open(name, "wb") as file:
        for start, size in segments:
            file.seek(start)
            file.write(os.urandom(size))
        file.truncate(length)
    os.utime(name, ns=(0, random.randrange(10**18)))
write(b"big", os.urandom(3 << 20) + b"end", mtime=1)
write(b"zeros", bytes(1 << 20))
write(b"bare", b"x" * 512)
here = b"."
for number in range(60):
    here += b"/a folder whose name is rather long %d" % number
    os.mkdir(here)
write(here + b"/leaf", b"deep")
for number in range(count):
    folder = b"many/%02d" % (number % 97)
    os.makedirs(folder, exist_ok=True)
    content = b"%d\n" % number * random.randrange(20)
    write(b"%s/%d" % (folder, number), content, mode=random.choice((0o644, 0o600, 0o755)))
os.mkfifo("fifo")
socket.socket(socket.AF_UNIX).bind("socket")
for folder, names, _ in os.walk(b".", topdown=False):
    for name in names:
        path = os.path.join(folder, name)
        if not os.path.islink(path):
            os.utime(path, ns=(0, random.randrange(2 * 10**18)))
for name in os.listdir(b"."):
    if name.startswith(b"folder"):
        os.chmod(name, int(name[6:], 8))
os.utime(b".", ns=(0, 5))
"""
"""Arguments: a folder to make, and how many ordinary files."""


@dataclass(frozen=True)
class Look:
    """All that an archive keeps of one entry, and whose it is.

    `target` is a link's; of a file with several names it is the first of these.
    """

    kind: int
    mode: int
    mtime: int
    owner: tuple[int, int]
    length: int = 0
    content: str = ""
    target: bytes = b""


def as_tenant(user: IsolatedUser, source: str, *arguments: str, timeout: float | None = None) -> None:
    """Run Python source as a tenant, in its home; it must end well."""
    done = subprocess.run(
        [PYTHON, "-I", "-S", "-c", source, *arguments],
        user=user.linux_uid,
        group=user.linux_gid,
        extra_groups=[],
        cwd=user.home_dir,
        capture_output=True,
        text=True,
        umask=0o22,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr


def make_tree(user: IsolatedUser, count: int, name: str = "sandboxes/api") -> None:
    as_tenant(user, MAKE, name, str(count))


def looks(top: Path) -> dict[bytes, Look]:
    """All of a tree, specials aside. Run it as root, and only while nobody changes the tree."""
    found: dict[bytes, Look] = {}
    first: dict[tuple[int, int], bytes] = {}
    base = os.fsencode(top)
    pending = [b""]
    while pending:
        relative = pending.pop()
        path = base + b"/" * bool(relative) + relative
        status = os.lstat(path)
        kind = stat.S_IFMT(status.st_mode)
        common = (kind, stat.S_IMODE(status.st_mode), status.st_mtime_ns, (status.st_uid, status.st_gid))
        if kind == stat.S_IFDIR:
            pending += sorted((relative + b"/" * bool(relative) + name for name in os.listdir(path)), reverse=True)
            found[relative] = Look(*common)
        elif kind == stat.S_IFLNK:
            found[relative] = Look(kind, 0o777, *common[2:], target=os.readlink(path))
        elif kind == stat.S_IFREG:
            same = first.setdefault((status.st_dev, status.st_ino), relative)
            content = _digest(path, status.st_size)
            found[relative] = Look(*common, length=status.st_size, content=content, target=same)
    return found


def _digest(path: bytes, length: int) -> str:
    """Where data is, and what."""
    digest = hashlib.sha256()
    at = 0
    with open(path, "rb") as file:
        while at < length:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            digest.update(b"%d-%d " % (start, at))
            os.lseek(file.fileno(), start, os.SEEK_SET)
            left = at - start
            while left:
                data = os.read(file.fileno(), min(left, 1 << 20))
                digest.update(data)
                left -= len(data)
    return digest.hexdigest()


def differences(one: dict[bytes, Look], other: dict[bytes, Look]) -> list[str]:
    """What is not the same, by path."""
    return [f"{path!r}: {one.get(path)} / {other.get(path)}" for path in one.keys() | other.keys()
            if one.get(path) != other.get(path)]  # fmt: skip
