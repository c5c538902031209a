"""`put` and `get`: a client of `SandboxFiles`, and what it prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import USER, Cli, Start

pytestmark = pytest.mark.host


def test_there_and_back(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "source/sub").mkdir(parents=True)
    (tmp_path / "source/sub/a").write_text("content")
    (tmp_path / "source/link").symlink_to("sub/a")
    put = cli("put", USER, "api", str(tmp_path / "source"), "src", "--json")
    assert json.loads(put.stdout) == {"files": 1, "bytes": 7, "skipped": [], "warnings": ""}
    got = cli("get", USER, "api", "src", str(tmp_path / "back"))
    assert (got.returncode, got.stdout) == (0, b"")
    assert got.stderr == b"left out, neither file nor folder: link\ngot 1 file, 7 bytes\n"
    assert (tmp_path / "back/sub/a").read_text() == "content"
    assert cli("get", USER, "api", "src/sub/a", cwd=tmp_path).returncode == 0
    assert (tmp_path / "a").read_text() == "content"


def test_the_name_of_what_is_left_out_is_one_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/x\ngot 9 files, 9 bytes").symlink_to("y")
    (tmp_path / "source/a").write_text("content")
    assert cli("put", USER, "api", str(tmp_path / "source"), "src").returncode == 0
    got = cli("get", USER, "api", "src", str(tmp_path / "back"))
    assert len(got.stderr.splitlines()) == 2
    assert rb"'x\ngot 9 files, 9 bytes'" in got.stderr


def test_errors(cli: Cli, tmp_path: Path) -> None:
    missing = cli("get", USER, "api", "x", str(tmp_path / "x"), "--json")
    assert missing.returncode == 1
    assert json.loads(missing.stdout)["error"]["code"] == "not-found"
    refused = cli("put", USER, "api", str(tmp_path), "../x")
    assert refused.returncode == 1
    assert b"is not a path within a sandbox's directory" in refused.stderr
    assert b"Traceback" not in refused.stderr


@pytest.fixture
def getting(cli: Cli, start: Start, tmp_path: Path) -> Callable[..., subprocess.Popen[bytes]]:
    """Begins to get a large file, and returns when that is under way."""

    def begin(**options: Any) -> subprocess.Popen[bytes]:
        source = tmp_path / "source"
        with source.open("wb") as file:
            file.truncate(1 << 29)
        assert cli("put", USER, "api", str(source), "big").returncode == 0
        out = tmp_path / "out"
        out.mkdir()
        process = start("get", USER, "api", "big", str(out / "big"), **options)
        while not list(out.glob(".pactown-get-*/content")):
            os.sched_yield()
            assert process.poll() is None
        return process

    return begin


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_get_leaves_nothing(
    getting: Callable[..., subprocess.Popen[bytes]], tmp_path: Path, number: signal.Signals
) -> None:
    process = getting()
    process.send_signal(number)
    process.communicate()
    assert process.returncode == 128 + number
    assert list((tmp_path / "out").iterdir()) == []


def test_an_ignored_signal_stays_ignored(getting: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    process = getting(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))  # as nohup does
    process.send_signal(signal.SIGHUP)
    process.communicate()
    assert process.returncode == 0
    assert (tmp_path / "out/big").stat().st_size == 1 << 29
