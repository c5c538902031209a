"""Tenants who lie in the stream that a `get` reads, race what moves their files, or stop it."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from itertools import count
from pathlib import Path

import pytest

from pactown_runner.errors import FilesError, RunnerError
from pactown_runner.homes import SandboxFiles
from pactown_runner.homes.get import Get
from pactown_runner.homes.unpacking import Bounds, Extracted, extract
from pactown_runner.models import State
from pactown_runner.specs import SandboxSpec
from pactown_runner.supervisor import Supervisor
from tests.files.helpers import OTHER, SERVICE, USER, as_tenant, snapshot

BOUNDS = Bounds(1 << 30, 1000)


# ---- Forged streams


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **values: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    for key, value in values.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def folder(name: str) -> bytes:
    return member(name, kind=tarfile.DIRTYPE)


def huge_header(kind: bytes, size: int) -> bytes:
    return member("././@LongLink", kind=kind, size=size) + bytes(1024)


def long_name(name: bytes) -> bytes:
    return member("././@LongLink", name, kind=tarfile.GNUTYPE_LONGNAME)


TOP = folder("./x")
LINK = member("./x/l", kind=tarfile.SYMTYPE, linkname="/tmp")
END = bytes(1024)
FORGED = {
    "above": TOP + member("../evil", b"e") + END,
    "above, within": TOP + folder("./x/a") + member("./x/a/../../../evil", b"e") + END,
    "absolute": TOP + member("/tmp/evil", b"e") + END,
    "not asked for": TOP + member("./y", b"e") + END,
    "begins elsewhere": member("./y", b"e") + END,
    "file through a link": TOP + LINK + member("./x/l/evil", b"e") + END,
    "top is a link": member("./x", kind=tarfile.SYMTYPE, linkname="/tmp") + member("./x/evil", b"e") + END,
    "top is a device": member("./x", kind=tarfile.CHRTYPE) + END,
    "file twice": TOP + member("./x/f", b"1") + member("./x/f", b"2") + END,
    "folder twice": TOP + folder("./x/d") + folder("./x/d") + END,
    "file, then folder": TOP + member("./x/f", b"1") + folder("./x/f") + END,
    "below a file": TOP + member("./x/f", b"1") + member("./x/f/g", b"2") + END,
    "top twice": TOP + TOP + END,
    "more than the file": member("./x", b"1") + member("./x/y", b"2") + END,
    "without its folder": TOP + member("./x/d/f", b"1") + END,
    "left before": TOP + folder("./x/d") + folder("./x/e") + member("./x/d/f", b"1") + END,
    "cut off in a header": TOP + member("./x/f", b"1" * 600)[:100],
    "cut off in content": TOP + member("./x/f", b"1" * 600)[:700],
    "no end": TOP + member("./x/f", b"1" * 600),
    "nothing": b"",
    "empty archive": END,
    "8 GiB": TOP + member("./x/f", size=8 << 30) + bytes(4096),
    "less than nothing": TOP + member("./x/f", size=-512) + END,
    "folder with content": TOP + member("./x/d", b"1" * 512, kind=tarfile.DIRTYPE) + END,
    "huge pax header": TOP + huge_header(tarfile.XHDTYPE, 1 << 33) + END,
    "huge global header": TOP + huge_header(tarfile.XGLTYPE, 1 << 33) + END,
    "huge long name": TOP + huge_header(tarfile.GNUTYPE_LONGNAME, 1 << 33) + END,
    "long names without end": TOP + long_name(b"./x/y\0") * 5000 + END,
    "long name is nothing's": TOP + long_name(b"./x/y\0") + END,
    "long name leads up": TOP + long_name(b"./x/../../evil\0") + member("./x/f") + END,
    "NUL in a name": TOP + long_name(b"./x/a\0b\0") + member("./x/f") + END,
    "sparse": TOP + member("./x/f", b"1", kind=tarfile.GNUTYPE_SPARSE) + END,
    "unknown type": TOP + member("./x/f", kind=b"Z") + END,
    "too deep": TOP + b"".join(folder("./x" + "/d" * depth) for depth in range(1, 200)) + END,
    "too many": TOP + b"".join(member(f"./x/{number}") for number in range(2000)) + END,
    "name too long for the disk": TOP + member("./x/" + "n" * 300) + END,
    "noise": os.urandom(4096),
    "goes on": TOP + END + bytes(2 << 20),
    "one block of zeros": TOP + bytes(512) + member("./x/f", b"1") + END,
}  # fmt: skip


def try_extract(stream: bytes, into: Path) -> Extracted:
    fd = os.open(into, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return extract(io.BufferedReader(io.BytesIO(stream)), "x", fd, BOUNDS)
    finally:
        os.close(fd)


def test_an_honest_stream_is_taken(tmp_path: Path) -> None:
    stream = TOP + folder("./x/d") + member("./x/d/f", b"1", mode=0o7755) + member("./x/l", kind=tarfile.SYMTYPE) + END
    assert try_extract(stream, tmp_path) == Extracted(1, 1, ["l"])
    assert (tmp_path / "content/d/f").stat().st_mode & 0o7777 == 0o755


@pytest.mark.host
@pytest.mark.parametrize("case", FORGED)
async def test_forged_streams(files: SandboxFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    stream = tmp_path / "stream"
    stream.write_bytes(FORGED[case])
    await files.put(USER, SERVICE, stream, "x")
    monkeypatch.setattr(Get, "argv", lambda self, operand: ("/bin/cat", "./x"))
    (tmp_path / "out").mkdir()
    with pytest.raises(FilesError):
        await files.get(USER, SERVICE, "x", tmp_path / "out/back", max_bytes=BOUNDS.bytes, max_entries=BOUNDS.entries)
    assert list((tmp_path / "out").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stream"]
    assert not Path("/tmp/evil").exists()


@pytest.mark.host
async def test_a_stream_without_end_is_given_up(
    files: SandboxFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await files.put(USER, SERVICE, TOP + member("./x/f", size=8 << 30), "x")
    monkeypatch.setattr(Get, "argv", lambda self, operand: ("/bin/sh", "-c", "cat ./x; exec cat /dev/zero"))
    with pytest.raises(FilesError, match="more than 1048576 bytes"):
        await files.get(USER, SERVICE, "x", tmp_path / "back", max_bytes=1 << 20)
    assert list(tmp_path.iterdir()) == []


# ---- Planted links


@pytest.mark.host
@pytest.mark.parametrize("planted", ["sandboxes", "sandboxes/api", "sandboxes/api/sub"])
@pytest.mark.parametrize("aim", ["root's", "another tenant's"])
async def test_planted_links_lead_nowhere(
    supervisor: Supervisor, files: SandboxFiles, users_base: Path, tmp_path: Path, planted: str, aim: str
) -> None:
    user, other = [await supervisor.users.get_or_create(name) for name in (USER, OTHER)]
    if aim == "root's":
        victim = users_base / "roots"
        victim.mkdir(mode=0o755)
    else:
        await files.put(OTHER, SERVICE, b"secret", "secret")
        victim = other.home_dir / "sandboxes" / SERVICE
    (victim / "canary").write_text("unchanged")
    (victim / "canary").chmod(0o600)
    as_tenant(user, f"mkdir -p {os.path.dirname(planted) or '.'} && ln -sfn {victim} {planted}")
    before = snapshot(victim)
    (tmp_path / "source").mkdir()
    (tmp_path / "source/canary").write_text("mine")
    for source, target in ((b"mine", "sub/canary"), (tmp_path / "source", "sub"), (b"mine", "sub/new")):
        with pytest.raises(RunnerError):
            await files.put(USER, SERVICE, source, target)
    with pytest.raises(RunnerError):
        await files.read(USER, SERVICE, "sub/canary")
    with pytest.raises(RunnerError):
        await files.get(USER, SERVICE, "sub", tmp_path / "back")
    assert snapshot(victim) == before
    as_tenant(user, f"rm {planted}")
    await files.put(USER, SERVICE, b"mine", "sub/canary")
    assert await files.read(USER, SERVICE, "sub/canary") == b"mine"


# ---- Races

RACER = """\
import os, shutil
ready = False
while True:
    shutil.rmtree("aside", ignore_errors=True)
    try:
        os.unlink("sub")
    except OSError:
        shutil.rmtree("sub", ignore_errors=True)
    try:
        os.mkdir("sub")
        open("sub/canary", "w").close()
        if not ready:
            ready = True
            print("ready", flush=True)
        while True:
            os.rename("sub", "aside")
            os.symlink({victim!r}, "sub")
            os.unlink("sub")
            os.rename("aside", "sub")
    except OSError:
        pass  # a put has made a folder of that name meanwhile
