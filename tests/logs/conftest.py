"""Pumps with real FIFOs and real writers, in a directory that goes away."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from pactown_runner.logs import LogHub, LogLimits, LogPaths, LogPump, TenantLogs, read_log
from pactown_runner.logs.rate import Rate
from pactown_runner.models import LogRecord

USER = "auth0|123456"
PER_SECOND = 10_000
"""Bytes, of a tenant that may not print as it likes."""
MakePump = Callable[..., LogPump]
T = TypeVar("T")
Write = Callable[..., Awaitable[asyncio.subprocess.Process]]


@pytest.fixture
def paths(tmp_path: Path) -> LogPaths:
    return LogPaths(tmp_path / "log", tmp_path / "run", "aabbccdd")


@pytest.fixture
async def hub() -> AsyncIterator[LogHub]:
    hub = LogHub()
    yield hub
    hub.close()


@pytest.fixture
async def make_pump(paths: LogPaths, hub: LogHub) -> AsyncIterator[MakePump]:
    """Makes pumps of this test's hub; those still open at its end are detached."""
    pumps: list[LogPump] = []

    def make(service_id: str = "api", run_id: str = "r1", **options: Any) -> LogPump:
        known: dict[str, Any] = {"paths": paths, "hub": hub, "uid": os.geteuid(), "gid": os.getegid()}
        pump = LogPump(user_id=USER, service_id=service_id, run_id=run_id, **(known | options))
        pumps.append(pump)
        return pump

    yield make
    for pump in pumps:
        pump.detach()


@pytest.fixture
async def write() -> AsyncIterator[Write]:
    """Starts a program on a pump's FIFOs; what still runs at the test's end is killed."""
    programs: list[asyncio.subprocess.Process] = []

    async def start(pump: LogPump, *command: str, **options: Any) -> asyncio.subprocess.Process:
        out, err = pump.child_fds
        program = await asyncio.create_subprocess_exec(*command, stdout=out, stderr=err, **options)
        programs.append(program)
        pump.close_child_fds()
        return program

    yield start
    for program in programs:
        if program.returncode is None:
            program.kill()
        await program.wait()


@pytest.fixture
def no_fd_leak() -> Iterator[None]:
    """For tests that close all they open by themselves."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == before


def limited(paths: LogPaths, **limits: Any) -> TenantLogs:
    """What the pumps of a tenant with these limits share."""
    return TenantLogs(paths, LogLimits(**limits))


class Clock:
    """Time that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def rated(paths: LogPaths, clock: Clock, *, drops: bool, per_second: int = PER_SECOND) -> TenantLogs:
    """What the pumps of a tenant with a rate share, in a time of their own."""
    tenant = limited(paths)
    tenant.rate = Rate(per_second, drops=drops, clock=clock)
    return tenant


def files(paths: LogPaths) -> dict[str, int]:
    """The files of the tenant's logs and how many bytes each has, by name."""
    found = {}
    for directory in (paths.tenant_dir, paths.aside_dir):
        with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # somebody is writing
                    if ".jsonl" in entry.name:
                        found[entry.name] = entry.stat().st_size
    return dict(sorted(found.items()))


async def records(paths: LogPaths, service_id: str = "api", **options: Any) -> list[LogRecord]:
    """The service's log as it stands."""
    return [record async for record in read_log(paths.log(service_id), **options)]


async def gather(reading: AsyncIterator[LogRecord]) -> list[int]:
    """The numbers of all records that a reader gives."""
    return [record.seq async for record in reading]


async def soon(work: Awaitable[T], seconds: float = 30) -> T:
    """Await `work`, and fail rather than hang."""
    return await asyncio.wait_for(work, seconds)


async def written(pump: LogPump, until: Callable[[], bool]) -> None:
    """Wait for changes of the pump's log until the condition holds."""
    while not until():
        await pump.feed.changed(pump.feed.version)
