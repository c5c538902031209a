"""A leaf in this run's own tree, a tenant that is only a number, and a look at what a start leaves behind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from pactown_runner.launcher import LaunchSpec
from tests import hostsweep

if TYPE_CHECKING:
    from tests.hostguard import Run

MakeSpec = Callable[..., LaunchSpec]
ENV = {"PATH": "/usr/bin:/bin"}


@dataclass
class Leaf:
    """A cgroup that processes are born in; `path` is as they read it in `/proc/self/cgroup`."""

    directory: Path
    path: str
    fd: int

    def pids(self) -> list[int]:
        return [int(word) for word in (self.directory / "cgroup.procs").read_text().split()]


@pytest.fixture
def leaf(slice_name: str) -> Iterator[Leaf]:
    mount = hostsweep.cgroup2_mounts()[0]
    directory = mount / slice_name / "api.scope"
    directory.mkdir(parents=True)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    yield Leaf(directory, f"/{slice_name}/api.scope", fd)
    os.close(fd)


@pytest.fixture
def tenant(test_run: Run) -> int:
    """The uid and gid of a tenant; no account has them."""
    return test_run.uids[0]


@pytest.fixture
def spec(tenant: int) -> MakeSpec:
    def make(*argv: str, **options: Any) -> LaunchSpec:
        known: dict[str, Any] = {"argv": argv, "uid": tenant, "gid": tenant, "env": ENV}
        return LaunchSpec(**(known | options))

    return make


@pytest.fixture(scope="session")
def uvloop_is_warm() -> None:
    """uvloop's library makes a pipe for signals once a process, and keeps it."""
    uvloop.new_event_loop().close()


@pytest.fixture
def leaves_nothing(uvloop_is_warm: None) -> Iterator[None]:
    """The test ends with the descriptors that it began with, and with no child, ended or not."""
    before = _descriptors()
    yield
    assert _descriptors() == before
    with pytest.raises(ChildProcessError):
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def _descriptors() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one through which the directory itself was read
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return found
