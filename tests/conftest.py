"""What tests share: lanes, the guard against leftovers, fixtures that keep to this run's names and uids."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests import hostsweep

if TYPE_CHECKING:  # as a plugin it must not be imported before pytest does
    from tests.hostguard import Run

pytest_plugins = ("tests.hostguard", "tests.deadline", "tests.lanes", "tests.supervising")

_numbers = itertools.count(1)

# How long an example takes is the machine's business.
settings.register_profile("patient", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if item.get_closest_marker("each_loop"):
        import uvloop  # noqa: PLC0415  # few tests ask for it

        factories["uvloop"] = uvloop.new_event_loop
    return factories


@pytest.fixture
def slice_name(test_run: Run) -> Iterator[str]:
    """A name for the top of a test's own cgroup tree; the tree is removed, with all that runs in it."""
    name = f"{test_run.name}-{next(_numbers)}.slice"
    yield name
    for path in hostsweep.cgroup_dirs(name.__eq__):
        hostsweep.remove_cgroup(path)


@pytest.fixture
def foreign(test_run: Run) -> str:
    """A name for a login that no user of the project has, nor another test run: logins are the whole host's."""
    return f"pactown_foreign{test_run.name[-6:]}"


@pytest.fixture
def users_base(test_run: Run) -> Iterator[Path]:
    """A directory of mode 0711 that tenants can pass through, unlike `tmp_path`."""
    base = Path(tempfile.mkdtemp(prefix="users-", dir=test_run.directory))
    base.chmod(0o711)
    yield base
    hostsweep.remove_file(base)
