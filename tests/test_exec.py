"""A further program in a running sandbox: where it is, what it has, how it is fed, heard, waited for and ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from cgroups import GoneError
from pactown_runner import Sandbox, Settings, State, Supervisor, execution, program
from pactown_runner.errors import RunnerError, SpecError, StartError, StateError
from pactown_runner.execution import Execution, execute
from pactown_runner.host import LoopHost
from pactown_runner.launcher import call as launcher_call
from pactown_runner.launcher import launch_async, launcher_path
from pactown_runner.outcomes import ExitStatus
from pactown_runner.programs import launch_spec
from pactown_runner.trees import slice_name
from tests.supervising import (
    eventually,
    leaves_nothing,
    line_of,
    processes_of,
    python,
    soon,
    spec,
)

pytestmark = pytest.mark.host
each_loop = pytest.mark.each_loop
WELL = ExitStatus(exit_code=0)
KILLED = ExitStatus(signal=signal.SIGKILL)


def host_of(supervisor: Supervisor) -> LoopHost:
    assert supervisor._host is not None
    return supervisor._host


def executing(
    supervisor: Supervisor, sandbox: Sandbox, argv: str | list[str], **options: Any
) -> asyncio.Task[Execution]:
    """Execute in a sandbox that is found as anybody finds it: by its name, and by the number of its first process."""
    host = host_of(supervisor)

    async def work() -> Execution:
        first = os.pidfd_open(sandbox.pid)
        try:
            with host.tree.open_scope(slice_name(sandbox.user.key), f"{sandbox.service_id}.scope") as cgroup:
                return await execute(host, sandbox.user, sandbox.spec, cgroup, argv, first=first, **options)
        finally:
            os.close(first)

    return asyncio.ensure_future(work())


async def exec_in(supervisor: Supervisor, sandbox: Sandbox, argv: str | list[str], **options: Any) -> Execution:
    return await soon(executing(supervisor, sandbox, argv, **options))


async def output_of(supervisor: Supervisor, sandbox: Sandbox, argv: str | list[str], **options: Any) -> str:
    """What a program prints that ends well and complains of nothing."""
    done = await soon((await exec_in(supervisor, sandbox, argv, **options)).communicate())
    assert (done.status, done.stderr, done.dropped) == (WELL, b"", 0)
    return done.stdout.decode()


@pytest.fixture
async def api(supervisor: Supervisor) -> AsyncIterator[Sandbox]:
    """A service that is only there."""
    sandbox = await supervisor.start(spec(["cat"], stdin=True, env={"A": "of the service", "B": "b"}))
    await sandbox.send(b"ready\n")
    await line_of(sandbox)
    yield sandbox
    await soon(sandbox.kill())


def pids_of(supervisor: Supervisor, sandbox: Sandbox) -> list[int]:
    tree = host_of(supervisor).tree
    with tree.open_scope(slice_name(sandbox.user.key), f"{sandbox.service_id}.scope") as cgroup:
        return cgroup.pids()


async def first_words(execution: Execution, wanted: bytes = b"ready\n") -> None:
    words = b""
    while not words.endswith(wanted):
        words += await soon(execution.stdout.receive())


# ---- Where it is, and what it has

STATUS = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Umask", "SigIgn")


def status_of(pid: int) -> dict[str, str]:
    lines = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: value.strip() for name, _, value in lines}


def kernel_view(pid: int) -> dict[str, Any]:
    """What the kernel says of a process, as far as it bears on what it may do."""
    status = status_of(pid)
    return {
        **{name: status[name] for name in STATUS},
        "cgroup": Path(f"/proc/{pid}/cgroup").read_text(),
        "namespaces": {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in os.listdir(f"/proc/{pid}/ns")},
        "descriptors": sorted(os.listdir(f"/proc/{pid}/fd")),
        "limits": Path(f"/proc/{pid}/limits").read_text(),
        "oom_score_adj": Path(f"/proc/{pid}/oom_score_adj").read_text(),
        "directory": os.readlink(f"/proc/{pid}/cwd"),
        "priority": os.getpriority(os.PRIO_PROCESS, pid),
    }


@each_loop
async def test_the_kernel_tells_it_from_the_service_by_its_pid_alone(supervisor: Supervisor, api: Sandbox) -> None:
    async with await exec_in(supervisor, api, ["cat"], stdin=True) as execution:
        pid = execution.pid
        # It answers: its loader, which opens files, has done its work.
        await execution.send(b"ready\n")
        await first_words(execution)
        assert kernel_view(pid) == kernel_view(api.pid)
        place = Path(f"/proc/{pid}/cgroup").read_text().splitlines()[-1]
        assert place.endswith(f"/{slice_name(api.user.key)}/api.scope")
        assert status_of(pid)["Uid"].split() == [str(api.user.linux_uid)] * 4
        assert os.getsid(pid) == os.getpgid(pid) == pid
        assert status_of(pid)["PPid"] == str(os.getpid())
        assert execution.isolation.placement in ("born", "joined")
    assert not Path(f"/proc/{pid}").exists()
    assert api.state is State.RUNNING


async def test_its_environment_is_the_services_and_what_is_given(supervisor: Supervisor, api: Sandbox) -> None:
    env = (await output_of(supervisor, api, ["env"], env={"B": "of the call", "C": "c"})).splitlines()
    assert {"A=of the service", "B=of the call", "C=c", f"HOME={api.user.home_dir}"} <= set(env)
    assert len(env) == 9


async def test_it_runs_in_the_services_directory(supervisor: Supervisor, api: Sandbox) -> None:
    directory = api.user.home_dir / "sandboxes/api"
    assert await output_of(supervisor, api, "mkdir sub; pwd") == f"{directory}\n"
    assert await output_of(supervisor, api, ["pwd"], cwd="sub") == f"{directory}/sub\n"
    assert await output_of(supervisor, api, ["pwd"], cwd="/usr") == "/usr\n"


@pytest.mark.parametrize("namespaces", [{"net"}, {"ipc", "uts"}, {"ipc", "net", "uts"}])
async def test_it_joins_the_namespaces_of_its_sandbox(supervisor: Supervisor, namespaces: set[str]) -> None:
    api = await supervisor.start(spec(["sleep", "1000"], namespaces=namespaces))
    async with await exec_in(supervisor, api, ["sleep", "1000"]) as execution:
        theirs, own = (kernel_view(pid)["namespaces"] for pid in (execution.pid, os.getpid()))
        assert theirs == kernel_view(api.pid)["namespaces"]
        assert {name for name in own if own[name] != theirs[name]} == namespaces
        assert set(execution.isolation.namespaces) == namespaces


async def test_a_sandbox_whose_first_process_nobody_knows(supervisor: Supervisor, api: Sandbox) -> None:
    host = host_of(supervisor)
    with host.tree.open_scope(slice_name(api.user.key), "api.scope") as cgroup:
        with pytest.raises(StateError, match="nobody knows the first process"):
            await execute(host, api.user, api.spec, cgroup, ["id"], first=None)
        with ended_child() as pidfd, pytest.raises(StateError, match="has ended"):
            await execute(host, api.user, api.spec, cgroup, ["id"], first=pidfd)


async def test_what_it_was_called_with_may_be_closed_at_once(supervisor: Supervisor, api: Sandbox) -> None:
    """And the numbers stand for something else."""
    host = host_of(supervisor)
    first = os.pidfd_open(api.pid)
    with host.tree.open_scope(slice_name(api.user.key), "api.scope") as cgroup:
        task = asyncio.ensure_future(execute(host, api.user, api.spec, cgroup, ["sleep", "1000"], first=first))
        await asyncio.sleep(0)
        number = cgroup.fd
    os.close(first)
    others = opened_as(first, number)
    async with await soon(task) as execution:
        assert execution.pid in pids_of(supervisor, api)
    for fd in others:
        os.close(fd)


def opened_as(*numbers: int) -> list[int]:
    """Open files until these numbers stand for them: a supervisor's threads take and leave numbers, too."""
    opened: list[int] = []
    while not set(numbers) <= set(opened):
        opened.append(os.open("/", os.O_RDONLY))
        if opened[-1] > max(numbers):
            time.sleep(0.001)  # the loop gets no turn
    return opened


