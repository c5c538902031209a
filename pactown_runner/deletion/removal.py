"""The removal of a user, step by step; blocking.

    deleting (registry) > slice killed > what starts things later > processes > files, by the tenant's own hand > IPC,
    keys, mail > home > logs > account > tombstone

From the first step on nothing starts for the user any more, and what is to become of home and logs is written down with
it. Each step can be taken again; so whoever comes next finishes what a crash left, and is told apart from somebody who
is still at it by a claim, as for everything that runs.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cgroups import MAX, Cgroup, CgroupError, GoneError, Limits

from ..errors import RunnerError, StartError, StateError
from ..home_dirs import keep_home
from ..host import Claim, Host
from ..launcher import DEFAULT_PATH, START_TIMEOUT, Directory, LaunchSpec, launch_popen
from ..logs import LogPaths
from ..models import IsolatedUser
from ..registry import Removal, SandboxRow
from ..trees import end_all, slice_name
from .traces import remove_homes, sweep

__all__ = ["delete_user", "finish_removals"]

_log = logging.getLogger(__name__)

REMOVAL = "_removal"
"""What a removal is called where services have their ids."""

REAP_SECONDS = 1.0
"""For a helper to be reaped when it has ended."""

_LOOK_AGAIN = 0.5
"""Seconds until the next look at whether a removal is to be given up."""


def delete_user(
    host: Host,
    user_id: str,
    *,
    delete_home: bool = True,
    delete_logs: bool = True,
    give_up: threading.Event | None = None,
) -> IsolatedUser:
    """Delete a user, with all that carries its uid on this host; returns who that was.

    Its sandboxes have been stopped, in every process that shares the state. Key and uid stay taken, and are this id's
    again if it comes back. To be called again if it fails, or `finish_removals`, also after a crash: each goes on where
    the last one ended.

    Args:
        delete_home: else the home becomes root's, with all that is in it, until the user is made again.
        delete_logs: else they stay where they are.
        give_up: lets another thread end it, within a second as a rule.

    Raises:
        NotFoundError: there is no such user.
        AccountError: the account is not what we made, and nothing was changed; or it cannot be deleted.
        StateError: something is meant to run for the user, somebody else removes it just now, something that was killed
            is not gone, or it was given up.
        FilesError: the home cannot be emptied.
    """
    host.users.check_ours(user_id)
    removal = Removal(delete_home, delete_logs)
    user = host.users.begin_removal(user_id, removal)
    _finish(host, user, removal, give_up or threading.Event())
    return user


def finish_removals(host: Host, *, give_up: threading.Event | None = None) -> list[IsolatedUser]:
    """Finish the removals that dead processes, or errors, left half-done; returns the users that are gone by it.

    It may take as long as the removals themselves. What cannot be finished is logged, and left for the next time. To be
    called after what dead owners left has been taken over.

    Args:
        give_up: as for `delete_user`.
    """
    give_up = give_up or threading.Event()
    gone = []
    for user in host.users.unfinished_removals():
        if give_up.is_set():
            break
        if host.registry.sandboxes.row(user.key, REMOVAL) is not None:
            continue  # somebody is at it
        try:
            host.users.check_ours(user.saas_user_id)
            _finish(host, user, host.users.removal(user), give_up)
        except (RunnerError, CgroupError, OSError) as error:
            _log.error("cannot finish the removal of user %s: %s", user.linux_username, error)
        else:
            gone.append(user)
    return gone


def _finish(host: Host, user: IsolatedUser, removal: Removal, give_up: threading.Event) -> None:
    # In other processes the claims find out.
    host.known.pop(user.saas_user_id, None)
    with _claimed(host, user) as claim:
        work = _Work(host, user, claim, give_up)
        work.end_slice()
        if not removal.delete_home:
            # First: the home may lie in a public place, and what it holds does carry the uid.
            keep_home(user.home_dir, user.linux_uid)
        if host.users.root_mode:
            sweep(user, work.run)
        remove_homes(user, work.run, kept=not removal.delete_home)
        if removal.delete_logs:
            work.remove_logs()
        host.users.remove_account(user)
    host.tree.remove_unused_slices()


@contextlib.contextmanager
def _claimed(host: Host, user: IsolatedUser) -> Iterator[Claim]:
    """Be the one who removes this user. Should we die, the next owner ends what the removal runs."""
    claim = (user.key, REMOVAL, secrets.token_hex(8))
    host.registry.sandboxes.claim_removal(
        SandboxRow(
            key=user.key,
            service_id=REMOVAL,
            run_id=claim[2],
            owner=host.owner.owner_id,
            kind="run",
            spec="{}",
            cgroup=f"{host.tree.path}/{slice_name(user.key)}/{REMOVAL}.scope",
            created_at=time.time(),
        )
    )
    try:
        yield claim
    finally:
        # While something of it may run, the row has to say so.
        if claim not in host.unfinished:
            host.release(claim)


@dataclass(frozen=True)
class _Work:
    """The steps of one removal; each can be taken again."""

    host: Host
    user: IsolatedUser
    claim: Claim
    give_up: threading.Event

    def end_slice(self) -> None:
        """Kill what runs in the tenant's slice."""
        with self.host.tree.slice(self.user.key) as slice_:
            end_all(slice_, slice_)
            # What the tenant has put into memory, such as files in /dev/shm, still counts against it. Nothing but what
            # removes them runs in the slice from now on, and that must not want for memory.
            if "memory" in slice_.controllers():
                slice_.apply(Limits(memory_max=MAX, memory_high=MAX))

    def remove_logs(self) -> None:
        """Remove logs, spools and FIFOs. They lie in directories that only we can enter."""
        host = self.host
        paths = LogPaths(host.settings.log_dir, host.settings.run_dir, self.user.key)
        for service_id, run_id in paths.leftovers():
            for path in (*paths.fifos(service_id, run_id), *paths.spools(service_id, run_id)):
                Path(path).unlink(missing_ok=True)
        for claim in [claim for claim in host.unwritten if claim[0] == self.user.key]:
            host.unwritten.pop(claim, None)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(paths.tenant_dir)

    def run(self, script: str, directory: str | Path, timeout: float, *words: str) -> bool:
        """Run a shell script as the tenant, in a scope of its slice; whether it ended with 0, and in time."""
        spec = LaunchSpec(
            argv=["/bin/sh", "-c", script, "pactown-removal", *words],
            mode="root" if self.host.users.root_mode else "user",
            uid=self.user.linux_uid,
            gid=self.user.linux_gid,
            env={"PATH": DEFAULT_PATH, "LC_ALL": "C"},
            directories=[Directory(directory)],
        )
        with self._scope() as scope:
            null = subprocess.DEVNULL
            patience, unreaped = min(timeout, START_TIMEOUT), self.host.unreaped
            try:
                program, _ = launch_popen(spec, scope.fd, null, null, null, timeout=patience, unreaped=unreaped)
            except StartError as error:
                if error.step != "launcher" or error.errno:
                    raise
                # What runs as the tenant stopped it, or killed it.
                _log.error("a helper of the removal of %s: %s", self.user.linux_username, error)
                return False
            try:
                return self._wait(program, timeout) == 0
            finally:
                with contextlib.suppress(GoneError):
                    scope.kill()
                self._reap(program)

    def _wait(self, program: subprocess.Popen[bytes], timeout: float) -> int | None:
        """The exit code, or None if it has not ended in time."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.give_up.is_set():
                raise StateError(
                    f"the removal of user {self.user.linux_username} was given up half-way", remedy="remove it again"
                )
            with contextlib.suppress(subprocess.TimeoutExpired):
                return program.wait(_LOOK_AGAIN)
        _log.error("a helper of the removal of %s took longer than %g s", self.user.linux_username, timeout)
        return None

    def _reap(self, program: subprocess.Popen[bytes]) -> None:
        try:
            program.wait(REAP_SECONDS)
        except subprocess.TimeoutExpired:
            # Something traces it, ptrace(2), and decides when. That it runs no more is seen to all the same.
            self.host.unreaped.add(program.pid)
            program.returncode = -signal.SIGKILL

    @contextlib.contextmanager
    def _scope(self) -> Iterator[Cgroup]:
        tree, (key, name, run_id) = self.host.tree, self.claim
        with tree.scope(key, name, run_id) as scope:
            try:
                yield scope
            finally:
                try:
                    tree.end_scope(slice_name(key), scope.name)
                except CgroupError as error:
                    self.host.unfinished[self.claim] = None
                    raise StateError(f"a helper could not be ended: {error.message}", remedy=error.remedy) from error
