"""One place in the tree and one set of accounts for all kernel tests: under emulation each would cost half a second.

A test has a supervisor of its own, and when it has ended nothing of what it ran may be left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cgroups import find_mount
from pactown_runner import Sandbox, Settings, Supervisor
from tests import hostsweep
from tests.supervising import line_of, python, spec

if TYPE_CHECKING:
    from tests.hostguard import Run

MIB = 2**20
Measure = Callable[[str, object], None]

_figures = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Last, as what they leave for the next boot would be in the others' way.
    items.sort(key=lambda item: item.get_closest_marker("guest") is not None)
    if os.environ.get("PACTOWN_GUEST") != "1":
        for item in items:
            if item.get_closest_marker("guest"):
                item.add_marker(pytest.mark.skip(reason="needs the guest: make test-kernel"))


@pytest.fixture(scope="session")
def settings(test_run: Run) -> Iterator[Settings]:
    """Settings of one state for all tests, whose accounts and place in the tree are removed at the end."""
    base = Path(tempfile.mkdtemp(prefix="users-", dir=test_run.directory))
    base.chmod(0o711)
    settings = Settings(
        users_base=base,
        state_dir=base / ".state",
        log_dir=base / ".state/log",
        run_dir=base / ".state/run",
        cgroup_slice=f"{test_run.name}-kernel.slice",
        uid_ranges=(test_run.uids,),
        stop_grace=5.0,
    )
    yield settings
    for path in list(hostsweep.cgroup_dirs(settings.cgroup_slice.__eq__)):
        hostsweep.remove_cgroup(path)
    for leak in list(hostsweep.accounts(test_run.claim)):
        leak.remove()
    hostsweep.remove_file(base)


@pytest.fixture
async def supervisor(settings: Settings) -> AsyncIterator[Supervisor]:
    """A running supervisor; nothing is left of what it ran."""
    async with Supervisor(settings=settings) as supervisor:
        yield supervisor
    assert not left(settings)


def left(settings: Settings) -> list[Path]:
    """The slices and scopes of tenants that are there."""
    (top,) = hostsweep.cgroup_dirs(settings.cgroup_slice.__eq__)
    found = [Path(directory, name) for directory, names, _ in os.walk(top) for name in names]
    return [path for path in found if path.suffix in (".slice", ".scope") and path.name != "_keeper.scope"]


def cgroup_of(sandbox: Sandbox) -> Path:
    """Where a sandbox is in the tree, as its first process reads it."""
    assert sandbox.isolation.cgroup is not None
    return find_mount().path / sandbox.isolation.cgroup.lstrip("/")


def slice_of(sandbox: Sandbox) -> Path:
    """The cgroup of its tenant."""
    return cgroup_of(sandbox).parent


# ---- The bystander

_SERVER = """
import socket
server = socket.create_server(("127.0.0.1", 0), backlog=64)
print("port", server.getsockname()[1], flush=True)
while True:
    client, _ = server.accept()
    client.recv(1000)
    client.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\nhere")
    client.close()
"""


class Bystander:
    """Another tenant's HTTP service, which has to answer whatever its neighbours do."""

    def __init__(self, sandbox: Sandbox, port: int) -> None:
        self.sandbox = sandbox
        self.answers: list[float] = []
        self._port = port

    @property
    def worst(self) -> float:
        """Seconds that the slowest answer took."""
        return max(self.answers)

    async def ask(self) -> None:
        """Ask once, and note how long the answer took."""
        began = time.monotonic()
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            try:
                writer.write(b"GET / HTTP/1.0\r\n\r\n")
                assert (await reader.read()).endswith(b"here")
            finally:
                writer.close()
            await writer.wait_closed()
        self.answers.append(time.monotonic() - began)

    @contextlib.asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        """Ask ten times a second as long as the block lasts; a question without an answer fails the test."""
        over = asyncio.Event()

        async def go_on() -> None:
            while not over.is_set():
                await self.ask()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(over.wait(), 0.1)

        task = asyncio.create_task(go_on())
        try:
            yield
            assert not task.done(), task
        finally:
            over.set()
            await task


@pytest.fixture
async def bystander(supervisor: Supervisor) -> Bystander:
    """Another tenant's service; it lives as long as the test."""
    sandbox = await supervisor.start(spec(python(_SERVER), user="bystander", service="http"))
    return Bystander(sandbox, int((await line_of(sandbox, "port")).split()[1]))


# ---- Figures


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measure:
    """Note a figure; all of them are listed at the end of the run."""
    figures = request.config.stash.setdefault(_figures, [])

    def note(name: str, value: object) -> None:
        value = f"{value:.3g}" if isinstance(value, float) else value
        figures.append(f"{request.node.name}: {name} {value}")

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if figures := config.stash.get(_figures, []):
        terminalreporter.section(f"measured on Linux {os.uname().release}, {os.cpu_count()} CPUs")
        for figure in figures:
            terminalreporter.line(figure)
