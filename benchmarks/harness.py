"""What the benchmarks share: a supervisor of their own, removed afterwards with all that it made."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pactown_runner import SandboxSpec, Settings, Supervisor
from pactown_runner.purge import Purge

__all__ = ["bench_supervisor", "loop_delay", "machine", "percentile", "show", "start_idle"]


@asynccontextmanager
async def bench_supervisor(**given: Any) -> AsyncIterator[Supervisor]:
    """A supervisor whose state, users and cgroups are removed afterwards, with these settings by name."""
    # As with the defaults on most hosts: FIFOs in memory (there /run), homes, logs and registry on the disk.
    with (
        tempfile.TemporaryDirectory(prefix="pactown-bench-", dir="/var/tmp") as disk,
        tempfile.TemporaryDirectory(prefix="pactown-bench-", dir="/dev/shm") as memory,
    ):
        os.chmod(disk, 0o711)
        settings = Settings.load(
            users_base=Path(disk, "users"),
            run_dir=Path(memory, "run"),
            cgroup_slice=f"{Path(disk).name}.slice",
            **given,
        )
        try:
            async with Supervisor(settings=settings) as supervisor:
                yield supervisor
        finally:
            with Purge(settings) as purge:
                purge.carry_out(purge.plan())


async def start_idle(supervisor: Supervisor, numbers: range, *, users: int = 10) -> None:
    """Start sandboxes of these numbers that do nothing, twenty at a time, shared out among so many users."""

    async def start(number: int) -> None:
        spec = SandboxSpec(user_id=f"user-{number % users}", service_id=f"idle-{number}", command=["sleep", "3600"])
        await supervisor.start(spec)

    for first in range(0, len(numbers), 20):
        await asyncio.gather(*map(start, numbers[first : first + 20]))


@asynccontextmanager
async def loop_delay(delays: list[float], *, period: float = 0.002) -> AsyncIterator[None]:
    """Note in `delays` by how many seconds the loop is late, each `period` seconds."""

    async def watch() -> None:
        while True:
            due = time.perf_counter() + period
            await asyncio.sleep(period)
            delays.append(max(0.0, time.perf_counter() - due))

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def machine() -> str:
    """What this was measured on."""
    return f"{os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}"


def show(figures: Mapping[str, Any]) -> None:
    """Print figures by name, one a line."""
    for name, value in figures.items():
        print(f"{name:32} {value:>12}")
