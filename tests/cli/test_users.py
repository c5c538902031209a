"""`users`: tenants and their data from the command line, with real accounts, beside servers, and interrupted."""

from __future__ import annotations

import json
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pactown_runner import Settings
from pactown_runner.accounts import Accounts
from pactown_runner.registry import Registry
from tests import hostsweep
from tests.cli.conftest import ROOT, SECONDS, USER, Cli, Result, Start
from tests.cli.terminals import terminal
from tests.supervising import Start as StartChild
from tests.supervising import leftovers

if TYPE_CHECKING:
    from tests.hostguard import Run

pytestmark = pytest.mark.host

LISTED = {
    "saas_user_id",
    "linux_username",
    "linux_uid",
    "linux_gid",
    "home_dir",
    "created_at",
    "status",
    "tier",
    "blocked",
    "running",
}
SERVER = """
async def work(supervisor):
    await supervisor.start(spec(["sleep", "1000"], user="auth0|demo"))
    await say("ready")
    await asyncio.sleep(1000)
"""
MADE = "mkdir -p data/deep && echo content > data/deep/file && ln -s deep data/link && chmod 0 data/deep/file"
HalfWay = Callable[..., subprocess.Popen[bytes]]
STREAMED = 4096
"""So much of an archive is there when it is half-way."""


def _json(done: Result) -> Any:
    assert done.returncode == 0, done
    return json.loads(done.stdout)


def _error(done: Result) -> Any:
    assert (done.returncode, done.stderr) == (1, b"")
    return json.loads(done.stdout)["error"]


def _as_tenant(cli: Cli, script: str, user: str = USER) -> bytes:
    done = cli("run", "--user", user, "--service", "probe", "--", "sh", "-c", script)
    assert done.returncode == 0, done
    return done.stdout


@pytest.fixture
def nothing_left(settings: Settings) -> Callable[[], None]:
    """Fails if anything is under way, or something of it is left."""

    def look() -> None:
        assert not [what for what in leftovers(settings) if not what.endswith(".slice")]
        assert not list(settings.users_base.glob(".fresh-*"))

    return look


@pytest.fixture
def until_row(settings: Settings) -> Callable[[str], None]:
    """Waits until something of this name is claimed."""

    def wait(name: str) -> None:
        with Registry(settings.state_dir / "registry.db") as registry:
            while not [row for row in registry.sandboxes.rows() if row.service_id == name]:
                os.sched_yield()

    return wait


# ---- Who there is


def test_nobody_is_there_and_looking_makes_nothing(cli: Cli, settings: Settings) -> None:
    done = cli("users", "list")
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"pactown-runner users create ID" in done.stderr
    assert _json(cli("users", "list", "--json")) == {"users": [], "count": 0}
    for words in (["show"], ["stats"], ["export"], ["delete", "--yes"]):
        target = ["/nonexistent/x"] if words == ["export"] else []
        error = _error(cli("users", *words, "nobody", *target, "--json"))
        assert error["code"] == "not-found"
        assert "users list" in error["remedy"]
    assert not settings.state_dir.exists()


def test_who_there_is(cli: Cli, settings: Settings) -> None:
    made = _json(cli("users", "create", USER, "--json"))
    login = pwd.getpwuid(made["linux_uid"])
    assert (made["created"], made["linux_username"]) == (True, login.pw_name)
    again = cli("users", "create", USER)
    assert again.stderr == b"it was there already\n"
    other = cli("users", "create", "other\nuser")
    assert rb"pactown-runner run --user $'other\x0auser' -- id" in other.stderr

    listed = _json(cli("users", "list", "--json"))
    assert listed["count"] == 2
    first, second = listed["users"]
    assert first.keys() == LISTED
    assert first == {name: made[name] for name in first.keys() & made.keys()} | {
        "status": "ready",
        "tier": None,
        "blocked": False,
        "running": 0,
    }
    assert second["saas_user_id"] == "other\nuser"

    heading, *rows = cli("users", "list").stdout.decode().splitlines()
    assert heading.split() == ["USER", "LOGIN", "UID", "CREATED", "TIER", "RUNNING", "STATUS"]
    assert [row.split()[0] for row in rows] == [USER, r"'other\nuser'"]
    assert rows[0].split()[1:3] == [login.pw_name, str(login.pw_uid)]

    shown = cli("users", "show", USER)
    assert (shown.returncode, shown.stderr) == (0, b"")
    pairs = dict(line.split(maxsplit=1) for line in shown.stdout.decode().splitlines() if not line.startswith("uid,"))
    assert (pairs["user"], pairs["home"], pairs["status"]) == (USER, login.pw_dir, "ready")
    assert Path(pairs["logs"]).parent == settings.log_dir


