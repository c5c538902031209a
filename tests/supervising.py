"""Fixtures and helpers for tests of whole supervisors: real accounts, real cgroups, and nothing left behind.

A plugin; a test module asks for it with `pytest_plugins = ("tests.supervising",)`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from cgroups import find_mount
from pactown_runner import Sandbox, SandboxSpec, Settings, Supervisor
from pactown_runner.registry import Registry
from tests import hostsweep

if TYPE_CHECKING:
    from tests.hostguard import Run

ROOT = Path(__file__).resolve().parent.parent
USER = "auth0|123456"
PATIENCE = 30.0
"""Seconds after which a test fails rather than waits. Nothing here takes one."""
T = TypeVar("T")


@pytest.fixture
def settings(users_base: Path, slice_name: str, test_run: Run) -> Iterator[Settings]:
    """Settings of a state of this test's own. Its accounts are removed afterwards, and what ran as them."""
    yield Settings(
        users_base=users_base,
        state_dir=users_base / ".state",
        log_dir=users_base / ".state/log",
        run_dir=users_base / ".state/run",
        cgroup_slice=slice_name,
        uid_ranges=(test_run.uids,),
        stop_grace=5.0,
        takeover_interval=0.05,
    )
    for path in hostsweep.cgroup_dirs(slice_name.__eq__):
        hostsweep.remove_cgroup(path)
    for leak in list(hostsweep.accounts(test_run.claim)):
        leak.remove()


@pytest.fixture
async def supervisor(settings: Settings) -> AsyncIterator[Supervisor]:
    """A running supervisor. Nothing of what it ran is there when it has ended, which is looked at."""
    async with Supervisor(settings=settings) as supervisor:
        yield supervisor
        assert not any(sandbox.state == "starting" for sandbox in supervisor.list())
    assert not leftovers(settings), "left by the supervisor"


def spec(command: str | list[str], *, service: str = "api", user: str = USER, **options: Any) -> SandboxSpec:
    return SandboxSpec(user_id=user, service_id=service, command=command, **options)


def python(source: str) -> list[str]:
    """A command that runs Python source as a tenant, who cannot reach this test's own interpreter."""
    return ["/usr/bin/python3", "-S", "-E", "-c", source]


async def soon(work: Awaitable[T], seconds: float = PATIENCE) -> T:
    """Await `work`, and fail rather than hang."""
    return await asyncio.wait_for(work, seconds)


async def line_of(sandbox: Sandbox, wanted: str = "ready") -> str:
    """Wait until the sandbox has printed a line that begins like this."""

    async def look() -> str:
        async with contextlib.aclosing(sandbox.logs(follow=True)) as records:
            async for record in records:
                if record.line.startswith(wanted):
                    return record.line
        raise AssertionError(f"{sandbox} ended without a line {wanted!r}: {sandbox.outcome}")

    return await soon(look())


async def lines(sandbox: Sandbox, stream: str = "stdout") -> list[str]:
    return [record.line async for record in sandbox.logs() if record.stream == stream]


async def eventually(condition: Callable[[], object], seconds: float = PATIENCE, *, pause: float = 0.005) -> None:
    """Wait for what no event tells of: another process's doing. The pause is longer where asking takes a process."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} s: {condition}"
        await asyncio.sleep(pause)


def listens(path: Path) -> bool:
    """Whether a server can be asked on this socket, which is there a moment before it listens."""
    with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
        client.connect(str(path))
        return True
    return False


# ---- What is left


def tree(settings: Settings) -> Iterator[Path]:
    """Every cgroup below the test's slice."""
    for directory, names, _ in os.walk(find_mount().path / settings.cgroup_slice):
        yield from (Path(directory, name) for name in names)


def leftovers(settings: Settings) -> list[str]:
    """What there is of sandboxes, alive or left behind: cgroups, FIFOs, spools, rows, owners."""
    found = [str(path) for path in tree(settings)]
    for directory in (settings.run_dir / "fifo", *settings.log_dir.glob("*/.spool"), settings.state_dir / "owners"):
        with contextlib.suppress(FileNotFoundError):
            found += [str(path) for path in directory.iterdir()]
    with Registry(settings.state_dir / "registry.db") as registry:
        found += [f"row {row.key}/{row.service_id}" for row in registry.sandboxes.rows()]
    return found


def processes_of(uid: int) -> dict[int, str]:
    """The pids of all that a uid runs on the whole host, each with its cgroup.

    What has ended and waits to be reaped, by init as a rule, runs no more.
    """
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = dict(line.split(":", 1) for line in Path(f"/proc/{name}/status").read_text().splitlines())
            if str(uid) in fields["Uid"].split() and fields["State"].split()[0] not in "ZX":
                cgroups = Path(f"/proc/{name}/cgroup").read_text().splitlines()
                found[int(name)] = next(line for line in cgroups if line.startswith("0::"))[3:]
    return found


@dataclass
class Usage:
    """What this process and its state hold."""

    descriptors: dict[str, str] = field(default_factory=dict)
    children: list[str] = field(default_factory=list)
    threads: int = 0
    left: list[str] = field(default_factory=list)


