"""Whether tenants that write without end keep the supervisor from anybody else, and whether what they print is counted.

Five tenants run `yes`, beyond what they may print and keep; another tenant's programs are started meanwhile. How much
each `yes` has written is what the kernel has counted, in `/proc/<pid>/io`. Where there is a rate, a reader follows each
log and counts; where there is none but only the cap, the numbers of the records tell. What is `alone` was measured
before the floods began: it tells how busy the machine was with something else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from pactown_runner import Sandbox, SandboxSpec, Supervisor

from .harness import bench_supervisor, loop_delay, machine, percentile, show

SETTLED = 0.25
"""The part of the time after which memory must not grow any more."""


async def follow(sandbox: Sandbox) -> Counter[str]:
    """Read a flood's log to its end, and count the lines that came and those that did not."""
    counts, expected = Counter[str](), 1
    async for record in sandbox.logs(follow=True):
        counts["dropped"] += record.dropped_lines
        counts["written"] += not record.dropped_bytes
        counts["missed"] += record.seq - expected
        expected = record.seq + 1
    return counts


def numbered(directory: Path) -> Counter[str]:
    """The lines of a flood's log that are there, and those that have made room for them, as their numbers tell."""
    found = [record["seq"] for record in records(directory) if "file" not in record]
    return Counter(written=len(found), missed=found[0] - 1 if found else 0)


async def end(flood: Sandbox) -> int:
    """End a flood; returns how many lines it has printed."""
    # In a frozen process no write is half done. The shell's only child has written nothing but this.
    await flood.freeze()
    yes = Path(f"/proc/{flood.pid}/task/{flood.pid}/children").read_text().strip()
    fields = dict(line.split(": ") for line in Path(f"/proc/{yes}/io").read_text().splitlines())
    await flood.kill()
    return int(fields["wchar"]) // 2


async def start_others(supervisor: Supervisor, until: float) -> tuple[list[float], list[float]]:
    """Seconds that starts take, and whole runs of `/bin/true`, 50 ms apart."""
    starts, runs = [], []
    while time.perf_counter() < until:
        began = time.perf_counter()
        spec = SandboxSpec(user_id="quiet", service_id="true", command=["/bin/true"])
        sandbox = await supervisor.start_run(spec)
        starts.append(time.perf_counter() - began)
        await sandbox.wait()
        runs.append(time.perf_counter() - began)
        await asyncio.sleep(0.05)
    return starts, runs


def taken(directory: Path) -> int:
    """What a tenant's logs and spools take now."""
    sizes = {}
    for path in (*directory.glob("*.jsonl"), *directory.glob(".*/*")):
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            # One that is just being put aside has two names.
            sizes[found.st_ino] = found.st_blocks * 512
    return sum(sizes.values())


async def watch(log_dir: Path, until: float) -> tuple[int, list[int]]:
    """The most that one tenant's logs took, and this process's resident memory once a second."""
    most, resident, process = 0, [], psutil.Process()
    while time.perf_counter() < until:
        resident.append(process.memory_info().rss)
        for _ in range(10):
            await asyncio.sleep(0.1)
            most = max(most, *await asyncio.to_thread(lambda: [taken(path) for path in log_dir.glob("pactown_*")]), 0)
    return most, resident


def records(directory: Path) -> Iterator[dict[str, Any]]:
    """The last flood's records that are still there, oldest first."""
    aside = sorted(directory.glob(".aside/flood.jsonl.*"), key=lambda path: int(path.suffix[1:]))
    for path in (*aside, directory / "flood.jsonl"):
        with path.open("rb") as file:
            yield from map(json.loads, file)


def unaccounted(directory: Path) -> int:
    """Bytes by which the records that are there are not what the offsets in them say; 0 if each is true."""
    wrong, before = 0, None
    for record in records(directory):
        offset = sum(record["spool"])
        if "file" not in record:
            size = len(record["line"]) + 1 if "line" in record else record["dropped"]["bytes"]
            if before is not None:
                wrong += abs(offset - before - size)
        before = offset
    return wrong


async def measure(tenants: int, seconds: float, rate: int | None, policy: str, cap: int) -> dict[str, Any]:
    """So many floods at once, and what others see of them."""
    delays: list[float] = []
    delays_alone: list[float] = []
    given = {"log_rate_policy": policy, "log_cap_bytes": cap, "log_rotate_bytes": cap // 8, "log_keep": 100}
    async with bench_supervisor(log_rate_bytes=rate, **given) as supervisor:
        await supervisor.run(SandboxSpec(user_id="quiet", service_id="true", command=["/bin/true"]))
        async with loop_delay(delays_alone):
            starts_alone, _ = await start_others(supervisor, time.perf_counter() + seconds / 6)
        floods = [
            await supervisor.start(SandboxSpec(user_id=f"loud-{number}", service_id="flood", command="yes; :"))
            for number in range(tenants)
        ]
        until = time.perf_counter() + seconds
        following = [asyncio.create_task(follow(flood)) for flood in floods if rate]
        watching = asyncio.create_task(watch(supervisor.settings.log_dir, until))
        async with loop_delay(delays):
            cpu = time.process_time()
            starts, runs = await start_others(supervisor, until)
            cpu = time.process_time() - cpu
        most, resident = await watching
        printed = [await end(flood) for flood in floods]
        await asyncio.gather(*(flood.wait() for flood in floods))
        logs = [path.parent for path in supervisor.settings.log_dir.glob("pactown_*/flood.jsonl")]
        counts = [await task for task in following] or [numbered(path) for path in logs]
        wrong = sum(unaccounted(path) for path in logs)
    settled = resident[int(len(resident) * SETTLED) :]
    return {
        "policy": policy if rate else "none",
        "start_alone_p99_ms": round(percentile(starts_alone, 99) * 1e3, 2),
        "loop_delay_alone_p99_ms": round(percentile(delays_alone, 99) * 1e3, 2),
        "start_p50_ms": round(percentile(starts, 50) * 1e3, 2),
        "start_p99_ms": round(percentile(starts, 99) * 1e3, 2),
        "run_p99_ms": round(percentile(runs, 99) * 1e3, 2),
        "starts": len(starts),
        "loop_delay_p99_ms": round(percentile(delays, 99) * 1e3, 2),
        "loop_delay_max_ms": round(max(delays) * 1e3, 2),
        "supervisor_cpu_percent": round(cpu / seconds * 100),
        "memory_mib": round(settled[0] / 2**20, 1),
        "memory_growth_mib": round((max(settled) - settled[0]) / 2**20, 1),
        "logs_most_of_cap_percent": round(most / cap * 100, 1),
        "printed_lines": sum(printed),
        **{f"{name}_lines": sum(count[name] for count in counts) for name in ("written", "dropped", "missed")},
        "lines_not_accounted_for": abs(sum(printed) - sum(count.total() for count in counts)),
        "bytes_not_accounted_for": wrong,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tenants", type=int, default=5)
    parser.add_argument("--rate", type=int, default=16 << 10, help="bytes that each may print per second")
    parser.add_argument("--cap", type=int, default=32 << 20, help="bytes that the logs of each may take")
    parser.add_argument("--policy", nargs="*", default=["block", "drop", "none"], help="`none`: the cap alone")
    options = parser.parse_args(argv)
    print(machine())
    status = 0
    for policy in options.policy:
        rate, known = (None, "block") if policy == "none" else (options.rate, policy)
        result = asyncio.run(measure(options.tenants, options.seconds, rate, known, options.cap))
        print()
        show(result)
        status |= bool(result["lines_not_accounted_for"] or result["bytes_not_accounted_for"])
    return status


if __name__ == "__main__":
    main()
