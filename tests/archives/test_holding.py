"""What the tenant's sandboxes are while its home is read or replaced: still, and afterwards what they were."""

from __future__ import annotations

import asyncio
import tarfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from pactown_runner import Sandbox, Settings
from pactown_runner.archives import ArchiveError, export_home, held, import_home
from pactown_runner.errors import StartError, StateError
from pactown_runner.host import Host
from pactown_runner.models import IsolatedUser, State
from pactown_runner.registry import HOLD, HeldError, Standing
from pactown_runner.specs import RestartMode, RestartPolicy
from pactown_runner.supervisor import Supervisor
from tests.archives.trees import as_tenant
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

WRITER = """
number = 0
while True:
    number += 1
    for name in range(400):
        with open("../file%03d" % name, "w") as file:
            file.write(str(number))
    if number == 1:
        print("ready", flush=True)
"""
"""At any moment some files hold a number, and all behind them the one before."""


async def start_writer(supervisor: Supervisor) -> Sandbox:
    sandbox = await supervisor.start(spec(python(WRITER)))
    await line_of(sandbox)
    return sandbox


async def goes_on(user: IsolatedUser, number: int) -> None:
    """Wait until the writer has got further than this."""
    await eventually(lambda: int((user.home_dir / "sandboxes/file399").read_text() or 0) > number + 1)


def is_frozen(sandbox: Sandbox) -> bool:
    assert sandbox.cgroup is not None
    return sandbox.cgroup.frozen()


async def in_thread(call: Callable[[], object]) -> object:
    return await asyncio.to_thread(call)


def numbers_in(archive: Path) -> list[int]:
    found = {}
    with tarfile.open(archive) as tar:
        for info in tar:
            if "/file" in info.name:
                file = tar.extractfile(info)
                assert file is not None
                found[info.name] = int(file.read() or b"-1")
    return [found[name] for name in sorted(found)]


async def test_what_runs_is_frozen_meanwhile(
    supervisor: Supervisor, host: Host, user: IsolatedUser, archive: Path
) -> None:
    sandbox = await start_writer(supervisor)
    for _ in range(5):
        await in_thread(partial(export_home, host, user, archive))
        numbers = [number for number in numbers_in(archive) if number != -1]
        assert len(numbers) >= 399
        # The one that is being written may be empty.
        assert numbers == sorted(numbers, reverse=True)
        assert numbers[0] - numbers[-1] <= 1
        await goes_on(user, numbers[-1])
    assert sandbox.state == State.RUNNING


async def test_what_was_frozen_stays_so(supervisor: Supervisor, host: Host, user: IsolatedUser, archive: Path) -> None:
    sandbox = await start_writer(supervisor)
    await sandbox.freeze()
    await in_thread(partial(export_home, host, user, archive))
    with host.tree.open_scope(f"pactown-{user.key}.slice", "api.scope") as scope:
        assert scope.frozen()
    await sandbox.thaw()


async def test_what_is_to_be_stopped_must_be(
    supervisor: Supervisor, host: Host, user: IsolatedUser, archive: Path
) -> None:
    sandbox = await start_writer(supervisor)
    inode = user.home_dir.stat().st_ino
    with pytest.raises(StateError, match=r"in use: api of user 'auth0\|123456'"):
        await in_thread(partial(export_home, host, user, archive, while_="stopped"))
    await in_thread(partial(export_home, host, user, archive))
    with pytest.raises(StateError, match=r"in use: api of user 'auth0\|123456'"):
        await in_thread(partial(import_home, host, user, archive))
    assert user.home_dir.stat().st_ino == inode
    assert sandbox.state == State.RUNNING
    await sandbox.stop(0)
    await in_thread(partial(export_home, host, user, archive, while_="stopped"))
    await in_thread(partial(import_home, host, user, archive))
    assert user.home_dir.stat().st_ino != inode


@pytest.mark.parametrize("what", ["thaws", "stops"])
async def test_an_export_that_somebody_stirs_is_none(
    supervisor: Supervisor, host: Host, user: IsolatedUser, archive: Path, what: str
) -> None:
    as_tenant(user, 'import os; open("big", "wb").write(os.urandom(4 << 20))')
    sandbox = await start_writer(supervisor)
    loop = asyncio.get_running_loop()
    stirred: list[bool] = []

    async def stir() -> None:
        if what == "stops":
            await sandbox.stop(0)
        else:
            with host.tree.open_scope(f"pactown-{user.key}.slice", "api.scope") as scope:
                scope.thaw()

    def on_progress(done: int, total: int | None) -> None:
        if not stirred:
            asyncio.run_coroutine_threadsafe(stir(), loop).result(20)
            stirred.append(True)

    export = partial(export_home, host, user, archive, progress=on_progress)
    # Perhaps it sees a file change under it before it looks at who ran.
    with pytest.raises((StateError, ArchiveError), match=r"ran or ended meanwhile|while it was read"):
        await in_thread(export)
    assert stirred
    assert not archive.exists()


