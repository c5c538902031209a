"""What the operator lets a tenant have: tiers, and blocks, as claims and cgroups come to know of them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgroups import Cgroup, CgroupError, Limits
from pactown_runner import Settings
from pactown_runner.admission import Admission
from pactown_runner.errors import AdmissionError, BlockedError, RegistryError, SpecError
from pactown_runner.models import IsolatedUser
from pactown_runner.registry import Quota, Quotas, Registry, SandboxRow, Standing, UserRow
from pactown_runner.standings import Standings, succeeding
from pactown_runner.tiers import Tier
from pactown_runner.trees import Tree, open_tree
from tests.cgroups.fake import make_fake

KEY, OTHER = "aaaaaaaa", "bbbbbbbb"


def row(service_id: str = "api", key: str = KEY, run_id: str = "r1") -> SandboxRow:
    return SandboxRow(key, service_id, run_id, "o1", "service", "{}", "/x", 1.0)


def user_of(key: str) -> IsolatedUser:
    return IsolatedUser(key, f"pactown_{key}", 64100, 64100, Path("/x"), 1.0)


@pytest.fixture
def now() -> list[float]:
    return [1_700_000_000.0]


@pytest.fixture
def registry(tmp_path: Path, now: list[float]) -> Iterator[Registry]:
    with Registry(tmp_path / "state/registry.db", clock=lambda: now[0]) as registry:
        for number, key in enumerate((KEY, OTHER)):
            user = UserRow(
                saas_id=key,
                key=key,
                username=f"pactown_{key}",
                uid=64100 + number,
                gid=64100 + number,
                home=Path("/x"),
                created_at=1.0,
            )
            assert registry.users.add(user)
            registry.users.mark_ready(user)
        yield registry


def test_a_standing_is_kept_and_outlives_the_user(registry: Registry, tmp_path: Path) -> None:
    assert registry.standings.get(KEY) == Standing(None, False)
    registry.standings.set(KEY, Standing("pro", True))
    registry.standings.set(OTHER, Standing("free"))
    registry.standings.set(OTHER, Standing("basic"))
    with Registry(registry.path) as again:
        assert (again.standings.get(KEY), again.standings.get(OTHER)) == (Standing("pro", True), Standing("basic"))
    user = registry.users.row(KEY)
    assert user is not None
    deleting = registry.users.begin_removal(user)
    registry.users.tombstone(deleting)
    assert registry.standings.get(KEY) == Standing("pro", True)


def test_who_is_blocked_starts_nothing_and_nothing_of_it_comes_back(registry: Registry) -> None:
    registry.services.register(row("web"))
    registry.sandboxes.claim(row("api"))
    registry.standings.set(KEY, Standing(blocked=True))
    for claim in (registry.sandboxes.claim, registry.services.register):
        for quota in (None, Quotas(Quota(5, 5, 5)), Quotas(Quota())):
            with pytest.raises(BlockedError) as caught:
                claim(row("new"), quota)
            assert (caught.value.code, caught.value.limit) == ("blocked", "blocked")
    with pytest.raises(BlockedError):
        registry.sandboxes.restart((KEY, "api", "r1"), "o1", "r2", 1.0)
    assert not registry.sandboxes.restart((OTHER, "api", "r1"), "o1", "r2", 1.0)
    assert registry.sandboxes.release(KEY, "web", "r1")
    assert registry.services.absent() == []
    assert [kept.service_id for kept in registry.sandboxes.rows()] == ["api"]
    # The operator can still have something done for it, and others are not concerned.
    registry.sandboxes.claim(row("_job-1"))
    registry.sandboxes.claim(row("api", OTHER))
    registry.standings.set(KEY, Standing())
    assert [service.service_id for service in registry.services.absent()] == ["web"]
    assert registry.sandboxes.restart((KEY, "api", "r1"), "o1", "r2", 1.0)


def test_a_tier_caps_what_its_tenants_claim(registry: Registry, now: list[float]) -> None:
    tiers = (Tier(name="one", max_sandboxes=1, starts_per_hour=3), Tier(name="none", max_sandboxes=0))
    quota = Admission(Settings(max_sandboxes_per_user=2, tiers=tiers), lambda _: None).quota
    registry.sandboxes.claim(row("a"), quota)
    registry.sandboxes.claim(row("b"), quota)
    with pytest.raises(AdmissionError, match="2 may"):
        registry.sandboxes.claim(row("c"), quota)
    registry.standings.set(OTHER, Standing("none"))
    with pytest.raises(AdmissionError, match="0 may"):
        registry.sandboxes.claim(row(key=OTHER), quota)
    registry.standings.set(OTHER, Standing("one"))
    for _ in range(3):
        registry.sandboxes.claim(row(key=OTHER), quota)
        with pytest.raises(AdmissionError, match="1 may"):
            registry.sandboxes.claim(row("b", OTHER), quota)
        registry.sandboxes.release(OTHER, "api", "r1")
    with pytest.raises(AdmissionError, match="3 starts per hour") as caught:
        registry.sandboxes.claim(row(key=OTHER), quota)
    assert (caught.value.limit, caught.value.retry_after) == ("starts_per_hour", 1200.0)
    now[0] += 1200
    registry.services.register(row(key=OTHER), quota)


def test_who_has_a_tier_that_nobody_knows_starts_nothing(registry: Registry) -> None:
    registry.standings.set(KEY, Standing("gold"))
    with pytest.raises(AdmissionError, match="not known") as caught:
        registry.sandboxes.claim(row(), Admission(Settings(), lambda _: None).quota)
    assert caught.value.limit == "tiers"
    assert registry.sandboxes.rows() == []


def test_rates_by_minute_and_hour_are_counted_apart(registry: Registry, now: list[float]) -> None:
    quota = Quotas(Quota(starts_per_minute=2, starts_per_hour=3))
    outcomes = []
    for _ in range(6):
        try:
            registry.sandboxes.claim(row(), quota)
        except AdmissionError as error:
            outcomes.append(error.limit)
        else:
            registry.sandboxes.release(KEY, "api", "r1")
            outcomes.append("")
        now[0] += 20
    assert outcomes == ["", "", "", "starts_per_hour", "starts_per_hour", "starts_per_hour"]


def test_limits_are_the_tiers_where_it_says_some(registry: Registry) -> None:
    own, plain = (
        Tier(name="own", default_limits=Limits(pids_max=1), tenant_limits=Limits(pids_max=2)),
        Tier(name="plain"),
    )
    settings = Settings(default_limits=Limits(pids_max=3), tenant_limits=Limits(pids_max=4), tiers=(own, plain))
    standings = Standings(settings, registry)

    def pids() -> tuple[Any, Any]:
        return standings.default_limits(KEY).pids_max, standings.tenant_limits(KEY).pids_max

    assert pids() == (3, 4)
    for tier, most in (("own", (1, 2)), ("plain", (3, 4)), (None, (3, 4))):
        standings.change(None, user_of(KEY), Standing(tier))
        assert standings.of(KEY) == Standing(tier)
        assert pids() == most
    with pytest.raises(SpecError, match="no tier 'gold'") as caught:
        standings.change(None, user_of(KEY), Standing("gold"))
    assert caught.value.remedy == "choose from own, plain"
    assert standings.of(KEY) == Standing()


def test_a_standing_that_cannot_be_written_down_leaves_the_limits_as_they_were(
    registry: Registry, tmp_path: Path
) -> None:
    tiers = (Tier(name="small", tenant_limits=Limits(pids_max=2, memory_max=1 << 20)),)
    standings = Standings(Settings(tenant_limits=Limits(pids_max=4), tiers=tiers), registry)
    with make_fake(tmp_path / "top") as top, make_fake(tmp_path / f"top/pactown-{KEY}.slice") as slice_:
        tree = Tree(top, registry.state_id, standings.tenant_limits)
        for before, held in ((Standing(), ("4", "max")), (Standing("small"), ("2", "1048576"))):
            standings.change(tree, user_of(KEY), before)
            slice_.apply(standings.tenant_limits(KEY))
            after = Standing("small") if before.tier is None else Standing()
            with closing(sqlite3.connect(registry.path, isolation_level=None)) as db:
                db.execute("CREATE TRIGGER broken BEFORE INSERT ON standings BEGIN SELECT raise(ABORT, 'broken'); END")
                with pytest.raises(RegistryError, match="broken"):
                    standings.change(tree, user_of(KEY), after)
                db.execute("DROP TRIGGER broken")
            assert standings.of(KEY) == before
            assert tuple((slice_.path / name).read_text().strip() for name in ("pids.max", "memory.max")) == held


def test_a_tier_is_found_by_its_users_id(registry: Registry) -> None:
    standings = Standings(Settings(), registry)
    registry.standings.set(KEY, Standing("pro"))
    assert [standings.tier_of(user_id) for user_id in (KEY, OTHER, "nobody")] == ["pro", None, None]


SIZE = st.none() | st.integers(1 << 20, 1 << 30)
LIMITS = st.builds(
    Limits,
    memory_max=SIZE,
    memory_high=SIZE,
    memory_swap_max=SIZE,
    pids_max=st.none() | st.integers(1, 100),
    cpu_max=st.none() | st.sampled_from([0.5, 2.0]),
    cpu_weight=st.none() | st.integers(1, 100),
    io_max=st.none()
    | st.dictionaries(
        st.sampled_from(["8:0", "8:16"]), st.sampled_from([{"wbps": 5}, {"riops": 7, "rbps": 9}]), min_size=1
    ),
)


@given(LIMITS, LIMITS)
def test_what_is_limited_no_more_is_written_so(before: Limits, after: Limits) -> None:
    def written(*several: Limits) -> dict[str, str]:
        """What a cgroup's files hold after these were written, but those that say that nothing is limited."""
        held: dict[str, str] = {}
        for limits in several:
            for file, text in limits.render():
                if file != "io.max":
                    held[file] = text
                    continue
                disk, *pairs = text.split()
                held |= {f"{disk} {name}": value for name, _, value in (pair.partition("=") for pair in pairs)}
        free = {"cpu.weight": "100", "cpu.max": "max 100000"}
        return {file: text for file, text in held.items() if text not in ("max", free.get(file))}

    assert written(before, succeeding(before, after)) == written(after)