@contextlib.contextmanager
def ended_child() -> Iterator[int]:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    pidfd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    yield pidfd
    os.close(pidfd)


# ---- Fed and heard


@each_loop
async def test_input_goes_in_and_both_outputs_come_out(
    supervisor: Supervisor, api: Sandbox, settings: Settings
) -> None:
    data = os.urandom(1 << 20)
    with leaves_nothing(settings):
        # `/dev/stdin` and the like are opened anew, which takes the right to do so.
        execution = await exec_in(supervisor, api, "tee /dev/stderr </dev/stdin >/dev/stdout", stdin=data)
        done = await soon(execution.communicate(limit=1 << 21))
        assert (done.status, done.stdout == data, done.stderr == data) == (WELL, True, True)
        execution = await exec_in(supervisor, api, ["wc", "-c"], stdin=True)
        assert (await soon(execution.communicate(data))).stdout == b"1048576\n"
        execution = await exec_in(supervisor, api, ["cat"])
        assert (await soon(execution.communicate())).stdout == b""


@each_loop
async def test_one_can_talk_to_it(supervisor: Supervisor, api: Sandbox) -> None:
    execution = await exec_in(supervisor, api, ["cat"], stdin=True)
    for word in (b"one", b"two"):
        await soon(execution.send(word))
        assert await soon(execution.stdout.receive()) == word
    execution.close_stdin()
    execution.close_stdin()
    with pytest.raises(StateError, match="no open standard input"):
        await execution.send(b"more")
    assert await soon(execution.wait()) == WELL
    with pytest.raises(anyio.EndOfStream):
        await execution.stdout.receive()


