"""Metrics: what is counted of real sandboxes, under which labels, and that no counter goes back."""

from __future__ import annotations

import asyncio
import platform
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from cgroups import Pressure, Stats
from pactown_runner import Outcome, RestartPolicy, Settings, Supervisor
from pactown_runner.errors import AdmissionError, StartError
from pactown_runner.events import EventBus
from pactown_runner.metrics import Metrics
from pactown_runner.models import State
from pactown_runner.tallies import KEPT_SECONDS, OTHER, TENANT, Labels, Tallies, used
from tests.supervising import USER, eventually, line_of, python, soon, spec

BURN = "import time\nwhile time.process_time() < 0.3: pass\nprint('ready', flush=True)\ntime.sleep(1000)"


class Told:
    """An answer, read by the official parser."""

    def __init__(self, text: bytes) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text.decode())}
        self.values = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float | None:
        """The value of `pactown_<name>`."""
        return self.values.get((f"pactown_{name}", frozenset(labels.items())))

    def sandbox(self, name: str, service: str = "api", user: str = USER, **labels: str) -> float | None:
        return self(f"sandbox_{name}", user=user, service=service, **labels)

    def labels(self, name: str) -> set[tuple[str, str]]:
        """Users and services that `pactown_<name>` is told of."""
        return {
            (dict(labels).get("user", ""), dict(labels).get("service", ""))
            for found, labels in self.values
            if found == f"pactown_{name}"
        }


async def told(metrics: Metrics) -> Told:
    return Told(await soon(metrics.render()))


# ---- Real sandboxes


@pytest.mark.host
async def test_a_service_that_starts_crashes_and_is_started_again(supervisor: Supervisor) -> None:
    metrics = Metrics(supervisor)
    policy = RestartPolicy("on-failure", backoff=0.01, jitter=0.0, max_restarts=2)
    sandbox = await supervisor.start(spec("echo one; echo two; exit 3", restart=policy))
    assert (await soon(sandbox.wait())).exit_code == 3
    assert sandbox.state is State.CRASH_LOOPING
    found = await told(metrics)
    assert found.sandbox("starts_total") == 3
    assert found.sandbox("restarts_total") == 2
    assert found.sandbox("ends_total", reason="exited") == 3
    assert found.sandbox("crash_loops_total") == 1
    assert found.sandbox("log_lines_total") == 6
    assert found.sandbox("log_bytes_total") == 3 * len("one\ntwo\n")
    assert found.sandbox("log_dropped_lines_total") == 0
    assert found("sandboxes", state="crash-looping") == 1
    assert found("spawn_seconds_count") == 3
    assert 0 < (found("spawn_seconds_sum") or 0) < 90
    # Nothing of it is there any more, and what it used is told all the same.
    assert (found.sandbox("cpu_seconds_total") or 0) > 0
    assert found.sandbox("pids") is None

    await soon(sandbox.restart())
    await soon(sandbox.stop(grace=0))
    again = await told(metrics)
    assert again.sandbox("restarts_total") == (again.sandbox("starts_total") or 0) - 1
    assert again.sandbox("crash_loops_total") in (1, 2)
    ends = [value for (name, _), value in again.values.items() if name == "pactown_sandbox_ends_total"]
    assert sum(ends) == again.sandbox("starts_total")
    assert sum(value for (name, _), value in again.values.items() if name == "pactown_sandboxes") == 0


@pytest.mark.host
async def test_what_runs_is_told_as_it_is_now(supervisor: Supervisor) -> None:
    metrics = Metrics(supervisor)
    sandbox = await supervisor.start(spec(python(BURN)))
    await line_of(sandbox)
    other = await supervisor.start(spec("sleep 1000", user="other"))
    await sandbox.freeze()
    found = await told(metrics)
    assert (found("sandboxes", state="running"), found("sandboxes", state="frozen")) == (1, 1)
    assert (found("tenant_sandboxes", user=USER), found("tenant_sandboxes", user="other")) == (1, 1)
    cpu = found.sandbox("cpu_seconds_total")
    assert cpu is not None
    assert 0.3 <= cpu < 60
    assert (found("tenant_cpu_seconds_total", user=USER) or 0) >= cpu
    waited = found.sandbox("pressure_waiting_seconds_total", resource="cpu")
    assert (waited is None) == ((await other.stats()).cpu_pressure is None)
    stats = await sandbox.stats()
    assert found.sandbox("pids") == stats.pids_current
    assert (found.sandbox("memory_bytes") is None) == (stats.memory_current is None)
    assert found("build_info", version=version("pactown-runner"), python=platform.python_version()) == 1
    assert found.values["process_open_fds", frozenset()] > 3
    # What has ended does not take back what it used.
    await soon(sandbox.stop(grace=0))
    assert ((await told(metrics)).sandbox("cpu_seconds_total") or 0) >= cpu


