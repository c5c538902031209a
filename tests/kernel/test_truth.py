"""What the command, the doctor and the reports say is so: with all controllers, and with one switched off above us."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pactown_runner import Settings, Supervisor
from tests.kernel.conftest import MIB, Measure
from tests.kernel.test_trees import APART, RUN_ONE
from tests.supervising import ROOT, spec

if TYPE_CHECKING:
    from tests.hostguard import Run

pytestmark = pytest.mark.kernel

COMMAND = [sys.executable, "-m", "pactown_runner"]


@pytest.fixture
def environment(settings: Settings) -> dict[str, str]:
    first, last = settings.uid_ranges[0]
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PACTOWN_USERS_BASE": str(settings.users_base),
        "PACTOWN_CGROUP_SLICE": settings.cgroup_slice,
        "PACTOWN_UID_RANGES": f"{first}-{last}",
    }


def command(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, check=False, env=environment, capture_output=True, text=True, timeout=120)


def findings(printed: str) -> dict[str, dict[str, Any]]:
    return {finding["check"]: finding for finding in json.loads(printed)["findings"]}


def test_the_command_holds_a_program_to_its_limits(environment: dict[str, str]) -> None:
    limited = (*COMMAND, "run", "--user", "demo", "--memory", "64M", "--pids", "32", "--cpu", "25%", "--json", "--")
    # Within its limits...
    done = command(environment, *limited, "sh", "-c", "exit 7")
    assert done.returncode == 7, done.stderr
    limits = json.loads(done.stdout)["isolation"]["limits"]
    assert limits["memory.max"] == str(64 * MIB)
    assert (limits["pids.max"], limits["cpu.max"]) == ("32", "25000 100000")
    # ...and beyond one of them.
    done = command(environment, *limited, "/usr/bin/python3", "-c", "x = bytearray(128 << 20)")
    assert done.returncode == 137, done.stderr
    outcome = json.loads(done.stdout)["outcome"]
    assert (outcome["reason"], outcome["oom_level"]) == ("oom-killed", "service")


def test_the_doctor_finds_every_limit(environment: dict[str, str]) -> None:
    found = findings(command(environment, *COMMAND, "doctor", "--json").stdout)
    for controller in ("memory", "cpu", "pids", "io", "cpuset"):
        assert found[f"limits.{controller}"]["status"] == "ok", found[f"limits.{controller}"]
    assert found["cgroup2"]["status"] == "ok"
    assert found["launcher.placement"]["message"] == "programs are born in their cgroup"


def test_a_controller_that_is_off_above_us_is_named(environment: dict[str, str], test_run: Run) -> None:
    """In a container whose parent hands down cpu and pids, and no memory."""
    parent = Path("/sys/fs/cgroup", f"{test_run.name}-poor.slice")
    parent.mkdir()
    environment["PACTOWN_CGROUP_SLICE"] = f"{test_run.name}-poor-inner.slice"
    try:
        (parent / "cgroup.subtree_control").write_text("+cpu +pids")
        apart = [sys.executable, "-c", APART, str(parent / "container")]
        done = command(environment, *apart, "-m", "pactown_runner", "doctor", "--json")
        found = findings(done.stdout)
        assert done.returncode == 1
        assert found["limits.memory"]["status"] == "fail"
        assert found["limits.memory"]["remedy"]
        assert found["limits.cpu"]["status"] == found["limits.pids"]["status"] == "ok"
        for directory, _, _ in os.walk(parent / "container", topdown=False):
            os.rmdir(directory)

        done = command(environment, *apart, "-c", RUN_ONE)
        refused = json.loads(done.stdout)
        assert refused["code"] == "limit-not-enforceable", refused
        assert "memory" in refused["message"]
        assert refused["remedy"]
    finally:
        for directory, _, _ in os.walk(parent, topdown=False):
            os.rmdir(directory)


async def test_a_start_after_a_pause_costs_what_one_at_once_does(supervisor: Supervisor, measured: Measure) -> None:
    """Born in the cgroup, nothing waits for RCU; a write to `cgroup.procs` would cost 25 ms more after a pause."""
    one = spec(["/bin/true"])

    async def start() -> float:
        began = time.perf_counter()
        outcome = await supervisor.run(one)
        taken = time.perf_counter() - began
        assert outcome.ok
        return taken

    for _ in range(3):
        await start()
    at_once = [await start() for _ in range(25)]
    after_pause = []
    for _ in range(25):
        await asyncio.sleep(0.02)
        after_pause.append(await start())
    sandbox = await supervisor.start(spec(["sleep", "1000"], service="placed"))
    assert sandbox.isolation.placement == "born"
    await sandbox.kill()
    p50, later = statistics.median(at_once), statistics.median(after_pause)
    measured("start to exit at once, p50 ms", p50 * 1e3)
    measured("start to exit after 20 ms, p50 ms", later * 1e3)
    measured("ratio", later / p50)
