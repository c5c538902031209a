"""Where sandboxes live: under systemd apart from any supervisor, without it, in a container, and without root."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cgroups import Limits
from pactown_runner import Settings, Supervisor
from tests.kernel.conftest import MIB, cgroup_of, slice_of
from tests.supervising import ROOT, Child, line_of, python, soon, spec

if TYPE_CHECKING:
    from tests.hostguard import Run

pytestmark = pytest.mark.kernel

LIMITS = Limits(memory_max="64M", pids_max=32, cpu_max=0.5)
FILES = ("memory.max", "pids.max", "cpu.max")
SERVICE = """
from cgroups import Limits
async def work(supervisor):
    limits = Limits(memory_max="64M", pids_max=32, cpu_max=0.5)
    sandbox = await supervisor.start(spec(["sleep", "1000"], limits=limits))
    await say(f"{sandbox.pid} {sandbox.isolation.cgroup}")
    await asyncio.sleep(1000)
"""


@pytest.fixture
def under_systemd() -> None:
    if not Path("/run/systemd/system").is_dir():
        pytest.fail("process 1 is not systemd; these tests are for the guest")


def systemctl(*words: str) -> str:
    return subprocess.run(["systemctl", *words], check=True, capture_output=True, text=True).stdout.strip()


def read(cgroup: Path) -> dict[str, str]:
    return {name: (cgroup / name).read_text().strip() for name in FILES}


def unit_of(settings: Settings) -> str:
    return f"{settings.cgroup_slice.removesuffix('.slice')}-sandboxes.service"


# ---- Under systemd


@pytest.mark.usefixtures("under_systemd")
async def test_systemd_leaves_sandboxes_and_their_limits_alone(supervisor: Supervisor, settings: Settings) -> None:
    sandbox = await supervisor.start(spec(["sleep", "1000"], limits=LIMITS))
    scope = cgroup_of(sandbox)
    before = read(scope)
    assert before == {"memory.max": str(64 * MIB), "pids.max": "32", "cpu.max": "50000 100000"}
    systemctl("daemon-reload")
    systemctl("set-property", "--runtime", settings.cgroup_slice, "CPUWeight=50", "MemoryMax=1G")
    assert read(scope) == before
    assert sandbox.pid in map(int, (scope / "cgroup.procs").read_text().split())
    assert (await soon(sandbox.kill())).reason == "stopped"
    # And what is started afterwards has its limits as well.
    sandbox = await supervisor.start(spec(["sleep", "1000"], limits=LIMITS))
    assert read(cgroup_of(sandbox)) == before
    await soon(sandbox.kill())


@pytest.mark.usefixtures("under_systemd")
async def test_the_tree_is_a_delegated_unit_apart_from_any_supervisor(
    supervisor: Supervisor, settings: Settings
) -> None:
    sandbox = await supervisor.start(spec(["sleep", "1000"]))
    top = systemctl("show", "--property=ControlGroup", "--value", unit_of(settings))
    assert sandbox.isolation.cgroup is not None
    assert sandbox.isolation.cgroup.startswith(f"{top}/pactown-")
    assert systemctl("show", "--property=Delegate", "--value", unit_of(settings)) == "yes"
    own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    assert not own[3:].startswith(top)
    await soon(sandbox.kill())


@pytest.mark.usefixtures("under_systemd")
async def test_a_killed_supervisor_takes_no_sandbox_along(settings: Settings) -> None:
    child = Child(settings, SERVICE)
    try:
        pid, cgroup = (await soon(child.line())).split()
        scope = Path("/sys/fs/cgroup", cgroup.lstrip("/"))
        before = read(scope)
        child.popen.kill()
        child.popen.wait()
        assert pid in (scope / "cgroup.procs").read_text().split()
        assert read(scope) == before
        async with Supervisor(settings=settings) as successor:
            (sandbox,) = successor.list()
            assert (sandbox.pid, sandbox.isolation.limits["memory.max"]) == (int(pid), str(64 * MIB))
            assert (await soon(sandbox.stop(grace=5))).reason == "stopped"
        assert not scope.exists()
    finally:
        child.close()


HOG = "import sys; x = b'x' * (int(sys.argv[1]) << 20); print('ready', flush=True); sys.stdin.read()"


async def test_a_server_and_a_one_shot_run_share_the_tenants_limit(settings: Settings) -> None:
    limited = Settings(
        **{
            **{name: getattr(settings, name) for name in settings.__dataclass_fields__},
            "tenant_limits": Limits(memory_max="64M"),
        }
    )
    async with Supervisor(settings=limited) as server, Supervisor(settings=limited, role="one-shot") as one_shot:
        service = await server.start(spec([*python(HOG), "24"], user="sharing", service="server", stdin=True))
        await line_of(service)
        assert (slice_of(service) / "memory.max").read_text().strip() == str(64 * MIB)
        run = await one_shot.start_run(spec([*python(HOG), "16"], user="sharing", service="fits", stdin=True))
        await line_of(run)
        assert slice_of(run) == slice_of(service)
        await soon(run.kill())
        outcome = await soon(one_shot.run(spec([*python(HOG), "60"], user="sharing", service="too-much")))
        assert (outcome.reason, outcome.oom_level) == ("oom-killed", "tenant")
        assert service.state == "running" or service.outcome is not None
        await soon(service.kill())


# ---- Without systemd, and in a container

APART = """
import ctypes, json, os, subprocess, sys
CLONE_NEWNS, CLONE_NEWCGROUP, MS_REC, MS_PRIVATE, MNT_DETACH = 0x20000, 0x2000000, 1 << 14, 1 << 18, 2
libc = ctypes.CDLL(None, use_errno=True)
def check(answer):
    if answer:
        raise OSError(ctypes.get_errno(), "cannot part from the host")
