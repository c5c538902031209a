"""Admission against this host's memory and this process's descriptors."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cgroups import Limits
from pactown_runner import SandboxSpec, Settings, Supervisor
from pactown_runner import admission as admission_module
from pactown_runner.admission import DESCRIPTORS_EACH, DESCRIPTORS_SPARE, Admission
from pactown_runner.errors import AdmissionError
from pactown_runner.registry import Quota, Standing
from pactown_runner.tiers import Tier
from tests.supervising import USER, line_of, soon, spec

ROOT = Path(__file__).resolve().parent.parent
HUGE = 1 << 50
"""Bytes that no host has."""


def one(limits: Limits | None = None) -> SandboxSpec:
    return SandboxSpec(user_id="auth0|1", service_id="api", command=["true"], limits=limits)


def admitting(settings: Settings, tier: str | None = None) -> Admission:
    """For users who all have this tier."""
    return Admission(settings, lambda user_id: tier)


def refused(admission: Admission, limits: Limits | None = None, *, running: int = 0) -> AdmissionError:
    with pytest.raises(AdmissionError, match="cannot start 'api'") as caught:
        admission.check(one(limits), running)
    assert (caught.value.code, caught.value.retry_after) == ("refused", None)
    assert caught.value.remedy is not None
    return caught.value


# ---- Quotas


def test_without_caps_nothing_is_counted() -> None:
    admission = admitting(Settings())
    assert admission.quota.general == admission.caps.general == Quota()
    admission.check(one(), 1)


def test_what_starts_by_itself_has_no_rate() -> None:
    admission = admitting(Settings(max_sandboxes=5, max_sandboxes_per_user=0, starts_per_minute=1.5))
    assert (admission.quota.general, admission.caps.general) == (Quota(5, 0, 1.5), Quota(5, 0, None))
    admission = admitting(Settings(starts_per_minute=1.5))
    assert (admission.quota.general, admission.caps.general) == (Quota(None, None, 1.5), Quota())
    admission = admitting(Settings(max_sandboxes=0))
    assert admission.quota.general == admission.caps.general == Quota(0, None, None)


def test_a_tier_says_how_many_and_how_often_and_leaves_the_rest_to_the_settings() -> None:
    tiers = (Tier(name="one", max_sandboxes=1, starts_per_hour=7), Tier(name="plain"))
    admission = admitting(Settings(max_sandboxes=5, max_sandboxes_per_user=3, starts_per_minute=2, tiers=tiers))
    assert admission.quota.of_tiers == {"one": Quota(5, 1, 2, 7), "plain": Quota(5, 3, 2)}
    assert admission.caps.of_tiers == {"one": Quota(5, 1), "plain": Quota(5, 3)}


# ---- Memory


def test_the_reserve_is_left_to_the_host() -> None:
    left = psutil.virtual_memory().available
    admitting(Settings(memory_reserve=left // 2)).check(one(), 0)
    error = refused(admitting(Settings(memory_reserve=HUGE)))
    assert error.limit == "memory_reserve"
    assert f"of which {HUGE >> 20} MiB are reserved" in error.message


def test_what_it_may_take_must_be_there_besides() -> None:
    left = psutil.virtual_memory().available
    admission = admitting(Settings(memory_reserve=left // 3))
    admission.check(one(Limits(memory_max=left // 3)), 0)
    error = refused(admission, Limits(memory_max=left))
    assert f"may take {left / (1 << 20):.0f} MiB" in error.message
    admission.check(one(Limits(memory_max="max")), 0)
    admission.check(one(Limits(pids_max=5)), 0)


def test_limits_by_default_count_where_none_are_given() -> None:
    admission = admitting(Settings(default_limits=Limits(memory_max=HUGE)))
    refused(admission)
    admission.check(one(Limits(memory_max="1M")), 0)
    admission.check(one(Limits()), 0)


def test_nothing_takes_more_than_its_tenant_may() -> None:
    admission = admitting(Settings(tenant_limits=Limits(memory_max="1M")))
    admission.check(one(Limits(memory_max=HUGE)), 0)
    admission = admitting(Settings(tenant_limits=Limits(memory_max=HUGE)))
    refused(admission)
    admission.check(one(Limits(memory_max="1M")), 0)


@pytest.mark.host
async def test_the_tier_that_counts_is_the_one_that_the_user_has_now(settings: Settings) -> None:
    tiers = (Tier(name="large", default_limits=LARGE),)
    async with Supervisor(settings=replace(settings, tiers=tiers)) as supervisor:
        assert (await supervisor.run(spec("true"))).ok
        for tier in ("large", None):
            await supervisor.users.set_standing(USER, Standing(tier))
            if tier is None:
                assert (await supervisor.run(spec("true"))).ok
            else:
                with pytest.raises(AdmissionError, match=f"may take {HUGE >> 20} MiB"):
                    await supervisor.run(spec("true"))


SMALL, LARGE = Limits(memory_max="1M"), Limits(memory_max=HUGE)


@pytest.mark.parametrize(
    ("general", "tier", "fits"),
    [
        ({"default_limits": LARGE}, {"default_limits": SMALL}, True),
        ({"default_limits": SMALL}, {"default_limits": LARGE}, False),
        ({"default_limits": LARGE}, {"default_limits": Limits()}, True),
        ({"default_limits": LARGE}, {"tenant_limits": SMALL}, True),
        ({"default_limits": LARGE, "tenant_limits": SMALL}, {"tenant_limits": LARGE}, False),
        ({}, {"tenant_limits": LARGE}, False),
        ({"default_limits": LARGE}, {}, False),
        ({"default_limits": SMALL}, {}, True),
    ],
)
def test_limits_that_a_spec_leaves_open_are_the_tiers(
    general: dict[str, Limits], tier: dict[str, Limits], fits: bool
) -> None:
    own = Settings(**general, tiers=(Tier(name="own", **tier), Tier(name="other", default_limits=LARGE)))  # type: ignore[arg-type]
    # The same limits said by the settings alone.
    for admission in (admitting(own, "own"), admitting(Settings(**{**general, **tier}, tiers=()))):  # type: ignore[arg-type]
        if fits:
            admission.check(one(), 0)
        else:
            refused(admission)


def test_a_tenants_limit_is_its_tiers_for_what_has_limits_too() -> None:
    tiers = (Tier(name="small", tenant_limits=SMALL), Tier(name="large", tenant_limits=LARGE))
    for limits in (LARGE, Limits()):
        admitting(Settings(tiers=tiers), "small").check(one(limits), 0)
        refused(admitting(Settings(tiers=tiers), "large"), limits)


def test_nobodys_tier_is_asked_for_while_there_is_room_for_any() -> None:
    asked = []

    def tier_of(user_id: str) -> None:
        asked.append(user_id)

    tiers = (Tier(name="small", default_limits=SMALL), Tier(name="large", default_limits=LARGE))
    admission = Admission(Settings(tiers=tiers), tier_of)
    admission.check(one(SMALL), 0)
    admission.check(one(Limits()), 0)
    assert asked == []
    admission.check(one(), 0)
    assert asked == ["auth0|1"]
    Admission(Settings(tiers=tiers[:1]), tier_of).check(one(), 0)
    assert len(asked) == 1


def test_without_a_reserve_memory_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(psutil, "virtual_memory")
    admitting(Settings(memory_reserve=0)).check(one(Limits(memory_max=HUGE)), 0)


def test_a_reading_serves_many(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = []
    real, now = psutil.virtual_memory, 1000.0

    def read() -> object:
        readings.append(now)
        return real()

    monkeypatch.setattr(psutil, "virtual_memory", read)
    monkeypatch.setattr("time.monotonic", lambda: now)
    admission = admitting(Settings())
    for _ in range(1000):
        admission.check(one(), 0)
        now += 0.001
    assert len(readings) == 1 / admission_module.MEMORY_AGE
    assert readings[1] - readings[0] == pytest.approx(admission_module.MEMORY_AGE, abs=0.001)


# ---- Descriptors


@contextmanager
def descriptors(most: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def in_use() -> int:
    return len(os.listdir("/proc/self/fd")) - 1  # the one through which they are listed


def test_so_many_sandboxes_as_there_are_descriptors_for() -> None:
    admission = admitting(Settings())
    # The listing itself was counted with the others.
    with descriptors(in_use() + 1 + DESCRIPTORS_SPARE + 3 * DESCRIPTORS_EACH):
        for running in range(3):
            admission.check(one(), running)
        error = refused(admission, running=3)
    assert error.limit == "descriptors"
    assert "3 sandboxes run here" in error.message
    assert "LimitNOFILE=" in str(error.remedy)
    admission.check(one(), 3)  # there are more again


def test_what_the_host_program_opens_later_is_seen(tmp_path: Path) -> None:
    if not os.stat("/proc/self/fd").st_size:
        pytest.skip("the kernel does not count them before Linux 6.2")
    admission = admitting(Settings())
    with descriptors(in_use() + 1 + DESCRIPTORS_SPARE + DESCRIPTORS_EACH), ExitStack() as stack:
        admission.check(one(), 0)
        for _ in range(2):
            stack.enter_context(tmp_path.joinpath("file").open("w"))
        refused(admission)
    admission.check(one(), 0)


RAISE = """
import resource
from pactown_runner.admission import raise_descriptor_limit
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard - 1))
for _ in range(2):
    assert raise_descriptor_limit() == hard - 1
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard - 1, hard - 1)
"""


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    # For good, and so in a process of its own.
    subprocess.run([sys.executable, "-c", RAISE], cwd=ROOT, check=True, timeout=60)


@contextmanager
def room_for(count: int) -> Iterator[None]:
    """So many descriptors are free and no more."""
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    used = {fd for fd in used if os.path.exists(f"/proc/self/fd/{fd}")}  # not the one of that listing
    with ExitStack() as stack:
        for _ in range(max(used) + 1 - len(used)):  # the holes
            stack.callback(os.close, os.dup(min(used)))
        with descriptors(max(used) + 1 + count):
            yield


@pytest.mark.host
@pytest.mark.each_loop
async def test_no_sandbox_holds_more_than_is_kept_for_it(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is asked here is not whether it is refused, but whether it gets by.
    monkeypatch.setattr(admission_module, "DESCRIPTORS_EACH", 0)
    monkeypatch.setattr(admission_module, "DESCRIPTORS_SPARE", 0)
    await supervisor.run(spec("echo the first opens what stays open; echo >&2"))
    before = in_use()
    with room_for(DESCRIPTORS_EACH):
        sandbox = await soon(supervisor.start(spec("echo ready; echo >&2; cat", stdin=True)))
    await soon(sandbox.send(b"more\n"))
    await line_of(sandbox, "more")
    assert in_use() - before <= DESCRIPTORS_EACH
    sandbox.close_stdin()
    with room_for(DESCRIPTORS_EACH):
        assert (await soon(sandbox.wait())).ok
