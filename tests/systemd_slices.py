"""Slices that systemd made for a test run's units: they stay when the units have ended, and are no leak of a test."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.hostsweep import cgroup2_mounts

ABOVE = ("pactown-test.slice", "pactown.slice")
"""`a-b-c.slice` lies in `a-b.slice`, which lies in `a.slice`."""


def stop_slices(run_name: str) -> None:
    """Stop those of one run, and those above them in which nothing else is."""
    if not Path("/run/systemd/system").is_dir():
        return
    # Those above first become empty by this; the pattern chooses from what is loaded.
    subprocess.run(["systemctl", "stop", f"{run_name}.slice", f"{run_name}-*.slice"], check=False, capture_output=True)
    for name in ABOVE:
        if _is_unused(name):
            subprocess.run(["systemctl", "stop", name], check=False, capture_output=True)


def _is_unused(name: str) -> bool:
    parts = name.removesuffix(".slice").split("-")
    below = "/".join("-".join(parts[: number + 1]) + ".slice" for number in range(len(parts)))
    directories = [mount / below for mount in cgroup2_mounts()]
    return any(path.is_dir() and not any(child.is_dir() for child in path.iterdir()) for path in directories)
