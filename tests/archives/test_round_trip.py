"""Homes that go out and come back: nothing is lost, nothing is added."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import stat
import subprocess
import tarfile
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from pactown_runner.archives import ArchiveError, LeftOut, export_home, export_stream, import_home, import_stream
from pactown_runner.config import Settings
from pactown_runner.errors import FilesError
from pactown_runner.host import Host
from pactown_runner.models import IsolatedUser
from pactown_runner.supervisor import Supervisor
from tests import hostsweep
from tests.archives.trees import Look, as_tenant, differences, looks, make_tree
from tests.supervising import USER

pytestmark = pytest.mark.host

SPECIALS = (LeftOut("sandboxes/api/fifo", "FIFO"), LeftOut("sandboxes/api/socket", "socket"))


def test_there_and_back(host: Host, user: IsolatedUser, archive: Path) -> None:
    make_tree(user, 300)
    before = looks(user.home_dir)
    exported = export_home(host, user, archive)
    assert differences(before, looks(user.home_dir)) == []
    assert (exported.left_out, exported.left_out_count) == (SPECIALS, 2)
    assert exported.entries == len(before)
    assert exported.archive_bytes == archive.stat().st_size
    assert (stat.S_IMODE(archive.stat().st_mode), archive.stat().st_uid) == (0o600, os.geteuid())
    former = user.home_dir.stat().st_ino
    imported = import_home(host, user, archive)
    assert user.home_dir.stat().st_ino != former
    assert differences(before, looks(user.home_dir)) == []
    assert imported.verified
    numbers = (imported.entries, imported.files, imported.bytes)
    assert numbers == (exported.entries, exported.files, exported.bytes)


@pytest.fixture
async def elsewhere(settings: Settings, slice_name: str) -> AsyncIterator[Supervisor]:
    """A supervisor on a state that has never seen the tenant."""
    base = settings.users_base / "elsewhere"
    own = {name: base / f".{name}" for name in ("state_dir", "log_dir", "run_dir")}
    slice_ = slice_name.replace(".slice", "b.slice")
    async with Supervisor(settings=replace(settings, users_base=base, cgroup_slice=slice_, **own)) as supervisor:  # type: ignore[arg-type]
        yield supervisor
    for path in hostsweep.cgroup_dirs(slice_.__eq__):
        hostsweep.remove_cgroup(path)
    shutil.rmtree(base)


@pytest.mark.deadline(300)
async def test_twenty_thousand_files_move_to_another_host(
    host: Host, user: IsolatedUser, archive: Path, elsewhere: Supervisor
) -> None:
    make_tree(user, 20_000)
    before = looks(user.home_dir)
    assert len(before) > 20_000
    export_home(host, user, archive)
    shutil.rmtree(user.home_dir / "sandboxes")
    assert elsewhere._host is not None
    # As a login of the other state holds the name, the other one has to be a longer one.
    there = await elsewhere.users.get_or_create(USER)
    assert there.linux_uid != user.linux_uid
    import_home(elsewhere._host, there, archive)
    after = looks(there.home_dir)
    assert {look.owner for look in after.values()} == {(there.linux_uid, there.linux_gid)}
    assert differences(nobodys(before), nobodys(after)) == []
    again = archive.with_name("again.tar.gz")
    export_home(elsewhere._host, there, again)
    assert manifest(again) == manifest(archive)


def manifest(archive: Path) -> bytes:
    with tarfile.open(archive) as tar:
        *_, last = tar
        file = tar.extractfile(last)
        assert file is not None
        return file.read()


def nobodys(found: dict[bytes, Look]) -> dict[bytes, Look]:
    return {path: replace(look, owner=(0, 0)) for path, look in found.items()}


def test_gnu_tar_makes_the_same_of_it(host: Host, user: IsolatedUser, archive: Path, users_base: Path) -> None:
    make_tree(user, 30)
    before = looks(user.home_dir)
    export_home(host, user, archive)
    out = users_base / "out"
    out.mkdir()
    subprocess.run(["tar", "-xzpf", archive, "-C", out], check=True, capture_output=True)
    assert sorted(os.listdir(out)) == ["pactown-manifest.jsonl", user.linux_username]
    assert differences(nobodys(before), nobodys(looks(out / user.linux_username))) == []


def test_the_manifest_tells_of_each_file(host: Host, user: IsolatedUser, archive: Path) -> None:
    as_tenant(user, 'import os; open("a", "w").write("hello"); open(b"\\xff", "w"); os.symlink("a", "l")')
    export_home(host, user, archive)
    head, *lines, last = map(json.loads, manifest(archive).splitlines())
    assert head == {"format": "pactown-home", "version": 1, "user_id": USER}
    assert [line.get("path", line.get("path_b64")) for line in lines] == ["", "a", "l", "/w=="]
    assert (lines[1]["size"], lines[1]["mode"]) == (5, "0644")
    assert lines[1]["sha256"] == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert lines[2]["target"] == "a"
    assert last == {"entries": 4, "files": 2, "bytes": 5}


# ---- Archives of the original


@pytest.mark.parametrize("way", ["tar", "tar --format=posix", "tar -S --format=posix", "PAX", "GNU", "USTAR"])
def test_archives_of_the_original(host: Host, user: IsolatedUser, users_base: Path, archive: Path, way: str) -> None:
    old = users_base / "old" / "pactown_0123abcd"
    old.mkdir(parents=True)
    shutil.chown(old, user.linux_uid, user.linux_gid)
    make = (
        'import os; os.mkdir("d" * 90); os.symlink("../x", "d" * 90 + "/l"); os.mkdir("d" * 90 + "/" + "e" * 90);'
        'open("d" * 90 + "/" + "e" * 90 + "/f", "w").write("x" * 70000); open("\\u00fc", "w");'
        'os.link("\\u00fc", "same"); open("s", "w").truncate(1 << 20); os.mkfifo("p");'
        'os.makedirs("sandboxes/api/.venv/bin"); open("sandboxes/api/.venv/pyvenv.cfg", "w")'
    )
    as_tenant(replace(user, home_dir=old), make)
    if way.startswith("tar"):
        subprocess.run([*way.split(), "-czf", archive, "-C", old.parent, old.name], check=True)
    else:
        with tarfile.open(archive, "w:gz", format=getattr(tarfile, f"{way}_FORMAT")) as tar:
            tar.add(old, arcname=old.name)
    imported = import_home(host, user, archive)
    assert not imported.verified
    assert imported.left_out == (LeftOut("p", "FIFO"),)
    # Whole seconds are all that most of them know; and of holes they know nothing.
    coarse = [{path: coarsely(look) for path, look in looks(top).items()} for top in (old, user.home_dir)]
    coarse[0][b""] = replace(coarse[0][b""], mode=0o700)
    assert differences(*coarse) == []
    assert (user.home_dir / "s").read_bytes() == bytes(1 << 20)


def coarsely(look: Look) -> Look:
    return replace(look, mtime=look.mtime // 10**9, content=look.content if look.length < 1 << 20 else "")


# ---- What is left out


def test_virtual_environments_stay_here(host: Host, user: IsolatedUser, archive: Path) -> None:
    as_tenant(
        user,
        """