async def test_one_at_a_time(supervisor: Supervisor, host: Host, user: IsolatedUser, archive: Path) -> None:
    def both() -> None:
        export_home(host, user, archive)
        with held(host, user) as hold:
            assert {row.service_id for row in host.registry.sandboxes.rows()} == {"_hold"}
            for call in (export_home, import_home):
                with pytest.raises(StateError, match="exported or imported"):
                    call(host, user, archive)
            with pytest.raises(StateError, match="something runs for it"):
                host.users.begin_removal(USER)
            hold.must_be_idle()
        import_home(host, user, archive)

    await in_thread(both)


async def test_an_export_that_fails_lets_go(
    supervisor: Supervisor, host: Host, user: IsolatedUser, archive: Path
) -> None:
    await start_writer(supervisor)
    with pytest.raises(ArchiveError):
        await in_thread(partial(export_home, host, user, archive, python=Path("/bin/false")))
    await goes_on(user, int((user.home_dir / "sandboxes/file399").read_text() or 0))


# ---- What is to start meanwhile

SLEEP = ["/bin/sleep", "1000"]
COUNTED = "n=$(cat ../n 2>/dev/null || echo 0); n=$((n+1)); echo $n > ../n; echo run $n; "
"""Each run knows which one it is."""

HOLDER = """
from pactown_runner.archives import held
async def work(supervisor):
    user = await supervisor.users.get_or_create("auth0|123456")
    def hold():
        with held(supervisor._host, user) as hold:
            hold.freeze()
            print("held", flush=True)
            sys.stdin.readline()
    await asyncio.to_thread(hold)
    await say("let go")
    await told()
"""
"""Another process that holds the tenant until it is told."""


def policy(mode: RestartMode, **options: float) -> RestartPolicy:
    return RestartPolicy(mode, **{"backoff": 0.01, "jitter": 0.0, "healthy_after": 1000.0, **options})  # type: ignore[arg-type]


@asynccontextmanager
async def holding(host: Host, user: IsolatedUser) -> AsyncIterator[None]:
    """Hold the tenant within."""
    begun, over = threading.Event(), threading.Event()

    def hold() -> None:
        with held(host, user) as hold:
            hold.freeze()
            begun.set()
            over.wait()

    work = asyncio.create_task(asyncio.to_thread(hold))
    try:
        assert await asyncio.to_thread(begun.wait, PATIENCE)
        yield
    finally:
        over.set()
        await work


async def waits(supervisor: Supervisor, service: str = "api") -> Sandbox:
    """Wait until a sandbox waits to be started, and has looked at least once whether it may."""
    await eventually(lambda: any(sandbox.service_id == service for sandbox in supervisor.list()))
    sandbox = supervisor.get(USER, service)
    first = sandbox.course.attempt._making
    await eventually(lambda: sandbox.course.attempt._making is not first)
    assert sandbox.state is State.STARTING
    return sandbox


@pytest.mark.parametrize("kind", ["service", "registered", "run"])
async def test_a_start_waits(supervisor: Supervisor, host: Host, user: IsolatedUser, kind: str) -> None:
    with leaves_nothing(supervisor.settings):
        async with holding(host, user):
            if kind == "run":
                starting = asyncio.create_task(supervisor.start_run(spec("exec sleep 1000", timeout=0.2)))
            else:
                again = policy("always" if kind == "registered" else "no")
                starting = asyncio.create_task(supervisor.start(spec(SLEEP, restart=again)))
            await waits(supervisor)
            assert not starting.done()
            assert [row.service_id for row in host.registry.sandboxes.rows()] == ["_hold"]
            before = time.monotonic()
        sandbox = await soon(starting)
        if kind == "run":
            outcome = await soon(sandbox.wait())
            # The time that it waited is none of its own.
            assert outcome.reason == "timed-out"
            assert outcome.wall_seconds <= time.monotonic() - before
        else:
            assert sandbox.state is State.RUNNING
            await soon(sandbox.stop(0))