async def test_what_is_alive_is_shown(cli: Cli, child: StartChild) -> None:
    process = child(SERVER)
    await process.line()
    assert [user["running"] for user in _json(cli("users", "list", "--json"))["users"]] == [1]
    (sandbox,) = _json(cli("users", "show", USER, "--json"))["sandboxes"]
    assert {name: sandbox[name] for name in ("service_id", "kind", "looked_after")} == {
        "service_id": "api",
        "kind": "service",
        "looked_after": True,
    }
    await process.killed()
    (sandbox,) = _json(cli("users", "show", USER, "--json"))["sandboxes"]
    assert sandbox["looked_after"] is False
    assert b"api, since" in (shown := cli("users", "show", USER).stdout)
    assert b"which nobody looks after" in shown


def test_a_terminal_gets_a_table(start: Start, cli: Cli) -> None:
    cli("users", "create", USER)
    with terminal() as screen:
        process = start("users", "list", stdout=screen.theirs, stderr=screen.theirs)
        text = screen.rest()
        assert process.wait(SECONDS) == 0
    assert USER.encode() in text
    assert b"running" in text
    assert b"RUNNING" not in text
    if os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown"):
        assert b"\x1b[32mready" in text


def test_what_a_home_takes(cli: Cli) -> None:
    _as_tenant(cli, "head -c 3000000 /dev/urandom > big")
    counted = _json(cli("users", "stats", USER, "--json"))
    assert counted.keys() == {"user", "sandbox_count", "total_size_mb", "usage"}
    assert counted["user"]["saas_user_id"] == USER
    assert counted["sandbox_count"] == 1
    usage = counted["usage"]
    assert 3_000_000 <= usage["bytes"] < 4_000_000
    assert (usage["entries"], usage["sandboxes"], usage["disk_max"]) == (4, 1, None)
    text = cli("users", "stats", USER).stdout
    assert b"MiB" in text
    assert f"({usage['bytes']} bytes)".encode() in text
    assert b"no limit is enforced" in text


# ---- Data in and out


def test_there_and_back(cli: Cli, tmp_path: Path, nothing_left: Callable[[], None]) -> None:
    archive = tmp_path / "archive.tar.gz"
    _as_tenant(cli, f"{MADE}; mkfifo fifo")
    exported = cli("users", "export", USER, str(archive))
    assert (exported.returncode, exported.stdout) == (0, b"")
    left_out, what, then = exported.stderr.decode().splitlines()
    assert left_out == "left out (FIFO): sandboxes/probe/fifo"
    assert f"exported {USER!r}: " in what
    typed = shlex.split(then.partition(": ")[2])
    assert typed == ["pactown-runner", "users", "import", USER, str(archive)]

    _as_tenant(cli, "rm -r data; touch more")
    imported = cli(*typed[1:])
    assert (imported.returncode, imported.stdout) == (0, b"")
    assert b"all of it as its manifest says" in imported.stderr
    found = _as_tenant(cli, "stat -c %a data/deep/file; chmod 600 data/deep/file; cat data/link/file; ls")
    assert found == b"0\ncontent\ndata\n"

    again = _json(cli("users", "export", USER, str(archive), "--json"))
    assert again["path"] == str(archive)
    assert again["archive_bytes"] == archive.stat().st_size
    assert (again["files"], again["left_out"], again["left_out_count"]) == (1, [], 0)
    nothing_left()