import os
os.makedirs(".cache/venvs/abc/bin")
os.makedirs(".cache/pip")
for name in "abcdef":
    os.makedirs("sandboxes/" + name)
os.symlink("../../.cache/venvs/abc", "sandboxes/a/.venv")
os.symlink(os.path.abspath(".cache/venvs/abc"), "sandboxes/b/.venv")
os.makedirs("sandboxes/c/.venv/bin")
open("sandboxes/c/.venv/pyvenv.cfg", "w")
os.makedirs("sandboxes/d/.venv/bin")
os.symlink("/usr", "sandboxes/e/.venv")
open("sandboxes/f/.venv", "w")
os.makedirs("sandboxes/f/sub/.venv")
open("sandboxes/f/sub/.venv/pyvenv.cfg", "w")
os.chmod("sandboxes/c/.venv", 0)
""",
    )
    exported = export_home(host, user, archive)
    left_out = (".cache/venvs", "sandboxes/a/.venv", "sandboxes/b/.venv", "sandboxes/c/.venv")
    assert exported.left_out == tuple(LeftOut(path, "venv") for path in left_out)
    assert stat.S_IMODE((user.home_dir / "sandboxes/c/.venv").stat().st_mode) == 0
    import_home(host, user, archive)
    home = user.home_dir
    assert sorted(os.listdir(home / ".cache")) == ["pip"]
    assert [name for name in "abcdef" if os.path.lexists(home / f"sandboxes/{name}/.venv")] == ["d", "e", "f"]
    assert (home / "sandboxes/f/sub/.venv/pyvenv.cfg").exists()


def test_what_is_not_the_tenants_is_listed(host: Host, user: IsolatedUser, archive: Path) -> None:
    as_tenant(user, 'import os; os.mkdir("a"); open("a/mine", "w"); open("z", "w")')
    (user.home_dir / "a/roots").write_text("secret")
    (user.home_dir / "a/roots").chmod(0o600)
    (user.home_dir / "a/shown").write_text("shown")
    (user.home_dir / "b").mkdir(mode=0o700)
    exported = export_home(host, user, archive)
    assert exported.left_out == (LeftOut("a/roots", "unreadable"), LeftOut("b", "unreadable"))
    assert b"secret" not in gzip.decompress(archive.read_bytes())
    # The former home cannot be emptied of what is not the tenant's own; the rest of it is.
    import_home(host, user, archive)
    assert (user.home_dir / "a/shown").stat().st_uid == user.linux_uid
    left = [path for path in user.home_dir.parent.iterdir() if path.name.startswith(".fresh")]
    assert left == []


# ---- Bounds


@pytest.mark.parametrize(
    ("setting", "bound", "says"),
    [
        ("archive_max_bytes", 99_999, r"more than 99999 bytes \(archive_max_bytes\)"),
        ("archive_max_bytes", 100_000, "the archive is larger than 100000 bytes"),
        ("archive_max_entries", 12, "more than 12 files and folders"),
        ("archive_max_depth", 3, "a/b/c/d: more than 3 folders"),
    ],
)
def test_too_much_is_not_exported(
    host: Host, user: IsolatedUser, archive: Path, setting: str, bound: int, says: str
) -> None:
    make = 'import os; os.makedirs("a/b/c/d"); [open("f%d" % n, "wb").write(os.urandom(12500)) for n in range(8)]'
    as_tenant(user, make)
    exported = export_home(host, user, archive)
    assert (exported.entries, exported.bytes) == (13, 100_000)
    before = archive.read_bytes()
    lower = replace(host, settings=replace(host.settings, **{setting: bound}))  # type: ignore[arg-type]
    with pytest.raises(ArchiveError, match=says):
        export_home(lower, user, archive)
    assert archive.read_bytes() == before
    assert sorted(os.listdir(archive.parent)) == [".state", "archive.tar.gz", user.linux_username]


def test_what_no_path_leads_to_is_not_exported(host: Host, user: IsolatedUser, archive: Path) -> None:
    make = "import os\nfor n in range(22):\n os.mkdir('d' * 200)\n os.chdir('d' * 200)"
    as_tenant(user, make)
    with pytest.raises(ArchiveError, match="longer than any that can be opened"):
        export_home(host, user, archive)
    assert not archive.exists()


def test_an_archive_of_another_user(host: Host, user: IsolatedUser, archive: Path) -> None:
    as_tenant(user, 'open("f", "w").write("x")')
    export_home(host, user, archive)
    other = host.users.get_or_create("auth0|other")
    with pytest.raises(ArchiveError, match=r"made of the home of 'auth0\|123456', not of that of 'auth0\|other'"):
        import_home(host, other, archive)
    assert os.listdir(other.home_dir) == []
    assert import_home(host, other, archive, made_for=USER).verified
    assert (other.home_dir / "f").stat().st_uid == other.linux_uid


# ---- Where it goes, and how it is told


def test_progress(host: Host, user: IsolatedUser, archive: Path) -> None:
    as_tenant(user, 'import os; open("f", "wb").write(os.urandom(2 << 20))')
    told: list[tuple[int, int | None]] = []
    export_home(host, user, archive, progress=lambda done, total: told.append((done, total)))
    size = archive.stat().st_size
    assert len(told) > 4
    assert told == sorted(told)
    assert told[-1] == (size, None)
    told.clear()
    import_home(host, user, archive, progress=lambda done, total: told.append((done, total)))
    assert len(told) > 4
    assert told == sorted(told)
    assert told[-1][1] == told[-1][0] == size


def test_through_pipes(host: Host, user: IsolatedUser) -> None:
    make_tree(user, 20)
    before = looks(user.home_dir)
    read, write = os.pipe()
    pieces: list[bytes] = []

    def reader() -> None:
        while data := os.read(read, 5000):
            pieces.append(data)

    thread = threading.Thread(target=reader)
    thread.start()
    try:
        exported = export_stream(host, user, write)
    finally:
        os.close(write)
        thread.join()
        os.close(read)
    assert exported.archive_bytes == sum(map(len, pieces))
    read, write = os.pipe()

    def writer() -> None:
        with open(write, "wb") as file:
            file.writelines(pieces)

    thread = threading.Thread(target=writer)
    thread.start()
    try:
        assert import_stream(host, user, read).verified
    finally:
        thread.join()
        os.close(read)
    assert differences(before, looks(user.home_dir)) == []


def test_paths_that_a_tenant_could_change_are_refused(host: Host, user: IsolatedUser, users_base: Path) -> None:
    as_tenant(user, 'import os; os.mkdir("out"); open("out/archive.tar.gz", "w")')
    (users_base / "mine").mkdir()
    (users_base / "link").symlink_to(user.home_dir / "out")
    (users_base / "archive-link").symlink_to(user.home_dir / "out/archive.tar.gz")
    for name, mode in (("open", 0o777), ("sticky", 0o1777)):
        (users_base / name).mkdir()
        (users_base / name).chmod(mode)
    as_tenant(user, f'import os; os.symlink("{users_base}/mine", "{users_base}/sticky/planted")')
    as_tenant(user, f'open("{users_base}/sticky/planted.tar.gz", "w")')
    for way in (
        user.home_dir / "out/archive.tar.gz",
        users_base / "link/archive.tar.gz",
        users_base / "archive-link",
        users_base / "open/archive.tar.gz",
        users_base / "sticky/planted/archive.tar.gz",
        users_base / "sticky/planted.tar.gz",
    ):
        for move in (export_home, import_home):
            with pytest.raises(ArchiveError, match=r"a tenant's \(uid|everybody can change"):
                move(host, user, way)
    assert (user.home_dir / "out/archive.tar.gz").read_bytes() == b""
    for way in (users_base / "mine/archive.tar.gz", users_base / "sticky/archive.tar.gz"):
        export_home(host, user, way)
        assert import_home(host, user, way).verified


@pytest.mark.parametrize("direction", ["out", "in"])
def test_a_pipe_that_nobody_uses_keeps_nobody(host: Host, user: IsolatedUser, direction: str) -> None:
    as_tenant(user, 'import os; open("f", "wb").write(os.urandom(2 << 20))')
    before = looks(user.home_dir)
    read, write = os.pipe()
    try:
        move, fd = (export_stream, write) if direction == "out" else (import_stream, read)
        with pytest.raises(FilesError, match=r"longer than 0\.5 s"):
            move(host, user, fd, timeout=0.5)
    finally:
        os.close(read)
        os.close(write)
    assert differences(before, looks(user.home_dir)) == []


def test_a_reader_that_goes_away(host: Host, user: IsolatedUser) -> None:
    as_tenant(user, 'import os; open("f", "wb").write(os.urandom(2 << 20))')
    read, write = os.pipe()
    os.close(read)
    try:
        with pytest.raises(BrokenPipeError):
            export_stream(host, user, write)
    finally:
        os.close(write)


@pytest.mark.parametrize("what", ["missing/archive.tar.gz", "folder"])
def test_a_target_that_cannot_be(host: Host, user: IsolatedUser, users_base: Path, what: str) -> None:
    (users_base / "folder").mkdir()
    with pytest.raises(ArchiveError, match=r"cannot (write|reach)"):
        export_home(host, user, users_base / what)
    with pytest.raises(ArchiveError, match=r"cannot (read|reach)"):
        import_home(host, user, users_base / what)
    assert sorted(os.listdir(users_base)) == [".state", "folder", user.linux_username]
