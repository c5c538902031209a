"""Users: nothing of theirs is given twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pactown_runner.errors import StateError
from pactown_runner.registry import Registry, UserRow
from tests.registry.rows import sandbox_row, statements, user_row

IDS = [
    "auth0|123456",
    "a/b",
    "🦀 emoji",
    "e\N{COMBINING ACUTE ACCENT}",  # looks like the next one, and is another id
    "\N{LATIN SMALL LETTER E WITH ACUTE}",
    "A",
    "a",
    "a ",
    "%61",
    "'; DROP TABLE users; --",
    "user@example.com",
]


def test_ids_come_back_byte_for_byte_after_reopening(path: Path, registry: Registry) -> None:
    for number, saas_id in enumerate(IDS):
        assert registry.users.add(user_row(saas_id, f"{number:08x}", 64100 + number))
    registry.close()
    with Registry(path) as again:
        assert [row.saas_id for row in again.users.rows()] == IDS
        for number, saas_id in enumerate(IDS):
            assert again.users.row(saas_id) == user_row(saas_id, f"{number:08x}", 64100 + number)
        assert again.users.row("E") is None


@pytest.mark.parametrize(
    "taken", [{"saas_id": "auth0|1"}, {"key": "aaaaaaaa"}, {"uid": 64100}], ids=["id", "key", "uid"]
)
def test_nothing_is_given_twice(registry: Registry, taken: dict[str, str | int]) -> None:
    free = user_row("auth0|2", "bbbbbbbb", 64101)
    first = user_row()
    assert registry.users.add(first)
    clash = replace(free, **{name: getattr(first, name) for name in taken})
    assert not registry.users.add(clash)
    assert registry.users.rows() == [first]
    assert registry.users.add(free)


def test_virtual_users_share_a_uid(registry: Registry) -> None:
    assert registry.users.add(user_row("a", "aaaaaaaa", 1000, virtual=True))
    assert registry.users.add(user_row("b", "bbbbbbbb", 1000, virtual=True))
    assert registry.users.used_uids() == set()


def test_tombstones_keep_key_and_uid(registry: Registry, ready: UserRow) -> None:
    with pytest.raises(StateError):
        registry.users.tombstone(ready)  # only after begin_removal
    registry.users.tombstone(registry.users.begin_removal(ready))
    assert registry.users.rows("ready", "creating", "deleting") == []
    assert registry.users.key_holder(ready.key) == ready.saas_id
    assert registry.users.used_uids() == {ready.uid}
    assert not registry.users.add(user_row("other", ready.key, 64101))
    assert not registry.users.add(user_row("other", "bbbbbbbb", ready.uid))
    with pytest.raises(StateError):
        registry.users.mark_ready(ready)
    with pytest.raises(StateError):
        registry.users.begin_removal(ready)


def test_revived_user_has_its_own_key_and_uid(registry: Registry, ready: UserRow) -> None:
    gone = registry.users.tombstone(registry.users.begin_removal(ready))
    revived = registry.users.revive(gone, 1800000000.0)
    assert revived == replace(gone, status="creating", created_at=1800000000.0)
    assert registry.users.row(ready.saas_id) == revived


def test_users_are_durable_and_claims_are_not_slowed(registry: Registry, path: Path) -> None:
    seen = statements(registry)
    registry.users.add(user_row())
    registry.users.mark_ready(user_row())
    registry.sandboxes.claim(sandbox_row())
    words = [statement.split()[0] + statement[-6:] for statement in seen]
    full, normal = "PRAGMA= FULL", "PRAGMANORMAL"
    assert words[0] == full
    assert words[2:4] == [normal, full]
    assert words[5] == normal
    assert len(words) == 7


def unused(registry: Registry, first: int, last: int) -> list[int]:
    return [uid for uids in registry.users.unused_uids(first, last) for uid in uids]


def test_unused_uids_are_those_above_and_then_the_gaps(registry: Registry) -> None:
    assert unused(registry, 5, 8) == [5, 6, 7, 8]
    for number, uid in enumerate((7, 10, 11, 14, 100)):
        assert registry.users.add(user_row(f"id{number}", f"{number:08x}", uid))
    registry.users.add(user_row("virtual", "ffffffff", 15, virtual=True))
    assert unused(registry, 5, 16) == [15, 16, 5, 6, 8, 9, 12, 13]
    assert unused(registry, 7, 14) == [8, 9, 12, 13]
    assert unused(registry, 10, 11) == unused(registry, 100, 100) == []
    assert unused(registry, 101, 102) == [101, 102]
    assert next(registry.users.unused_uids(10, 11)) == range(12, 12)


def steps(registry: Registry, action: Callable[[], object]) -> int:
    """How many instructions of its virtual machine SQLite needs."""
    count = 0

    def step() -> int:
        nonlocal count
        count += 1
        return 0

    with registry._database as db:
        db.set_progress_handler(step, 1)
    action()
    with registry._database as db:
        db.set_progress_handler(None, 1)
    return count


def test_the_next_uid_costs_the_same_however_many_there_are(registry: Registry) -> None:
    registry.users.add(user_row("first", "ffffffff", 1000))
    before = steps(registry, lambda: next(registry.users.unused_uids(1000, 9000)))
    for number in range(300):
        registry.users.add(user_row(f"id{number}", f"{number:08x}", 1001 + number))
    after = steps(registry, lambda: next(registry.users.unused_uids(1000, 9000)))
    assert before == after
    assert steps(registry, registry.users.used_uids) > 300  # such a look is seen
