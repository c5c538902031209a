"""A supervisor as a process of its own: what it tells its service manager, and what signals and sudden deaths do."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cgroups import find_mount
from pactown_runner import SandboxSpec, Settings, Supervisor
from pactown_runner.logs import LogPaths
from pactown_runner.notify import NAME_PREFIX
from pactown_runner.specs import RestartPolicy
from tests.service_manager import ServiceManager
from tests.supervising import ROOT, eventually, leftovers, soon, spec

if TYPE_CHECKING:
    from tests.hostguard import Run

pytestmark = pytest.mark.host
each_loop = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])

PROGRAM = """
import asyncio, contextlib, importlib, sys
from pactown_runner import SandboxSpec, Settings
from pactown_runner.serving import serve

loop, *specs = sys.argv[1:]

@contextlib.asynccontextmanager
async def beside(supervisor):
    for text in [] if supervisor.list() else specs:
        await supervisor.start(SandboxSpec.from_json(text))
    print("ready", *(f"{sandbox.pid} {sandbox.isolation.cgroup}" for sandbox in supervisor.list()), flush=True)
    yield
    print("over", *(sandbox.state for sandbox in supervisor.list()), flush=True)

importlib.import_module(loop).run(serve(Settings.load(), beside=beside))
"""
ALWAYS = RestartPolicy("always", backoff=0.01)
SLEEP = ["sleep", "1000"]
LINES = 5000
"""So many fit into a FIFO, which holds 64 KiB."""
LAST_WORDS = f"while [ ! -e go ]; do sleep 0.01; done; seq {LINES}; exec >&2; echo done"

Serve = Callable[..., "Server"]


class Server:
    """A process that serves; the test is its service manager."""

    def __init__(self, popen: subprocess.Popen[bytes], manager: ServiceManager, errors: Path) -> None:
        self.popen = popen
        self._manager = manager
        self._errors = errors

    async def ready(self) -> list[str]:
        """Wait until it looks after its services; returns the pid and cgroup of each."""
        assert self.popen.stdout is not None
        line = await soon(asyncio.to_thread(self.popen.stdout.readline))
        assert line.startswith(b"ready"), self.errors()
        return line.decode().split()[1:]

    async def ended(self) -> int:
        """Wait for its end, and hear what it has to say meanwhile."""

        def has_ended() -> bool:
            # In this order, so that nothing is missed.
            status = self.popen.poll()
            self._manager.listen()
            return status is not None

        await eventually(has_ended)
        return self.popen.wait()

    def errors(self) -> str:
        return self._errors.read_text()


@pytest.fixture
def manager(test_run: Run) -> Iterator[ServiceManager]:
    with (
        tempfile.TemporaryDirectory(prefix="notify-", dir=test_run.directory) as directory,
        ServiceManager(f"{directory}/notify") as manager,
    ):
        yield manager


@pytest.fixture
def serving(settings: Settings, manager: ServiceManager, tmp_path: Path) -> Iterator[Serve]:
    """Starts servers of this test's state; those that live are killed at the end."""
    servers: list[Server] = []

    def start(*specs: SandboxSpec, loop: str = "asyncio", capacity: int = 100, **environ: str) -> Server:
        environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "PACTOWN_USERS_BASE": str(settings.users_base),
            "PACTOWN_CGROUP_SLICE": settings.cgroup_slice,
            "PACTOWN_UID_RANGES": "{}-{}".format(*settings.uid_ranges[0]),
            **environ,
        }
        words = [sys.executable, "-c", PROGRAM, loop, *(spec.to_json() for spec in specs)]
        errors = tmp_path / f"errors-{len(servers)}"
        with errors.open("wb") as stderr:
            popen = manager.start(
                words, environ, capacity=capacity, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr
            )
        servers.append(Server(popen, manager, errors))
        return servers[-1]

    yield start
    for server in servers:
        with server.popen as popen:
            popen.kill()


async def heard(manager: ServiceManager, line: str, times: int = 1) -> None:
    """Wait until a line has been said so often."""

    def listen() -> bool:
        manager.listen()
        return manager.said.count(line) >= times

    await eventually(listen)