async def test_a_start_that_waits_can_be_stopped(supervisor: Supervisor, host: Host, user: IsolatedUser) -> None:
    async with holding(host, user):
        with leaves_nothing(supervisor.settings):
            starting = asyncio.create_task(supervisor.start(spec(SLEEP, restart=policy("always"))))
            sandbox = await waits(supervisor)
            with pytest.raises(StartError, match="exported or imported"):
                await soon(sandbox.stop())
            with pytest.raises(StartError):
                await soon(starting)
            abandoned = asyncio.create_task(supervisor.start(spec(SLEEP)))
            await waits(supervisor)
            abandoned.cancel()
            with pytest.raises(asyncio.CancelledError):
                await soon(abandoned)
            assert supervisor.list() == []
            run = asyncio.create_task(supervisor.run(spec(SLEEP)))
            sandbox = await waits(supervisor)
            with pytest.raises(StartError):
                await soon(sandbox.kill())
            assert (await soon(run)).reason == "failed-to-start"
    assert host.registry.services.absent() == []


async def test_a_supervisor_that_ends_waits_for_no_hold(settings: Settings, child: Start) -> None:
    async with Supervisor(settings=settings) as supervisor:
        await supervisor.users.get_or_create(USER)
        holder = child(HOLDER, role="one-shot")
        assert await holder.line() == "held"
        starting = asyncio.create_task(supervisor.start(spec(SLEEP)))
        await waits(supervisor)
    with pytest.raises(StartError):
        await soon(starting)
    holder.tell("")
    assert await holder.line() == "let go"
    holder.tell("")
    assert await holder.ended() == 0
    assert leftovers(settings) == []


async def test_one_that_backs_off_while_all_is_frozen_is_started_afterwards(
    supervisor: Supervisor, host: Host, user: IsolatedUser, archive: Path
) -> None:
    as_tenant(user, 'import os; open("big", "wb").write(os.urandom(4 << 20))')
    writer = await start_writer(supervisor)
    failing = await supervisor.start(
        spec(
            COUNTED + "[ $n = 3 ]",
            service="failing",
            restart=policy("on-failure", backoff=3.0, backoff_max=3.0, max_restarts=2),
        )
    )
    await eventually(lambda: failing.state is State.BACKING_OFF)
    due, halfway = failing.course._life.due, threading.Event()

    def on_progress(done: int, total: int | None) -> None:
        # As soon as it was to be started again, and was not.
        assert halfway.wait(PATIENCE)

    export = asyncio.create_task(in_thread(partial(export_home, host, user, archive, progress=on_progress)))
    await eventually(lambda: host.registry.sandboxes.row(user.key, "_hold"))
    await eventually(lambda: failing.state is State.BACKING_OFF and failing.course._life.due > due)
    assert (failing.restarts, failing.outcome) == (0, None)
    halfway.set()
    await soon(export)
    with tarfile.open(archive) as tar:
        file = tar.extractfile(f"{user.linux_username}/sandboxes/n")
        assert file is not None
        assert file.read() == b"1\n"
    # That it was not started meanwhile is none of the failures that it may have.
    assert (await soon(failing.wait())).ok
    assert failing.restarts == 2
    assert await lines(failing) == ["run 1", "run 2", "run 3"]
    assert writer.state is State.RUNNING


@pytest.mark.parametrize("what", ["stop", "restart"])
async def test_one_that_rests_meanwhile_can_be_stopped_or_started_again(
    supervisor: Supervisor, host: Host, user: IsolatedUser, what: str
) -> None:
    failing = await supervisor.start(spec(COUNTED + "[ $n = 2 ]", restart=policy("on-failure", max_restarts=0)))
    await soon(failing.wait())
    assert failing.state is State.CRASH_LOOPING
    async with holding(host, user):
        restarting = asyncio.create_task(failing.restart())
        await eventually(lambda: failing.state is State.BACKING_OFF)
        if what == "stop":
            await soon(failing.stop())
            assert [row.service_id for row in host.registry.sandboxes.rows()] == ["_hold"]
        assert restarting.done() == (what == "stop")
    await asyncio.gather(soon(restarting), return_exceptions=True)
    assert (await soon(failing.wait())).ok == (what == "restart")
    assert failing.restarts == (what == "restart")


async def test_what_runs_can_be_stopped_meanwhile(supervisor: Supervisor, host: Host, user: IsolatedUser) -> None:
    sandbox = await start_writer(supervisor)
    async with holding(host, user):
        assert (await soon(sandbox.stop(5))).reason == "stopped"
        with pytest.raises(HeldError, match="try again"):
            await supervisor.files.put(USER, "api", Path(__file__).parent)
        assert [row.service_id for row in host.registry.sandboxes.rows()] == ["_hold"]


