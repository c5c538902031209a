"""A scope's first process, as a successor finds it: by pid and start time, written onto the cgroup itself."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from cgroups import Cgroup

from .models import IsolationReport

__all__ = ["Main"]

_MARK = "pactown.main"


@dataclass(frozen=True, slots=True)
class Main:
    """A scope's first process, written onto the cgroup for a successor: it lasts exactly as long as what it names.

    Attributes:
        pid: its number, and...
        start_time: ...when it started, in clock ticks since boot (`proc_pid_stat(5)`, field 22): the two name it.
        isolation: what was reported when it started.
    """

    pid: int
    start_time: int
    isolation: IsolationReport

    @classmethod
    def of(cls, pid: int, isolation: IsolationReport) -> Self:
        """Describe a process that is not yet reaped."""
        return cls(pid, _start_time(pid), isolation)

    def mark(self, scope: Cgroup) -> None:
        """Write it onto the scope."""
        scope.mark(_MARK, json.dumps([self.pid, self.start_time, self.isolation.to_dict()]).encode())

    @classmethod
    def update(cls, scope: Cgroup, isolation: IsolationReport) -> None:
        """Write a changed report onto the scope."""
        if (main := cls.read(scope)) is not None:
            replace(main, isolation=isolation).mark(scope)

    @classmethod
    def read(cls, scope: Cgroup) -> Self | None:
        """Read it from the scope, if it is there."""
        if (raw := scope.marks(_MARK)) is None:
            return None
        pid, start_time, isolation = json.loads(raw)
        return cls(pid, start_time, IsolationReport.from_dict(isolation))

    def pidfd(self) -> int | None:
        """A descriptor of this very process, or None if it has been reaped."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        # Only now is it known whose descriptor that is.
        try:
            if _start_time(self.pid) == self.start_time:
                return fd
        except ProcessLookupError:
            pass
        os.close(fd)
        return None


def _start_time(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except FileNotFoundError as error:
        raise ProcessLookupError(pid) from error
    # The name, in parentheses, may itself hold spaces and parentheses.
    return int(stat.rpartition(b")")[2].split()[19])
