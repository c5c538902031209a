"""What is meant to be alive, and what a hold keeps from starting."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from pactown_runner.errors import AlreadyRunningError, BlockedError, NotFoundError, StateError
from pactown_runner.registry import HOLD, ClaimedError, HeldError, Quota, Quotas, Registry, Standing, UserRow
from tests.registry.rows import sandbox_row, service_row, user_row


def test_claim_and_release(registry: Registry, ready: UserRow) -> None:
    row = sandbox_row()
    registry.sandboxes.claim(row)
    assert registry.sandboxes.row(ready.key, "api") == row
    assert registry.sandboxes.rows() == registry.sandboxes.rows("o1") == registry.sandboxes.rows(key=ready.key) == [row]
    assert registry.sandboxes.rows("o2") == registry.sandboxes.rows(key="bbbbbbbb") == []
    with pytest.raises(ClaimedError, match=r"'api' of user 'auth0\|1' is running already .*o1") as caught:
        registry.sandboxes.claim(sandbox_row(run_id="r2", owner="o2"))
    assert isinstance(caught.value, AlreadyRunningError)
    assert (caught.value.owner, caught.value.run_id) == ("o1", "r1")
    registry.sandboxes.claim(sandbox_row("web", run_id="r3"))
    assert not registry.sandboxes.release(ready.key, "api", "r2")
    assert registry.sandboxes.release(ready.key, "api", "r1")
    assert not registry.sandboxes.release(ready.key, "api", "r1")
    assert [row.service_id for row in registry.sandboxes.rows()] == ["web"]


def test_claim_needs_a_ready_user(registry: Registry) -> None:
    with pytest.raises(NotFoundError, match="user with key aaaaaaaa is not ready"):
        registry.sandboxes.claim(sandbox_row())
    registry.users.add(user_row())
    with pytest.raises(NotFoundError, match=r"user 'auth0\|1' is not ready"):
        registry.sandboxes.claim(sandbox_row())
    ready = registry.users.mark_ready(user_row())
    registry.users.begin_removal(ready)
    with pytest.raises(NotFoundError):
        registry.sandboxes.claim(sandbox_row())
    assert registry.sandboxes.rows() == []


def test_who_is_blocked_is_called_by_its_id(registry: Registry, ready: UserRow) -> None:
    registry.sandboxes.claim(sandbox_row())
    registry.standings.set(ready.key, Standing(blocked=True))
    with pytest.raises(BlockedError, match=r"user 'auth0\|1' is blocked"):
        registry.sandboxes.claim(sandbox_row("web"))
    with pytest.raises(BlockedError, match=r"user 'auth0\|1' is blocked"):
        registry.sandboxes.restart((ready.key, "api", "r1"), "o1", "r2", 1.0)


def test_removal_waits_for_the_last_sandbox(registry: Registry, ready: UserRow) -> None:
    registry.sandboxes.claim(sandbox_row())
    with pytest.raises(StateError, match="something runs"):
        registry.users.begin_removal(ready)
    assert registry.users.row(ready.saas_id) == ready
    registry.sandboxes.release(ready.key, "api", "r1")
    registry.users.begin_removal(ready)


def test_take_over_is_compare_and_swap(registry: Registry, ready: UserRow) -> None:
    registry.sandboxes.claim(sandbox_row())
    assert not registry.sandboxes.take_over(ready.key, "api", "r1", "o9", "o2")
    assert not registry.sandboxes.take_over(ready.key, "api", "r9", "o1", "o2")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: registry.sandboxes.take_over(ready.key, "api", "r1", "o1", f"new{n}"), range(8)))
    assert sum(won) == 1
    assert registry.sandboxes.rows()[0].owner == f"new{won.index(True)}"


def test_update_spec_is_this_runs_only(registry: Registry, ready: UserRow) -> None:
    registry.sandboxes.claim(sandbox_row())
    assert not registry.sandboxes.update_spec(ready.key, "api", "r2", "{}")
    assert registry.sandboxes.update_spec(ready.key, "api", "r1", "{}")
    assert registry.sandboxes.rows() == [replace(sandbox_row(), spec="{}")]


def test_restart_is_another_run_of_the_same_claim(registry: Registry, ready: UserRow) -> None:
    registry.sandboxes.claim(sandbox_row())
    claim = (ready.key, "api", "r1")
    assert not registry.sandboxes.restart(claim, "o2", "r2", 1800000000.0)
    assert not registry.sandboxes.restart((ready.key, "api", "r0"), "o1", "r2", 1800000000.0)
    assert not registry.sandboxes.restart((ready.key, "web", "r1"), "o1", "r2", 1800000000.0)
    assert registry.sandboxes.rows() == [sandbox_row()]
    assert registry.sandboxes.restart(claim, "o1", "r2", 1800000000.0)
    assert registry.sandboxes.rows() == [replace(sandbox_row(run_id="r2"), created_at=1800000000.0)]
    assert not registry.sandboxes.restart(claim, "o1", "r3", 1800000000.0)
    assert not registry.sandboxes.release(*claim)


def test_while_a_user_is_held_nothing_starts_but_the_holds_own_job(registry: Registry, ready: UserRow) -> None:
    other = user_row("auth0|2", "bbbbbbbb", 64101)
    assert registry.users.add(other)
    registry.users.mark_ready(other)
    registry.services.register(sandbox_row("absent"))
    registry.sandboxes.release(ready.key, "absent", "r1")
    registry.sandboxes.claim(sandbox_row())
    registry.sandboxes.claim(sandbox_row(HOLD, run_id="h1"))
    for claim in (registry.sandboxes.claim, registry.services.register):
        for quota in (None, Quotas(Quota(starts_per_hour=1))):
            for name in ("new", "_job-h2", "_removal"):
                with pytest.raises(HeldError, match="exported or imported"):
                    claim(sandbox_row(name), quota)
    with pytest.raises(HeldError):
        registry.sandboxes.restart((ready.key, "api", "r1"), "o1", "r2", 1.0)
    with pytest.raises(AlreadyRunningError):
        registry.sandboxes.claim(sandbox_row(HOLD, run_id="h2"))
    assert registry.services.absent() == []
    registry.sandboxes.claim(sandbox_row("_job-h1"))
    registry.sandboxes.claim(sandbox_row(key=other.key))
    # What the hold has frozen is for its successor to know, and nobody else's business.
    assert registry.holds.frozen(ready.key) == frozenset()
    registry.holds.set_frozen(ready.key, "h0", ["web"])
    registry.holds.set_frozen(ready.key, "h1", ["web", "api"])
    assert registry.holds.frozen(ready.key) == {"api", "web"}
    assert registry.holds.frozen(other.key) == frozenset()
    registry.sandboxes.release(ready.key, HOLD, "h1")
    assert registry.holds.frozen(ready.key) == frozenset()
    assert registry.services.absent() == [service_row("absent")]
    assert registry.sandboxes.restart((ready.key, "api", "r1"), "o1", "r2", 1.0)
    # And none of the refused ones was counted.
    registry.sandboxes.claim(sandbox_row("new"), Quotas(Quota(starts_per_hour=1)))
