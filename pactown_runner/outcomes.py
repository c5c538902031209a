"""What came of a sandbox: from exit status, counters and what was asked of it to an `Outcome`. Pure."""

from __future__ import annotations

import signal
from typing import Literal, NamedTuple

from cgroups import Stats

from .errors import StartError
from .models import Outcome, Reason

__all__ = ["ExitStatus", "failed_to_start", "outcome_of"]


class ExitStatus(NamedTuple):
    """How the first process ended: its exit code, or the signal that ended it, or neither where nobody can know."""

    exit_code: int | None = None
    signal: int | None = None

    @property
    def known(self) -> bool:
        """Whether the kernel could still tell."""
        return self.exit_code is not None or self.signal is not None


def outcome_of(
    status: ExitStatus,
    *,
    asked: Reason | None,
    stats: Stats,
    tenant_oom: bool,
    survivors: int,
    wall_seconds: float,
) -> Outcome:
    """Say why a sandbox ended.

    Args:
        status: of the first process.
        asked: why it was ended by us, if it was.
        stats: the scope's counters, read when it was empty.
        tenant_oom: whether the tenant's slice ran into its own `memory.max` meanwhile.
        survivors: processes that had to be killed.
        wall_seconds: how long it lived.
    """
    reason, level = asked, _oom_level(stats, tenant_oom=tenant_oom)
    if reason is None and (stats.oom_kill or 0) > 0 and status.exit_code != 0:
        reason = "oom-killed"
    if reason is None:
        reason = "lost" if not status.known else "exited" if status.signal is None else "signaled"
    return Outcome(
        reason=reason,
        exit_code=status.exit_code,
        signal=status.signal,
        oom_level=level,
        message=_describe(reason, status, level, survivors, wall_seconds),
        survivors_killed=survivors,
        wall_seconds=wall_seconds,
        stats=stats,
    )


def _oom_level(stats: Stats, *, tenant_oom: bool) -> Literal["service", "tenant"] | None:
    # `oom_kill` rises where the victim lived; only `oom` of `memory.events.local` tells whose limit was hit.
    if not stats.oom_kill:
        return None
    return "service" if stats.oom else "tenant" if tenant_oom else None


def failed_to_start(error: StartError) -> Outcome:
    """Say that there never was a program."""
    return Outcome(
        reason="failed-to-start", failed_step=error.step, failed_errno=error.errno or None, message=str(error)
    )


def _describe(
    reason: Reason, status: ExitStatus, level: Literal["service", "tenant"] | None, survivors: int, wall_seconds: float
) -> str:
    if status.signal is not None:
        how = f"ended by {_signal_name(status.signal)}"
    elif status.exit_code is not None:
        how = f"exited with code {status.exit_code}"
    else:
        how = "ended with a status that nobody could see"
    why = {
        "oom-killed": f"out of memory ({level or 'host'} level): ",
        "timed-out": "time is up: ",
        "stopped": "stopped: ",
    }.get(reason, "")
    rest = f"; {survivors} {'process' if survivors == 1 else 'processes'} had to be killed" if survivors else ""
    return f"{why}{how} after {wall_seconds:.3g} s{rest}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