container = sys.argv[1]
if container:
    os.mkdir(container)
    with open(container + "/cgroup.procs", "w") as procs:
        procs.write("0")
check(libc.unshare(CLONE_NEWNS | (CLONE_NEWCGROUP if container else 0)))
check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
check(libc.mount(b"none", b"/run/systemd", b"tmpfs", 0, None))
if container:
    check(libc.umount2(b"/sys/fs/cgroup", MNT_DETACH))
    check(libc.mount(b"none", b"/sys/fs/cgroup", b"cgroup2", 0, None))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
RUN_ONE = """
import asyncio, json, sys
from pathlib import Path
from pactown_runner import Limits, RunnerError, SandboxSpec, Settings, Supervisor
async def main():
    limits = Limits(memory_max="32M", pids_max=16, cpu_max=0.5)
    spec = SandboxSpec(user_id="u", service_id="s", limits=limits, command="cat /proc/self/cgroup; exit 3")
    try:
        async with Supervisor(settings=Settings.load()) as supervisor:
            sandbox = await supervisor.start(spec)
            lines = [record.line async for record in sandbox.logs(follow=True)]
            outcome = await sandbox.wait()
            own = Path("/proc/self/cgroup").read_text().split("0::")[1].strip()
            print(json.dumps({**outcome.to_dict(), "lines": lines, "own": own, "mode": sandbox.isolation.mode,
                "limits": dict(sandbox.isolation.limits)}))
    except RunnerError as error:
        print(json.dumps({"code": error.code, "message": error.message, "remedy": error.remedy}))
asyncio.run(main())
"""


