"""What a line of log costs, and whether one sandbox's flood holds up anybody else."""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

from pactown_runner import Sandbox, SandboxSpec

from .harness import bench_supervisor, loop_delay, machine, percentile, show


async def count(sandbox: Sandbox) -> int:
    """Follow a log to its end; fails unless each line is there once and in order."""
    expected = 0
    async for record in sandbox.logs(follow=True):
        expected += 1
        if record.raw != str(expected).encode():
            raise RuntimeError(f"line {expected} is {record.raw!r}")
    return expected


async def ticks(sandbox: Sandbox) -> list[float]:
    """Seconds between a second sandbox's writing a line (it prints the time) and a reader's having it."""
    return [time.time() - float(record.line) async for record in sandbox.logs(follow=True)]


TICK = "while :; do date +%s.%N; sleep 0.02; done"


async def measure(lines: int) -> dict[str, Any]:
    """One sandbox prints so many lines and is followed, while another one ticks."""
    delays: list[float] = []
    async with bench_supervisor() as supervisor:
        ticking = await supervisor.start(SandboxSpec(user_id="quiet", service_id="tick", command=TICK))
        late = asyncio.create_task(ticks(ticking))
        async with loop_delay(delays):
            began = time.perf_counter()
            flood = await supervisor.start(SandboxSpec(user_id="loud", service_id="flood", command=["seq", str(lines)]))
            counted = await count(flood)
            seconds = time.perf_counter() - began
        await ticking.stop(grace=0)
        lateness = await late
    return {
        "lines": counted,
        "lines_per_second": round(counted / seconds),
        "loop_delay_p99_ms": round(percentile(delays, 99) * 1e3, 2),
        "loop_delay_max_ms": round(max(delays) * 1e3, 2),
        "other_sandbox_line_p50_ms": round(percentile(lateness, 50) * 1e3, 2),
        "other_sandbox_line_p99_ms": round(percentile(lateness, 99) * 1e3, 2),
        "other_sandbox_lines": len(lateness),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=1_000_000)
    options = parser.parse_args(argv)
    print(machine())
    show(asyncio.run(measure(options.lines)))
    return 0


if __name__ == "__main__":
    main()