def test_an_archive_of_somebody_else(cli: Cli, tmp_path: Path) -> None:
    archive = str(tmp_path / "archive.tar.gz")
    _as_tenant(cli, MADE)
    cli("users", "export", USER, archive)
    refused = cli("users", "import", "other", archive)
    assert refused.returncode == 1
    assert b"try: if that is meant, name whose it was: --made-for ID" in refused.stderr
    assert b"user 'other' was made, and its home is empty" in refused.stderr
    imported = _json(cli("users", "import", "third", archive, "--made-for", USER, "--json"))
    assert (imported["user_id"], imported["created"], imported["verified"]) == ("third", True, True)
    assert _as_tenant(cli, "chmod 600 data/deep/file; cat data/link/file", "third") == b"content\n"
    missing = _error(cli("users", "import", "fourth", str(tmp_path / "none"), "--json"))
    assert missing["message"] == f"cannot read {tmp_path / 'none'}: No such file or directory"
    assert [user["saas_user_id"] for user in _json(cli("users", "list", "--json"))["users"]] == [USER, "other", "third"]


def test_through_a_pipe(cli: Cli, start: Start, nothing_left: Callable[[], None]) -> None:
    _as_tenant(cli, f"{MADE}; head -c 3000000 /dev/urandom > big; sha256sum big > sum")
    exporting = start("users", "export", USER, "-")
    importing = start("users", "import", "other", "-", "--made-for", USER, "--json", stdin=exporting.stdout)
    document, complaints = importing.communicate(timeout=SECONDS)
    assert exporting.wait(SECONDS) == 0, complaints
    assert (importing.returncode, complaints) == (0, b"")
    assert json.loads(document)["verified"] is True
    assert _as_tenant(cli, "sha256sum -c sum", "other") == b"big: OK\n"
    nothing_left()


def test_a_reader_who_went_away(start: Start, cli: Cli, nothing_left: Callable[[], None]) -> None:
    _as_tenant(cli, "head -c 3000000 /dev/urandom > big")
    process = start("users", "export", USER, "-")
    assert process.stdout is not None
    assert process.stdout.read(STREAMED)
    process.stdout.close()
    assert process.wait(SECONDS) == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""
    nothing_left()


def test_what_makes_no_sense_is_misuse(cli: Cli, start: Start) -> None:
    cli("users", "create", USER)
    assert cli("users", "export", USER, "-", "--json").returncode == 2
    assert "name a file" in _error(cli("users", "export", USER, "/tmp", "--json"))["remedy"]
    with terminal() as screen:
        assert start("users", "export", USER, "-", stdout=screen.theirs).wait(SECONDS) == 2
        assert start("users", "import", USER, "-", stdin=screen.theirs).wait(SECONDS) == 2


def test_an_output_that_is_full(start: Start, cli: Cli, nothing_left: Callable[[], None]) -> None:
    cli("users", "create", USER)
    with Path("/dev/full").open("wb") as full:
        process = start("users", "export", USER, "-", stdout=full)
        _, complaints = process.communicate(timeout=SECONDS)
    assert (process.returncode, complaints) == (
        1,
        b"error: cannot write to standard output: No space left on device\n",
    )
    nothing_left()


def test_a_bar_is_shown_on_a_terminal(start: Start, cli: Cli, tmp_path: Path) -> None:
    archive = tmp_path / "archive.tar.gz"
    _as_tenant(cli, "head -c 3000000 /dev/urandom > big")
    cli("users", "export", USER, str(archive))
    data = archive.read_bytes()
    with terminal() as screen:
        process = start("users", "import", USER, "-", stdin=subprocess.PIPE, stderr=screen.theirs)
        assert process.stdin is not None
        process.stdin.write(data[:STREAMED])
        process.stdin.flush()
        screen.until(b"import")
        process.stdin.write(data[STREAMED:])
        process.stdin.close()
        screen.until(b"imported ")
        assert process.wait(SECONDS) == 0


