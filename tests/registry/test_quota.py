"""Caps and rates, under a clock of the test's."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from pactown_runner.errors import AdmissionError, NotFoundError
from pactown_runner.registry import ClaimedError, Quota, Quotas, Registry, UserRow
from tests.registry.rows import Clock, sandbox_row, service_row, start, statements


def test_a_cap_on_the_host_counts_all_users_sandboxes(registry: Registry, ready: UserRow, other: UserRow) -> None:
    quota = Quotas(Quota(max_sandboxes=3))
    registry.sandboxes.claim(sandbox_row(), quota)
    registry.sandboxes.claim(sandbox_row(key=other.key, owner="o2"), quota)
    registry.services.register(sandbox_row("web"), quota)
    for action in (registry.sandboxes.claim, registry.services.register):
        with pytest.raises(AdmissionError, match=r"3 sandboxes run on this host, and 3 may") as caught:
            action(sandbox_row("more"), quota)
        assert (caught.value.code, caught.value.limit, caught.value.retry_after) == ("refused", "max_sandboxes", None)
        assert caught.value.remedy is not None
    assert len(registry.sandboxes.rows()) == 3
    registry.sandboxes.claim(sandbox_row("free"))  # without a quota there is none
    registry.sandboxes.release(other.key, "api", "r1")
    registry.sandboxes.release(ready.key, "free", "r1")
    registry.sandboxes.claim(sandbox_row("more"), quota)
    registry.sandboxes.release(ready.key, "web", "r1")
    registry.sandboxes.release(ready.key, "more", "r1")
    assert registry.services.absent() == [service_row("web")]  # and not the one that was refused


def test_a_cap_on_a_user_counts_its_own(registry: Registry, ready: UserRow, other: UserRow) -> None:
    quota = Quotas(Quota(max_per_user=2))
    for user in (ready, other):
        for service_id in ("a", "b"):
            registry.sandboxes.claim(sandbox_row(service_id, key=user.key), quota)
        told = re.escape(f"2 sandboxes of user {user.saas_id!r} run, and 2 may")
        with pytest.raises(AdmissionError, match=told) as caught:
            registry.sandboxes.claim(sandbox_row("c", key=user.key), quota)
        assert caught.value.limit == "max_sandboxes_per_user"
    registry.sandboxes.release(ready.key, "a", "r1")
    registry.sandboxes.claim(sandbox_row("c"), quota)


def test_a_cap_of_none_at_all_lets_nothing_in(registry: Registry, ready: UserRow) -> None:
    for quota in (Quotas(Quota(max_sandboxes=0)), Quotas(Quota(max_per_user=0))):
        with pytest.raises(AdmissionError, match="0 sandboxes"):
            registry.sandboxes.claim(sandbox_row(), quota)
    assert registry.sandboxes.rows() == []


def test_the_runners_own_jobs_count_against_nobody(registry: Registry, ready: UserRow) -> None:
    for number in range(5):
        registry.sandboxes.claim(sandbox_row(f"_job-{number}"))
    quota = Quotas(Quota(max_sandboxes=2, max_per_user=2))
    registry.sandboxes.claim(sandbox_row("a"), quota)
    registry.sandboxes.claim(sandbox_row("Z_"), quota)
    with pytest.raises(AdmissionError):
        registry.sandboxes.claim(sandbox_row("c"), quota)


def test_what_runs_already_says_so_and_costs_no_start(registry: Registry, ready: UserRow) -> None:
    quota = Quotas(Quota(max_sandboxes=1, max_per_user=1, starts_per_minute=1))
    registry.sandboxes.claim(sandbox_row(), quota)
    with pytest.raises(ClaimedError, match="o1"):
        registry.sandboxes.claim(sandbox_row(run_id="r2"), quota)
    with pytest.raises(NotFoundError):
        registry.sandboxes.claim(sandbox_row(key="cccccccc"), quota)


@pytest.mark.parametrize(
    ("per_minute", "at_once", "interval"),
    [(1, 1, 60.0), (60, 60, 1.0), (7, 7, 8.571428), (2.5, 2, 24.0), (0.25, 1, 240.0), (120, 120, 0.5)],
)
def test_a_minutes_starts_may_come_at_once_and_then_one_by_one(
    timed: Registry, clock: Clock, per_minute: float, at_once: int, interval: float
) -> None:
    assert [start(timed, per_minute) for _ in range(at_once)] == [0.0] * at_once
    # What is left of a bucket that does not hold a whole number of starts comes back the sooner.
    rest = interval * (1 - max(1, per_minute) % 1)
    for wait in [rest, *[interval] * (2 * at_once)]:
        assert start(timed, per_minute) == pytest.approx(wait, abs=1e-6)
        before = clock.now
        clock.now = before + wait - 2e-6
        assert 0 < start(timed, per_minute) < 1e-5
        clock.now = before + wait
        assert start(timed, per_minute) == 0.0
    clock.now += 86400
    assert [start(timed, per_minute) for _ in range(at_once)] == [0.0] * at_once
    assert start(timed, per_minute) > 0


def test_so_many_starts_as_are_due_and_no_more(timed: Registry, clock: Clock) -> None:
    chance = random.Random(1)
    begun, done = clock.now, 0
    while clock.now < begun + 3600:
        clock.now += chance.choice((0.0, 0.1, 0.7, 3.0))
        done += start(timed, 30) == 0.0
    # 30 at first, and one every 2 seconds: it asks far more often than that.
    assert done == 30 + (clock.now - begun) // 2


def test_users_have_starts_of_their_own(timed: Registry, other: UserRow) -> None:
    assert [start(timed, 2), start(timed, 2)] == [0.0, 0.0]
    assert start(timed, 2) > 0
    assert start(timed, 2, other.key) == 0.0


def test_a_refused_start_costs_none(timed: Registry, registry: Registry, clock: Clock) -> None:
    registry.sandboxes.claim(sandbox_row("held"))
    for _ in range(5):
        with pytest.raises(AdmissionError, match="sandboxes"):
            timed.sandboxes.claim(sandbox_row(), Quotas(Quota(max_per_user=1, starts_per_minute=2)))
    assert [start(timed, 2), start(timed, 2)] == [0.0, 0.0]
    assert {start(timed, 2) for _ in range(5)} == {30.0}
    clock.now += 30
    assert start(timed, 2) == 0.0


def test_what_starts_by_itself_costs_none(timed: Registry, ready: UserRow) -> None:
    timed.sandboxes.claim(sandbox_row(), Quotas(Quota(starts_per_minute=1)))
    for number in range(5):
        assert timed.sandboxes.restart((ready.key, "api", f"r{number + 1}"), "o1", f"r{number + 2}", 1.0)
    timed.sandboxes.release(ready.key, "api", "r6")
    timed.sandboxes.claim(sandbox_row(), Quotas(Quota(max_per_user=5)))
    timed.sandboxes.release(ready.key, "api", "r1")
    assert start(timed, 1) == 60.0


@pytest.mark.parametrize("back", [90.0, 86400.0, 1699999999.0])
def test_a_clock_that_is_put_back_keeps_nobody_out(timed: Registry, clock: Clock, back: float) -> None:
    assert [start(timed, 2), start(timed, 2)] == [0.0, 0.0]
    clock.now -= back
    assert [start(timed, 2), start(timed, 2)] == [0.0, 0.0]
    assert start(timed, 2) == 30.0


def test_a_clock_that_is_put_back_a_little_costs_what_it_was_put_back(timed: Registry, clock: Clock) -> None:
    assert [start(timed, 6) for _ in range(3)] == [0.0] * 3
    clock.now -= 20
    assert [start(timed, 6), start(timed, 6)] == [0.0, 10.0]
    clock.now += 3600
    assert [start(timed, 6) for _ in range(7)] == [0.0] * 6 + [10.0]


def test_another_rate_holds_at_once(timed: Registry) -> None:
    assert start(timed, 0.1) == 0.0
    assert start(timed, 0.1) == 600.0
    assert start(timed, 10) == 0.0
    assert [start(timed, 3) for _ in range(3)] == [0.0, 0.0, 6.0]


def test_starts_are_remembered_by_the_file(timed: Registry, path: Path, clock: Clock) -> None:
    assert start(timed, 1) == 0.0
    timed.close()
    with Registry(path, clock=clock) as again:
        assert start(again, 1) == 60.0


def test_a_claim_without_quota_is_one_statement(registry: Registry, ready: UserRow) -> None:
    seen = statements(registry)
    registry.sandboxes.claim(sandbox_row())
    assert len(seen) == 1
    registry.sandboxes.claim(sandbox_row("web"), Quotas(Quota(5, 5, 5.0)))
    assert not any("_'" in statement and "key" not in statement for statement in seen)  # nor is every row looked at


def test_the_count_of_a_host_that_is_capped_reads_names_alone(registry: Registry, ready: UserRow) -> None:
    def plan() -> str:
        with registry._database as db:
            return str(db.execute("EXPLAIN QUERY PLAN SELECT count(*) FROM sandboxes").fetchone()[3])

    registry.sandboxes.index_for(Quotas(Quota(max_per_user=5, starts_per_minute=5)))
    assert "sandboxes_names" not in plan()
    for _ in range(2):
        registry.sandboxes.index_for(Quotas(Quota(max_sandboxes=5)))
    assert plan() == "SCAN sandboxes USING COVERING INDEX sandboxes_names"
    registry.sandboxes.claim(sandbox_row(), Quotas(Quota(max_sandboxes=5)))
    assert registry.sandboxes.rows() == [sandbox_row()]
