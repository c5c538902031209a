"""What an isolated start costs: `/bin/true` started, awaited and accounted for, beside others that start it.

Contenders take turns within each round, so that a machine whose speed drifts slows all of them alike; what counts is
the ratio to bare asyncio in the same run. Everything of ours is included: registry, FIFOs, cgroup, log, `Outcome`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from pactown_runner import SandboxSpec, Supervisor

from .harness import bench_supervisor, machine, percentile

TRUE = "/bin/true"
BASE = "asyncio"
TENANT = "65001"
"""A uid for `setpriv` and `bwrap`; it needs no account."""

Start = Callable[[int], Awaitable[None]]
"""Start `/bin/true` and wait for it; the number tells concurrent starts apart."""


async def posix_spawn(_: int) -> None:
    """The floor: no library, only the wait is asynchronous."""
    pid = os.posix_spawn(TRUE, [TRUE], {})
    pidfd = os.pidfd_open(pid)
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    loop.add_reader(pidfd, ended.set_result, None)
    await ended
    loop.remove_reader(pidfd)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)


def command(*argv: str) -> Start:
    """A command through bare `asyncio.create_subprocess_exec`."""

    async def start(_: int) -> None:
        process = await asyncio.create_subprocess_exec(*argv, stdin=asyncio.subprocess.DEVNULL)
        if await process.wait() != 0:
            raise RuntimeError(f"{argv[0]} failed")

    return start


def ours(supervisor: Supervisor) -> Start:
    """This project, whole."""

    async def start(number: int) -> None:
        outcome = await supervisor.run(SandboxSpec(user_id="bench", service_id=f"true-{number}", command=[TRUE]))
        if not outcome.ok:
            raise RuntimeError(outcome.message)

    return start


def contenders(supervisor: Supervisor) -> dict[str, Start]:
    """All that this machine has."""
    found = {"posix_spawn": posix_spawn, BASE: command(TRUE), "pactown-runner": ours(supervisor)}
    if setpriv := shutil.which("setpriv"):
        ids = (f"--reuid={TENANT}", f"--regid={TENANT}", "--clear-groups")
        found["setpriv"] = command(setpriv, *ids, "--bounding-set=-all", "--no-new-privs", TRUE)
    if bwrap := shutil.which("bwrap"):
        found["bwrap"] = command(bwrap, "--ro-bind", "/", "/", "--dev", "/dev", TRUE)
        found["bwrap +pid,ipc,uts"] = command(
            bwrap, "--ro-bind", "/", "/", "--dev", "/dev", "--unshare-pid", "--unshare-ipc", "--unshare-uts", TRUE
        )
    return found


async def latency(starts: dict[str, Start], rounds: int, gap: float) -> dict[str, list[float]]:
    """Seconds from start to exit, one start at a time, `gap` seconds apart."""
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    for _ in range(rounds):
        for name, start in starts.items():
            began = time.perf_counter()
            await start(0)
            seconds[name].append(time.perf_counter() - began)
            if gap:
                await asyncio.sleep(gap)
    return seconds


async def throughput(start: Start, concurrency: int, seconds: float) -> float:
    """Starts per second, with so many under way at once."""
    deadline = time.perf_counter() + seconds
    done = 0

    async def worker(number: int) -> None:
        nonlocal done
        while time.perf_counter() < deadline:
            await start(number)
            done += 1

    began = time.perf_counter()
    await asyncio.gather(*(worker(number) for number in range(concurrency)))
    return done / (time.perf_counter() - began)


async def measure(rounds: int, seconds: float, resident_mib: int) -> dict[str, Any]:
    """Everything, with so much memory resident in this process."""
    ballast = bytearray(os.urandom(1 << 20) * resident_mib)
    result: dict[str, Any] = {"resident_mib": resident_mib, "latency": {}, "starts_per_second": {}}
    async with bench_supervisor() as supervisor:
        starts = contenders(supervisor)
        for start in starts.values():
            for _ in range(10):
                await start(0)
        gc.collect()
        for gap_ms, share in ((0, 1), (20, 4), (100, 10)):
            taken = await latency(starts, max(20, rounds // share), gap_ms / 1000)
            base = statistics.median(taken[BASE])
            result["latency"][f"{gap_ms} ms"] = {
                name: {
                    "p50_ms": round(statistics.median(values) * 1e3, 3),
                    "p99_ms": round(percentile(values, 99) * 1e3, 3),
                    "ratio": round(statistics.median(values) / base, 2),
                }
                for name, values in taken.items()
            }
        for concurrency in (1, 8, 32):
            result["starts_per_second"][str(concurrency)] = {
                name: round(await throughput(start, concurrency, seconds)) for name, start in starts.items()
            }
    del ballast
    return result


def show(result: dict[str, Any]) -> None:
    """Print one result as tables."""
    print(f"\n{result['resident_mib']} MiB resident in the caller")
    for gap, rows in result["latency"].items():
        print(f"\n{'start to exit, ' + gap + ' between':34} {'p50 ms':>8} {'p99 ms':>8} {'x asyncio':>10}")
        for name, row in rows.items():
            print(f"{name:34} {row['p50_ms']:8.3f} {row['p99_ms']:8.3f} {row['ratio']:10.2f}")
    names = list(next(iter(result["starts_per_second"].values())))
    print(f"\n{'starts per second, at once:':34}" + "".join(f"{n:>8}" for n in result["starts_per_second"]))
    for name in names:
        print(f"{name:34}" + "".join(f"{row[name]:8}" for row in result["starts_per_second"].values()))


def main(argv: list[str] | None = None) -> int:
    """Measure and print; as root, on a host with a cgroup v2 mount."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=400, help="starts of each contender, back to back")
    parser.add_argument("--seconds", type=float, default=3, help="time for each figure of throughput")
    parser.add_argument("--resident", type=int, nargs="*", default=[0, 1024], metavar="MIB")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    options = parser.parse_args(argv)
    if os.geteuid() != 0:
        print("starting programs as other users takes root", file=sys.stderr)
        return 1
    results = [asyncio.run(measure(options.rounds, options.seconds, mib)) for mib in options.resident]
    if options.json:
        print(json.dumps({"machine": machine(), "results": results}, indent=2))
        return 0
    print(machine())
    for result in results:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