@each_loop
async def test_what_it_does_not_read_holds_up_nobody(supervisor: Supervisor, api: Sandbox) -> None:
    data = bytes(1 << 20)
    assert (await soon((await exec_in(supervisor, api, ["true"], stdin=data)).communicate())).status == WELL
    for close in ("", "exec <&-; "):
        execution = await exec_in(supervisor, api, close + "echo ready; exec sleep 1000", stdin=True)
        await first_words(execution)
        # They wait for one another, and both for the program.
        sending = [asyncio.create_task(execution.send(data)) for _ in range(2)]
        await asyncio.sleep(0)
        await soon(execution.kill())
        assert {type(error) for error in await soon(asyncio.gather(*sending, return_exceptions=True))} == {StateError}


async def test_input_without_a_pipe_for_it(supervisor: Supervisor, api: Sandbox) -> None:
    for stdin in (None, b"", b"given"):
        async with await exec_in(supervisor, api, ["sleep", "1000"], stdin=stdin) as execution:
            for sending in (execution.send(b"x"), execution.communicate(b"x")):
                with pytest.raises(StateError, match="stdin=True"):
                    await sending


async def test_nothing_is_read_ahead(supervisor: Supervisor, api: Sandbox) -> None:
    """What nobody reads is in the kernel, and makes the program wait."""
    source = """
import os
os.set_blocking(1, False)
written = 0
try:
    while True:
        written += os.write(1, bytes(4096))
except BlockingIOError:
    os.write(2, b"%d" % written)
"""
    execution = await exec_in(supervisor, api, python(source))
    assert await soon(execution.stderr.receive()) == b"65536"
    assert await soon(execution.wait()) == WELL
    assert len(b"".join([chunk async for chunk in execution.stdout])) == 65536


@each_loop
async def test_a_flood_is_counted(supervisor: Supervisor, api: Sandbox) -> None:
    size = 64 << 20
    execution = await exec_in(supervisor, api, ["head", "-c", str(size), "/dev/zero"])
    done = await soon(execution.communicate(limit=1000))
    assert (done.status, done.stdout, done.dropped) == (WELL, bytes(1000), size - 1000)


