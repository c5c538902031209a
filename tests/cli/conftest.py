"""The command as its users have it: a process of its own, told by words and the environment, seen by what it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pactown_runner import Settings
from tests import hostsweep

if TYPE_CHECKING:
    from tests.hostguard import Run

ROOT = Path(__file__).resolve().parents[2]
_SCRIPT = Path(sys.executable).with_name("pactown-runner")
COMMAND = [str(_SCRIPT)] if _SCRIPT.exists() else [sys.executable, "-m", "pactown_runner"]
USER = "auth0|demo"
SECONDS = 60.0

Result = subprocess.CompletedProcess[bytes]
Cli = Callable[..., Result]
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def environ(settings: Settings) -> dict[str, str]:
    """What leads the command to this test's own state."""
    first, last = settings.uid_ranges[0]
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PACTOWN_USERS_BASE": str(settings.users_base),
        "PACTOWN_CGROUP_SLICE": settings.cgroup_slice,
        "PACTOWN_UID_RANGES": f"{first}-{last}",
        "OPERATORS_SECRET": "not for tenants",
        "COLUMNS": "200",
    }


@pytest.fixture
def cli(environ: dict[str, str]) -> Cli:
    """Runs the command to its end."""

    def run(*words: str, **options: Any) -> Result:
        options = {"stdin": subprocess.DEVNULL, **options} if "input" not in options else options
        words = (*COMMAND, *words)
        return subprocess.run(words, check=False, env=environ, capture_output=True, timeout=SECONDS, **options)

    return run


@pytest.fixture
def start(environ: dict[str, str]) -> Iterator[Start]:
    """Starts the command; whatever of it still runs when the test ends is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(*words: str, **options: Any) -> subprocess.Popen[bytes]:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen([*COMMAND, *words], env=environ, **{**pipes, **options})
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait(SECONDS)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def nothing_runs(settings: Settings, test_run: Run) -> Callable[[], None]:
    """Fails if a sandbox, or a process of a tenant, is there."""

    def look() -> None:
        scopes = [str(path) for path in hostsweep.cgroup_dirs(lambda name: name.endswith(".scope"))]
        assert not [path for path in scopes if settings.cgroup_slice in path]
        assert not [leak.what for leak in hostsweep.processes(test_run.claim)]

    return look


def run_words(*command: str, service: str = "probe") -> list[str]:
    """The words that run `command` as this test's user."""
    return ["run", "--user", USER, "--service", service, "--", *command]


@pytest.fixture
def serving(start: Start) -> subprocess.Popen[bytes]:
    """A server of this test's own, ready to be asked."""
    return ready(start("serve"))


def ready(process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """Wait until a server can be asked."""
    assert process.stderr is not None
    told = []
    for line in process.stderr:
        told.append(line)
        if b"looking after" in line:
            return process
    raise AssertionError(f"it ended instead: {told}")