async def test_beside_a_server(cli: Cli, child: StartChild, tmp_path: Path) -> None:
    archive = str(tmp_path / "archive.tar.gz")
    process = child(SERVER)
    await process.line()
    assert cli("users", "export", USER, archive).returncode == 0
    refused = _error(cli("users", "export", USER, archive, "--stopped", "--json"))
    assert refused["code"] == "wrong-state"
    assert "stop its sandboxes first" in refused["remedy"]
    assert "stop its sandboxes first" in _error(cli("users", "import", USER, archive, "--json"))["remedy"]
    assert "stop its sandboxes first" in _error(cli("users", "delete", USER, "--yes", "--json"))["remedy"]
    assert cli("users", "import", "other", archive, "--made-for", USER).returncode == 0
    assert cli("users", "delete", "other", "--yes").returncode == 0
    (user,) = _json(cli("users", "list", "--json"))["users"]
    assert (user["status"], user["running"]) == ("ready", 1)


# ---- The end


def test_nothing_is_left_of_a_user(cli: Cli, settings: Settings, nothing_left: Callable[[], None]) -> None:
    _as_tenant(cli, f"{MADE}; chmod 0 data; echo printed")
    (user,) = _json(cli("users", "list", "--json"))["users"]
    logs = Path(_json(cli("users", "show", USER, "--json"))["log_dir"])
    assert logs.is_dir()
    for words in (["delete", USER], ["delete", USER, "--json"]):
        done = cli("users", *words, input=b"y\n")
        assert done.returncode == 1
        assert b"give --yes" in done.stdout + done.stderr
    done = cli("users", "delete", USER, "--yes")
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr.decode() == f"deleted {USER!r}: login {user['linux_username']}, uid {user['linux_uid']}\n"
    assert not Path(user["home_dir"]).exists()
    assert not logs.exists()
    with pytest.raises(KeyError):
        pwd.getpwuid(user["linux_uid"])
    assert _json(cli("users", "list", "--json"))["count"] == 0
    assert _error(cli("users", "delete", USER, "--yes", "--json"))["code"] == "not-found"
    nothing_left()


def test_home_and_logs_may_be_kept(cli: Cli) -> None:
    _as_tenant(cli, "echo content > file; echo printed")
    shown = _json(cli("users", "show", USER, "--json"))
    deleted = _json(cli("users", "delete", USER, "--yes", "--keep-home", "--keep-logs", "--json"))
    assert deleted == {"success": True, "user_id": USER, "home_kept": True, "logs_kept": True}
    assert Path(shown["home_dir"]).stat().st_uid == 0
    assert Path(shown["log_dir"], "probe.jsonl").exists()

    (user,) = _json(cli("users", "list", "--json"))["users"]
    assert user["status"] == "kept"
    for words in (["stats", USER], ["export", USER, "/nonexistent/x"], ["delete", USER, "--yes"]):
        error = _error(cli("users", *words, "--json"))
        assert error["code"] == "not-found"
        assert f"pactown-runner users create '{USER}'" in error["remedy"]
    assert _json(cli("users", "create", USER, "--json"))["linux_uid"] == shown["linux_uid"]
    assert _as_tenant(cli, "cat file") == b"content\n"


def test_it_asks_on_a_terminal(start: Start, cli: Cli) -> None:
    home = Path(_json(cli("users", "create", USER, "--json"))["home_dir"])
    for answer, status in ((b"n\n", 1), (b"\x04", 1), (b"y\n", 0)):
        assert home.is_dir()
        with terminal() as screen:
            sides = {"stdin": screen.theirs, "stdout": screen.theirs, "stderr": screen.theirs}
            process = start("users", "delete", USER, "--keep-logs", **sides)
            text = screen.until(b"[y/N]")
            assert f"Delete {USER} and all that is its, but keep the logs?".encode() in text
            assert str(home).encode() in text
            screen.type(answer)
            screen.until(b"deleted")
            assert process.wait(SECONDS) == status
    assert not home.exists()