@each_loop
async def test_a_reader_leaves_others_their_turn(supervisor: Supervisor, api: Sandbox) -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with await exec_in(supervisor, api, "head -c 65536 /dev/zero; echo ready >&2; exec sleep 1000") as execution:
        assert await soon(execution.stderr.receive()) == b"ready\n"
        beside = asyncio.create_task(others())
        for _ in range(1024):
            assert len(await execution.stdout.receive(64)) == 64
        beside.cancel()
        assert turns >= 1024


@each_loop
async def test_a_stream_is_one_readers(supervisor: Supervisor, api: Sandbox) -> None:
    async with await exec_in(supervisor, api, ["cat"], stdin=True) as execution:
        reading = asyncio.create_task(execution.stdout.receive())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(anyio.BusyResourceError):
            await execution.stdout.receive()
        reading.cancel()
        await asyncio.wait([reading])
        await execution.send(b"x")
        assert await soon(execution.stdout.receive()) == b"x"
        reading = asyncio.create_task(execution.stdout.receive())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await execution.stdout.aclose()
        await execution.stdout.aclose()
        with pytest.raises(anyio.ClosedResourceError):
            await soon(reading)


async def test_whoever_closes_an_output_has_the_program_told(supervisor: Supervisor, api: Sandbox) -> None:
    execution = await exec_in(supervisor, api, ["yes"])
    assert (await soon(execution.stdout.receive(2))) == b"y\n"
    await execution.stdout.aclose()
    assert await soon(execution.wait()) == ExitStatus(signal=signal.SIGPIPE)


# ---- Its end


@each_loop
@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("exit 0", WELL),
        ("exit 42", ExitStatus(exit_code=42)),
        ("kill -SEGV $$", ExitStatus(signal=signal.SIGSEGV)),
    ],
)
async def test_how_it_ended(supervisor: Supervisor, api: Sandbox, command: str, status: ExitStatus) -> None:
    execution = await exec_in(supervisor, api, command)
    assert await soon(execution.wait()) == status
    assert await soon(execution.kill()) == await soon(execution.wait()) == status


@each_loop
@pytest.mark.parametrize("descendant", ["sleep 1000", "yes"])
async def test_its_end_is_its_own_and_not_its_descendants(
    supervisor: Supervisor, api: Sandbox, settings: Settings, descendant: str
) -> None:
    """They hold its pipes, and one never stops writing."""
    with leaves_nothing(settings):
        execution = await exec_in(supervisor, api, f"echo ready; {descendant} & exit 3", stdin=True)
        done = await soon(execution.communicate(limit=6))
        assert (done.status, done.stdout) == (ExitStatus(exit_code=3), b"ready\n")


FAMILY = """
import os, time
for leaves in (False, True):
    if not os.fork():
        if os.fork():
            os._exit(0)
        if leaves:
            os.setsid()
        os.write(1, b"%d " % os.getpid())
        time.sleep(1000)
while True:
    time.sleep(1000)
"""
"""Two orphans, of which one has left the session."""


@each_loop
@pytest.mark.parametrize("end", ["kill", "time-out", "block"])
async def test_its_group_ends_with_it_and_what_has_left_that_with_the_sandbox(
    supervisor: Supervisor, api: Sandbox, end: str
) -> None:
    execution = await exec_in(supervisor, api, python(FAMILY))
    said = ""
    while len(said.split()) < 2 or not said.endswith(" "):
        said += (await soon(execution.stdout.receive())).decode()
    match end:
        case "kill":
            assert await soon(execution.kill()) == KILLED
        case "time-out":
            with anyio.move_on_after(0.01):
                await execution.communicate()
        case "block":
            async with execution:
                pass
    await eventually(lambda: len(pids_of(supervisor, api)) == 2)
    (left,) = set(pids_of(supervisor, api)) - {api.pid}
    assert str(left) in said.split()
    assert os.getsid(left) == left
    await soon(api.kill())
    assert processes_of(api.user.linux_uid) == {}


