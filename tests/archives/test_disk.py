"""Disks that are full, or that can do less than others."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pactown_runner.archives import ArchiveError, export_home, import_home
from pactown_runner.config import Settings
from pactown_runner.host import Host
from pactown_runner.models import IsolatedUser
from tests.archives.trees import as_tenant, differences, looks

pytestmark = pytest.mark.host

FILL = 'import os; os.makedirs("a/b"); [open("a/b/%d" % n, "wb").write(os.urandom(1 << 20)) for n in range(6)]'


@pytest.fixture
def small(users_base: Path) -> Iterator[Path]:
    """A file system of 32 MiB."""
    disk = users_base / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m,mode=711", "disk", disk], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.fixture
def settings(settings: Settings, small: Path) -> Settings:
    """Homes on the small disk, and nothing else there."""
    return replace(settings, users_base=small / "homes")


def fill_up(disk: Path, but: int) -> Path:
    """Leave so many bytes."""
    found = os.statvfs(disk)
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(found.f_bavail * found.f_bsize - but))
    return ballast


def test_an_export_on_a_full_disk_leaves_nothing(host: Host, user: IsolatedUser, small: Path) -> None:
    as_tenant(user, FILL)
    target = small / "archive.tar.gz"
    ballast = fill_up(small, 3 << 20)
    with pytest.raises(ArchiveError, match=r"cannot write .*archive\.tar\.gz: No space left"):
        export_home(host, user, target)
    assert sorted(os.listdir(small)) == ["ballast", "homes"]
    ballast.unlink()
    export_home(host, user, target)
    before = target.read_bytes()
    fill_up(small, 3 << 20)
    with pytest.raises(ArchiveError, match="No space left"):
        export_home(host, user, target)
    assert target.read_bytes() == before
    assert sorted(os.listdir(small)) == ["archive.tar.gz", "ballast", "homes"]


def test_an_import_on_a_full_disk_changes_nothing(host: Host, user: IsolatedUser, small: Path, archive: Path) -> None:
    as_tenant(user, FILL)
    export_home(host, user, archive)
    before, inode = looks(user.home_dir), user.home_dir.stat().st_ino
    ballast = fill_up(small, 3 << 20)
    with pytest.raises(ArchiveError, match="No space left"):
        import_home(host, user, archive)
    assert differences(before, looks(user.home_dir)) == []
    assert user.home_dir.stat().st_ino == inode
    assert os.listdir(small / "homes") == [user.home_dir.name]
    ballast.unlink()
    import_home(host, user, archive)
    assert differences(before, looks(user.home_dir)) == []
    assert user.home_dir.stat().st_ino != inode


def test_an_export_where_files_need_names(
    host: Host, user: IsolatedUser, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a kernel or a file system that knows no O_TMPFILE takes it for.
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
    as_tenant(user, FILL)
    out = small / "out"
    out.mkdir()
    fill_up(small, 3 << 20)
    with pytest.raises(ArchiveError, match="No space left"):
        export_home(host, user, out / "archive.tar.gz")
    assert os.listdir(out) == []
    (small / "ballast").unlink()
    seen = set()
    for _ in range(2):
        export_home(host, user, out / "archive.tar.gz", progress=lambda *_: seen.update(os.listdir(out)))
        assert os.listdir(out) == ["archive.tar.gz"]
    assert len([name for name in seen if name.startswith(".pactown-export-")]) == 2
    (out / "folder").mkdir()
    with pytest.raises(ArchiveError, match="cannot write"):
        export_home(host, user, out / "folder")
    assert sorted(os.listdir(out)) == ["archive.tar.gz", "folder"]