async def test_who_is_blocked_meanwhile_stays_frozen(supervisor: Supervisor, host: Host, user: IsolatedUser) -> None:
    writer = await start_writer(supervisor)
    async with holding(host, user):
        await supervisor.users.set_standing(USER, Standing(blocked=True))
    with host.tree.open_scope(f"pactown-{user.key}.slice", "api.scope") as scope:
        assert scope.frozen()
    async with holding(host, user):
        await supervisor.users.set_standing(USER, Standing())
        assert is_frozen(writer)
    await goes_on(user, int((user.home_dir / "sandboxes/file399").read_text() or 0))


async def test_who_is_blocked_no_more_goes_on_when_the_hold_ends(
    supervisor: Supervisor, host: Host, user: IsolatedUser
) -> None:
    writer = await start_writer(supervisor)
    async with holding(host, user):
        for standing in (Standing(blocked=True), Standing()):
            await supervisor.users.set_standing(USER, standing)
            assert is_frozen(writer)
    await eventually(lambda: not is_frozen(writer))


@pytest.mark.parametrize("end", ["in order", "by its death"])
async def test_what_is_frozen_or_thawed_meanwhile_is_so_afterwards(
    supervisor: Supervisor, host: Host, user: IsolatedUser, child: Start, end: str
) -> None:
    writer = await start_writer(supervisor)
    frozen = await supervisor.start(spec(SLEEP, service="frozen"))
    await frozen.freeze()
    other = await supervisor.start(spec(SLEEP, service="other"))
    holder = child(HOLDER, role="one-shot")
    assert await holder.line() == "held"
    await other.freeze()
    await other.thaw()
    await writer.freeze()
    await frozen.thaw()
    assert [writer.state, frozen.state, other.state] == [State.FROZEN, State.RUNNING, State.RUNNING]
    assert all(map(is_frozen, supervisor.list()))
    if end == "in order":
        holder.tell("")
        assert await holder.line() == "let go"
        holder.tell("")
    else:
        await holder.killed()
        await eventually(lambda: host.registry.sandboxes.row(user.key, HOLD) is None)
    await eventually(lambda: not (is_frozen(frozen) or is_frozen(other)))
    assert is_frozen(writer)
    await writer.thaw()
    await goes_on(user, int((user.home_dir / "sandboxes/file399").read_text() or 0))


async def test_what_is_frozen_as_a_hold_begins_or_ends_stays_so(
    supervisor: Supervisor, host: Host, user: IsolatedUser
) -> None:
    sandbox = await supervisor.start(spec(SLEEP))

    async def freeze(turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        await sandbox.freeze()

    def hold() -> None:
        with held(host, user) as hold:
            hold.freeze()

    for number in range(50):
        await asyncio.gather(freeze(number % 10), asyncio.to_thread(hold))
        assert is_frozen(sandbox)
        await asyncio.gather(sandbox.thaw(), asyncio.to_thread(hold))
        assert sandbox.state is State.RUNNING
        await eventually(lambda: not is_frozen(sandbox))


async def test_services_come_back_when_their_tenant_is_held_no_more(settings: Settings, child: Start) -> None:
    async with Supervisor(settings=settings) as supervisor:
        sandbox = await supervisor.start(spec(COUNTED + "exec sleep 1000", restart=policy("always")))
        await line_of(sandbox, "run 1")
        user = sandbox.user
    holder = child(HOLDER, role="one-shot")
    assert await holder.line() == "held"
    # What was left behind would be written down under the service's name, and has to wait as well.
    spool = settings.log_dir / user.linux_username / ".spool/api.0123456789abcdef.out"
    spool.write_bytes(b"left behind\n")
    async with Supervisor(settings=settings) as supervisor:
        host = supervisor._host
        assert host is not None
        assert list(host.unwritten) == [(user.key, "api", "0123456789abcdef")]
        assert not any(sandbox.state is State.RUNNING for sandbox in supervisor.list())
        holder.tell("")
        assert await holder.line() == "let go"
        await eventually(lambda: supervisor.list() and supervisor.list()[0].state is State.RUNNING)
        back = supervisor.get(USER, "api")
        await line_of(back, "run 2")
        await soon(back.stop(0))
    holder.tell("")
    await holder.ended()
