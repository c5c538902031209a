"""Homes that go out and come back: nothing is lost, nothing is added."""

from __future__ import annotations

import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from pactown_runner.archives import LeftOut, export_home, import_home
from pactown_runner.host import Host
from pactown_runner.models import IsolatedUser
from tests.archives.trees import Look, differences, looks, make_tree

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


def test_gnu_tar_makes_the_same_of_it(host: Host, user: IsolatedUser, archive: Path, users_base: Path) -> None:
    make_tree(user, 30)
    before = looks(user.home_dir)
    export_home(host, user, archive)
    out = users_base / "out"
    out.mkdir()
    subprocess.run(["tar", "-xzpf", archive, "-C", out], check=True, capture_output=True)
    assert sorted(os.listdir(out)) == ["pactown-manifest.jsonl", user.linux_username]
    assert differences(nobodys(before), nobodys(looks(out / user.linux_username))) == []


def nobodys(found: dict[bytes, Look]) -> dict[bytes, Look]:
    return {path: replace(look, owner=(0, 0)) for path, look in found.items()}