@pytest.mark.host
async def test_what_cannot_be_started_and_what_is_refused(settings: Settings) -> None:
    async with Supervisor(settings=replace(settings, max_sandboxes_per_user=1)) as supervisor:
        metrics = Metrics(supervisor)
        with pytest.raises(StartError):
            await supervisor.start(spec(["/no/such/program"], service="broken"))
        await supervisor.start(spec("sleep 1000"))
        for _ in range(2):
            with pytest.raises(AdmissionError):
                await supervisor.start(spec("sleep 1000", service="more"))
        found = await told(metrics)
        assert found.sandbox("ends_total", "broken", reason="failed-to-start") == 1
        assert found.sandbox("starts_total", "broken") == 0
        assert found("admission_refusals_total", limit="max_sandboxes_per_user") == 2
        assert found.sandbox("starts_total", "more") is None
        assert found("spawn_seconds_count") == 1
    async with Supervisor(settings=replace(settings, memory_reserve=1 << 60)) as supervisor:
        metrics = Metrics(supervisor)
        with pytest.raises(AdmissionError):
            await supervisor.start(spec("true"))
        assert (await told(metrics))("admission_refusals_total", limit="memory_reserve") == 1


@pytest.mark.host
async def test_dropped_output_is_counted(settings: Settings) -> None:
    dropping = replace(settings, log_rate_bytes=4096, log_rate_policy="drop")
    async with Supervisor(settings=dropping) as supervisor:
        metrics = Metrics(supervisor)
        sandbox = await supervisor.start(spec("seq 100000"))
        await soon(sandbox.wait())
        found = await told(metrics)
        dropped = found.sandbox("log_dropped_lines_total")
        assert dropped
        assert dropped + (found.sandbox("log_lines_total") or 0) == 100_000
        printed = sum(len(f"{number}\n") for number in range(1, 100_001))
        assert (found.sandbox("log_bytes_total") or 0) + (found.sandbox("log_dropped_bytes_total") or 0) == printed


@pytest.mark.host
async def test_three_services_and_room_for_two(settings: Settings) -> None:
    async with Supervisor(settings=replace(settings, metrics_services_max=2)) as supervisor:
        metrics = Metrics(supervisor)
        for service in ("one", "two"):
            await supervisor.start(spec("sleep 1000", service=service))
        await line_of(await supervisor.start(spec(python(BURN), service="large")))
        first = await told(metrics)
        assert {service for _, service in first.labels("sandbox_starts_total")} == {"one", "two", OTHER}
        assert (first.sandbox("cpu_seconds_total", OTHER) or 0) >= 0.3
        # It is the largest of them, and has a count of its own from now on.
        second = await told(metrics)
        services = {service for _, service in second.labels("sandbox_starts_total")}
        assert services in ({"large", "one", OTHER}, {"large", "two", OTHER})
        assert second.sandbox("cpu_seconds_total", "large") is not None
        # What it used before stays where it was counted.
        assert (second.sandbox("cpu_seconds_total", OTHER) or 0) >= (first.sandbox("cpu_seconds_total", OTHER) or 0)
        assert second("tenant_sandboxes", user=USER) == 3


@pytest.mark.host
async def test_without_room_for_services_each_user_is_one(settings: Settings) -> None:
    async with Supervisor(settings=replace(settings, metrics_services_max=0)) as supervisor:
        metrics = Metrics(supervisor)
        for user, service in (("a", "one"), ("a", "two"), ("b", "one")):
            await supervisor.start(spec("sleep 1000", user=user, service=service))
        await told(metrics)
        found = await told(metrics)
        assert found.labels("sandbox_starts_total") == {("a", OTHER), ("b", OTHER)}
        assert found.sandbox("starts_total", OTHER, "a") == 2


@pytest.mark.host
async def test_who_is_left_running_is_adopted_with_what_it_uses_from_then_on(settings: Settings) -> None:
    leaving = replace(settings, on_exit="leave")
    async with Supervisor(settings=leaving) as supervisor:
        await line_of(await supervisor.start(spec(python(BURN))))
    successor = Supervisor(settings=settings)
    metrics = Metrics(successor)
    async with successor:
        late = Metrics(successor)
        for each, adoptions in ((metrics, 1), (late, None)):
            found = await told(each)
            assert found.sandbox("adoptions_total") == (adoptions or 0)
            assert found.sandbox("starts_total") == 0
            # The predecessor told of what it had used before.
            assert (found.sandbox("cpu_seconds_total") or 0) < 0.3
            assert found("spawn_seconds_count") == 0