def log_of(settings: Settings, stream: str = "stdout") -> list[str]:
    """What the service has printed; empty if nothing was ever written down."""
    logs = [path.read_text() for path in settings.log_dir.glob("*/api.jsonl")]
    records = [json.loads(line) for log in logs for line in log.splitlines()]
    return [record["line"] for record in records if record["stream"] == stream]


# ---- In order


@each_loop
async def test_the_manager_hears_of_the_whole_life(
    serving: Serve, manager: ServiceManager, settings: Settings, loop: str
) -> None:
    server = serving(spec(SLEEP), loop=loop, WATCHDOG_USEC="100000")
    await server.ready()
    await heard(manager, "READY=1")
    await heard(manager, "WATCHDOG=1", times=3)
    ((name, kept),) = manager.store.items()
    assert name.startswith(NAME_PREFIX)
    assert [os.readlink(f"/proc/self/fd/{fd}").rsplit(".", 1)[1] for fd in kept] == ["out", "err"]
    before = list(manager.said)
    assert "STOPPING=1" not in before
    server.popen.terminate()
    assert await server.ended() == 0, server.errors()
    assert server.popen.stdout is not None
    assert server.popen.stdout.read() == b"over running\n", "what goes on beside it ends first"
    said = manager.said[len(before) :]
    assert said.index("STOPPING=1") < said.index("FDSTOREREMOVE=1")
    assert {"STATUS=ending 1 sandbox", "EXTEND_TIMEOUT_USEC=30000000"} < set(said)
    assert not manager.store
    assert not leftovers(settings)


@each_loop
async def test_what_is_left_running_is_taken_over(
    serving: Serve, manager: ServiceManager, settings: Settings, loop: str
) -> None:
    services = [spec(SLEEP, service=name, restart=ALWAYS) for name in ("one", "two")]
    server = serving(*services, loop=loop, PACTOWN_ON_EXIT="leave")
    running = await server.ready()
    server.popen.terminate()
    assert await server.ended() == 0, server.errors()
    kept = dict(manager.store)
    assert len(kept) == 2
    successor = serving(loop=loop)
    assert sorted(await successor.ready()) == sorted(running)
    manager.listen()
    assert manager.store == kept, "nothing was given twice"
    successor.popen.terminate()
    assert await successor.ended() == 0, successor.errors()
    assert not manager.store
    assert not leftovers(settings)


@each_loop
async def test_a_second_signal_lets_all_grace_be_over(
    serving: Serve, manager: ServiceManager, settings: Settings, loop: str
) -> None:
    stubborn = spec("trap 'echo no' TERM; echo up; while :; do sleep 100; done", stop_grace=1000.0)
    server = serving(stubborn, loop=loop)
    await server.ready()
    await eventually(lambda: "up" in log_of(settings))
    server.popen.terminate()
    await heard(manager, "STOPPING=1")
    await eventually(lambda: "no" in log_of(settings))
    server.popen.send_signal(signal.SIGINT)
    assert await server.ended() == 0, server.errors()
    assert "SIGINT again" in server.errors()
    assert not leftovers(settings)


async def test_a_hang_up_means_nothing_without_a_terminal(serving: Serve, manager: ServiceManager) -> None:
    server = serving()
    await server.ready()
    server.popen.send_signal(signal.SIGHUP)
    await eventually(lambda: "SIGHUP does nothing" in server.errors())
    manager.listen()
    assert "STOPPING=1" not in manager.said
    server.popen.send_signal(signal.SIGINT)
    assert await server.ended() == 0


async def test_one_that_cannot_begin_is_never_ready(
    serving: Serve, manager: ServiceManager, settings: Settings
) -> None:
    settings.state_dir.mkdir(mode=0o700)
    (settings.state_dir / "run").mkdir()
    (settings.state_dir / "run").chmod(0o777)
    server = serving()
    assert await server.ended() == 1
    assert "LogError" in server.errors()
    assert "READY=1" not in manager.said


# ---- Descriptors that outlive it