def usage(settings: Settings) -> Usage:
    descriptors = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one through which the directory itself was read
            # SQLite itself keeps those of a second connection until it can close them all; and a server's look for
            # dead owners, in a thread, has their directory open at any moment, or the file of one.
            name = os.readlink(f"/proc/self/fd/{fd}")
            # What tells of a tenant's pressure is closed a while after its last sandbox, the epoll that it is in with
            # the supervisor. Any other epoll comes with a descriptor of a cgroup's that would show.
            passing = (".pressure", "[eventpoll]")
            if not any(part in name for part in ("/registry.db", "/owners")) and not name.endswith(passing):
                descriptors[fd] = name
    children = [pid for task in os.listdir("/proc/self/task") for pid in _children(f"/proc/self/task/{task}/children")]
    # A tenant's slice stays for as long as its supervisor.
    left = [what for what in leftovers(settings) if not what.endswith(".slice")]
    return Usage(descriptors, children, threading.active_count(), left)


def _children(path: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return Path(path).read_text().split()
    return []


def _usage_at_rest(settings: Settings, wanted: Usage | None) -> Usage:
    """What is held for longer than a moment: a supervisor's threads open this and that, and close it again.

    Args:
        wanted: look for this, if it comes soon; else for the same twice.
    """
    deadline = time.monotonic() + 10
    found = usage(settings)
    while time.monotonic() < deadline:
        before, found = found, usage(settings)
        if found.descriptors == (before if wanted is None else wanted).descriptors:
            break
        # The loop stands still meanwhile: what it is to close itself does not go by waiting.
        time.sleep(0.001)
    return found


@contextlib.contextmanager
def leaves_nothing(settings: Settings) -> Iterator[None]:
    """What is done within leaves no child, ended or not, no descriptor, cgroup, FIFO, spool or row.

    Threads are a pool's: it may fill, but not outgrow itself.
    """
    for thread in threading.enumerate():
        if thread.name == "pactown-removals":  # what a supervisor looks for at its beginning
            thread.join(PATIENCE)
    before = _usage_at_rest(settings, None)
    yield
    after = _usage_at_rest(settings, before)
    assert after.descriptors == before.descriptors
    assert after.children == before.children
    assert after.left == before.left
    assert after.threads <= before.threads + 8


# ---- Supervisors in processes of their own

_CHILD = """
import asyncio, json, os, sys
from pathlib import Path
from pactown_runner import SandboxSpec, Settings, Supervisor

given = json.loads(sys.argv[1])
role, on_crash = given.pop("role"), given.pop("on_crash")
ranges = tuple(tuple(pair) for pair in given.pop("uid_ranges"))
settings = Settings(uid_ranges=ranges, on_crash=on_crash, **given)

async def say(word):
    print(word, flush=True)

def spec(command, service="api", user="auth0|123456", **options):
    return SandboxSpec(user_id=user, service_id=service, command=command, **options)

async def told():
    return (await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)).strip()
"""
_MAIN = """
async def main():
    async with Supervisor(settings=settings, role=role) as supervisor:
        await work(supervisor)

asyncio.run(main())
"""


class Child:
    """A supervisor in a process of its own, which does what a source says: `async def work(supervisor)`."""

    def __init__(self, settings: Settings, source: str, *, role: str = "server", on_crash: str = "adopt") -> None:
        given = {
            "users_base": str(settings.users_base),
            "state_dir": str(settings.state_dir),
            "log_dir": str(settings.log_dir),
            "run_dir": str(settings.run_dir),
            "cgroup_slice": settings.cgroup_slice,
            "uid_ranges": settings.uid_ranges,
            "takeover_interval": settings.takeover_interval,
            "role": role,
            "on_crash": on_crash,
        }
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in `close`
        self.popen = subprocess.Popen(
            [sys.executable, "-c", _CHILD + source + _MAIN, json.dumps(given)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self.popen.pid

    async def line(self) -> str:
        """The next line that it prints."""
        assert self.popen.stdout is not None
        line = await soon(asyncio.to_thread(self.popen.stdout.readline))
        assert line, f"ended with {self.popen.wait()}: {self.errors()}"
        return line.strip()

    def tell(self, line: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()

    async def killed(self) -> None:
        """Kill it, as a power cut would, and see its end."""
        self.popen.kill()
        await self.ended()

    async def ended(self) -> int:
        """Wait for its end."""
        return await soon(asyncio.to_thread(self.popen.wait))

    def errors(self) -> str:
        """What it has written to its standard error."""
        self._errors.seek(0)
        return self._errors.read()

    def close(self) -> None:
        self.popen.kill()
        self.popen.communicate()
        self._errors.close()


Start = Callable[..., Child]


@pytest.fixture
def child(settings: Settings) -> Iterator[Start]:
    """Start supervisors in processes of their own; those that live are killed at the end."""
    with contextlib.ExitStack() as stack:

        def start(source: str, **options: Any) -> Child:
            process = Child(settings, source, **options)
            stack.callback(process.close)
            return process

        yield start