@pytest.mark.host
async def test_another_registry_and_thread_may_expose_them(supervisor: Supervisor) -> None:
    metrics = Metrics(supervisor)
    await supervisor.start(spec("sleep 1000"))
    # On the loop nothing can be waited for: events are there, and what is in use is as it was seen last.
    assert Told(prometheus_client.generate_latest(metrics.registry)).sandbox("cpu_seconds_total") is None
    found = Told(await asyncio.to_thread(prometheus_client.generate_latest, metrics.registry))
    assert found.sandbox("starts_total") == 1
    assert found.sandbox("cpu_seconds_total") is not None
    assert b"pactown_" not in prometheus_client.generate_latest()


@pytest.mark.host
@pytest.mark.each_loop
async def test_how_late_the_loop_was(supervisor: Supervisor) -> None:
    metrics = Metrics(supervisor)
    async with metrics.watching():
        looks = 0.0
        while not looks:
            await asyncio.sleep(0)
            looks = (await told(metrics))("event_loop_delay_seconds_count") or 0
    assert Told(await metrics.render())("event_loop_delay_seconds_bucket", le="+Inf") == looks


async def test_one_that_does_not_run_has_metrics_too(settings: Settings) -> None:
    found = await told(Metrics(Supervisor(settings=settings)))
    assert found("sandboxes", state="running") == 0
    assert found.labels("sandbox_starts_total") == set()


@pytest.mark.host
async def test_counters_never_go_back(supervisor: Supervisor) -> None:
    """While sandboxes come, crash and go, whatever moment they are looked at."""
    metrics = Metrics(supervisor)
    policy = RestartPolicy("on-failure", backoff=0.001, backoff_max=0.001, jitter=0.0, max_restarts=9)

    async def churn(service: str) -> None:
        for _ in range(5):
            sandbox = await supervisor.start(spec("echo x; exit 1", service=service, restart=policy))
            await sandbox.wait()
            await sandbox.stop(grace=0)

    churning = asyncio.gather(*(churn(service) for service in ("one", "two")))
    before: dict[Any, float] = {}
    while not churning.done():
        found = await told(metrics)
        now = {key: value for key, value in found.values.items() if key[0].endswith("_total")}
        assert all(value >= before[key] for key, value in now.items() if key in before)
        assert before.keys() <= now.keys()
        before = now
    await churning
    found = await told(metrics)
    for service in ("one", "two"):
        assert found.sandbox("starts_total", service) == 5 * 10
        assert found.sandbox("ends_total", service, reason="exited") == 5 * 10
        assert found.sandbox("log_lines_total", service) == 5 * 10
    await eventually(lambda: not supervisor.list())


# ---- Events


def test_a_listener_hears_what_no_reader_would_and_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[Any] = []

    def fails(*_: Any) -> None:
        raise ZeroDivisionError

    bus = EventBus(1, [fails, lambda *what: heard.append(what)])
    reader = bus.read()
    for number in range(3):
        bus.tell("started", USER, "api", "run", pid=number)
    bus.note("refused", USER, limit="max_sandboxes")
    assert heard == [
        *(("started", USER, "api", "run", {"pid": number}) for number in range(3)),
        ("refused", USER, None, None, {"limit": "max_sandboxes"}),
    ]
    assert len(reader._events) == 1
    assert len(caplog.records) == 4


# ---- Labels


def started(tallies: Tallies, *services: str, user: str = USER) -> None:
    for service in services:
        tallies.hear("started", user, service, "run", {}, now=0.0)


def cpu(tallies: Tallies, service: str, usec: int, user: str = USER) -> Labels:
    return tallies.use(user, service, "run", {"cpu": usec})


def own(tallies: Tallies) -> set[str]:
    return {labels.service for labels in tallies.counts} - {OTHER, TENANT}


def test_the_first_keep_their_counts_until_somebody_is_much_larger() -> None:
    tallies = Tallies(2, 10)
    started(tallies, "a", "b", "c")
    live = {(USER, service) for service in "abc"}
    for service, usec in (("a", 100), ("b", 200), ("c", 150)):
        cpu(tallies, service, usec)
    tallies.tidy(live, 1.0)
    assert own(tallies) == {"a", "b"}
    cpu(tallies, "c", 1000)
    tallies.tidy(live, 2.0)
    assert own(tallies) == {"b", "c"}
    assert tallies.counts[Labels(USER, OTHER)]["cpu"] == 1000
    # From there it goes on, and a is counted with the others.
    assert cpu(tallies, "c", 1001) == (USER, "c")
    assert cpu(tallies, "a", 130) == (USER, OTHER)
    assert tallies.counts[Labels(USER, "c")]["cpu"] == 1
    assert tallies.counts[Labels(USER, OTHER)]["cpu"] == 1030