async def test_what_it_leaves_behind_stays_when_it_ends_by_itself(supervisor: Supervisor, api: Sandbox) -> None:
    async with await exec_in(supervisor, api, "sleep 1000 & echo $!") as execution:
        left = int(await soon(execution.stdout.receive()))
        assert await soon(execution.wait()) == WELL
    assert set(pids_of(supervisor, api)) == {api.pid, left}


@each_loop
async def test_output_can_be_read_after_its_end(supervisor: Supervisor, api: Sandbox, settings: Settings) -> None:
    with leaves_nothing(settings):
        execution = await exec_in(supervisor, api, "head -c 50000 /dev/zero; echo oops >&2")
        assert await soon(execution.wait()) == WELL
        # Nothing of it is open any more, whether somebody reads it or not.
    assert [len(chunk) async for chunk in execution.stdout] == [50000]
    assert await execution.stderr.receive(2) == b"oo"
    assert await execution.stderr.receive() == b"ps\n"
    with pytest.raises(anyio.EndOfStream):
        await execution.stderr.receive()


@each_loop
async def test_the_sandboxes_end_is_its_end(supervisor: Supervisor, settings: Settings) -> None:
    with leaves_nothing(settings):
        api = await supervisor.start(spec(["sleep", "1000"]))
        execution = await exec_in(supervisor, api, "echo ready; exec sleep 1000", stdin=True)
        await first_words(execution)
        collecting = asyncio.create_task(execution.communicate())
        await soon(api.kill())
        assert (await soon(collecting)).status == KILLED


POLITE = """
import os, signal
def end(*_):
    os.write(1, b"termed\\n")
    os._exit(5)
signal.signal(signal.SIGTERM, end)
os.write(1, b"ready\\n")
while True:
    signal.pause()
"""


async def test_it_is_asked_to_end_with_the_sandbox(supervisor: Supervisor, api: Sandbox) -> None:
    execution = await exec_in(supervisor, api, python(POLITE))
    await first_words(execution)
    stopping = asyncio.create_task(api.stop())
    done = await soon(execution.communicate())
    assert (done.status, done.stdout) == (ExitStatus(exit_code=5), b"termed\n")
    await soon(stopping)


async def _in_block(execution: Execution) -> None:
    async with execution:
        await execution.stdout.receive()


@each_loop
@pytest.mark.parametrize("call", [Execution.wait, Execution.communicate, _in_block])
async def test_a_cancelled_caller_ends_it(
    supervisor: Supervisor, api: Sandbox, settings: Settings, call: Callable[[Execution], Coroutine[Any, Any, Any]]
) -> None:
    with leaves_nothing(settings):
        execution = await exec_in(supervisor, api, "trap '' TERM; sleep 1000 & echo ready; wait; sleep 1000")
        await first_words(execution)
        caller = asyncio.create_task(call(execution))
        for _ in range(5):
            await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await soon(caller)
        assert not Path(f"/proc/{execution.pid}").exists()
        assert await soon(execution.wait()) == KILLED
    assert api.state is State.RUNNING


async def test_a_timeout_is_a_cancelled_caller(supervisor: Supervisor, api: Sandbox) -> None:
    execution = await exec_in(supervisor, api, ["sleep", "1000"])
    with anyio.move_on_after(0.01):
        await execution.communicate()
    assert not Path(f"/proc/{execution.pid}").exists()


@each_loop
async def test_cancelled_at_any_turn_of_the_loop_nothing_is_left(
    supervisor: Supervisor, api: Sandbox, settings: Settings
) -> None:
    finished = 0
    with leaves_nothing(settings):
        for turns in [*range(12), *range(12, 400, 20)]:
            task = executing(supervisor, api, ["sleep", "1000"], stdin=b"x")
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            try:
                execution = await soon(task)
            except asyncio.CancelledError:
                pass
            else:
                finished += 1
                await soon(execution.kill())
            assert pids_of(supervisor, api) == [api.pid]
    assert finished < 32


