"""From exit status, counters and what was asked to an outcome."""

from __future__ import annotations

from typing import Any

import pytest

from cgroups import Stats
from pactown_runner.errors import StartError
from pactown_runner.outcomes import ExitStatus, failed_to_start, outcome_of

EXIT_0, EXIT_3, KILLED, UNKNOWN = ExitStatus(0), ExitStatus(3), ExitStatus(signal=9), ExitStatus()
CALM = Stats(oom=0, oom_kill=0)
BLIND = Stats()
OWN_LIMIT = Stats(oom=1, oom_kill=1)
OTHER_LIMIT = Stats(oom=0, oom_kill=2)


def outcome(status: ExitStatus, stats: Stats = CALM, asked: Any = None, **options: Any) -> Any:
    given = {"asked": asked, "stats": stats, "tenant_oom": False, "survivors": 0, "wall_seconds": 1.25, **options}
    return outcome_of(status, **given)


@pytest.mark.parametrize(
    ("status", "stats", "asked", "tenant_oom", "reason", "level"),
    [
        (EXIT_0, CALM, None, False, "exited", None),
        (EXIT_0, BLIND, None, False, "exited", None),
        (EXIT_3, CALM, None, True, "exited", None),
        (KILLED, CALM, None, False, "signaled", None),
        (KILLED, BLIND, None, False, "signaled", None),
        (UNKNOWN, CALM, None, False, "lost", None),
        (KILLED, OWN_LIMIT, None, False, "oom-killed", "service"),
        (KILLED, OWN_LIMIT, None, True, "oom-killed", "service"),
        (KILLED, OTHER_LIMIT, None, True, "oom-killed", "tenant"),
        (KILLED, OTHER_LIMIT, None, False, "oom-killed", None),
        # A shell that reports its child's death.
        (ExitStatus(137), OWN_LIMIT, None, False, "oom-killed", "service"),
        (UNKNOWN, OWN_LIMIT, None, False, "oom-killed", "service"),
        # It lost a child and made its way all the same.
        (EXIT_0, OWN_LIMIT, None, False, "exited", "service"),
        # What we did is why it ended, whatever else happened.
        (KILLED, OWN_LIMIT, "stopped", False, "stopped", "service"),
        (KILLED, CALM, "timed-out", False, "timed-out", None),
        (EXIT_0, CALM, "stopped", False, "stopped", None),
        (UNKNOWN, CALM, "stopped", False, "stopped", None),
    ],
)
def test_reason_and_level(
    status: ExitStatus, stats: Stats, asked: Any, tenant_oom: bool, reason: str, level: str | None
) -> None:
    found = outcome(status, stats, asked, tenant_oom=tenant_oom)
    assert (found.reason, found.oom_level) == (reason, level)
    assert (found.exit_code, found.signal) == (status.exit_code, status.signal)
    assert found.stats is stats


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (outcome(EXIT_3), "exited with code 3 after 1.25 s"),
        (outcome(KILLED), "ended by SIGKILL after 1.25 s"),
        (outcome(ExitStatus(signal=35)), "ended by signal 35 after 1.25 s"),
        (outcome(UNKNOWN), "ended with a status that nobody could see after 1.25 s"),
        (
            outcome(KILLED, asked="stopped", survivors=1),
            "stopped: ended by SIGKILL after 1.25 s; 1 process had to be killed",
        ),
        (outcome(EXIT_0, survivors=2), "exited with code 0 after 1.25 s; 2 processes had to be killed"),
        (outcome(KILLED, OTHER_LIMIT), "out of memory (host level): ended by SIGKILL after 1.25 s"),
        (outcome(KILLED, asked="timed-out"), "time is up: ended by SIGKILL after 1.25 s"),
    ],
)
def test_it_is_said_in_one_line(found: Any, message: str) -> None:
    assert found.message == message


def test_what_never_ran() -> None:
    found = failed_to_start(StartError("cannot execute 'x'", step="execve", errno=2, remedy="install it"))
    assert (found.reason, found.failed_step, found.failed_errno) == ("failed-to-start", "execve", 2)
    assert (found.message, found.ok, found.stats) == ("cannot execute 'x' (install it)", False, None)
    assert failed_to_start(StartError("killed", step="launcher")).failed_errno is None
