"""The units as `docs/operations.md` has them installed, and a service that survives a reboot of the host.

In the guest only, which it reboots: `scripts/kernel_lane/`. Both halves are whole tests; what the first one found
lies beside the lane's other results.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import pytest

from tests import hostguard
from tests.sections import commands
from tests.supervising import ROOT, eventually

if TYPE_CHECKING:
    from tests.hostguard import Run

pytestmark = [pytest.mark.kernel, pytest.mark.beside, pytest.mark.deadline(300)]

PREFIX = Path("/opt/pactown")
FOUND = Path("/srv/results/before-the-reboot.json")
REBOOT = Path("/srv/results/reboot")
LIMITS = {"memory.max": str(64 << 20), "pids.max": "16", "cpu.max": "50000 100000"}


def typed(text: str) -> str:
    """Type commands into a shell; what they print."""
    done = subprocess.run(["sh", "-e"], input=text, text=True, capture_output=True, check=False)
    assert done.returncode == 0, (text, done.stdout, done.stderr, journal())
    return done.stdout


def journal() -> str:
    return subprocess.run(
        ["journalctl", "--no-pager", "--boot", "--unit=pactown-*"], capture_output=True, text=True, check=False
    ).stdout


def service() -> dict[str, Any]:
    socket = "--unix-socket /run/pactown/api.sock"
    found: dict[str, Any] = json.loads(typed(f"curl -fsS {socket} http://localhost/runner/sandboxes/demo/web"))
    return found


async def ready() -> dict[str, Any]:
    """The service as the API shows it when it is ready."""
    await eventually(lambda: service()["ready"], 120, pause=0.2)
    return service()


def unit(property_: str) -> str:
    return typed(f"systemctl show --property={property_} --value pactown-runner.service")


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()


def assert_runs(found: dict[str, Any]) -> None:
    """It runs, answers, and is the tenant's, within its limits: as the kernel says it."""
    assert found["state"] == "running", found
    scope = Path("/sys/fs/cgroup", found["isolation"]["cgroup"].lstrip("/"))
    assert str(scope).startswith("/sys/fs/cgroup/pactown.slice/pactown-sandboxes.service/pactown-")
    assert str(found["pid"]) in (scope / "cgroup.procs").read_text().split()
    assert {name: (scope / name).read_text().strip() for name in LIMITS} == LIMITS
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{found['pid']}/status").read_text().splitlines())
    assert status["Uid"].split() == [str(uid) for uid in found["isolation"]["uid"]] + [
        str(found["isolation"]["uid"][0])
    ]
    assert found["isolation"]["uid"][0] != 0
    with urlopen("http://127.0.0.1:8001/") as answer:
        assert answer.status == 200


@pytest.fixture
def installed() -> None:
    """As if the first section had been typed, but from these sources, and with the guest's Python: it has no pip."""
    program = PREFIX / "bin/pactown-runner"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m pactown_runner "$@"\n')
    program.chmod(0o755)
    (PREFIX / "share").mkdir()
    (PREFIX / "share/pactown-runner").symlink_to(ROOT / "deploy")
    typed(commands("operations.md", "Install")[0].splitlines()[3])


@pytest.mark.guest(boot=1)
@pytest.mark.usefixtures("installed")
async def test_a_service_starts_where_the_units_were_installed_as_documented(test_run: Run) -> None:
    units, start = commands("operations.md", "Install the units")
    typed(units)
    assert json.loads(typed(start)).items() >= {"user_id": "demo", "service_id": "web"}.items()
    found = await ready()
    assert_runs(found)
    FOUND.write_text(json.dumps(found | {"boot_id": boot_id()}))
    REBOOT.touch()
    # It is to be there after the reboot.
    test_run.before |= hostguard.strangers()


@pytest.mark.guest(boot=2)
async def test_it_is_back_after_the_reboot() -> None:
    before = json.loads(FOUND.read_text())
    assert before["boot_id"] != boot_id()
    found = await ready()
    assert found["run_id"] != before["run_id"]
    assert found["isolation"]["uid"] == before["isolation"]["uid"]
    assert found["command"] == before["command"]
    assert_runs(found)
    # From here on it is what the documentation says of the units' end.
    _fetch, upgrade = commands("operations.md", "Upgrade")
    supervisor = unit("MainPID")
    typed(upgrade)
    assert unit("MainPID") != supervisor
    after = service()
    assert (after["pid"], after["run_id"]) == (found["pid"], found["run_id"])
    assert_runs(after)
    (remove,) = commands("operations.md", "Remove it")
    typed(remove)
    assert not Path(f"/proc/{found['pid']}").exists()
    assert hostguard.strangers() <= {"cgroup /sys/fs/cgroup/pactown.slice"}
