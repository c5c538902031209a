"""What an idle sandbox costs its supervisor: memory, descriptors, threads, CPU time; and what looking at all costs."""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import threading
import time
from typing import Any

import psutil

from pactown_runner import Supervisor

from .harness import bench_supervisor, loop_delay, machine, percentile, show, start_idle

ROUNDS = 20
"""Looks at all sandboxes, of which the median and the worst are told."""


async def measure(sandboxes: int, seconds: float) -> dict[str, Any]:
    """Start so many that do nothing, look at this process, and look at them all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    process = psutil.Process()
    async with bench_supervisor() as supervisor:
        for number in range(10):  # the users, and whatever the first start of all needs
            await start_idle(supervisor, range(number, number + 1))
        before = process.memory_info().rss, len(os.listdir("/proc/self/fd")), threading.active_count()
        began = time.perf_counter()
        await start_idle(supervisor, range(10, sandboxes + 10))
        started = time.perf_counter() - began
        after = process.memory_info().rss, len(os.listdir("/proc/self/fd")), threading.active_count()

        cpu = time.process_time()
        await asyncio.sleep(seconds)
        cpu = time.process_time() - cpu
        looks = await look(supervisor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return {
        "sandboxes": sandboxes,
        "starts_per_second": round(sandboxes / started),
        "memory_kib_each": round((after[0] - before[0]) / sandboxes / 1024, 1),
        "descriptors_each": round((after[1] - before[1]) / sandboxes, 2),
        "threads_added": after[2] - before[2],
        "cpu_us_per_second_each": round(cpu / seconds / sandboxes * 1e6, 1),
        **looks,
    }


async def look(supervisor: Supervisor) -> dict[str, Any]:
    """Look at all sandboxes, some times over, and see how late the loop is meanwhile."""
    times: dict[str, list[float]] = {"list": [], "stats": [], "stats_with_pressure": []}
    delays: list[float] = []
    read = 0
    async with loop_delay(delays):
        for _ in range(ROUNDS):
            marks = [time.perf_counter()]
            supervisor.list()
            marks.append(time.perf_counter())
            read = len(await supervisor.stats())
            marks.append(time.perf_counter())
            await supervisor.stats(pressure=True)
            marks.append(time.perf_counter())
            for values, began, ended in zip(times.values(), marks[:-1], marks[1:], strict=True):
                values.append(ended - began)
    result: dict[str, Any] = {"counted": read}
    for name, values in times.items():
        result[f"{name}_of_all_ms"] = round(percentile(values, 50) * 1e3, 1)
        result[f"{name}_of_all_worst_ms"] = round(max(values) * 1e3, 1)
    return result | {"loop_late_worst_ms": round(max(delays) * 1e3, 1)}


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sandboxes", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args(argv)
    print(machine())
    show(asyncio.run(measure(options.sandboxes, options.seconds)))
    return 0


if __name__ == "__main__":
    main()
