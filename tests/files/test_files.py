"""Files into and out of sandboxes, moved by real tenants' processes."""

from __future__ import annotations

import asyncio
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from cgroups import Limits
from pactown_runner.config import Settings
from pactown_runner.errors import FilesError, LimitsError, NotFoundError, SpecError
from pactown_runner.homes import SandboxFiles, Transfer
from pactown_runner.supervisor import Supervisor
from tests.files.helpers import SERVICE, USER, contents

pytestmark = pytest.mark.host

ODD_NAMES = (
    "-rf", "a\\tb", "a\nb", "ü", "*", "'\"$(id)`id`;", " ", "@LongLink", "x" * 200, os.fsdecode(b"\xff\xfe raw"),
)  # fmt: skip


def make_tree(top: Path) -> None:
    top.mkdir()
    for name in ODD_NAMES:
        (top / name).write_text(f"content of {name!r}")
    (top / "empty").mkdir()
    (top / "nothing").write_bytes(b"")
    (top / "run").write_text("#!/bin/sh\n")
    (top / "run").chmod(0o6755)
    (top / "locked").mkdir()
    (top / "locked" / "secret").write_text("s")
    (top / "locked" / "secret").chmod(0o400)
    (top / "locked").chmod(0o500)
    (top / "one").write_text("same")
    (top / "two").hardlink_to(top / "one")
    (top / "link").symlink_to("one")
    (top / "away").symlink_to("/etc/passwd")
    (top / "big").write_bytes(os.urandom(3 << 20) + b"end")
    deep = top
    for number in range(30):
        deep /= f"a folder whose name is rather long {number}"
        deep.mkdir()
    (deep / "leaf").write_text("deep")


async def home_of(supervisor: Supervisor, user_id: str = USER) -> Path:
    return (await supervisor.users.get_or_create(user_id)).home_dir


async def test_a_tree_comes_back_as_it_went(supervisor: Supervisor, files: SandboxFiles, tmp_path: Path) -> None:
    make_tree(tmp_path / "source")
    put = await files.put(USER, SERVICE, tmp_path / "source")
    got = await files.get(USER, SERVICE, ".", tmp_path / "back")
    before = contents(tmp_path / "source")
    assert contents(tmp_path / "back") == before
    regular = [content for content in before.values() if content is not None]
    assert put == Transfer(len(regular), sum(map(len, regular)) - len("same"))
    assert (got.files, got.bytes) == (len(regular), sum(map(len, regular)))
    assert sorted(got.skipped) == ["away", "link"]
    inside = await home_of(supervisor) / "sandboxes" / SERVICE
    assert os.readlink(inside / "away") == "/etc/passwd"
    assert (inside / "one").stat().st_ino == (inside / "two").stat().st_ino
    assert (tmp_path / "back/one").stat().st_ino != (tmp_path / "back/two").stat().st_ino
    modes = {name: stat.S_IMODE((tmp_path / "back" / name).stat().st_mode) for name in ("run", "locked", "one")}
    assert modes == {"run": 0o700, "locked": 0o500, "one": 0o600}
    assert int((tmp_path / "back/one").stat().st_mtime) == int((tmp_path / "source/one").stat().st_mtime)
    assert (tmp_path / "back/one").stat().st_uid == os.geteuid()


async def test_what_was_put_is_the_tenants_and_private(
    supervisor: Supervisor, files: SandboxFiles, tmp_path: Path
) -> None:
    make_tree(tmp_path / "source")
    await files.put(USER, SERVICE, tmp_path / "source", "some/where")
    user = await supervisor.users.get(USER)
    assert user is not None
    inside = user.home_dir / "sandboxes" / SERVICE
    seen = [inside, *inside.rglob("*")]
    assert len(seen) > 50
    for path in seen:
        found = path.lstat()
        assert (found.st_uid, found.st_gid) == (user.linux_uid, user.linux_gid)
        assert path.is_symlink() or not found.st_mode & 0o7077, path


