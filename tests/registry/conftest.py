"""Registries of a test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pactown_runner.registry import Registry, UserRow
from tests.registry.rows import Clock, user_row


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "parent" / "state" / "registry.db"


@pytest.fixture
def registry(path: Path) -> Iterator[Registry]:
    with Registry(path) as registry:
        yield registry


@pytest.fixture
def ready(registry: Registry) -> UserRow:
    assert registry.users.add(user_row())
    return registry.users.mark_ready(user_row())


@pytest.fixture
def other(registry: Registry, ready: UserRow) -> UserRow:
    row = user_row("other", "bbbbbbbb", 64101)
    assert registry.users.add(row)
    return registry.users.mark_ready(row)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timed(path: Path, ready: UserRow, clock: Clock) -> Iterator[Registry]:
    """The same registry under a clock of the test's."""
    with Registry(path, clock=clock) as registry:
        yield registry
