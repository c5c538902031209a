"""A host, a tenant and another, and a look at what is left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pactown_runner.host import Host
from pactown_runner.models import IsolatedUser
from pactown_runner.supervisor import Supervisor
from tests.supervising import USER


@pytest.fixture
def host(supervisor: Supervisor) -> Iterator[Host]:
    """What a supervisor's sandboxes share. Nothing of an archive's making is left in it at the end."""
    host = supervisor._host
    assert host is not None
    yield host
    assert [row.service_id for row in host.registry.sandboxes.rows() if row.service_id.startswith("_")] == []
    assert [name for name in os.listdir(host.settings.users_base) if name.startswith(".fresh")] == []


@pytest.fixture
async def user(supervisor: Supervisor) -> IsolatedUser:
    return await supervisor.users.get_or_create(USER)


@pytest.fixture
def archive(users_base: Path) -> Path:
    return users_base / "archive.tar.gz"
