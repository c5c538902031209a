"""`serve`: what it says, on a terminal and elsewhere, and how it ends. What it does is in `tests/test_serving.py`."""

from __future__ import annotations

import json
import os
import pty
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import IO, Any

import pytest

from pactown_runner import Settings, Supervisor
from pactown_runner.specs import RestartPolicy
from tests.cli.conftest import SECONDS, Cli, Start
from tests.supervising import leftovers, spec

pytestmark = pytest.mark.host

ODD = "auth0|\x1b[31m\u202e"
"""A user whose id would colour the operator's terminal, and turn what stands on it round."""


async def left_running(settings: Settings) -> int:
    """A service that nobody looks after; its pid."""
    always = RestartPolicy("always", backoff=0.01)
    async with Supervisor(settings=replace(settings, on_exit="leave")) as supervisor:
        sandbox = await supervisor.start(spec(["sleep", "1000"], user=ODD, restart=always))
        return sandbox.pid


def kill(pid: int) -> None:
    """Kill the service that was left running. It is this process's child, and nobody else's to reap."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def told(stream: IO[bytes], event: str) -> dict[str, Any]:
    """The next line of JSON that tells of this."""
    for line in stream:
        record = json.loads(line)
        if record["event"].startswith(event):
            return dict(record)
    raise AssertionError(f"it ended without {event!r}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_logs_are_json_and_the_end_is_in_order(start: Start, settings: Settings, number: signal.Signals) -> None:
    pid = await left_running(settings)
    process = start("serve")
    assert process.stderr is not None
    assert process.stdout is not None
    record = told(process.stderr, "looking after")
    assert record["event"] == f"looking after {settings.state_dir}, 1 sandbox"
    assert record.keys() == {"event", "level", "timestamp", "logger"}
    kill(pid)
    record = told(process.stderr, "restarted")
    assert (record["level"], record["user_id"], record["service_id"]) == ("info", ODD, "api")
    assert record["details"]["pid"] != pid
    process.send_signal(number)
    assert told(process.stderr, "ending 1 sandbox")
    assert told(process.stderr, "stopped")["user_id"] == ODD
    assert process.wait(SECONDS) == 0
    assert process.stdout.read() == b""
    assert not leftovers(settings)


async def test_services_are_left_if_asked_for(start: Start, settings: Settings) -> None:
    pid = await left_running(settings)
    process = start("serve", "--on-exit", "leave")
    assert process.stderr is not None
    told(process.stderr, "looking after")
    process.terminate()
    assert told(process.stderr, "leaving 1 sandbox")
    assert process.wait(SECONDS) == 0
    async with Supervisor(settings=settings) as successor:
        (sandbox,) = successor.list()
        assert sandbox.pid == pid
        await sandbox.kill()
    assert not leftovers(settings)


def test_an_unknown_wish_is_told(cli: Cli) -> None:
    done = cli("serve", "--on-exit", "freeze")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"error: on_exit must be 'stop' or 'leave', not 'freeze'\n"


def test_one_that_is_stuck_shows_where_when_the_watchdog_ends_it(start: Start) -> None:
    process = start("serve")
    assert process.stderr is not None
    told(process.stderr, "looking after")
    process.send_signal(signal.SIGABRT)
    assert process.wait(SECONDS) == -signal.SIGABRT
    assert b"most recent call first" in process.stderr.read()


# ---- On a terminal


class Terminal:
    """What appears on it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.text = b""

    def until(self, words: bytes) -> bytes:
        """Wait for these words; returns all that has appeared."""
        while words not in self.text:
            self.text += os.read(self.fd, 4096)
        return self.text


@pytest.fixture
def terminal() -> Iterator[tuple[Terminal, int]]:
    """Our side of it, and the one that programs have."""
    ours, theirs = pty.openpty()
    yield Terminal(ours), theirs
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
async def test_a_terminal_shows_what_is_served_and_no_control_characters(
    start: Start, settings: Settings, terminal: tuple[Terminal, int], number: signal.Signals
) -> None:
    pid = await left_running(settings)
    screen, theirs = terminal
    process = start("serve", stdin=theirs, stdout=theirs, stderr=theirs)
    text = screen.until(b"once more at once\r\n").replace(b"\r", b"")
    for name, value in (("homes", settings.users_base), ("state", settings.state_dir), ("logs", settings.log_dir)):
        assert f"  {name:<10} {value}\n".encode() in text
    assert b"  mode       root: " in text
    kill(pid)
    text = screen.until(b"restarted")
    text = screen.until(b"user_id")
    process.send_signal(number)
    text = screen.until(b"ending 1 sandbox")
    assert b"auth0|\\x1b[31m\\u202e" in text
    assert ODD.encode() not in text
    assert process.wait(SECONDS) == 0
    assert not leftovers(settings)
