"""A tenant's debugger on the tenant's own processes: ptrace(2) decides who sees an end, and when it comes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from cgroups import find_mount
from pactown_runner import Sandbox, Settings, Supervisor
from pactown_runner.errors import FilesError
from pactown_runner.homes import SandboxFiles
from pactown_runner.tenant_threads import TenantThreads
from tests.supervising import (
    USER,
    Start,
    eventually,
    leaves_nothing,
    leftovers,
    line_of,
    processes_of,
    python,
    soon,
    spec,
    tree,
)

pytestmark = pytest.mark.host

TRACE_EXIT = 0x40
"""PTRACE_O_TRACEEXIT: a process that is about to end waits for its tracer's word."""

_TRACER = """
import ctypes, time
pid = int(open("../api/pid").read())
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long] * 4
seize = 0x4206
print("ready" if libc.ptrace(seize, pid, 0, {options}) == 0 else ctypes.get_errno(), flush=True)
time.sleep(1000)
"""

_EXIT_WHEN_TOLD = """
import os, time
open("pid", "w").write(str(os.getpid()))
print("ready", flush=True)
while not os.path.exists("go"):
    time.sleep(0.01)
os._exit(7)
"""
"""No signal comes to it: what is traced would stop at each."""

_HUNTER = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long] * 4
print("ready", flush=True)
seen = {{os.getpid()}}
while True:
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) in seen:
            continue
        seen.add(int(name))
        try:
            if os.stat("/proc/" + name).st_uid == os.getuid():
                libc.ptrace(0x4206, int(name), 0, {options})
        except OSError:
            pass
"""
"""Traces whatever else of its tenant appears, and never asks how it is."""


async def traced(supervisor: Supervisor, *, options: int) -> tuple[Sandbox, Sandbox]:
    """A sandbox, and one of the same tenant that traces the first one's process and never asks how it is."""
    api = await supervisor.start(spec("echo $$ >pid; echo ready; exec sleep 1000"))
    await line_of(api)
    tracer = await supervisor.start(spec(python(_TRACER.format(options=options)), service="tracer"))
    await line_of(tracer)
    return api, tracer


async def test_a_tracer_that_does_not_wait_keeps_nobody(supervisor: Supervisor, settings: Settings) -> None:
    with leaves_nothing(settings):
        api, tracer = await traced(supervisor, options=0)
        pid = api.pid
        outcome = await soon(api.kill())
        assert (outcome.reason, outcome.signal) == ("stopped", signal.SIGKILL)
        assert ") Z " in Path(f"/proc/{pid}/stat").read_text(), "the attack does not work here"
        assert (await soon(supervisor.run(spec("exit 3")))).exit_code == 3
        await soon(tracer.kill())
        # Now it is ours to reap, which is done in passing.
        await eventually(lambda: not Path(f"/proc/{pid}").exists())


async def test_the_exit_code_of_what_is_traced_is_known(supervisor: Supervisor) -> None:
    api = await supervisor.start(spec(python(_EXIT_WHEN_TOLD)))
    await line_of(api)
    tracer = await supervisor.start(spec(python(_TRACER.format(options=0)), service="tracer"))
    await line_of(tracer)
    await soon(supervisor.run(spec("touch ../api/go", service="go")))
    outcome = await soon(api.wait())
    assert (outcome.reason, outcome.exit_code) == ("exited", 7)


async def test_what_was_taken_out_of_its_cgroup_ends_all_the_same(supervisor: Supervisor, settings: Settings) -> None:
    """An operator, or another manager of cgroups, moved it."""
    with leaves_nothing(settings):
        api = await supervisor.start(spec(["sleep", "1000"]))
        uid, pid = api.user.linux_uid, api.pid
        try:
            (find_mount().path / "cgroup.procs").write_text(str(pid))
            outcome = await soon(api.kill())
            assert (outcome.reason, outcome.signal) == ("stopped", signal.SIGKILL)
            assert processes_of(uid) == {}
        finally:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)


async def test_a_tracer_that_forbids_an_end_ends_itself(supervisor: Supervisor, settings: Settings) -> None:
    with leaves_nothing(settings):
        api, tracer = await traced(supervisor, options=TRACE_EXIT)
        outcome = await soon(api.kill())
        assert (outcome.reason, outcome.signal) == ("stopped", signal.SIGKILL)
        # It was in the way. One that does its work is not, see below.
        assert (await soon(tracer.wait())).signal == signal.SIGKILL


async def test_a_tracer_that_does_its_work_is_left_alone(supervisor: Supervisor) -> None:
    api = await supervisor.start(spec(python(_EXIT_WHEN_TOLD)))
    await line_of(api)
    waits = _TRACER.format(options=TRACE_EXIT).replace(
        "time.sleep(1000)", "import os; os.waitpid(pid, 0); libc.ptrace(7, pid, 0, 0); os.waitpid(pid, 0); input()"
    )
    tracer = await supervisor.start(spec(python(waits), service="tracer", stdin=True))
    await line_of(tracer)
    await soon(api.kill())
    assert tracer.state == "running"


async def test_a_successor_ends_what_a_tracer_holds(
    supervisor: Supervisor, settings: Settings, child: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """The traced one is a one-shot run, to be ended; the tracer a service, to be gone on with."""
    pid_of = """
async def work(supervisor):
    run = await supervisor.start_run(spec("echo $$ >pid; echo ready; exec sleep 1000"))
    async for record in run.logs(follow=True):
        break
    tracer = await supervisor.start(spec(["/usr/bin/python3", "-S", "-E", "-c", TRACER], service="tracer"))
    async for record in tracer.logs(follow=True):
        break
    await say("ready")
    await told()
"""
    process = child(f"TRACER = {_TRACER.format(options=TRACE_EXIT)!r}" + pid_of)
    assert await process.line() == "ready"
    await process.killed()
    # The row goes last.
    await eventually(lambda: not any(what.startswith("row ") and what.endswith("/api") for what in leftovers(settings)))
    assert not any(path.name == "api.scope" for path in tree(settings))
    assert (await soon(supervisor.run(spec("exit 3")))).exit_code == 3


@pytest.mark.parametrize("options", [0, TRACE_EXIT], ids=["zombie", "exit"])
async def test_a_traced_job_keeps_no_thread(supervisor: Supervisor, settings: Settings, options: int) -> None:
    with leaves_nothing(settings):
        hunter = await supervisor.start(spec(python(_HUNTER.format(options=options)), service="hunter"))
        await line_of(hunter)
        host = supervisor.files._host
        threads = TenantThreads()
        files = SandboxFiles(host, threads, job_timeout=1.0)
        try:
            with pytest.raises(FilesError):
                await soon(files.put(USER, "api", b"x" * (64 << 20), "big"))
            await soon(hunter.kill())
            # By the threads that the other had, in as much time as it needs.
            await soon(SandboxFiles(host, threads).put(USER, "api", b"x", "small"))
        finally:
            threads.close()
        await eventually(lambda: not host.unreaped)
