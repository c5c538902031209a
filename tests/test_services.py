"""Services over more than one run: restart policies, services that come back, and what is left to a successor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cgroups import Limits
from pactown_runner import Sandbox, Settings, Supervisor
from pactown_runner.errors import AlreadyRunningError, NotFoundError, SpecError, StartError, StateError
from pactown_runner.events import EventReader
from pactown_runner.models import Event, State
from pactown_runner.registry import Registry
from pactown_runner.specs import Probe, RestartMode, RestartPolicy, SandboxSpec
from tests.supervising import (
    PATIENCE,
    USER,
    Start,
    eventually,
    leaves_nothing,
    leftovers,
    line_of,
    lines,
    python,
    soon,
    spec,
)

pytestmark = pytest.mark.host
each_loop = pytest.mark.each_loop

SLEEP = ["sleep", "1000"]
COUNTED = "n=$(cat n 2>/dev/null || echo 0); n=$((n+1)); echo $n > n; echo run $n; "
"""Each run knows which one it is."""


def policy(mode: RestartMode, **options: float) -> RestartPolicy:
    return RestartPolicy(mode, **{"backoff": 0.01, "healthy_after": 1000.0, **options})  # type: ignore[arg-type]


async def state_of(sandbox: Sandbox, state: State) -> None:
    await eventually(lambda: sandbox.state is state)


async def until(reader: EventReader, kind: str) -> list[Event]:
    seen = []
    async with asyncio.timeout(PATIENCE):
        async for event in reader:
            seen.append(event)
            if event.kind == kind:
                return seen
    raise AssertionError(f"no {kind}: {seen}")


def services(settings: Settings) -> list[str]:
    with Registry(settings.state_dir / "registry.db") as registry:
        return [row.service_id for row in registry.services.absent()]


# ---- Restart policies


@each_loop
async def test_a_failing_service_is_started_again_until_it_succeeds(supervisor: Supervisor) -> None:
    with leaves_nothing(supervisor.settings):
        sandbox = await supervisor.start(spec(COUNTED + "[ $n = 3 ]", restart=policy("on-failure")))
        first = sandbox.run_id
        outcome = await soon(sandbox.wait())
        assert outcome.ok
        assert sandbox.restarts == 2
        assert sandbox.run_id != first
        assert sandbox.state is State.ENDED
        assert await lines(sandbox) == ["run 1", "run 2", "run 3"]
        with pytest.raises(NotFoundError):
            supervisor.get(USER, "api")


async def test_without_a_policy_there_is_one_run(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start(spec(COUNTED + "exit 1"))
    assert (await soon(sandbox.wait())).exit_code == 1
    assert await lines(sandbox) == ["run 1"]


async def test_always_means_after_success_too_and_followers_hear_all_runs(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start(spec(COUNTED, restart=policy("always", max_restarts=10_000)))
    await line_of(sandbox, "run 3")
    outcome = await soon(sandbox.stop())
    assert outcome is sandbox.last_outcome
    assert sandbox.state is State.ENDED
    assert not services(supervisor.settings)


async def test_a_one_shot_run_is_not_restarted(supervisor: Supervisor) -> None:
    with pytest.raises(SpecError, match="not restarted"):
        await supervisor.run(spec("true", restart=policy("always")))


async def test_a_service_that_keeps_failing_is_left_alone(supervisor: Supervisor) -> None:
    with leaves_nothing(supervisor.settings):
        events = supervisor.events()
        sandbox = await supervisor.start(spec("exit 3", restart=policy("on-failure", max_restarts=2)))
        outcome = await soon(sandbox.wait())
        assert (outcome.exit_code, sandbox.state, sandbox.restarts) == (3, State.CRASH_LOOPING, 2)
        assert supervisor.get(USER, "api") is sandbox
        kinds = [event.kind for event in await until(events, "crash-looping")]
        assert kinds == ["started", "ready", "restarted", "ready", "restarted", "ready", "crash-looping"]
        # A restart by hand gives it a new budget.
        await soon(sandbox.restart())
        outcome = await soon(sandbox.wait())
        assert sandbox.restarts == 5
        assert (await soon(sandbox.stop())) is outcome
        assert sandbox.state is State.ENDED


async def test_another_start_replaces_one_that_is_crash_looping(supervisor: Supervisor) -> None:
    failing = await supervisor.start(spec("exit 3", restart=policy("on-failure", max_restarts=0)))
    await soon(failing.wait())
    fixed = await soon(supervisor.start(spec(SLEEP)))
    assert failing.state is State.ENDED
    assert supervisor.list() == [fixed]


async def test_of_two_that_replace_one_that_is_crash_looping_one_does(supervisor: Supervisor) -> None:
    failing = await supervisor.start(spec("exit 3", restart=policy("on-failure", max_restarts=0)))
    await soon(failing.wait())
    starts = [supervisor.start(spec(SLEEP)) for _ in range(3)]
    found = await soon(asyncio.gather(*starts, return_exceptions=True))
    (fixed,) = [one for one in found if isinstance(one, Sandbox)]
    assert [type(one) for one in found if one is not fixed] == [AlreadyRunningError] * 2
    assert supervisor.list() == [fixed]
    assert (await soon(fixed.stop(0))).reason == "stopped"


async def test_one_that_was_replaced_does_not_come_back(supervisor: Supervisor) -> None:
    failing = await supervisor.start(spec("exit 3", restart=policy("always", max_restarts=0)))
    await soon(failing.wait())
    fixed = await soon(supervisor.start(spec(SLEEP)))
    assert services(supervisor.settings) == []
    await soon(fixed.stop(0))
    assert services(supervisor.settings) == []


async def test_one_that_makes_cgroups_of_its_own_ends(supervisor: Supervisor) -> None:
    with leaves_nothing(supervisor.settings):
        sandbox = await supervisor.start(spec(SLEEP))
        assert sandbox.cgroup is not None
        path = sandbox.cgroup.path
        for name in ("x", "x/y", "z"):
            (path / name).mkdir()
        assert (await soon(sandbox.stop(0))).reason == "stopped"
        assert not path.exists()


async def test_a_first_start_that_fails_is_told_and_not_tried_again(supervisor: Supervisor) -> None:
    with leaves_nothing(supervisor.settings):
        with pytest.raises(StartError) as caught:
            await supervisor.start(spec(["/nonexistent"], restart=policy("always")))
        assert caught.value.step == "execve"
        assert not supervisor.list()
        assert not services(supervisor.settings)


async def test_a_later_start_that_fails_counts_as_a_failed_run(supervisor: Supervisor) -> None:
    user = await supervisor.users.get_or_create(USER)
    sandbox = await supervisor.start(
        spec("echo '#!/bin/sh\necho once; rm x' > x; chmod +x x; exec ./x", restart=policy("no"))
    )
    await soon(sandbox.wait())
    await supervisor.run(spec("printf '#!/bin/sh\\nrm x\\n' > x; chmod +x x", service="other"))
    there = user.home_dir / "sandboxes/other"
    sandbox = await supervisor.start(
        spec(["./x"], service="other", cwd=str(there), restart=policy("on-failure", max_restarts=1))
    )
    outcome = await soon(sandbox.wait())
    assert outcome.ok
    await supervisor.run(spec("printf '#!/bin/sh\\nrm x; exit 1\\n' > x; chmod +x x", service="other"))
    sandbox = await supervisor.start(spec(["./x"], service="other", restart=policy("on-failure", max_restarts=1)))
    outcome = await soon(sandbox.wait())
    assert (outcome.reason, outcome.failed_step, sandbox.state) == ("failed-to-start", "execve", State.CRASH_LOOPING)


async def test_a_pause_can_be_cut_short(supervisor: Supervisor) -> None:
    with leaves_nothing(supervisor.settings):
        sandbox = await supervisor.start(spec("exit 1", restart=policy("always", backoff=1000, backoff_max=1000)))
        await state_of(sandbox, State.BACKING_OFF)
        assert sandbox.outcome is None
        with pytest.raises(StateError, match="backing-off"):
            await sandbox.freeze()
        await soon(sandbox.restart())
        await state_of(sandbox, State.BACKING_OFF)
        assert (await soon(sandbox.stop())).exit_code == 1


async def test_a_running_one_can_be_restarted(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start(spec(COUNTED + "sleep 1000"))
    await line_of(sandbox, "run 1")
    pid = sandbox.pid
    await soon(sandbox.restart(grace=1))
    await line_of(sandbox, "run 2")
    assert sandbox.pid != pid
    assert sandbox.state is State.RUNNING
    assert sandbox.last_outcome is not None
    assert sandbox.last_outcome.reason == "stopped"
    await soon(sandbox.stop())
    with pytest.raises(StateError, match="ended"):
        await sandbox.restart()


@pytest.mark.parametrize("at", [0.0, 0.001, 0.003, 0.01, 0.03])
async def test_a_stop_in_the_middle_of_restarts_is_the_end(supervisor: Supervisor, at: float) -> None:
    with leaves_nothing(supervisor.settings):
        sandbox = await supervisor.start(spec("exit 1", restart=policy("always", backoff=0.001, max_restarts=10_000)))
        for number in range(20):
            await asyncio.sleep(at)
            outcome = await soon(sandbox.stop(grace=0.1))
            assert outcome.reason in ("exited", "stopped")
            assert sandbox.state is State.ENDED
            if number < 19:
                sandbox = await supervisor.start(
                    spec("exit 1", restart=policy("always", backoff=0.001, max_restarts=10_000))
                )


async def test_a_healthy_run_begins_the_count_anew(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start(
        spec("exit 1", restart=policy("on-failure", max_restarts=1, healthy_after=0.0, backoff=0.001))
    )
    await eventually(lambda: sandbox.restarts > 3)
    await soon(sandbox.stop())


async def test_changed_limits_hold_for_later_runs(supervisor: Supervisor) -> None:
    events = supervisor.events()
    sandbox = await supervisor.start(spec(SLEEP))
    # Nothing that this host may be unable to enforce.
    await sandbox.set_limits(Limits())
    assert [event.kind for event in await until(events, "limit-changed")] == ["started", "ready", "limit-changed"]
    await soon(sandbox.restart(grace=0))
    assert sandbox.spec.limits == Limits()


async def test_limits_that_change_while_it_is_started_again_hold_too(
    supervisor: Supervisor, settings: Settings
) -> None:
    # Where this host cannot enforce them the next run fails, which is as good here.
    limits = Limits(pids_max=7)
    sandbox = await supervisor.start(spec(SLEEP, limits=Limits(), restart=policy("always")))
    with contextlib.closing(sqlite3.connect(settings.state_dir / "registry.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        restarting = asyncio.create_task(sandbox.restart(grace=0))
        await state_of(sandbox, State.STARTING)
        # What has been written onto the last run, which is over.
        remembering = asyncio.create_task(sandbox.course.remember(limits))
        await asyncio.sleep(0)
        other.execute("ROLLBACK")
        await soon(asyncio.wait([remembering, restarting]))
    assert sandbox.spec.limits == limits
    with Registry(settings.state_dir / "registry.db") as registry:
        (row,) = registry.sandboxes.rows()
    assert SandboxSpec.from_json(row.spec).limits == limits


# ---- Readiness and liveness

SERVER = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if os.path.exists(self.path.strip("/")) else 503)
        self.end_headers()
    def log_message(self, *args):
        pass
server = http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler)
print("ready", flush=True)
server.serve_forever()
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@each_loop
async def test_a_service_is_ready_when_its_probe_says_so_and_ended_when_it_is_dead(supervisor: Supervisor) -> None:
    port = free_port()
    events = supervisor.events()
    with leaves_nothing(supervisor.settings):
        sandbox = await supervisor.start(
            spec(
                python(SERVER),
                env={"PORT": str(port)},
                ready=Probe(port=port, path="/up", interval=0.02, timeout=PATIENCE, failures=1),
                alive=Probe(command="test ! -e dead", interval=0.02, timeout=PATIENCE, failures=2),
                restart=policy("on-failure"),
            )
        )
        await line_of(sandbox)
        assert not sandbox.ready
        waiting = asyncio.create_task(sandbox.until_ready())
        await (await sandbox.exec("touch up")).wait()
        await soon(waiting)
        await eventually(lambda: sandbox.ready)
        await (await sandbox.exec(["rm", "up"])).wait()
        lost = (await until(events, "unhealthy"))[-1]
        assert "503" in lost.details["reason"]
        assert (sandbox.state, sandbox.ready) == (State.RUNNING, False)
        await (await sandbox.exec("touch up dead")).wait()
        dead = await until(events, "restarted")
        assert [event.kind for event in dead if event.kind != "ready"] == ["unhealthy", "restarted"]
        assert sandbox.last_outcome is not None
        assert sandbox.last_outcome.reason == "unhealthy"
        await soon(sandbox.stop())


async def test_one_that_cannot_be_started_again_is_still_read_and_waited_for(supervisor: Supervisor) -> None:
    program = "[ ! -e y ] || { echo twice; exec sleep 1000; }; echo once; mv x y; exit 1"
    await supervisor.run(spec(f"printf '#!/bin/sh\\n{program}\\n' > x; chmod +x x"))
    restart = policy("on-failure", backoff_max=0.01, max_restarts=100_000)
    sandbox = await supervisor.start(spec(["./x"], restart=restart))
    await eventually(lambda: sandbox.last_outcome is not None and sandbox.last_outcome.reason == "failed-to-start")
    await soon(sandbox.started())
    assert await lines(sandbox) == ["once"]
    waiting = asyncio.create_task(sandbox.until_ready())
    await asyncio.sleep(0)
    assert not waiting.done()
    there = sandbox.user.home_dir / "sandboxes/api"
    (there / "x").symlink_to("y")
    await line_of(sandbox, "twice")
    await soon(waiting)
    assert sandbox.ready


async def test_who_waits_for_it_does_not_mind_a_moment_or_a_run_in_between(supervisor: Supervisor) -> None:
    command = "rm -f over; trap '' TERM; echo ready; until [ -e over ]; do sleep 0.01; done"
    sandbox = await supervisor.start(spec(command, ready=Probe(command="test -e up", interval=0.01)))
    await line_of(sandbox)
    waiting = asyncio.create_task(sandbox.until_ready())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    # It is so again before who waits has its turn.
    sandbox.course.ready()
    sandbox.course.unready("a moment")
    there = sandbox.user.home_dir / "sandboxes/api"
    (there / "up").touch()
    await soon(waiting)
    restarting = asyncio.create_task(sandbox.restart(grace=1000))
    await state_of(sandbox, State.STOPPING)
    waiting = asyncio.create_task(sandbox.until_ready())
    await asyncio.sleep(0)
    assert not waiting.done()
    (there / "over").touch()
    await soon(restarting)
    await soon(waiting)
    await soon(sandbox.kill())


async def test_one_that_never_gets_ready_is_ended(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start(spec(SLEEP, ready=Probe(port=free_port(), interval=0.02, within=0.2)))
    with pytest.raises(StateError):
        await soon(sandbox.until_ready())
    assert (await soon(sandbox.wait())).reason == "unhealthy"


async def test_one_that_ends_in_order_is_not_taken_for_dead(supervisor: Supervisor) -> None:
    alive = Probe(command="test ! -e dead", interval=0.01, timeout=PATIENCE, failures=1)
    sandbox = await supervisor.start(
        spec("trap 'touch dead; sleep 0.3; exit 0' TERM; echo ready; while :; do sleep 0.01; done", alive=alive)
    )
    await line_of(sandbox)
    await soon(sandbox.until_ready())
    outcome = await soon(sandbox.stop(grace=10))
    assert (outcome.reason, outcome.exit_code) == ("stopped", 0)


# ---- Services that come back


@each_loop
async def test_a_registered_service_comes_back_with_the_next_supervisor(settings: Settings) -> None:
    async with Supervisor(settings=settings) as supervisor:
        first = await supervisor.start(spec(COUNTED + "sleep 1000", service="back", restart=policy("always")))
        await line_of(first, "run 1")
        await supervisor.start(spec(SLEEP, service="gone"))
        await supervisor.start(spec(SLEEP, service="failing", restart=policy("on-failure")))
        stopped = await supervisor.start(spec(SLEEP, service="stopped", restart=policy("always")))
        await stopped.stop()
    assert not leftovers(settings)
    assert services(settings) == ["back"]
    async with Supervisor(settings=settings) as supervisor:
        back = supervisor.get(USER, "back")
        assert len(supervisor.list()) == 1
        await line_of(back, "run 2")
        assert back.spec.restart.mode == "always"
        await back.stop()
    assert not services(settings)


async def test_one_that_cannot_start_when_it_comes_back_is_tried_again(settings: Settings) -> None:
    restart = policy("always", max_restarts=3)
    async with Supervisor(settings=settings) as supervisor:
        await supervisor.run(spec("printf '#!/bin/sh\\nsleep 1000\\n' > x; chmod +x x"))
        await supervisor.start(spec(["./x"], restart=restart))
        user = await supervisor.users.get(USER)
    assert user is not None
    program = user.home_dir / "sandboxes/api/x"
    program.rename(program.with_name("y"))
    async with Supervisor(settings=settings) as supervisor:
        sandbox = supervisor.get(USER, "api")
        await state_of(sandbox, State.CRASH_LOOPING)
        assert sandbox.restarts == 3
        assert await lines(sandbox) == []
        with pytest.raises(StateError, match="crash-looping"):
            await soon(sandbox.until_ready())
        with pytest.raises(StartError):
            await soon(sandbox.restart())
        await soon(sandbox.stop())
    assert not leftovers(settings)
    assert not services(settings)


async def test_changed_limits_come_back_too(settings: Settings) -> None:
    limits = Limits(cpu_weight=None)
    async with Supervisor(settings=settings) as supervisor:
        sandbox = await supervisor.start(spec(SLEEP, restart=policy("always")))
        await sandbox.set_limits(limits)
    with Registry(settings.state_dir / "registry.db") as registry:
        (row,) = registry.services.absent()
    assert SandboxSpec.from_json(row.spec).limits == limits
    async with Supervisor(settings=settings) as supervisor:
        await supervisor.stop(USER, "api")


async def test_a_one_shot_supervisor_brings_nothing_back(settings: Settings) -> None:
    async with Supervisor(settings=settings) as supervisor:
        await supervisor.start(spec(SLEEP, restart=policy("always")))
    async with Supervisor(settings=settings, role="one-shot") as supervisor:
        assert not supervisor.list()
    async with Supervisor(settings=settings) as supervisor:
        await supervisor.stop(USER, "api")


async def test_a_service_whose_supervisor_and_processes_died_is_started_again(settings: Settings, child: Start) -> None:
    source = f"""