async def test_a_single_file(files: SandboxFiles, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("print(1)")
    assert await files.put(USER, SERVICE, tmp_path / "main.py") == Transfer(1, 8)
    await files.put(USER, SERVICE, tmp_path / "main.py", "src/")
    await files.put(USER, SERVICE, tmp_path / "main.py", "src/other.py")
    await files.put(USER, SERVICE, b"old", "conf")
    await files.put(USER, SERVICE, b"", "conf")
    assert await files.read(USER, SERVICE, "conf") == b""
    await files.get(USER, SERVICE, "src", tmp_path / "src")
    assert contents(tmp_path / "src") == {"main.py": b"print(1)", "other.py": b"print(1)"}
    (tmp_path / "there").write_text("older")
    assert await files.get(USER, SERVICE, "src/other.py", tmp_path / "there") == Transfer(1, 8)
    assert (tmp_path / "there").read_text() == "print(1)"
    whole = await files.get(USER, SERVICE, ".", tmp_path / "all")
    assert sorted(contents(tmp_path / "all")) == ["conf", "main.py", "src", "src/main.py", "src/other.py"], whole


@pytest.mark.parametrize("name", ODD_NAMES)
async def test_odd_names_by_themselves(files: SandboxFiles, tmp_path: Path, name: str) -> None:
    await files.put(USER, SERVICE, b"x", name)
    assert await files.read(USER, SERVICE, name) == b"x"
    await files.put(USER, SERVICE, b"y", f"{name}.d/{name}")
    await files.get(USER, SERVICE, f"{name}.d", tmp_path / "back")
    assert contents(tmp_path / "back") == {name: b"y"}


async def test_a_folder_is_merged_into_what_is_there(files: SandboxFiles, tmp_path: Path) -> None:
    for number in ("1", "2"):
        (tmp_path / number / "sub").mkdir(parents=True)
        (tmp_path / number / "sub" / "same").write_text(number)
        (tmp_path / number / "sub" / f"only{number}").write_text(number)
        await files.put(USER, SERVICE, tmp_path / number)
    await files.get(USER, SERVICE, ".", tmp_path / "back")
    assert contents(tmp_path / "back") == {"sub": None, "sub/same": b"2", "sub/only1": b"1", "sub/only2": b"2"}


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "a/..", "x\0y", "x" * 5000])
async def test_paths_that_lead_elsewhere_are_refused(files: SandboxFiles, tmp_path: Path, path: str) -> None:
    with pytest.raises(SpecError):
        await files.put(USER, SERVICE, b"x", path)
    with pytest.raises(SpecError):
        await files.get(USER, SERVICE, path, tmp_path / "x")
    with pytest.raises(SpecError):
        await files.read(USER, SERVICE, path)
    with pytest.raises(SpecError):
        await files.put(USER, "_job-1", b"x", "x")


