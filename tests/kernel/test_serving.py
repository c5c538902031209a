"""The unit of deploy/ as systemd runs it: restarted, killed and stopped, while sandboxes run on or end.

What it runs is an application that serves, which starts sooner than the command: `test_reboot.py` has that.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cgroups import Limits, find_mount
from pactown_runner import SandboxSpec, Settings, Supervisor
from tests.kernel.conftest import left
from tests.supervising import ROOT, eventually, spec
from tests.test_serving import ALWAYS, LAST_WORDS, LINES, PROGRAM, SLEEP

if TYPE_CHECKING:
    from tests.hostguard import Run

pytestmark = [pytest.mark.kernel, pytest.mark.beside]

UNIT = ROOT / "deploy/pactown-runner.service"
UNITS = Path("/run/systemd/system")


def systemctl(*words: str) -> str:
    return subprocess.run(["systemctl", *words], check=True, capture_output=True, text=True).stdout.strip()


class Unit:
    """The unit as it is shipped, but for its program, and for what leads that to this test's state."""

    def __init__(self, name: str, settings: Settings, directory: Path) -> None:
        self.name = name
        self._settings = settings
        self._directory = directory

    def begin(self, on_exit: str, wanted: SandboxSpec) -> tuple[int, str]:
        """Start it with a program that starts a service, as an application does; its pid and cgroup."""
        for name, text in (("program.py", PROGRAM), ("spec.json", wanted.to_json())):
            (self._directory / name).write_text(text)
        self.install(on_exit, '"$$(cat spec.json)"')
        self("start")
        _, pid, cgroup = read(self._directory / "printed").split()
        return int(pid), cgroup

    def install(self, on_exit: str, specs: str = "") -> None:
        words = f"cd {self._directory} && exec {sys.executable} program.py asyncio {specs} >printed"
        settings = self._settings
        paths = {name: getattr(settings, name) for name in ("users_base", "state_dir", "log_dir", "run_dir")}
        environment = {f"PACTOWN_{name.upper()}": str(path) for name, path in paths.items()} | {
            "PACTOWN_CGROUP_SLICE": settings.cgroup_slice,
            "PACTOWN_UID_RANGES": "{}-{}".format(*settings.uid_ranges[0]),
            "PACTOWN_ON_EXIT": on_exit,
            "PYTHONPATH": str(ROOT),
        }
        lines = ["[Service]", "ExecStart=", f"ExecStart=/bin/sh -c '{words}'"]
        lines += [f"Environment={name}={value}" for name, value in environment.items()]
        (UNITS / self.name).write_text(UNIT.read_text())
        drop_in = UNITS / f"{self.name}.d/test.conf"
        drop_in.parent.mkdir(exist_ok=True)
        drop_in.write_text("\n".join(lines) + "\n")
        systemctl("enable", "--quiet", "--runtime", self.name)
        systemctl("daemon-reload")

    def remove(self) -> None:
        for words in (["stop"], ["clean", "--what=fdstore"], ["disable", "--quiet", "--runtime"]):
            subprocess.run(["systemctl", *words, self.name], check=False, capture_output=True)
        shutil.rmtree(UNITS / f"{self.name}.d", ignore_errors=True)
        (UNITS / self.name).unlink(missing_ok=True)
        systemctl("daemon-reload")

    def __call__(self, *words: str) -> None:
        systemctl(*words, self.name)

    def value(self, property_: str) -> str:
        return systemctl("show", f"--property={property_}", "--value", self.name)

    def kept(self) -> int:
        """How many descriptors systemd holds for it."""
        return int(self.value("NFileDescriptorStore"))

    async def restarted(self, old_pid: str) -> None:
        """Wait until another process looks after services."""

        def is_another() -> bool:
            return self.value("ActiveState") == "active" and self.value("MainPID") != old_pid

        await eventually(is_another, 60, pause=0.2)