from pactown_runner.specs import RestartPolicy
async def work(supervisor):
    for mode in ("always", "on-failure", "no"):
        sandbox = await supervisor.start(
            spec({COUNTED + "exec sleep 1000"!r}, service=mode, restart=RestartPolicy(mode, backoff=0.01)))
        async for record in sandbox.logs(follow=True):
            break
        await say(str(sandbox.pid))
    await asyncio.sleep(1000)
"""
    before = child(source)
    pids = [int(await before.line()) for _ in range(3)]
    await before.killed()
    for pid in pids:
        os.kill(pid, 9)
    await eventually(lambda: all(map(_has_ended, pids)))
    async with Supervisor(settings=settings) as supervisor:
        # The third is taken over as well, and found to have ended.
        await eventually(lambda: sorted(one.service_id for one in supervisor.list()) == ["always", "on-failure"])
        for sandbox in supervisor.list():
            await line_of(sandbox, "run 2")
            assert sandbox.last_outcome is not None
            assert sandbox.last_outcome.reason in ("lost", "signaled")  # where nobody has reaped it yet
            await sandbox.stop()
    assert not leftovers(settings)


def _has_ended(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # before it was opened, or after
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True


# ---- Left to a successor


@each_loop
async def test_left_running_and_gone_on_with(settings: Settings) -> None:
    leaving = replace(settings, on_exit="leave")
    async with Supervisor(settings=leaving) as supervisor:
        sandbox = await supervisor.start(
            spec("i=0; while [ ! -e stop ]; do i=$((i+1)); echo line $i; sleep 0.01; done; exit 7")
        )
        await line_of(sandbox, "line 3")
        pid = sandbox.pid
        one_shot = await supervisor.start_run(spec(SLEEP, service="once"))
    assert one_shot.outcome is not None
    assert one_shot.outcome.reason == "stopped"
    assert sandbox.state is State.ENDED
    with pytest.raises(StateError, match="left to another"):
        await sandbox.wait()
    assert Path(f"/proc/{pid}").exists()
    async with Supervisor(settings=settings) as supervisor:
        adopted = supervisor.get(USER, "api")
        assert (adopted.pid, adopted.state) == (pid, State.RUNNING)
        (adopted.user.home_dir / "sandboxes/api/stop").touch()
        outcome = await soon(adopted.wait())
        assert outcome.exit_code == 7
        numbers = [line.split()[1] for line in await lines(adopted)]
        assert numbers == [str(number) for number in range(1, len(numbers) + 1)]


async def test_the_time_of_one_that_was_left_is_not_the_wall_clocks(settings: Settings) -> None:
    async with Supervisor(settings=replace(settings, on_exit="leave")) as supervisor:
        await supervisor.start(spec(SLEEP, timeout=3600.0))
    # As if the clock had been set since, by two hours: a test cannot set it, as it is the whole host's.
    with contextlib.closing(sqlite3.connect(settings.state_dir / "registry.db", isolation_level=None)) as db:
        db.execute("UPDATE sandboxes SET created_at = created_at - 7200")
    async with Supervisor(settings=settings) as supervisor:
        outcome = await soon(supervisor.get(USER, "api").stop())
        assert outcome.reason == "stopped"
        assert outcome.wall_seconds < 3600


@pytest.mark.parametrize("state", ["backing-off", "crash-looping", "frozen", "restarting"])
async def test_leaving_in_any_state_loses_nothing(settings: Settings, state: str) -> None:
    all_options: dict[str, dict[str, float]] = {
        "backing-off": {"backoff": 1000.0, "backoff_max": 1000.0},
        "crash-looping": {"max_restarts": 0},
        "frozen": {},
        "restarting": {"backoff": 0.0, "max_restarts": 100_000},
    }
    options = all_options[state]
    command = COUNTED + ("sleep 1000" if state == "frozen" else "exit 1")
    async with Supervisor(settings=replace(settings, on_exit="leave")) as supervisor:
        sandbox = await supervisor.start(spec(command, restart=policy("on-failure", **options)))
        if state == "frozen":
            await line_of(sandbox, "run 1")
            await sandbox.freeze()
        elif state == "restarting":
            await line_of(sandbox, "run 5")
        else:
            await state_of(sandbox, State(state))
        count = len(await lines(sandbox))
    async with Supervisor(settings=settings) as supervisor:
        successor = supervisor.get(USER, "api")
        if state == "frozen":
            assert successor.state is State.FROZEN
            await successor.thaw()
        elif state == "backing-off":
            await soon(successor.restart())
        else:
            await eventually(lambda: successor.restarts or successor.state is State.CRASH_LOOPING)
        await soon(successor.stop(grace=1))
        records = [record.line async for record in supervisor.logs(USER, "api")]
    numbers = [int(line.split()[1]) for line in records]
    # What a run prints that ends while nobody is there vanishes with its FIFO.
    missing = set(range(1, numbers[-1] + 1)) - set(numbers)
    assert numbers == sorted(set(numbers))
    assert len(missing) <= (state == "restarting")
    assert len(records) >= count
    assert not leftovers(settings)


async def test_hastened_all_grace_is_over(settings: Settings) -> None:
    began = time.monotonic()
    async with Supervisor(settings=replace(settings, stop_grace=1000.0)) as supervisor:
        sandbox = await supervisor.start(spec("trap '' TERM; echo ready; while :; do sleep 1000; done"))
        await line_of(sandbox)
        stopping = asyncio.create_task(sandbox.stop())
        await state_of(sandbox, State.STOPPING)
        supervisor.hasten()
        assert (await soon(stopping)).survivors_killed
        other = await supervisor.start(spec("trap '' TERM; echo ready; while :; do sleep 1000; done"))
        await line_of(other)
        supervisor.hasten()
    assert time.monotonic() - began < 500


async def test_specs_of_an_earlier_version_are_read() -> None:
    text = SandboxSpec(user_id="a", service_id="b", command=["c"]).to_json()
    for name in ("restart", "ready", "alive"):
        assert f'"{name}"' in text
    old = text.split(', "restart"')[0] + "}"
    assert SandboxSpec.from_json(old) == SandboxSpec.from_json(text)


async def test_one_that_is_crash_looping_has_its_name_until_stop_returns(
    supervisor: Supervisor, settings: Settings
) -> None:
    policy = RestartPolicy("on-failure", max_restarts=0)
    sandbox = await supervisor.start(spec("exit 1", restart=policy))
    await soon(sandbox.wait())
    with contextlib.closing(sqlite3.connect(settings.state_dir / "registry.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        stopping = asyncio.create_task(sandbox.stop())
        await eventually(lambda: sandbox.state is State.ENDED)
        assert not stopping.done()
        other.execute("ROLLBACK")
        await soon(stopping)
    # Which would be refused.
    await supervisor.start(spec("exit 1", restart=policy))
