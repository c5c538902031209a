"""Killing, signalling and freezing: nobody is missed, and no stranger is hit."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress

import pytest

from cgroups import Cgroup, FrozenTimeoutError, NotSupportedError, WaitTimeoutError, processes
from tests.cgroups.conftest import Start

IDLE = "echo ready; read x < /dev/zero"
DOUBLE_FORK = "(setsid sh -c '(setsid sh -c \"echo ready; read x < /dev/zero\") & exit' &) ; read x < /dev/zero"


def readable(fd: int, timeout: float = 10) -> bool:
    """Whether a descriptor becomes readable in time; a process's does so when it ends."""
    return bool(select.select([fd], [], [], timeout)[0])


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is in none of our cgroups."""
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.mark.host
def test_kill_reaches_a_double_forked_session_leader(group: Cgroup, start: Start) -> None:
    process = start(DOUBLE_FORK)
    pidfds = []
    try:
        for pid in group.pids():
            with suppress(ProcessLookupError):  # one of those in between, which ends just now
                pidfds.append(os.pidfd_open(pid))
        assert len(pidfds) >= 2
        group.kill()
        group.wait_empty(10)
        process.wait()
        assert all(readable(pidfd) for pidfd in pidfds)
        assert group.pids() == []
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


@pytest.mark.host
def test_kill_reaches_the_stopped_the_frozen_and_those_below(group: Cgroup, start: Start) -> None:
    with group.child("a.scope", create=True) as child:
        stopped, frozen = start(IDLE), start(IDLE, child)
        os.kill(stopped.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, stopped.pid, os.WSTOPPED)
        child.freeze()
        group.kill()
        group.wait_empty(10)
        assert stopped.wait() == frozen.wait() == -signal.SIGKILL


@pytest.mark.host
def test_a_signal_reaches_every_process_and_no_stranger(
    group: Cgroup, start: Start, stranger: subprocess.Popen[bytes]
) -> None:
    # More than are held at one time.
    crowd = start(f"i=0; while [ $i -lt {processes._BATCH + 20} ]; do sleep 1000 & i=$((i+1)); done; {IDLE}")
    with group.child("a.scope", create=True) as child:
        below = start(IDLE, child)
        everyone = group.pids(recursive=True)
        assert len(everyone) > processes._BATCH + 20
        assert group.signal(signal.SIGTERM) == len(everyone)
        group.wait_empty(10)
        assert crowd.wait() == below.wait() == -signal.SIGTERM
    assert stranger.poll() is None


@pytest.mark.host
def test_a_wrapping_shell_does_not_swallow_the_signal(group: Cgroup, start: Start) -> None:
    shell = start("trap '' TERM; sh -c 'trap - TERM; read x < /dev/zero' & echo ready; wait")
    group.signal(signal.SIGTERM)
    assert shell.poll() is None
    group.kill()


@pytest.mark.host
def test_sigkill_is_the_kernels_own_kill(group: Cgroup, start: Start) -> None:
    process = start("trap '' TERM; " + IDLE)
    assert group.signal(signal.SIGTERM) == 1
    assert group.signal(signal.SIGKILL) == 0
    assert process.wait() == -signal.SIGKILL


@pytest.mark.host
def test_signalling_an_empty_cgroup(group: Cgroup) -> None:
    assert group.signal(signal.SIGTERM) == 0


def test_a_number_that_changed_hands_is_not_signalled(
    fake: Cgroup, stranger: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    procs = fake.path / "cgroup.procs"
    procs.write_text(f"{stranger.pid}\n")
    real = os.pidfd_open

    def pidfd_open(pid: int) -> int:
        # Between our look and this call, ours ended and the number went to a stranger.
        procs.write_text("")
        return real(pid)

    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    assert fake.signal(signal.SIGKILL + 6) == 0
    assert stranger.poll() is None
    # The honest case beside it: still listed, so it gets the signal.
    monkeypatch.undo()
    procs.write_text(f"{stranger.pid}\n")
    assert fake.signal(signal.SIGTERM) == 1
    assert stranger.wait() == -signal.SIGTERM


def test_processes_that_keep_appearing_do_not_keep_us(fake: Cgroup, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter(range(2**22 + 1, 2**23))  # above the highest pid there can be
    monkeypatch.setattr(processes, "list_pids", lambda fd, recursive: [next(looks)])
    with pytest.raises(WaitTimeoutError, match="new processes keep appearing"):
        fake.signal(signal.SIGTERM)


def test_a_process_outside_our_pid_namespace_cannot_be_signalled(fake: Cgroup) -> None:
    (fake.path / "cgroup.procs").write_text("0\n")
    with pytest.raises(NotSupportedError, match="outside our pid namespace"):
        fake.signal(signal.SIGTERM)


@pytest.mark.host
def test_freezing_waits_until_everything_stands_still(group: Cgroup, start: Start) -> None:
    # So many that it takes its time: without waiting, the first look would find them on their way.
    start(f"i=0; while [ $i -lt 100 ]; do sleep 1000 & i=$((i+1)); done; {IDLE}")
    for _ in range(5):
        group.freeze()
        assert group.frozen()
        group.thaw()
        assert not group.frozen()


@pytest.mark.host
def test_a_frozen_process_acts_on_a_signal_once_it_is_thawed(group: Cgroup, start: Start) -> None:
    process = start("trap 'echo term; exit 7' TERM; echo ready; while :; do :; done")
    assert process.stdout is not None
    group.freeze()
    assert group.signal(signal.SIGTERM) == 1
    group.freeze()
    assert not readable(process.stdout.fileno(), 0)
    group.thaw()
    assert process.stdout.readline() == b"term\n"
    assert process.wait(10) == 7


@pytest.mark.host
def test_freezing_again_or_an_empty_cgroup(group: Cgroup) -> None:
    for _ in range(2):
        group.freeze()
        assert group.frozen()
    for _ in range(2):
        group.thaw()
        assert not group.frozen()


@pytest.mark.host
def test_thawing_below_a_frozen_cgroup_times_out(group: Cgroup, start: Start) -> None:
    with group.child("a.scope", create=True) as child:
        start(IDLE, child)
        group.freeze()
        with pytest.raises(FrozenTimeoutError, match="thaw the cgroups above it first"):
            child.thaw(0.01)
        group.thaw()
        assert not child.frozen()


@pytest.mark.host
def test_waiting_for_the_end_times_out(group: Cgroup, start: Start) -> None:
    process = start(IDLE)
    with pytest.raises(WaitTimeoutError, match=r"still has processes after 0\.01 s \(kill it\)"):
        group.wait_empty(0.01)
    group.kill()
    process.wait()
    group.wait_empty(10)
    group.wait_empty(0)


@pytest.mark.host
def test_tracers_are_killed_only_within(group: Cgroup, start: Start) -> None:
    """Else the one that is killed would wait for its tracer's word for ever."""
    with group.child("traced.scope", create=True) as traced, group.child("tracer.scope", create=True) as tracer:
        victim = start(IDLE, traced)
        code = (
            "import ctypes, time; libc = ctypes.CDLL(None); libc.ptrace.argtypes = [ctypes.c_long] * 4;"
            f"assert libc.ptrace(0x4206, {victim.pid}, 0, 0x40) == 0; print(str(), flush=True); time.sleep(1000)"
        )
        holder = start(f"echo ready; exec /usr/bin/python3 -c '{code}'", tracer)
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        traced.kill()
        with pytest.raises(WaitTimeoutError):
            traced.wait_empty(0.2)
        assert traced.kill_tracers(traced) == 0
        with pytest.raises(WaitTimeoutError):
            traced.wait_empty(0.1)
        assert traced.kill_tracers(group) == 1
        traced.wait_empty(10)
        assert victim.wait() == holder.wait() == -signal.SIGKILL
