"""Archives made to do harm: nothing beside the tenant's home changes, and the home does not when they are refused."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pactown_runner.archives import ArchiveError, Imported, export_home, import_home
from pactown_runner.host import Host
from pactown_runner.models import IsolatedUser
from tests.archives import pythons
from tests.archives.hostile import REFUSED, TAKEN, Aim, Case
from tests.archives.trees import as_tenant, differences, looks

if TYPE_CHECKING:
    from tests.hostguard import Run

pytestmark = pytest.mark.host

PYTHONS = pythons.found()
OLD = sorted(version for version in PYTHONS if tuple(map(int, version.split(".")[:2])) < (3, 9))

HONEST = """
import contextlib
import os
os.makedirs("sandboxes/api")
for name in ("main.py", "data"):
    with open("sandboxes/api/" + name, "w") as file:
        file.write("honest " + name)
os.symlink("main.py", "sandboxes/api/link")
os.link("sandboxes/api/data", "sandboxes/api/same")
"""


@pytest.fixture
def bounded(host: Host) -> Host:
    """A host with bounds that a test can reach."""
    bounds = {"archive_max_bytes": 8 << 20, "archive_max_entries": 2500, "archive_max_depth": 30}
    return replace(host, settings=replace(host.settings, **bounds))  # type: ignore[arg-type]


@pytest.fixture
def aim(bounded: Host, user: IsolatedUser, users_base: Path, archive: Path) -> Aim:
    as_tenant(user, HONEST)
    victim = users_base / "victim"
    victim.mkdir()
    (victim / "canary").write_text("canary")
    for path, mode in ((victim / "canary", 0o666), (victim, 0o777)):
        path.chmod(mode)
    export_home(bounded, user, archive)
    honest = archive.read_bytes()
    archive.unlink()
    return Aim(victim, users_base, user.home_dir, honest)


@pytest.fixture(scope="session")
def reach(test_run: Run) -> dict[str, Path]:
    """Programs that run the Pythons of this machine, made when they are asked for."""

    class Reach(dict[str, Path]):
        def __missing__(self, version: str) -> Path:
            self[version] = pythons.within_reach(PYTHONS[version], test_run.directory / "pythons")
            return self[version]

    return Reach()


def outside(aim: Aim) -> dict[str, tuple[object, ...]]:
    """All beside the home that an archive could be aimed at."""
    found: dict[str, tuple[object, ...]] = {}
    for path in (aim.base, *aim.base.iterdir()):
        status = path.lstat()
        found[str(path)] = (status.st_mode, status.st_uid, status.st_gid)
    return found | harmed(aim.victim)


def harmed(victim: Path) -> dict[str, tuple[object, ...]]:
    """All that could be done to a victim, down to a hard link."""
    found: dict[str, tuple[object, ...]] = {}
    for path in [victim, *victim.rglob("*")]:
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        times = (status.st_mtime_ns, status.st_ctime_ns)
        found[f"{path} itself"] = (status.st_mode, status.st_uid, status.st_ino, status.st_nlink, *times, content)
    return found


def try_import(host: Host, user: IsolatedUser, aim: Aim, case: Case, python: Path | None = None) -> Imported:
    archive = aim.base / "hostile.tar.gz"
    made = case.make(aim)
    with archive.open("wb") as file:
        for piece in [made] if isinstance(made, bytes) else made:
            file.write(piece)
    try:
        return import_home(host, user, archive, python=python)
    finally:
        archive.unlink()


@pytest.mark.deadline(300)
@pytest.mark.parametrize("version", [version for version in PYTHONS if version not in OLD])
def test_what_is_refused_changes_nothing(
    bounded: Host, user: IsolatedUser, aim: Aim, reach: dict[str, Path], version: str
) -> None:
    before, home, inode = outside(aim), looks(aim.home), aim.home.stat().st_ino
    failures = []
    for name, case in REFUSED.items():
        try:
            imported = try_import(bounded, user, aim, case, reach[version])
        except ArchiveError as error:
            if not re.search(case.says, str(error)):
                failures.append(f"{name}: {error}")
        else:
            failures.append(f"{name}: {imported}")
        assert outside(aim) == before, name
        assert differences(home, looks(aim.home)) == [], name
        assert aim.home.stat().st_ino == inode, name
    assert failures == []


@pytest.mark.parametrize("version", [version for version in PYTHONS if version not in OLD])
def test_what_is_taken_is_harmless(
    bounded: Host, user: IsolatedUser, aim: Aim, reach: dict[str, Path], version: str
) -> None:
    before = outside(aim)
    for name, case in TAKEN.items():
        inode = aim.home.stat().st_ino
        imported = try_import(bounded, user, aim, case, reach[version])
        assert not imported.verified, name
        assert outside(aim) == before, name
        assert aim.home.stat().st_ino != inode, name
        for path, look in looks(aim.home).items():
            assert look.owner == (user.linux_uid, user.linux_gid), (name, path)
            assert look.mode <= 0o777, (name, path)
        assert stat.S_IMODE(aim.home.stat().st_mode) == 0o700, name


@pytest.mark.parametrize("version", OLD)
def test_a_python_that_is_too_old_says_so(
    bounded: Host, user: IsolatedUser, aim: Aim, reach: dict[str, Path], version: str
) -> None:
    home = looks(aim.home)
    case = Case(lambda aim: aim.honest, "")
    with pytest.raises(ArchiveError, match=re.escape(f"is {version}")):
        try_import(bounded, user, aim, case, reach[version])
    with pytest.raises(ArchiveError, match=re.escape(f"is {version}")):
        export_home(bounded, user, aim.base / "out.tar.gz", python=reach[version])
    assert differences(home, looks(aim.home)) == []
    assert not os.path.lexists(aim.base / "out.tar.gz")


def test_there_are_enough_of_them() -> None:
    assert len(REFUSED) >= 60
    assert len(REFUSED) + len(TAKEN) >= 120


CARELESS = """
import os, sys, tarfile
with tarfile.open(sys.argv[1], "r:gz") as tar:
    for member in tar:
        try:
            tar.extract(member)
        except (OSError, tarfile.TarError, KeyError, ValueError):
            pass
"""


def test_a_careless_reader_falls_for_them(aim: Aim, user: IsolatedUser, users_base: Path) -> None:
    """That they are sharp: the same uid, and what everybody uses, `tarfile`, without its filters."""
    # Where it makes the home there lies a victim beside it, as for us.
    base = users_base / "careless"
    shutil.copytree(aim.victim, base / "victim")
    for path in (base, base / "victim", base / "victim/canary"):
        os.chown(path, user.linux_uid, user.linux_gid)
    aim = replace(aim, base=base, victim=base / "victim")
    hurt = set()
    for name, case in REFUSED.items():
        if not isinstance(made := case.make(aim), bytes):
            continue
        before = harmed(aim.victim)
        archive = base / "hostile.tar.gz"
        archive.write_bytes(made)
        archive.chmod(0o644)
        # Some of them shut out whoever reads them.
        base.chmod(0o755)
        # Some make it run in a circle, CVE-2025-8194.
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            as_tenant(replace(user, home_dir=base), CARELESS, str(archive), timeout=2)
        if harmed(aim.victim) != before:
            hurt.add(name)
        for path in base.iterdir():
            if path != aim.victim:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    assert len(hurt) >= 20
