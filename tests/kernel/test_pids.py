"""Limits on tasks: processes and threads count alike, and what is above the limit is refused, not killed."""

from __future__ import annotations

import pytest

from cgroups import Limits
from pactown_runner import Sandbox, Supervisor
from tests.supervising import line_of, python, soon, spec

pytestmark = pytest.mark.kernel

FORK = """
import errno, os, signal, sys
def fork():
    made = 0
    while True:
        try:
            if not os.fork():
                signal.pause()
                os._exit(0)
        except OSError as error:
            print("made", made, errno.errorcode[error.errno], flush=True)
            return
        made += 1
fork()
for line in sys.stdin:
    fork()
"""
THREADS = """
import threading
held, made = threading.Event(), 0
try:
    while True:
        threading.Thread(target=held.wait, daemon=True).start()
        made += 1
except RuntimeError as error:
    print("made", made, error, flush=True)
"""


async def test_forks_above_the_limit_fail_inside(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start(spec(python(FORK), stdin=True, limits=Limits(pids_max=16)))
    assert await line_of(sandbox, "made") == "made 15 EAGAIN"
    outcome = await soon(sandbox.kill())
    assert outcome.stats is not None
    assert (outcome.reason, outcome.stats.pids_peak) == ("stopped", 16)
    assert outcome.stats.pids_events_max


async def test_threads_count_like_processes(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start(spec(python(THREADS), limits=Limits(pids_max=16)))
    assert await line_of(sandbox, "made") == "made 15 can't start new thread"
    outcome = await soon(sandbox.wait())
    assert outcome.ok
    assert outcome.stats is not None
    assert outcome.stats.pids_peak == 16


async def test_a_lower_limit_ends_nothing_and_a_higher_one_lets_it_go_on(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start(spec(python(FORK), stdin=True, limits=Limits(pids_max=16)))
    await line_of(sandbox, "made 15")
    await sandbox.set_limits(Limits(pids_max=4))
    assert await current(sandbox) == 16
    await sandbox.send(b"\n")
    await line_of(sandbox, "made 0 EAGAIN")
    await sandbox.set_limits(Limits(pids_max=24))
    await sandbox.send(b"\n")
    await line_of(sandbox, "made 8 EAGAIN")
    assert await current(sandbox) == 24


async def current(sandbox: Sandbox) -> int | None:
    return (await sandbox.stats()).pids_current