def test_what_has_ended_makes_room_at_once_or_in_a_while() -> None:
    tallies = Tallies(2, 10)
    started(tallies, "a", "b", "c")
    tallies.hear("gone", USER, "a", "run", {}, now=0.0)
    tallies.tidy({(USER, "b"), (USER, "c")}, 1.0)
    assert own(tallies) == {"b", "c"}
    tallies.tidy(set(), 2.0)
    assert own(tallies) == {"b", "c"}, "some scrapes are to see it"
    tallies.tidy(set(), 2.0 + KEPT_SECONDS)
    assert own(tallies) == set()
    tallies.tidy(set(), 3.0 + KEPT_SECONDS)
    tallies.tidy(set(), 3.0 + 2 * KEPT_SECONDS)
    assert tallies.counts == {}


def test_any_number_of_runs_that_nobody_looks_at_take_no_room() -> None:
    tallies = Tallies(2, 2)
    for number in range(1000):
        name = (f"user{number % 100}", f"run{number}")
        started(tallies, name[1], user=name[0])
        tallies.hear("ended", *name, "run", {"outcome": Outcome(reason="exited", stats=Stats(cpu_usage_usec=1))}, now=0)
        tallies.hear("gone", *name, "run", {}, now=0.0)
    assert len(tallies.counts) == 5
    assert len(tallies._services) == 2
    for key in ("starts", "ends exited", "cpu"):
        assert sum(counts.get(key, 0) for counts in tallies.counts.values()) == 1000


def test_users_that_there_is_no_room_for_go_together_until_there_is() -> None:
    tallies = Tallies(10, 1)
    started(tallies, "api", user="a")
    for user in ("b", "c"):
        started(tallies, "api", user=user)
        tallies.use(user, TENANT, None, {"cpu": 5})
    assert set(tallies.counts) == {("a", "api"), ("", OTHER), ("", TENANT)}
    assert tallies.counts[Labels("", OTHER)]["starts"] == 2
    assert tallies.counts[Labels("", TENANT)]["cpu"] == 10
    live = {("b", "api"), ("b", TENANT)}
    for now in (1.0, 2.0 + KEPT_SECONDS, 4.0 + 2 * KEPT_SECONDS):
        tallies.tidy(live, now)
    assert tallies.use("b", "api", "run", {"cpu": 1}) == ("b", "api")
    assert ("a", "api") not in tallies.counts


def test_what_a_run_used_is_counted_once() -> None:
    tallies = Tallies(10, 10)
    stats = Stats(cpu_usage_usec=100, memory_pressure=Pressure(avg10=1.0, total_usec=7, full_total_usec=3))
    for _ in range(2):
        tallies.use(USER, "api", "one", used(stats))
    tallies.hear("ended", USER, "api", "one", {"outcome": Outcome(reason="exited", stats=stats)}, now=0.0)
    tallies.use(USER, "api", "two", {"cpu": 50})
    counts = tallies.counts[Labels(USER, "api")]
    assert (counts["cpu"], counts["waiting memory"], counts["stalled memory"]) == (150, 7, 3)
    # An old run's late end takes away nothing of what a later one has begun.
    tallies.hear("gone", USER, "api", "one", {}, now=0.0)
    tallies.use(USER, "api", "two", {"cpu": 60})
    assert counts["cpu"] == 160


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("xy"), st.integers(0, 5)), max_size=60))
def test_counts_are_bounded_and_what_is_counted_is_never_lost(steps: list[tuple[str, str, int]]) -> None:
    tallies = Tallies(2, 1)
    used_by: dict[tuple[str, str], int] = {}
    shown: dict[Labels, int] = {}
    for now, (service, user, more) in enumerate(steps):
        name = (user, service)
        used_by[name] = used_by.get(name, 0) + more
        cpu(tallies, service, used_by[name], user)
        for labels, counts in tallies.counts.items():
            assert counts.get("cpu", 0) >= shown.get(labels, 0)
        tallies.tidy(used_by.keys(), float(now))
        shown = {labels: counts.get("cpu", 0) for labels, counts in tallies.counts.items()}
        assert len(own(tallies)) <= 2
        assert len({labels.user for labels in tallies.counts}) <= 2