# ---- Interrupted


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request: pytest.FixtureRequest) -> signal.Signals:
    found = request.param
    assert isinstance(found, signal.Signals)
    return found


def _interrupted(process: subprocess.Popen[bytes], number: signal.Signals) -> bytes:
    process.send_signal(number)
    # Its input stays open.
    assert process.wait(SECONDS) == 128 + number
    assert process.stderr is not None
    return process.stderr.read()


def test_an_interrupted_export_leaves_nothing(
    start: Start,
    cli: Cli,
    tmp_path: Path,
    number: signal.Signals,
    until_row: Callable[[str], None],
    nothing_left: Callable[[], None],
) -> None:
    _as_tenant(cli, "head -c 200000000 /dev/urandom > big")
    out = tmp_path / "out"
    out.mkdir()
    exporting = start("users", "export", USER, str(out / "archive.tar.gz"))
    until_row("_hold")
    assert _interrupted(exporting, number) == b""
    assert list(out.iterdir()) == []
    nothing_left()
    assert _as_tenant(cli, "echo free") == b"free\n"


def test_an_interrupted_stream_leaves_nothing(
    start: Start, cli: Cli, number: signal.Signals, nothing_left: Callable[[], None]
) -> None:
    _as_tenant(cli, "head -c 3000000 /dev/urandom > big")
    exporting = start("users", "export", USER, "-")
    assert exporting.stdout is not None
    assert exporting.stdout.read(STREAMED)
    exporting.send_signal(number)  # nobody reads any more
    assert exporting.wait(SECONDS) == 128 + number
    nothing_left()


@pytest.fixture
def half_way(start: Start, cli: Cli, tmp_path: Path, until_row: Callable[[str], None]) -> HalfWay:
    """Begins to import an archive of which only the beginning comes."""
    archive = tmp_path / "archive.tar.gz"
    _as_tenant(cli, "head -c 3000000 /dev/urandom > big")
    cli("users", "export", USER, str(archive))
    _as_tenant(cli, "echo former > big")

    def begin(user: str = USER) -> subprocess.Popen[bytes]:
        process = start("users", "import", user, "-", stdin=subprocess.PIPE)
        assert process.stdin is not None
        process.stdin.write(archive.read_bytes()[:STREAMED])
        process.stdin.flush()
        until_row("_hold")
        return process

    return begin


def test_an_interrupted_import_leaves_the_home_as_it_was(
    half_way: HalfWay,
    cli: Cli,
    number: signal.Signals,
    nothing_left: Callable[[], None],
) -> None:
    process = half_way()
    assert _interrupted(process, number) == b""
    nothing_left()
    assert _as_tenant(cli, "cat big") == b"former\n"


def test_what_was_made_for_an_interrupted_import_is_told(half_way: HalfWay) -> None:
    assert b"user 'new' was made, and its home is empty" in _interrupted(half_way("new"), signal.SIGINT)


def test_a_killed_import_is_in_nobodys_way(half_way: HalfWay, cli: Cli, tmp_path: Path) -> None:
    process = half_way()
    process.kill()
    process.wait(SECONDS)
    again = cli("users", "import", USER, str(tmp_path / "archive.tar.gz"))
    assert again.returncode == 0, again
    assert _as_tenant(cli, "stat -c %s big") == b"3000000\n"


