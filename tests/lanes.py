"""A pytest plugin: the lanes `unit`, `host`, `kernel`: which this machine can run, what became of each."""

from __future__ import annotations

import os
from collections import Counter, defaultdict

import pytest

from tests.hostsweep import cgroup2_mounts

LANES = ("unit", "host", "kernel")
CONTROLLERS = ("memory", "cpu", "pids")

_lane_of = pytest.StashKey[dict[str, str]]()


def lacks_for_host() -> str | None:
    """What this machine lacks for the host lane, or None."""
    if os.geteuid() != 0:
        return f"root (this is uid {os.geteuid()})"
    if not cgroup2_mounts():
        return "a cgroup v2 mount (mount -t cgroup2 none /sys/fs/cgroup)"
    if not any(os.access(mount / "cgroup.procs", os.W_OK) for mount in cgroup2_mounts()):
        return "a writable cgroup v2 mount"
    return None


def lacks_for_kernel() -> str | None:
    """What this machine lacks for the kernel lane, or None."""
    if lacks := lacks_for_host():
        return lacks
    offered = {word for mount in cgroup2_mounts() for word in (mount / "cgroup.controllers").read_text().split()}
    missing = [controller for controller in CONTROLLERS if controller not in offered]
    if missing:
        here = ", ".join(sorted(offered)) or "none"
        return f"the cgroup v2 controllers {', '.join(missing)} (here: {here})"
    return None


def lane(item: pytest.Item) -> str:
    return next((name for name in ("kernel", "host") if item.get_closest_marker(name)), "unit")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[_lane_of] = {item.nodeid: lane(item) for item in items}
    for name, lacks in (("host", lacks_for_host()), ("kernel", lacks_for_kernel())):
        if lacks:
            for item in items:
                if lane(item) == name:
                    item.add_marker(pytest.mark.skip(reason=f"needs {lacks}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lanes = config.stash.get(_lane_of, {})
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in ("passed", "failed", "error", "skipped", "xfailed", "xpassed"):
        for report in terminalreporter.getreports(outcome):
            name = lanes.get(report.nodeid)
            if name is None:
                continue
            counts[name][outcome] += 1
            if outcome == "skipped" and isinstance(report.longrepr, tuple):
                reasons[name][report.longrepr[2].removeprefix("Skipped: ")] += 1
    terminalreporter.section("lanes")
    for name in LANES:
        if not counts[name]:
            terminalreporter.line(f"{name:<7} no tests were chosen")
            continue
        summary = ", ".join(f"{number} {outcome}" for outcome, number in counts[name].items())
        could_not = "could not run: " if counts[name].keys() == {"skipped"} else ""
        terminalreporter.line(f"{name:<7} {could_not}{summary}")
        for reason, number in reasons[name].items():
            terminalreporter.line(f"{'':<7} {number} skipped: {reason}")
