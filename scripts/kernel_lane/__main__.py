"""The command: build what is missing, boot, test, and say what came of it."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from xml.etree import ElementTree

from . import TOP, say
from .guest import Guest
from .image import make_image

HOST_PACKAGES = {"qemu-system-x86_64": "qemu-system-x86", "mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs"}
NICENESS = 2
"""Of the guest in which nothing is measured."""


def main(argv: Sequence[str] | None = None) -> int:
    """Do as asked; the exit status is pytest's."""
    parser = argparse.ArgumentParser(
        prog="kernel_lane", description="Run the tests that need a cgroup v2 kernel with controllers, in guests."
    )
    parser.add_argument(
        "--native", action="store_true", help="run on this host itself, which must have the controllers"
    )
    parser.add_argument(
        "--if-possible", action="store_true", help="say why not, and exit with 0, where no guest can be had"
    )
    parser.add_argument("--junit", type=Path, default=TOP / ".cache" / "kernel-junit.xml", help="where the report goes")
    parser.add_argument("args", nargs="*", help="for pytest, in a single guest then")
    options = parser.parse_args(argv)
    # As control-C does: the guest must not outlive whoever started it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if options.native:
        return run_native(options.junit, options.args)
    if options.if_possible and has_controllers():
        say("no guest is booted: this host has the controllers, so its own test run had these tests")
        return 0
    if problem := why_not():
        say(f"NOT RUN: {problem}")
        return 0 if options.if_possible and not must_run() else 1
    install_tools()
    return run_guests(make_image(), options.junit, options.args)


def why_not() -> str | None:
    """Why no guest can be had on this host, or None."""
    missing = [program for program in HOST_PACKAGES if not shutil.which(program)]
    if missing and (os.geteuid() != 0 or not shutil.which("apt-get")):
        return f"needs {', '.join(missing)}; try: apt-get install {' '.join(HOST_PACKAGES[name] for name in missing)}"
    if os.geteuid() != 0:
        return "needs root, to make the guest's file system"
    if os.uname().machine != "x86_64":
        return "the guest is x86-64, and emulating it elsewhere takes too long"
    return None


def must_run() -> bool:
    """Whether this is a CI machine on which nothing excuses a lane that does not run."""
    return os.environ.get("CI") == "true" and (
        os.geteuid() == 0 and Path("/etc/debian_version").exists() and os.uname().machine == "x86_64"
    )


def has_controllers() -> bool:
    """Whether this host itself can run the kernel tests, as `tests/lanes.py` decides it too."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    offered = {word for _, path, kind, *_ in mounts if kind == "cgroup2" for word in controllers_at(Path(path))}
    return os.geteuid() == 0 and offered >= {"memory", "cpu", "pids"}


def controllers_at(mount: Path) -> list[str]:
    """What the top of a cgroup v2 mount offers."""
    try:
        return (mount / "cgroup.controllers").read_text().split()
    except OSError:
        return []


def install_tools() -> None:
    """Install what is missing of the host's tools, and say so."""
    missing = [package for program, package in HOST_PACKAGES.items() if not shutil.which(program)]
    if missing:
        say(f"installing {' '.join(missing)} with apt-get")
        quiet = ["apt-get", "-qq", "-o", "Dpkg::Use-Pty=0"]
        install = [*quiet, "install", "-y", "--no-install-recommends", *missing]
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        if subprocess.run(install, env=environment, check=False).returncode != 0:
            subprocess.run([*quiet, "update"], env=environment, check=True)
            subprocess.run(install, env=environment, check=True)


def run_guests(image: Path, junit: Path, args: Sequence[str]) -> int:
    """Boot, wait for the power-off, and return pytest's status; 1 if there is none, or if a test was skipped."""
    began = time.monotonic()
    with ExitStack() as running:
        if args:
            guests = [Guest(image, with_files(args))]
        else:
            files = kernel_files()
            beside = [name for name in files if "mark.beside" in (TOP / name).read_text()]
            guests = [
                Guest(image, [name for name in files if name not in beside], name="measured | "),
                Guest(image, beside, name="beside   | ", cpus=1, niceness=NICENESS),
            ]
        say(f"booting {'the guest' if len(guests) == 1 else f'{len(guests)} guests'}")
        for guest in guests:
            running.enter_context(guest)
        results = [guest.results() for guest in guests]
        status = max(1 if result is None else result.status for result in results)
        join([report for result in results if result for report in result.reports], junit)
    return conclude(status, junit, f"in the guest, {time.monotonic() - began:.0f} s with its boot")


def kernel_files() -> list[str]:
    """The files with kernel tests: importing the others takes half a minute under emulation."""
    files = sorted(path for path in (TOP / "tests").rglob("test_*.py") if "mark.kernel" in path.read_text())
    return [str(path.relative_to(TOP)) for path in files]


def with_files(args: Sequence[str]) -> list[str]:
    """Arguments for pytest that choose from the files with kernel tests, unless they name some."""
    return list(args) if any(not word.startswith("-") for word in args) else [*args, *kernel_files()]


def run_native(junit: Path, args: Sequence[str]) -> int:
    """Run the kernel tests on this host."""
    junit.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "kernel and not guest", f"--junit-xml={junit}"]
    environment = os.environ | {"PACTOWN_KERNEL_LANE": "1"}
    command += with_files(args)
    status = subprocess.run(command, cwd=TOP, env=environment, check=False).returncode
    return conclude(status, junit, "on this host")


def join(reports: Iterable[Path], target: Path) -> None:
    """One JUnit report of several."""
    target.parent.mkdir(parents=True, exist_ok=True)
    suites = ElementTree.Element("testsuites")
    for report in reports:
        suites.extend(ElementTree.parse(report).getroot())
    ElementTree.ElementTree(suites).write(target, encoding="utf-8", xml_declaration=True)


def conclude(status: int, junit: Path, where: str) -> int:
    """Say in one line what came of it. 1 if a test was skipped: in this lane nothing may be missing."""
    cases = list(ElementTree.parse(junit).iter("testcase"))
    bad = {kind: [case for case in cases if case.find(kind) is not None] for kind in ("failure", "error", "skipped")}
    for kind, found in bad.items():
        for case in found:
            say(f"{kind}: {case.get('classname')}::{case.get('name')}")
    passed = len(cases) - sum(map(len, bad.values()))
    counts = ", ".join(f"{len(found)} {kind}" for kind, found in bad.items() if found)
    say(f"{passed} passed{', ' * bool(counts)}{counts} ({where})")
    if bad["skipped"]:
        say("a skipped test counts as failed here")
    return status or int(bool(bad["skipped"]))


if __name__ == "__main__":
    sys.exit(main())
