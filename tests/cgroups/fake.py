"""A fake cgroup: a directory of plain files. It holds what is written, and refuses and changes nothing by itself.

Its files and first texts are those of the kernel, for a cgroup that is not the root; `test_fake.py` holds the core
files against a real one. What the kernel does with a value is for the tests on a real mount.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cgroups import Cgroup

_PRESSURE = "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"

CORE = {
    "cgroup.controllers": "\n",
    "cgroup.events": "populated 0\nfrozen 0\n",
    "cgroup.freeze": "0\n",
    "cgroup.kill": "",
    "cgroup.max.depth": "max\n",
    "cgroup.max.descendants": "max\n",
    "cgroup.procs": "",
    "cgroup.subtree_control": "",
    "cgroup.threads": "",
    "cgroup.type": "domain\n",
    "cpu.pressure": _PRESSURE,
    "cpu.stat": "usage_usec 0\nuser_usec 0\nsystem_usec 0\n",
    "io.pressure": _PRESSURE,
    "memory.pressure": _PRESSURE,
}
"""What every cgroup but the root has."""

CONTROLLERS = {
    "cpu": {
        "cpu.max": "max 100000\n",
        "cpu.weight": "100\n",
        "cpu.stat": CORE["cpu.stat"] + "nr_periods 0\nnr_throttled 0\nthrottled_usec 0\n",
    },
    "cpuset": {
        "cpuset.cpus": "\n",
        "cpuset.cpus.effective": "0-3\n",
    },
    "io": {
        "io.max": "",
        "io.stat": "",
        "io.weight": "default 100\n",
    },
    "memory": {
        "memory.current": "0\n",
        "memory.events": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\noom_group_kill 0\n",
        "memory.events.local": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\noom_group_kill 0\n",
        "memory.high": "max\n",
        "memory.low": "0\n",
        "memory.max": "max\n",
        "memory.min": "0\n",
        "memory.oom.group": "0\n",
        "memory.peak": "0\n",
        "memory.swap.current": "0\n",
        "memory.swap.max": "max\n",
    },
    "pids": {
        "pids.current": "0\n",
        "pids.events": "max 0\n",
        "pids.max": "max\n",
        "pids.peak": "0\n",
    },
}
"""What each controller adds."""


def make_fake(path: Path, controllers: Iterable[str] = CONTROLLERS) -> Cgroup:
    """Make a fake cgroup that has these controllers, and open it."""
    path.mkdir(parents=True)
    controllers = sorted(controllers)
    texts = dict(CORE)
    for name in controllers:
        texts |= CONTROLLERS[name]
    texts["cgroup.controllers"] = " ".join(controllers) + "\n"
    for name, text in texts.items():
        (path / name).write_text(text)
    return Cgroup.open(path)