def test_an_interrupted_deletion_can_be_finished(
    start: Start, cli: Cli, until_row: Callable[[str], None], nothing_left: Callable[[], None]
) -> None:
    # Each of these folders costs its removal a process.
    _as_tenant(cli, "mkdir many && cd many && seq 5000 | xargs mkdir && chmod 0 *")
    deleting = start("users", "delete", USER, "--yes")
    until_row("_removal")
    complaints = _interrupted(deleting, signal.SIGINT).decode()
    assert complaints == f"interrupted; to finish what was interrupted: pactown-runner users delete '{USER}'\n"

    assert [user["status"] for user in _json(cli("users", "list", "--json"))["users"]] == ["deleting"]
    error = _error(cli("users", "stats", USER, "--json"))
    assert (error["code"], f"users delete '{USER}'" in error["remedy"]) == ("wrong-state", True)
    assert cli("users", "delete", USER, "--yes").returncode == 0
    assert _json(cli("users", "list", "--json"))["count"] == 0
    nothing_left()


def test_a_killed_deletion_can_be_finished(
    start: Start, cli: Cli, settings: Settings, until_row: Callable[[str], None], nothing_left: Callable[[], None]
) -> None:
    _as_tenant(cli, MADE)
    with Registry(settings.state_dir / "registry.db") as registry:
        accounts = Accounts(settings.users_base, settings.uid_ranges, registry.state_id)
    with accounts.lock():  # it waits for that at its end
        deleting = start("users", "delete", USER, "--yes")
        until_row("_removal")
        deleting.kill()
        deleting.wait(SECONDS)
    done = cli("users", "delete", USER, "--yes")
    assert done.returncode == 0, done
    assert _json(cli("users", "list", "--json"))["count"] == 0
    nothing_left()


# ---- Without root

_PLAIN = """
import os, pathlib, sys
base, uid = sys.argv[1:3]
sys.path[:0] = sys.argv[3:5]
# While the interpreter can still read all of itself.
import aiofiles, anyio, anyio._backends._asyncio, concurrent.futures.thread, ctypes, encodings.idna, grp, json, pwd
import sqlite3, structlog, tomllib, typer
import pactown_runner.cli.app, pactown_runner.cli.user_views, pactown_runner.cli.user_work
from pactown_runner.cli import main
assert main(["users", "list", "--users-base", base + "/none"]) == 0
os.setgroups([]); os.setresgid(*[int(uid)] * 3); os.setresuid(*[int(uid)] * 3)
os.environ["HOME"] = os.environ["XDG_RUNTIME_DIR"] = base
sys.exit(main(["users", *sys.argv[5:], "--json"]))
"""


def test_without_root(test_run: Run, slice_name: str) -> None:
    uid = test_run.uids[1]
    place = test_run.directory / "plain"
    place.mkdir()
    for name in ("pactown_runner", "cgroups"):
        shutil.copytree(ROOT / name, place / "lib" / name, ignore=shutil.ignore_patterns("__pycache__"))
    os.chown(place, uid, uid)
    environ = {"PATH": os.environ["PATH"], "PACTOWN_CGROUP_SLICE": slice_name}

    def users(*words: str) -> tuple[int, Any]:
        paths = [str(place / "lib"), sysconfig.get_path("purelib")]
        words = (sys.executable, "-c", _PLAIN, str(place), str(uid), *paths, *words)
        done = subprocess.run(words, check=False, capture_output=True, env=environ, timeout=SECONDS)
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return done.returncode, json.loads(done.stdout)

    try:
        status, made = users("create", "demo")
        assert (status, made["created"], made["linux_uid"]) == (0, True, uid)
        status, listed = users("list")
        assert (status, listed["count"], listed["users"][0]["status"]) == (0, 1, "ready")
        status, shown = users("show", "demo")
        assert (status, Path(shown["home_dir"]).stat().st_uid) == (0, uid)
        status, counted = users("stats", "demo")
        assert (status, counted["usage"]["counted"], counted["usage"]["entries"]) == (0, "walk", 1)
        # In a cgroup that was not delegated to it there is no place for what packs.
        status, refused = users("export", "demo", str(place / "archive.tar.gz"))
        assert (status, refused["error"]["code"]) == (1, "no-cgroup-tree")
        assert refused["error"]["remedy"]
    finally:
        hostsweep.remove_file(place)