def test_the_loops_end_is_its_end(settings: Settings) -> None:
    """Even if nothing of it has had its turn yet."""
    pids = []

    async def main() -> None:
        async with Supervisor(settings=settings) as supervisor:
            api = await supervisor.start(spec(["sleep", "1000"]))
            for turns in (0, 1, 5):
                pids.append((await exec_in(supervisor, api, ["sleep", "1000"], stdin=bytes(1 << 20))).pid)
                for _ in range(turns):
                    await asyncio.sleep(0)
            for task in asyncio.all_tasks():
                if task.get_name().startswith("pactown-exec"):
                    task.cancel()
            await eventually(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids))

    with leaves_nothing(settings):
        asyncio.run(main())


@each_loop
async def test_many_at_once(supervisor: Supervisor, api: Sandbox, settings: Settings) -> None:
    with leaves_nothing(settings):
        made = await asyncio.gather(*(exec_in(supervisor, api, ["cat"], stdin=b"%d" % n) for n in range(20)))
        done = await soon(asyncio.gather(*(execution.communicate() for execution in made)))
        assert [one.stdout for one in done] == [b"%d" % n for n in range(20)]


async def test_a_scope_is_opened_for_its_own_run_alone(supervisor: Supervisor, api: Sandbox) -> None:
    tree, key = host_of(supervisor).tree, api.user.key
    with tree.open_run(key, "api", api.run_id) as cgroup:
        assert cgroup.pids() == [api.pid]
    for name, run_id in (("api", "another"), ("another", api.run_id)):
        with pytest.raises(GoneError):
            tree.open_run(key, name, run_id)


# ---- Where it is refused


@pytest.mark.parametrize(
    ("argv", "options", "error", "told"),
    [
        (["no-such"], {}, StartError, "no such file in PATH"),
        (["id"], {"cwd": "nowhere"}, StartError, "cannot enter directory 'nowhere'"),
        (["id"], {"env": {"A=B": "c"}}, SpecError, "environment name"),
        ([], {}, SpecError, "command is empty"),
        (["a\0b"], {}, SpecError, "NUL"),
    ],
)
async def test_what_cannot_be_executed(
    supervisor: Supervisor,
    api: Sandbox,
    settings: Settings,
    argv: list[str],
    options: dict[str, Any],
    error: type[RunnerError],
    told: str,
) -> None:
    with leaves_nothing(settings), pytest.raises(error, match=told):
        await exec_in(supervisor, api, argv, stdin=True, **options)
    assert pids_of(supervisor, api) == [api.pid]


async def test_in_one_that_has_ended(supervisor: Supervisor, settings: Settings) -> None:
    api = await supervisor.start(spec(["sleep", "1000"]))
    host = host_of(supervisor)
    first = os.pidfd_open(api.pid)
    with host.tree.open_scope(slice_name(api.user.key), "api.scope") as cgroup:
        await soon(api.kill())
        with leaves_nothing(settings), pytest.raises(StateError, match="'api' has ended"):
            await execute(host, api.user, api.spec, cgroup, ["id"], first=first)
    os.close(first)


async def test_in_one_that_is_frozen(supervisor: Supervisor, api: Sandbox, settings: Settings) -> None:
    execution = await exec_in(supervisor, api, ["sleep", "1000"])
    await soon(api.freeze())
    with leaves_nothing(settings), pytest.raises(StateError, match="'api' is frozen") as caught:
        await exec_in(supervisor, api, ["id"])
    assert caught.value.remedy == "thaw it first"
    # What was there before is frozen with it, and can be killed.
    assert await soon(execution.kill()) == KILLED
    await soon(api.thaw())
    assert "uid=" in await output_of(supervisor, api, ["id"])


