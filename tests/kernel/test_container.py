"""The container of `compose.yaml`, as far as a guest without Docker can be one: crun(1) in Docker's place.

Taken from there are the capabilities, the cgroup namespace, the mounts and the entrypoint; the root file system is the
guest's own, below an overlay. Docker's seccomp and AppArmor profiles are not here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cgroups import find_mount
from tests.supervising import ROOT, eventually, listens

pytestmark = [pytest.mark.kernel, pytest.mark.beside, pytest.mark.guest(boot=1), pytest.mark.deadline(300)]

NAME = "container-of-compose"
SCOPE = Path(f"system.slice/docker-{NAME}.scope")
COMPOSE = (ROOT / "compose.yaml").read_text()
CAPABILITIES = re.findall(r"\w+", "".join(re.findall(r"cap_add: \[(.*)\]", COMPOSE)))
VOLUMES = [line.split(":") for line in re.findall(r"^ +- ([\w/]+:/[\w/]+)$", COMPOSE, re.MULTILINE)]
SERVE = f"{ROOT}/deploy/container-entrypoint {sys.executable} -m pactown_runner serve & wait"
"""As `init: true` has it, the server is not the only process of the container."""


class Container:
    """A bundle for crun, made as Docker makes its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.volumes = {inside: directory / f"volume{number}" for number, (_, inside) in enumerate(VOLUMES)}
        self.console = directory / "console"
        self.socket = self.volumes["/run/pactown"] / "api.sock"
        for path in (*self.volumes.values(), directory / "upper", directory / "work", directory / "rootfs"):
            path.mkdir()
        subprocess.run(["cp", "-a", "/etc/.", self.volumes["/etc"]], check=True)
        layers = f"lowerdir=/,upperdir={directory}/upper,workdir={directory}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, directory / "rootfs"], check=True)

    def start(self) -> None:
        (self.directory / "config.json").write_text(json.dumps(self._config()))
        with self.console.open("wb") as console:
            subprocess.run(
                ["crun", "--systemd-cgroup", "run", "--detach", f"--bundle={self.directory}", NAME],
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )

    def remove(self) -> None:
        subprocess.run(["crun", "delete", "--force", NAME], check=False, capture_output=True)
        subprocess.run(["umount", self.directory / "rootfs"], check=False)

    async def ready(self) -> None:
        """Wait until it listens, and fail with what it said if it does not."""
        events = find_mount().path / SCOPE / "cgroup.events"
        await eventually(lambda: listens(self.socket) or "populated 1" not in events.read_text(), 250)
        assert listens(self.socket), self.console.read_text()

    def asked(self, path: str, *words: str) -> Any:
        """What the API answers."""
        command = ["curl", "-sS", "--fail-with-body", "--unix-socket", str(self.socket), *words]
        done = subprocess.run([*command, f"http://localhost{path}"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout, done.stderr, self.console.read_text())
        return json.loads(done.stdout)

    def _config(self) -> dict[str, Any]:
        granted = [f"CAP_{name}" for name in CAPABILITIES]
        options = ["nosuid", "nodev", "noexec"]
        mounts = [
            ("/proc", "proc", "proc", options),
            ("/dev", "tmpfs", "tmpfs", ["nosuid", "mode=755"]),
            ("/sys", "sysfs", "sysfs", [*options, "ro"]),
            ("/sys/fs/cgroup", "cgroup", "cgroup", [*options, "ro"]),
            ("/dev/shm", "tmpfs", "shm", options),
            *((inside, "none", str(path), ["rbind"]) for inside, path in self.volumes.items()),
        ]
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": ["/bin/sh", "-c", SERVE],
                "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", f"PYTHONPATH={ROOT}"],
                "cwd": "/",
                "noNewPrivileges": True,
                "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), granted),
                "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 524288, "hard": 524288}],
            },
            "root": {"path": "rootfs"},
            "mounts": [dict(zip(("destination", "type", "source", "options"), mount, strict=True)) for mount in mounts],
            "linux": {
                "cgroupsPath": f"system.slice:docker:{NAME}",
                "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "cgroup", "network")],
            },
        }


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    container = Container(tmp_path)
    yield container
    container.remove()


async def test_what_compose_gives_is_enough(container: Container) -> None:
    assert {"SYS_ADMIN", "SETUID"} < set(CAPABILITIES)
    assert "/etc" in container.volumes
    container.start()
    await container.ready()
    wanted = {
        "user_id": "demo",
        "service_id": "web",
        "command": "id -u; sleep 1000",
        "limits": {"memory_max": "64M", "pids_max": 16, "cpu_max": 0.5},
        "namespaces": ["net", "ipc"],
        "restart": {"mode": "always"},
    }
    made = container.asked("/runner/sandboxes", "--json", json.dumps(wanted))
    assert made["state"] == "running"
    assert made["isolation"]["cgroup"].startswith("/pactown.slice/pactown-")
    # crun has the container in a cgroup below its unit's.
    (scope,) = (find_mount().path / SCOPE).rglob("web.scope")
    assert str(scope).endswith(made["isolation"]["cgroup"])
    assert (scope / "memory.max").read_text() == f"{64 << 20}\n"
    assert (scope / "pids.max").read_text() == "16\n"
    assert (scope / "cpu.max").read_text() == "50000 100000\n"
    (pid,) = (scope / "cgroup.procs").read_text().split()[:1]
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert (status["CapBnd"], status["NoNewPrivs"]) == ("0" * 16, "1")
    assert status["Uid"].split()[0] == str(made["isolation"]["uid"][0]) != "0"
