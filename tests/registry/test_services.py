"""What is meant to come back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pactown_runner.errors import NotFoundError, RegistryError, StateError
from pactown_runner.registry import ClaimedError, Registry, ServiceRow, UserRow
from tests.registry.rows import sandbox_row, service_row, statements, user_row


def test_a_registered_service_is_absent_when_nobody_has_claimed_it(
    registry: Registry, path: Path, ready: UserRow
) -> None:
    registry.services.register(sandbox_row())
    registry.sandboxes.claim(sandbox_row("once"))
    assert registry.services.absent() == []
    registry.sandboxes.release(ready.key, "api", "r1")
    registry.sandboxes.release(ready.key, "once", "r1")
    assert registry.services.absent() == [service_row()]
    with Registry(path) as again:
        assert again.services.absent() == [service_row()]
    registry.sandboxes.claim(sandbox_row(run_id="r2"))
    assert registry.services.absent() == []


def test_absent_services_come_oldest_first(registry: Registry, ready: UserRow) -> None:
    for service_id, created_at in (("b", 3.0), ("c", 1.0), ("a", 2.0)):
        registry.services.register(replace(sandbox_row(service_id), created_at=created_at))
        registry.sandboxes.release(ready.key, service_id, "r1")
    assert registry.services.absent() == [service_row("c", 1.0), service_row("a", 2.0), service_row("b", 3.0)]


def test_a_service_that_is_registered_again_is_as_it_was_asked_for_last(registry: Registry, ready: UserRow) -> None:
    registry.services.register(sandbox_row())
    registry.sandboxes.release(ready.key, "api", "r1")
    registry.services.register(replace(sandbox_row(run_id="r2"), spec="{}", created_at=1800000000.0))
    registry.sandboxes.release(ready.key, "api", "r2")
    assert registry.services.absent() == [ServiceRow(ready.key, "api", "{}", 1800000000.0)]


def test_forgotten_services_do_not_come_back(registry: Registry, ready: UserRow) -> None:
    registry.services.register(sandbox_row())
    assert not registry.services.forget(ready.key, "web")
    assert registry.services.forget(ready.key, "api")
    assert not registry.services.forget(ready.key, "api")
    assert registry.sandboxes.rows() == [sandbox_row()]  # it is not to come back, and is still there
    registry.sandboxes.release(ready.key, "api", "r1")
    assert registry.services.absent() == []


def test_a_removed_users_services_do_not_come_back(registry: Registry, ready: UserRow) -> None:
    registry.users.add(user_row("other", "bbbbbbbb", 64101))
    registry.users.mark_ready(user_row("other", "bbbbbbbb", 64101))
    for key in (ready.key, "bbbbbbbb"):
        registry.services.register(sandbox_row(key=key))
    with pytest.raises(StateError):
        registry.users.begin_removal(ready)
    for key in (ready.key, "bbbbbbbb"):
        registry.sandboxes.release(key, "api", "r1")
    registry.users.begin_removal(ready)
    assert [row.key for row in registry.services.absent()] == ["bbbbbbbb"]


def test_what_cannot_be_claimed_is_not_registered(registry: Registry) -> None:
    with pytest.raises(NotFoundError):
        registry.services.register(sandbox_row())
    registry.users.add(user_row())
    ready = registry.users.mark_ready(user_row())
    registry.sandboxes.claim(sandbox_row())
    with pytest.raises(ClaimedError, match="o1"):
        registry.services.register(replace(sandbox_row(run_id="r2"), spec="{}"))
    registry.sandboxes.release(ready.key, "api", "r1")
    assert registry.services.absent() == []


def test_what_is_to_come_back_is_durable(registry: Registry, ready: UserRow) -> None:
    seen = statements(registry)
    registry.services.register(sandbox_row())
    registry.services.forget(ready.key, "api")
    words = [statement.split()[0] + statement[-6:] for statement in seen]
    full, normal = "PRAGMA= FULL", "PRAGMANORMAL"
    assert words.index(full) < words.index("COMMITCOMMIT") < words.index(normal)
    assert [word for word in words if word.startswith("PRAGMA")] == [full, normal] * 2


@pytest.mark.parametrize("room", [0, 30], ids=["not the claim", "the claim alone"])
def test_a_full_disk_is_a_typed_error_and_takes_nothing_by_halves(
    registry: Registry, ready: UserRow, room: int
) -> None:
    with registry._database as db:
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count = {pages + room}")
    with pytest.raises(RegistryError, match="full") as caught:
        registry.services.register(replace(sandbox_row(), spec="x" * 100_000))
    assert caught.value.remedy == "free some space on its file system"
    assert registry.sandboxes.rows() == []
    assert registry.services.absent() == []
    registry.services.register(sandbox_row())
