"""A supervisor of this run's own, and a look at what a test of transfers leaves behind."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pactown_runner.config import Settings
from pactown_runner.homes import SandboxFiles
from pactown_runner.supervisor import Supervisor
from tests import hostsweep
from tests.files.helpers import job_scopes

if TYPE_CHECKING:
    from tests.hostguard import Run


@pytest.fixture
def settings(users_base: Path, slice_name: str, test_run: Run) -> Iterator[Settings]:
    state = users_base.with_name(users_base.name + "-state")
    yield Settings(
        users_base=users_base,
        state_dir=state,
        log_dir=state / "log",
        run_dir=state / "run",
        cgroup_slice=slice_name,
        uid_ranges=(test_run.uids,),
    )
    for leak in hostsweep.accounts(test_run.claim):
        leak.remove()


@pytest.fixture
async def supervisor(settings: Settings) -> AsyncIterator[Supervisor]:
    before = _held()
    async with Supervisor(settings=settings) as supervisor:
        yield supervisor
        assert job_scopes(settings) == []
        assert supervisor._host is not None
        assert supervisor._host.registry.sandboxes.rows() == []
    assert _held() == before


@pytest.fixture
def files(supervisor: Supervisor) -> SandboxFiles:
    return supervisor.files


def _held() -> tuple[int, list[str]]:
    """Descriptors that are open, and threads of ours that live."""
    fds = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            os.readlink(f"/proc/self/fd/{fd}")
            fds += 1
    return fds, [thread.name for thread in threading.enumerate() if thread.name.startswith("pactown")]
