"""A tenant's debugger on the tenant's own processes: ptrace(2) decides who sees an end, and when it comes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from cgroups import find_mount
from pactown_runner import Sandbox, Settings, Supervisor
from tests.supervising import eventually, leaves_nothing, line_of, processes_of, python, soon, spec

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
