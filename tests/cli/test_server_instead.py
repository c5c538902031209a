"""Commands that need no server, and have one do it all the same: `--server`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import SECONDS, USER, Cli, Result, Start
from tests.cli.test_served import Served, document, error_of, socket_of, start_words
from tests.supervising import eventually

pytestmark = pytest.mark.host

Asked = Callable[..., Result]


@pytest.fixture
def asked(serving: Served, cli: Cli, environ: dict[str, str], tmp_path: Path) -> Asked:
    """Runs a command that leads to the server by `--server` alone: its own state is another one, and stays empty."""
    address = socket_of(environ)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(*words: str, **options: Any) -> Result:
        at = 2 if words[0] == "users" else 1
        done = cli(*words[:at], "--server", address, "--users-base", str(elsewhere), *words[at:], **options)
        assert list(elsewhere.iterdir()) == []
        return done

    return run


def execute(command: str, *options: str) -> list[str]:
    return ["exec", "--user", USER, "--service", "api", *options, "--", "sh", "-c", command]


def test_a_program_is_executed_by_the_server(asked: Asked, cli: Cli) -> None:
    assert cli(*start_words("sleep", "1000")).returncode == 0
    done = asked(*execute("cat; pwd; echo $A >&2; exit 3", "-i", "--env", "A=b", "--cwd", "/"), input=b"\0in\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"\0in\n/\n", b"b\n")
    assert asked(*execute("kill -9 $$")).returncode == 137
    done = asked(*execute("head -c 3000000 /dev/zero"))
    assert (done.returncode, done.stdout, done.stderr) == (0, bytes(3_000_000), b"")
    done = asked("exec", "--user", USER, "--service", "api", "--", "nothing-of-this-name")
    assert (done.returncode, done.stdout) == (125, b"")
    assert b"cannot execute" in done.stderr
    assert asked("exec", "--user", USER, "--service", "other", "--", "true").returncode == 125


async def test_an_interrupted_command_ends_what_the_server_executed(
    asked: Asked, cli: Cli, start: Start, environ: dict[str, str], tmp_path: Path
) -> None:
    assert cli(*start_words("sleep", "1000")).returncode == 0
    environ["PACTOWN_SERVER"] = socket_of(environ)
    process = start(*execute("sleep 1000 & wait"))

    def tasks() -> int:
        return len(asked(*execute("pgrep -u $(id -u) -x sleep")).stdout.split())

    await eventually(lambda: tasks() == 2, SECONDS)
    process.terminate()
    assert process.wait(SECONDS) == 143
    await eventually(lambda: tasks() == 1, SECONDS)


def test_what_the_server_executes_is_heard_as_it_prints(
    serving: Served, cli: Cli, start: Start, environ: dict[str, str]
) -> None:
    assert cli(*start_words("sleep", "1000")).returncode == 0
    environ["PACTOWN_SERVER"] = socket_of(environ)
    words = execute("echo ready; while [ ! -e go ]; do sleep 0.02; done; echo done >&2")
    process = start(*words)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"ready\n"
    assert cli(*execute("touch go")).returncode == 0
    assert (process.stderr.read(), process.wait(SECONDS)) == (b"done\n", 0)


def test_files_go_there_and_back(asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\0content")
    assert document(asked("put", USER, "api", str(tmp_path / "a"), "sub/b", "--json"))["bytes"] == 8
    done = asked("get", USER, "api", "sub/b", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"got 1 file, 8 bytes\n")
    assert (tmp_path / "b").read_bytes() == b"\0content"
    assert asked("put", USER, "api", str(tmp_path / "a")).stderr == b"put 1 file, 8 bytes\n"
    assert asked("get", USER, "api", "a", str(tmp_path / "c")).returncode == 0
    assert (tmp_path / "c").read_bytes() == b"\0content"
    # A folder is not a file, neither here nor there, and what is not there leaves nothing here.
    assert error_of(asked("put", USER, "api", str(tmp_path), "--json"))["code"] == "files"
    assert asked("get", USER, "api", "sub", str(tmp_path / "d")).returncode == 1
    assert error_of(asked("get", USER, "api", "missing", str(tmp_path / "d"), "--json"))["code"] == "not-found"
    assert not (tmp_path / "d").exists()


def test_users_from_their_making_to_their_end(asked: Asked, cli: Cli, tmp_path: Path) -> None:
    made = document(asked("users", "create", USER, "--json"))
    assert made["created"] is True
    assert document(asked("users", "create", USER, "--json")) == {**made, "created": False}
    del made["created"]
    assert document(asked("users", "list", "--json")) == {"users": [made], "count": 1}
    assert made["linux_username"].encode() in asked("users", "list").stdout
    assert cli(*start_words("sleep", "1000")).returncode == 0
    shown = document(asked("users", "show", USER, "--json"))
    assert shown == {**made, "tier": None, "blocked": False, "sandboxes": [{"service_id": "api", "kind": "service"}]}
    assert b"service   api, since " in asked("users", "show", USER).stdout
    assert document(asked("users", "stats", USER, "--json"))["user"]["saas_user_id"] == USER
    assert b"entries    " in asked("users", "stats", USER).stdout
    assert asked("users", "delete", USER).stderr.startswith(b"error: nobody is there to be asked")
    assert asked("users", "delete", USER, "--yes").returncode == 0
    assert document(cli("users", "list", "--json"))["count"] == 0
    assert error_of(asked("users", "show", USER, "--json"))["code"] == "not-found"


def test_homes_go_out_and_in(asked: Asked, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(os.urandom(1 << 20))
    assert asked("put", USER, "api", str(tmp_path / "a")).returncode == 0
    archive = tmp_path / "home.tar.gz"
    told = document(asked("users", "export", USER, str(archive), "--json"))
    assert told == {"path": str(archive), "archive_bytes": archive.stat().st_size}
    piped = asked("users", "export", USER, "-")
    assert piped.returncode == 0
    for name, source, given in (("x", str(archive), b""), ("y", "-", piped.stdout)):
        done = asked("users", "import", name, "--made-for", USER, source, "--json", input=given)
        assert json.loads(done.stdout)["files"] == 1
        assert asked("get", name, "api", "a", str(tmp_path / name)).returncode == 0
        assert (tmp_path / name).read_bytes() == (tmp_path / "a").read_bytes()
    assert asked("users", "export", USER, str(archive), "--stopped").returncode == 2
    assert asked("users", "import", "z", "-", input=b"no archive").returncode == 1


async def test_an_interrupted_import_leaves_the_home_as_it_was(
    asked: Asked, start: Start, environ: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"content")
    environ["PACTOWN_SERVER"] = socket_of(environ)
    process = start("users", "import", USER, "-", stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(b"\x1f\x8b\x08\0")
    process.stdin.flush()
    await eventually(lambda: document(asked("users", "list", "--json"))["count"] == 1, SECONDS)
    process.terminate()
    assert process.wait(SECONDS) == 143
    assert asked("put", USER, "api", str(tmp_path / "a")).returncode == 0
    assert asked("get", USER, "api", "a", str(tmp_path / "b")).returncode == 0