async def test_what_is_not_there(supervisor: Supervisor, files: SandboxFiles, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no user"):
        await files.read(USER, SERVICE, "x")
    await supervisor.users.get_or_create(USER)
    with pytest.raises(NotFoundError):
        await files.get(USER, SERVICE, ".", tmp_path / "x")
    await files.put(USER, SERVICE, b"x", "folder/x")
    with pytest.raises(NotFoundError):
        await files.get(USER, SERVICE, "folder/y", tmp_path / "x")
    with pytest.raises(FilesError, match="no file"):
        await files.read(USER, SERVICE, "folder")
    with pytest.raises(FilesError, match="directory"):
        await files.put(USER, SERVICE, b"x", "folder")
    with pytest.raises(FilesError, match=r"(?i)not a directory"):
        await files.put(USER, SERVICE, b"x", "folder/x/y")
    with pytest.raises(FilesError):
        await files.put(USER, SERVICE, tmp_path / "missing")
    assert not list(tmp_path.iterdir())


async def test_special_files_are_refused_before_anything_is_sent(
    supervisor: Supervisor, files: SandboxFiles, tmp_path: Path
) -> None:
    make_tree(tmp_path / "source")
    os.mkfifo(tmp_path / "source/locked/fifo")
    with pytest.raises(FilesError, match=r"locked/fifo \(FIFO\)"):
        await files.put(USER, SERVICE, tmp_path / "source")
    with pytest.raises(FilesError, match="neither a file nor a folder"):
        await files.put(USER, SERVICE, tmp_path / "source/locked/fifo")
    assert await supervisor.users.list() == []


async def test_existing_destinations(files: SandboxFiles, tmp_path: Path) -> None:
    await files.put(USER, SERVICE, b"x", "folder/x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("stays")
    for path, destination in (("folder", "folder"), ("folder/x", "folder"), ("folder", "file")):
        with pytest.raises(FilesError, match="there already"):
            await files.get(USER, SERVICE, path, tmp_path / destination)
    assert contents(tmp_path) == {"folder": None, "file": b"stays"}
    (tmp_path / "link").symlink_to("file")
    await files.get(USER, SERVICE, "folder/x", tmp_path / "link")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "stays"


async def test_bounds(files: SandboxFiles, tmp_path: Path) -> None:
    for name in "abc":
        await files.put(USER, SERVICE, bytes(1000), name)
    with pytest.raises(FilesError, match="more than 2999 bytes"):
        await files.get(USER, SERVICE, ".", tmp_path / "x", max_bytes=2999)
    with pytest.raises(FilesError, match="more than 3 files"):
        await files.get(USER, SERVICE, ".", tmp_path / "x", max_entries=3)
    with pytest.raises(FilesError, match="more than 999 bytes"):
        await files.read(USER, SERVICE, "a", max_bytes=999)
    assert not list(tmp_path.iterdir())
    assert (await files.get(USER, SERVICE, ".", tmp_path / "x", max_bytes=3000, max_entries=4)).bytes == 3000


async def test_what_the_tenant_cannot_read_fails_the_whole(
    supervisor: Supervisor, files: SandboxFiles, tmp_path: Path
) -> None:
    await files.put(USER, SERVICE, b"x", "a")
    inside = await home_of(supervisor) / "sandboxes" / SERVICE
    (inside / "roots").write_text("root's")
    (inside / "roots").chmod(0o600)
    with pytest.raises(FilesError, match=r"roots: Cannot open: Permission denied"):
        await files.get(USER, SERVICE, ".", tmp_path / "x")
    assert not list(tmp_path.iterdir())


async def test_a_put_that_fails_leaves_no_part_of_a_file(
    supervisor: Supervisor, files: SandboxFiles, tmp_path: Path
) -> None:
    await files.put(USER, SERVICE, b"old", "f")
    source = tmp_path / "f"
    with source.open("wb") as file:
        file.truncate(1 << 30)

    def shorten(done: int, total: int | None) -> None:
        if done:
            os.truncate(source, 4096)

    with pytest.raises(FilesError, match="became shorter"):
        await files.put(USER, SERVICE, source, "f", on_progress=shorten)
    assert await files.read(USER, SERVICE, "f") == b"old"
    assert [path.name for path in (await home_of(supervisor) / "sandboxes" / SERVICE).iterdir()] == ["f"]


async def test_a_cancelled_put_has_ended_and_leaves_nothing(
    supervisor: Supervisor, files: SandboxFiles, tmp_path: Path
) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(8 << 30)
    moving = asyncio.Event()
    loop = asyncio.get_running_loop()

    def note(done: int, total: int | None) -> None:
        loop.call_soon_threadsafe(moving.set)

    task = asyncio.create_task(files.put(USER, SERVICE, tmp_path / "f", on_progress=note))
    await moving.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    inside = await home_of(supervisor) / "sandboxes" / SERVICE
    assert list(inside.iterdir()) == []


async def test_default_limits_hold_for_jobs_too(settings: Settings) -> None:
    async with Supervisor(settings=replace(settings, default_limits=Limits(memory_max="64M"))) as supervisor:
        assert supervisor._host is not None
        if "memory" in supervisor._host.tree.root.controllers():
            await supervisor.files.put(USER, SERVICE, b"x", "x")
        else:
            with pytest.raises(LimitsError):
                await supervisor.files.put(USER, SERVICE, b"x", "x")