@pytest.fixture
async def unit(settings: Settings, test_run: Run, tmp_path: Path) -> AsyncIterator[Unit]:
    if not Path("/run/systemd/system").is_dir():
        pytest.fail("process 1 is not systemd; these tests are for the guest")
    unit = Unit(f"{test_run.name}-runner.service", settings, tmp_path)
    yield unit
    unit.remove()
    # What is registered would come back under the next test's supervisor.
    async with Supervisor(settings=settings) as supervisor:
        for sandbox in supervisor.list():
            await sandbox.kill()


def is_alive(pid: int) -> bool:
    return read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[0:1] not in ([], ["Z"])


def read(path: Path) -> str:
    """A file's text, "" if it is not there or not any more."""
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


async def test_what_befalls_the_unit_befalls_no_sandbox(unit: Unit, settings: Settings) -> None:
    pid, _ = unit.begin("leave", spec(SLEEP, restart=ALWAYS))
    assert unit.kept() == 2
    first = unit.value("MainPID")
    unit.install("leave")
    unit("restart")
    # Since it is of the type notify, it is ready.
    serving = f"looking after {settings.state_dir}, 1 sandbox"
    assert unit.value("StatusText") == serving
    second = unit.value("MainPID")
    assert second != first
    assert (is_alive(pid), unit.kept()) == (True, 2)
    unit("kill", "--signal=SIGKILL", "--kill-whom=main")
    await unit.restarted(second)
    assert unit.value("StatusText") == serving
    assert (is_alive(pid), unit.kept()) == (True, 2)
    unit("stop")
    assert unit.value("ActiveState") == "inactive"
    # Held although it is stopped, which systemd does from version 254 on.
    assert (is_alive(pid), unit.kept()) == (True, 2)
    unit.install("stop")
    unit("start")
    assert unit.value("StatusText") == serving
    assert is_alive(pid)
    unit("stop")
    assert not is_alive(pid)
    assert unit.kept() == 0
    assert not left(settings)


async def test_a_killed_unit_loses_no_byte_of_a_sandbox_that_ends_meanwhile(unit: Unit, settings: Settings) -> None:
    _, cgroup = unit.begin("leave", spec(LAST_WORDS))
    scope = find_mount().path / cgroup.lstrip("/")
    unit.install("leave")
    first = unit.value("MainPID")
    unit("kill", "--signal=SIGSTOP", "--kill-whom=main")
    (home,) = (path for path in settings.users_base.glob("pactown_*") if scope.parent.stem.endswith(path.name[8:]))
    (home / "sandboxes/api/go").touch()
    await eventually(lambda: "populated 0" in read(scope / "cgroup.events"), 60)
    unit("kill", "--signal=SIGKILL", "--kill-whom=main")
    await unit.restarted(first)
    await eventually(lambda: not scope.exists(), 60)
    log = list(map(json.loads, read(settings.log_dir / home.name / "api.jsonl").splitlines()))
    # Earlier tests of the session had a service of this name.
    printed = [(record["stream"], record["line"]) for record in log if record["run"] == log[-1]["run"]]
    assert [line for stream, line in printed if stream == "stdout"] == [str(number) for number in range(1, LINES + 1)]
    assert [line for stream, line in printed if stream == "stderr"] == ["done"]
    assert unit.kept() == 0
    unit("stop")
    assert not left(settings)


async def test_all_is_done_with_what_the_unit_leaves_of_root(unit: Unit, settings: Settings) -> None:
    """A new account, limits and namespaces; and nothing of the unit's own confinement is a sandbox's."""
    limits = Limits(memory_max="64M", pids_max=32, cpu_max=0.5)
    wanted = spec(SLEEP, user="of the unit", limits=limits, namespaces=frozenset({"net", "ipc"}), restart=ALWAYS)
    pid, _ = unit.begin("stop", wanted)
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":\t", 1) for line in read(proc / "status").splitlines())
    assert (status["Seccomp"], status["CapBnd"], status["NoNewPrivs"]) == ("0", "0" * 16, "1")
    assert read(proc / "oom_score_adj") == "0\n"
    assert os.readlink(proc / "ns/mnt") == os.readlink("/proc/1/ns/mnt")
    assert os.readlink(proc / "ns/net") != os.readlink("/proc/1/ns/net")
    assert unit.kept() == 2
    unit("stop")
    assert unit.value("Result") == "success"
    assert not left(settings)