@pytest.fixture
def apart(test_run: Run) -> Iterator[dict[str, str]]:
    """An environment that leads to a state of its own, removed afterwards."""
    base = Path(tempfile.mkdtemp(prefix="apart-", dir=test_run.directory))
    base.chmod(0o711)
    name = f"{test_run.name}-apart.slice"
    yield {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "PACTOWN_USERS_BASE": str(base / "users"),
        "PACTOWN_CGROUP_SLICE": name,
        "PACTOWN_UID_RANGES": "{}-{}".format(*test_run.uids),
    }
    from pactown_runner.purge import Purge  # noqa: PLC0415

    if os.path.exists(base / "users/.state/registry.db") and os.stat(base / "users/.state").st_uid == 0:
        with Purge(Settings.load(users_base=base / "users", cgroup_slice=name, uid_ranges=(test_run.uids,))) as purge:
            purge.carry_out(purge.plan())
    shutil.rmtree(base, ignore_errors=True)


def outcome_of(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_without_systemd_the_tree_is_at_the_top(apart: dict[str, str]) -> None:
    result = outcome_of([sys.executable, "-c", APART, "", "-c", RUN_ONE], apart)
    assert (result["reason"], result["exit_code"]) == ("exited", 3), result
    (line,) = result["lines"]
    assert line.startswith(f"0::/{apart['PACTOWN_CGROUP_SLICE']}/pactown-")
    assert result["limits"] == {
        "memory.swap.max": "0",
        "memory.max": str(32 * MIB),
        "cpu.max": "50000 100000",
        "pids.max": "16",
    }
    assert result["stats"]["memory_peak"] > 0


def test_in_a_container_the_supervisor_steps_aside(apart: dict[str, str], test_run: Run) -> None:
    """Its cgroup is the top there, and could enable no controller with a process in it."""
    container = Path("/sys/fs/cgroup", f"{test_run.name}-container.slice")
    try:
        result = outcome_of([sys.executable, "-c", APART, str(container), "-c", RUN_ONE], apart)
        assert (result["reason"], result["exit_code"]) == ("exited", 3), result
        assert result["own"].endswith("/_keeper.scope")
        assert result["limits"]["memory.max"] == str(32 * MIB)
    finally:
        for directory, _, _ in os.walk(container, topdown=False):
            os.rmdir(directory)


# ---- Without root


@pytest.fixture
def login(test_run: Run) -> Iterator[str]:
    """A person's account, with a service manager of its own."""
    name = f"pt{uuid.uuid4().hex[:8]}"
    uid = str(test_run.uids[1])
    subprocess.run(["useradd", "--create-home", "--uid", uid, "--shell", "/bin/sh", name], check=True)
    subprocess.run(["systemctl", "start", f"user@{uid}.service"], check=True)
    yield name
    subprocess.run(["systemctl", "stop", f"user@{uid}.service"], check=False)
    subprocess.run(["userdel", "--remove", name], check=True, capture_output=True)


def as_login(login: str, apart: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    home = Path("/home", login)
    uid = home.stat().st_uid
    environment = {
        **apart,
        "HOME": str(home),
        "XDG_RUNTIME_DIR": f"/run/user/{uid}",
        "PACTOWN_USERS_BASE": str(home / "users"),
    }
    return ["runuser", "-u", login, "--"], environment


@pytest.mark.usefixtures("under_systemd")
def test_a_delegated_scope_has_limits_without_root(login: str, apart: dict[str, str]) -> None:
    become, environment = as_login(login, apart)
    scope = ["systemd-run", "--user", "--scope", "--quiet", "-p", "Delegate=yes"]
    result = outcome_of([*become, *scope, sys.executable, "-c", RUN_ONE], environment)
    assert (result["reason"], result["exit_code"], result["mode"]) == ("exited", 3, "user"), result
    assert result["limits"]["memory.max"] == str(32 * MIB)
    assert result["own"].endswith("/_keeper.scope")


@pytest.mark.usefixtures("under_systemd")
def test_without_delegation_a_start_is_refused_with_the_remedy(login: str, apart: dict[str, str]) -> None:
    become, environment = as_login(login, apart)
    result = outcome_of([*become, sys.executable, "-c", RUN_ONE], environment)
    assert result["code"] == "no-cgroup-tree", result
    assert "systemd-run --user --scope -p Delegate=yes" in result["remedy"]