async def test_one_that_is_frozen_meanwhile(
    supervisor: Supervisor, api: Sandbox, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is born in a frozen cgroup freezes itself: until it is thawed, or the time is up."""
    monkeypatch.setattr(program, "START_TIMEOUT", 0.5)
    with leaves_nothing(settings), late_launcher(settings, monkeypatch) as begin:
        task = executing(supervisor, api, ["id"])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await soon(api.freeze())
        begin.touch()
        with pytest.raises(StateError, match="'api' is frozen"):
            await soon(task)
        await soon(api.thaw())
        assert pids_of(supervisor, api) == [api.pid]


@contextlib.contextmanager
def late_launcher(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The launcher, on a machine that is so busy that it does not begin before there is a file of this path."""
    late, begin = settings.users_base / "late", settings.users_base / "begin"
    late.write_text(f'#!/bin/sh\nuntil [ -e {begin} ]; do /bin/sleep 0.01; done\nexec {launcher_path()} "$@"\n')
    late.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setattr(launcher_call, "_BINARY", late)
        yield begin


async def test_one_whose_end_has_been_seen_meanwhile_keeps_nothing(
    supervisor: Supervisor, api: Sandbox, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever ends a sandbox looks for the last time, and only then something is born in it."""
    host, user = host_of(supervisor), api.user
    with leaves_nothing(settings), host.tree.scope(user.key, "other", "a-run") as cgroup:
        told = launch_spec(spec(["sleep", "1000"], service="other"), user)
        first = await launch_async(told, cgroup.fd)
        with late_launcher(settings, monkeypatch) as begin:
            starting = execute(host, user, api.spec, cgroup, "sleep 1000 & sleep 1000", first=first.pidfd, stdin=b"x")
            task = asyncio.ensure_future(starting)
            await asyncio.sleep(0)
            # Not by `cgroup.kill`: Linux 6.18 kills at once what is born in a cgroup that ever was killed so.
            signal.pidfd_send_signal(first.pidfd, signal.SIGKILL)
            await eventually(lambda: not cgroup.populated())
            begin.touch()
            with pytest.raises(StateError, match="'api' has ended"):
                await soon(task)
        await eventually(lambda: not cgroup.populated())
        cgroup.remove()
        os.waitid(os.P_PIDFD, first.pidfd, os.WEXITED)
        os.close(first.pidfd)


async def test_one_that_is_removed_meanwhile(
    supervisor: Supervisor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with leaves_nothing(settings), late_launcher(settings, monkeypatch) as begin:
        begin.touch()
        api = await supervisor.start(spec(["sleep", "1000"]))
        begin.unlink()
        task = executing(supervisor, api, ["id"])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await soon(api.kill())
        begin.touch()
        with pytest.raises(StateError, match="'api' has ended"):
            await soon(task)


async def test_out_of_descriptors_nothing_is_left(supervisor: Supervisor, api: Sandbox, settings: Settings) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reached: set[str] = set()
    host = host_of(supervisor)
    first = os.pidfd_open(api.pid)
    with host.tree.open_scope(slice_name(api.user.key), "api.scope") as cgroup, leaves_nothing(settings):
        for room in range(24):
            used = max(int(name) for name in os.listdir("/proc/self/fd"))
            fill = [os.dup(0) for _ in range(used + 1 - len(os.listdir("/proc/self/fd")))]
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(fill, default=used) + 1 + room, hard))
            try:
                execution = await execute(host, api.user, api.spec, cgroup, ["sleep", "1000"], first=first, stdin=True)
                reached.add("executed")
                await soon(execution.kill())
            except StartError as error:
                reached.add(error.step)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                for fd in fill:
                    os.close(fd)
            assert pids_of(supervisor, api) == [api.pid]
    os.close(first)
    assert reached >= {"resources", "launcher", "executed"}


# ---- A tenant's attacks on it

STOPPER = """
import os, signal
os.mkdir("d")
os.symlink("d", "maze0")
for n in range(30):
    os.symlink("d/../" * 800 + f"maze{n}", f"maze{n + 1}")
print("ready", flush=True)
while True:
    try:
        os.kill(-1, signal.SIGSTOP)
    except ProcessLookupError:
        pass
"""
"""Stops all else of its uid, as fast as it can; and whoever enters `maze30` is on the way for milliseconds."""

HUNTER = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long] * 4
print("ready", flush=True)
seen = {{os.getpid()}}
while True:
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) in seen:
            continue
        try:
            if os.stat("/proc/" + name).st_uid == os.getuid() and libc.ptrace(0x4206, int(name), 0, {options}) == 0:
                seen.add(int(name))
        except OSError:
            pass
"""
"""Traces whatever else of its uid appears, and never asks how it is."""

TRACE_EXIT = 0x40
"""PTRACE_O_TRACEEXIT: what is about to end waits for its tracer's word."""


def traced(pid: int) -> bool:
    return status_of(pid)["TracerPid"] != "0"


@each_loop
async def test_stopped_before_it_could_be_executed(
    supervisor: Supervisor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "START_TIMEOUT", 0.2)
    stopper = await supervisor.start(spec(python(STOPPER)))
    await line_of(stopper)
    steps: list[tuple[str, str]] = []
    with leaves_nothing(settings):
        for _ in range(20):
            if len(steps) == 3:
                break
            try:
                execution = await exec_in(supervisor, stopper, ["true"], stdin=b"x", cwd="maze30")
            except StartError as error:
                steps.append((error.step, error.message))
            else:
                # Stopped as well, or faster than that.
                await soon(execution.kill())
            assert pids_of(supervisor, stopper) == [stopper.pid]
    assert set(steps) == {("launcher", "not executed after 0.2 s")}, "the attack does not work here"
    assert stopper.state is State.RUNNING


@each_loop
async def test_traced_it_ends_and_its_status_is_known(supervisor: Supervisor, settings: Settings) -> None:
    with leaves_nothing(settings):
        hunter = await supervisor.start(spec(python(HUNTER.format(options=0))))
        await line_of(hunter)
        execution = await exec_in(supervisor, hunter, ["cat"], stdin=True)
        await eventually(lambda: traced(execution.pid))
        done = await soon(execution.communicate(b"x"))
        assert (done.status, done.stdout) == (WELL, b"x")
        assert status_of(execution.pid)["State"].startswith("Z"), "the attack does not work here"
        await soon(hunter.kill())
        await eventually(lambda: not Path(f"/proc/{execution.pid}").exists())


@each_loop
async def test_traced_it_may_not_end_and_keeps_nobody(
    supervisor: Supervisor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "KILL_TIMEOUT", 0.5)
    with leaves_nothing(settings):
        hunter = await supervisor.start(spec(python(HUNTER.format(options=TRACE_EXIT))))
        await line_of(hunter)
        held = await exec_in(supervisor, hunter, ["sleep", "1000"], stdin=True)
        await eventually(lambda: traced(held.pid))
        with pytest.raises(StateError, match="was killed, and has not ended") as caught:
            await soon(held.kill())
        assert caught.value.remedy is not None
        assert traced(held.pid), "the attack does not work here"
        for waiting in (held.wait(), held.communicate(), held.kill()):
            with pytest.raises(StateError):
                await soon(waiting)
        # Cancelled, callers are let go as well.
        another = await exec_in(supervisor, hunter, ["sleep", "1000"])
        await eventually(lambda: traced(another.pid))
        with pytest.raises(TimeoutError):
            await soon(asyncio.wait_for(another.communicate(), 0.01))
        await soon(hunter.kill())
        await eventually(lambda: not Path(f"/proc/{held.pid}").exists() and not Path(f"/proc/{another.pid}").exists())


@each_loop
async def test_traced_before_its_start_was_seen(supervisor: Supervisor, settings: Settings) -> None:
    """It has been executed, the loop has not had its turn since, and then the caller goes away."""
    with leaves_nothing(settings):
        hunter = await supervisor.start(spec(python(HUNTER.format(options=TRACE_EXIT))))
        await line_of(hunter)
        task = executing(supervisor, hunter, ["sleep", "1000"])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        pid = 0
        while not (pid and traced(pid)):
            pid = next((pid for pid in pids_of(supervisor, hunter) if pid != hunter.pid), 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await soon(task)
        assert pid in host_of(supervisor).unreaped
        await soon(hunter.kill())
        await eventually(lambda: not Path(f"/proc/{pid}").exists())
