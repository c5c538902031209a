"""Programs of tenants as `subprocess.Popen` objects, each born in a scope of its own that goes when it has ended.

A `Popen` belongs to its caller, who waits for it or does not. So one thread watches all of them by pidfd, without
reaping any, and cleans up behind each: whatever else runs in its scope is killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import subprocess
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass

from cgroups import Cgroup, CgroupError, GoneError

from .errors import RunnerError, StateError
from .host import Claim, Host
from .launcher import START_TIMEOUT, LaunchSpec, launch_popen
from .models import IsolatedUser
from .registry import SandboxRow
from .trees import end_all, slice_name

__all__ = ["ScopedPopens"]

_log = logging.getLogger(__name__)


END_PATIENCE = 30.0
"""Seconds for what was killed to be gone."""


@dataclass(frozen=True, slots=True)
class _Run:
    claim: Claim
    scope: Cgroup
    pidfd: int


class ScopedPopens:
    """Starts programs, and cleans up behind them. Safe in any thread."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._changed = threading.Condition()
        self._runs: dict[int, _Run] = {}
        self._epoll = select.epoll()
        self._wakes, self._wake = os.pipe2(os.O_CLOEXEC)
        self._epoll.register(self._wakes, select.EPOLLIN)
        self._thread = threading.Thread(target=self._watch, name="pactown-popens", daemon=True)
        self._thread.start()

    def start(self, user: IsolatedUser, spec: LaunchSpec, *, limited: bool) -> subprocess.Popen[bytes]:
        """Start a program with pipes for its standard output and error.

        Args:
            limited: whether the `default_limits` of its tier, or of the settings, hold for it.

        Raises:
            StartError: it was not executed, or not in time, since the user's own processes can hold it up; nothing of
                it is left.
            LimitsError: a limit cannot be enforced.
            NotFoundError: there is no such user any more.
        """
        host, run_id = self._host, secrets.token_hex(8)
        name = f"run-{run_id}"
        claim = (user.key, name, run_id)
        with ExitStack() as undo:
            host.registry.sandboxes.claim(self._row(user, name, run_id))
            undo.callback(host.release, claim)
            scope = host.tree.scope(user.key, name, run_id)
            undo.callback(scope.close)
            undo.callback(_end, host, claim, scope)
            if limited:
                host.tree.limit(user.key, scope, host.standings.default_limits(user.key))
            popen, _ = launch_popen(
                spec,
                scope.fd,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                timeout=START_TIMEOUT,
                unreaped=host.unreaped,
            )
            pidfd = os.pidfd_open(popen.pid)
            undo.pop_all()
        with self._changed:
            self._runs[pidfd] = _Run(claim, scope, pidfd)
        self._epoll.register(pidfd, select.EPOLLIN)
        return popen

    def end(self, key: str) -> None:
        """End what runs of this user, and wait until nothing of it is left.

        Raises:
            StateError: something that was killed is not gone.
        """

        def left() -> list[_Run]:
            return [run for run in self._runs.values() if run.claim[0] == key]

        with self._changed:
            for run in left():
                with contextlib.suppress(GoneError):
                    run.scope.kill()
            if not self._changed.wait_for(lambda: not left(), END_PATIENCE):
                raise StateError(f"programs of user {key} were killed, and are not gone")

    def _row(self, user: IsolatedUser, name: str, run_id: str) -> SandboxRow:
        host = self._host
        return SandboxRow(
            key=user.key,
            service_id=name,
            run_id=run_id,
            owner=host.owner.owner_id,
            kind="run",
            spec="{}",
            cgroup=f"{host.tree.path}/{slice_name(user.key)}/{name}.scope",
            created_at=time.time(),
        )

    def close(self) -> None:
        """End what runs, and wait for that."""
        os.close(self._wake)
        self._thread.join()
        for run in list(self._runs.values()):
            self._epoll.unregister(run.pidfd)
            self._put_away(run)
        self._epoll.close()
        os.close(self._wakes)

    def _watch(self) -> None:
        while True:
            for fd, _ in self._epoll.poll():
                if fd == self._wakes:
                    return
                self._epoll.unregister(fd)
                self._put_away(self._runs[fd])

    def _put_away(self, run: _Run) -> None:
        try:
            _end(self._host, run.claim, run.scope)
        except (CgroupError, RunnerError, OSError) as error:
            _log.error("cannot clean up behind %s of user %s yet: %s", run.claim[1], run.claim[0], error)
            self._host.unfinished[run.claim] = None
        else:
            self._host.release(run.claim)
        with self._changed:
            run.scope.close()
            del self._runs[run.pidfd]
            self._changed.notify_all()
        os.close(run.pidfd)


def _end(host: Host, claim: Claim, scope: Cgroup) -> None:
    with contextlib.suppress(GoneError):
        with host.tree.slice(claim[0]) as slice_:
            end_all(scope, slice_)
        scope.remove()