@pytest.mark.parametrize(("capacity", "kept"), [(100, True), (0, False)])
async def test_what_sits_in_a_fifo_outlives_sandbox_and_supervisor(
    serving: Serve, manager: ServiceManager, settings: Settings, capacity: int, kept: bool
) -> None:
    server = serving(spec(LAST_WORDS), capacity=capacity)
    _, cgroup = await server.ready()
    # From here on nobody reads the FIFOs.
    server.popen.send_signal(signal.SIGSTOP)
    (home,) = settings.users_base.glob("pactown_*")
    (home / "sandboxes/api/go").touch()
    events = find_mount().path / cgroup.lstrip("/") / "cgroup.events"
    await eventually(lambda: "populated 0" in events.read_text())
    server.popen.kill()
    await server.ended()
    assert bool(manager.store) is kept
    successor = serving(capacity=capacity)
    await successor.ready()
    await eventually(lambda: not events.exists())
    # Without a store it is lost with the last descriptor, which is what the store is for.
    assert log_of(settings) == ([str(number) for number in range(1, LINES + 1)] if kept else [])
    assert log_of(settings, "stderr") == (["done"] if kept else [])
    manager.listen()
    assert not manager.store
    successor.popen.terminate()
    assert await successor.ended() == 0
    assert not leftovers(settings)


async def test_what_is_kept_of_runs_that_are_no_more_is_dropped(
    serving: Serve, manager: ServiceManager, settings: Settings
) -> None:
    manager.store[f"{NAME_PREFIX}0123456789abcdef"] = [os.open("/dev/null", os.O_RDWR) for _ in range(2)]
    manager.store["somebody's"] = [os.open("/dev/null", os.O_RDWR)]
    server = serving()
    await server.ready()
    await heard(manager, "FDSTOREREMOVE=1")
    assert list(manager.store) == ["somebody's"]
    assert 'nobody here wants what the service manager passed as "somebody\'s"' in server.errors()
    fds = {os.readlink(path) for path in Path(f"/proc/{server.popen.pid}/fd").iterdir() if int(path.name) > 2}
    assert "/dev/null" not in fds
    server.popen.terminate()
    assert await server.ended() == 0


async def test_what_is_adopted_from_one_without_a_store_is_kept(
    serving: Serve, manager: ServiceManager, settings: Settings
) -> None:
    server = serving(spec(SLEEP, restart=ALWAYS), capacity=0, PACTOWN_ON_EXIT="leave")
    await server.ready()
    server.popen.terminate()
    assert await server.ended() == 0, server.errors()
    assert not manager.store
    successor = serving()
    await successor.ready()
    await heard(manager, "FDSTORE=1")
    (kept,) = manager.store.values()
    assert len(kept) == 2
    successor.popen.terminate()
    assert await successor.ended() == 0, successor.errors()
    assert not manager.store


async def test_what_cannot_be_written_down_yet_is_kept_although_it_has_no_record(
    serving: Serve, manager: ServiceManager, settings: Settings
) -> None:
    async with Supervisor(settings=settings) as other:
        # A log has one writer at a time, and this one has the name now.
        sandbox = await other.start(spec(SLEEP))
        paths = LogPaths(settings.log_dir, settings.run_dir, sandbox.user.linux_username.removeprefix("pactown_"))
        run_id = "0123456789abcdef"
        for path in paths.fifos("api", run_id):
            os.mkfifo(path, 0o600)
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
            os.write(fd, b"last words\n")
            manager.store.setdefault(NAME_PREFIX + run_id, []).append(fd)
        server = serving()
        await server.ready()
        manager.listen()
        assert list(manager.store) == [NAME_PREFIX + run_id]
        server.popen.terminate()
        assert await server.ended() == 0, server.errors()
        await sandbox.kill()
    successor = serving()
    await successor.ready()
    assert log_of(settings) == log_of(settings, "stderr") == ["last words"]
    manager.listen()
    assert not manager.store
    successor.popen.terminate()
    assert await successor.ended() == 0
    assert not leftovers(settings)