"""
TRIES = 300


async def race(supervisor: Supervisor, victim: Path, tmp_path: Path, *, as_root: bool) -> int:
    """How often a canary was changed or read out while the tenant swaps a folder for a link to it."""
    victim.mkdir(mode=0o755)
    canary = victim / "canary"
    canary.write_text("canary")
    canary.chmod(0o600)
    spec = SandboxSpec(
        user_id=USER, service_id=SERVICE, command=["/usr/bin/python3", "-c", RACER.format(victim=str(victim))]
    )
    racer = await supervisor.start(spec)
    async for record in racer.logs(follow=True):
        assert record.line == "ready"
        break
    inside = racer.user.home_dir / "sandboxes" / SERVICE / "sub" / "canary"
    touched = 0
    # What root does itself takes so little time that on a busy machine the racer may not run once meanwhile.
    for number in count() if as_root else range(TRIES):
        content = b""
        with contextlib.suppress(RunnerError, OSError):
            if as_root:
                inside.write_text("overwritten")
                content = inside.read_bytes()
            elif number % 3 == 0:
                await supervisor.files.put(USER, SERVICE, b"overwritten", "sub/canary")
            elif number % 3 == 1:
                content = await supervisor.files.read(USER, SERVICE, "sub/canary")
            else:
                back = tmp_path / f"back-{number}"
                await supervisor.files.get(USER, SERVICE, "sub", back)
                content = (back / "canary").read_bytes()
        if content == b"canary" or canary.read_text() != "canary":
            touched += 1
            canary.write_text("canary")
            if as_root:
                break
    assert racer.state == State.RUNNING
    assert [path.name for path in victim.iterdir()] == ["canary"]
    await racer.kill()
    return touched


@pytest.mark.host
async def test_a_swapped_folder_leads_nowhere(supervisor: Supervisor, users_base: Path, tmp_path: Path) -> None:
    touched = await race(supervisor, users_base / "victim", tmp_path, as_root=False)
    assert touched == 0
    await supervisor.files.put(USER, SERVICE, b"honest", "honest/canary")
    assert await supervisor.files.read(USER, SERVICE, "honest/canary") == b"honest"


@pytest.mark.host
async def test_the_race_catches_who_moves_files_as_root(
    supervisor: Supervisor, users_base: Path, tmp_path: Path
) -> None:
    touched = await race(supervisor, users_base / "victim", tmp_path, as_root=True)
    assert touched > 0