def _in_vain(*_: object) -> None:
    raise CgroupError("not done after 10 s")


@pytest.mark.host
def test_a_tenant_is_held_still_with_all_that_it_runs(
    registry: Registry, slice_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _tree(slice_name, registry) as tree:
        scopes = {(key, name): tree.scope(key, name, "r1") for key in (KEY, OTHER) for name in ("a", "b", "_job-1")}
        standings = Standings(Settings(cgroup_slice=slice_name), registry)
        for blocked in (True, True, False):
            standings.change(tree, user_of(KEY), Standing(blocked=blocked))
            still = {place for place, scope in scopes.items() if scope.frozen()}
            assert still == ({(KEY, "a"), (KEY, "b")} if blocked else set())
        standings.change(tree, user_of("cccccccc"), Standing(blocked=True))
        # One that cannot be let go on now is let go on by the next call.
        standings.change(tree, user_of(KEY), Standing(blocked=True))
        with monkeypatch.context() as patch:
            patch.setattr(Cgroup, "thaw", _in_vain)
            with pytest.raises(CgroupError):
                standings.change(tree, user_of(KEY), Standing())
        standings.change(tree, user_of(KEY), Standing())
        assert not any(scope.frozen() for scope in scopes.values())
        for scope in scopes.values():
            scope.remove()
            scope.close()


@pytest.mark.host
def test_each_tenants_slice_gets_its_own_limits(registry: Registry, slice_name: str) -> None:
    asked: list[str] = []

    def limits_of(key: str) -> Limits:
        asked.append(key)
        return Limits()

    with _tree(slice_name, registry, limits_of) as tree:
        for key in (KEY, OTHER, KEY):
            tree.slice(key).close()
    assert asked == [KEY, OTHER]


def _tree(slice_name: str, registry: Registry, limits: Any = None) -> closing[Tree]:
    return closing(open_tree(cgroup_slice=slice_name, state_id=registry.state_id, tenant_limits=limits or Limits()))
