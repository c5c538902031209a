"""What a scrape of the metrics of many idle sandboxes costs, and how late the event loop is meanwhile."""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from typing import Any

from pactown_runner.metrics import Metrics

from .harness import bench_supervisor, loop_delay, machine, percentile, show, start_idle

SCRAPES = 20
"""Of which the median and the worst are told."""


async def measure(sandboxes: int, users: int) -> dict[str, Any]:
    """Start so many that do nothing, for so many users, and scrape."""
    async with bench_supervisor() as supervisor:
        metrics = Metrics(supervisor)
        await start_idle(supervisor, range(sandboxes), users=users)
        times: list[float] = []
        cpu_times: list[float] = []
        delays: list[float] = []
        size = lines = 0
        # What the starts have left to be looked through is not the scrapes' to pay for.
        gc.collect()
        quiet: list[float] = []
        async with loop_delay(quiet):
            await asyncio.sleep(2.0)
        async with loop_delay(delays):
            for _ in range(SCRAPES):
                began, cpu = time.perf_counter(), time.process_time()
                answer = await metrics.render()
                times.append(time.perf_counter() - began)
                cpu_times.append(time.process_time() - cpu)
                size, lines = len(answer), answer.count(b"\n")
    return {
        "sandboxes": sandboxes,
        "users": users,
        "lines": lines,
        "kib": size >> 10,
        "scrape_ms": round(percentile(times, 50) * 1e3, 1),
        "scrape_worst_ms": round(max(times) * 1e3, 1),
        "scrape_cpu_ms": round(percentile(cpu_times, 50) * 1e3, 1),
        "loop_late_p99_ms": round(percentile(delays, 99) * 1e3, 1),
        "loop_late_worst_ms": round(max(delays) * 1e3, 1),
        "loop_late_worst_without_ms": round(max(quiet) * 1e3, 1),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sandboxes", type=int, default=1000)
    parser.add_argument("--users", type=int, default=10)
    options = parser.parse_args(argv)
    print(machine())
    show(asyncio.run(measure(options.sandboxes, options.users)))
    return 0


if __name__ == "__main__":
    main()
