"""What requirements add to a start: programs with and without an environment, and what making one takes.

A start with requirements enters one folder more, and its program is sought in one more. What Python itself does in an
environment, such as to read `pyvenv.cfg`, is not ours, but a service's start all the same: so it is measured, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from pactown_runner import SandboxSpec, Supervisor
from pactown_runner.pythons import find_python

from .harness import bench_supervisor, machine, percentile
from .spawn import Start, latency

NAME = "bench_nothing"


def make_wheel(folder: Path) -> str:
    """A package without content, in a folder that tenants can read; returns the requirement."""
    wheel = folder / f"{NAME}-1-py3-none-any.whl"
    info = f"{NAME}-1.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{NAME}.py", "")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "".join(f"{info}/{name},,\n" for name in ("METADATA", "WHEEL", "RECORD")))
    wheel.chmod(0o644)
    folder.chmod(0o755)
    return f"{NAME} @ {wheel.as_uri()}"


def start(supervisor: Supervisor, service_id: str, command: list[str], requirements: list[str]) -> Start:
    """Start a program and wait for it."""
    spec = SandboxSpec(user_id="bench", service_id=service_id, command=command, requirements=requirements)

    async def run(_: int) -> None:
        outcome = await supervisor.run(spec)
        if not outcome.ok:
            raise RuntimeError(outcome.message)

    return run


async def measure(rounds: int, gap: float) -> dict[str, Any]:
    """Everything."""
    with tempfile.TemporaryDirectory(prefix="pactown-bench-", dir="/var/tmp") as folder:
        wanted = [make_wheel(Path(folder))]
        async with bench_supervisor() as supervisor:
            # Which also makes the user, so that what follows is the environment alone.
            await start(supervisor, "plain", ["/bin/true"], [])(0)
            began = time.perf_counter()
            await start(supervisor, "with", ["python", "-c", f"import {NAME}"], wanted)(0)
            cold = time.perf_counter() - began
            starts = {
                "/bin/true": start(supervisor, "plain", ["/bin/true"], []),
                "/bin/true, with requirements": start(supervisor, "with", ["/bin/true"], wanted),
                "python -c pass": start(supervisor, "plain", [find_python(), "-c", "pass"], []),
                "python -c pass, with requirements": start(supervisor, "with", ["python", "-c", "pass"], wanted),
            }
            await latency(starts, 10, 0)
            taken = await latency(starts, rounds, gap)
    return {
        "cold_ms": round(cold * 1e3),
        "warm": {
            name: {
                "p50_ms": round(statistics.median(values) * 1e3, 3),
                "p99_ms": round(percentile(values, 99) * 1e3, 3),
            }
            for name, values in taken.items()
        },
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and print; as root, on a host with a cgroup v2 mount."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=300, help="starts of each program")
    parser.add_argument("--gap", type=float, default=0, metavar="SECONDS", help="pause between two starts")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    options = parser.parse_args(argv)
    if os.geteuid() != 0:
        print("starting programs as other users takes root", file=sys.stderr)
        return 1
    result = asyncio.run(measure(options.rounds, options.gap))
    if options.json:
        print(json.dumps({"machine": machine(), **result}, indent=2))
        return 0
    print(f"{machine()}\n\nthe first start, which makes the environment: {result['cold_ms']} ms\n")
    print(f"{'start to exit':36} {'p50 ms':>8} {'p99 ms':>8}")
    for name, row in result["warm"].items():
        print(f"{name:36} {row['p50_ms']:8.3f} {row['p99_ms']:8.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
