"""Removing all that the runner ever made on this host for one state.

The order is that of a user's removal: what runs is killed, nothing new can start (`deleting`), the tenant's own files
go by the tenant's own hand, then the account. The registry goes last, and only if every account is gone: until then it
alone knows what is ours, and the same call can be repeated.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Self

from cgroups import Cgroup, CgroupError, GoneError, Limits, find_mount

from .accounts import PREFIX
from .config import Settings
from .deletion import remove_homes, sweep
from .errors import RunnerError, StartError, StateError
from .launcher import DEFAULT_PATH, START_TIMEOUT, Directory, LaunchSpec, launch_popen
from .models import IsolatedUser
from .owners import Owner
from .registry import Registry, UserRow
from .trees import Tree, open_tree
from .users import Users

__all__ = ["Plan", "Purge"]

KILL_SECONDS = 30.0
"""For what was killed to be gone. Only a process that waits for a dead disk takes longer than milliseconds."""

_MARK = "pactown.state"  # what `trees` writes onto each slice and scope
_OWNER_ID = re.compile(r"[0-9a-f]{16}")
_Matches = Callable[[str], bool]


@dataclass(frozen=True)
class Plan:
    """What would be removed.

    Attributes:
        running: sandboxes, as `<slice>/<scope>`.
        users: rows of the registry whose account may exist, or whose home was kept when they were deleted.
        directories: with logs, FIFOs and the registry.
        owners: live processes that use the state.
        strangers: logins that look like ours, and are not in the registry. They are left alone.
    """

    running: list[str]
    users: list[UserRow]
    directories: list[Path]
    owners: list[str]
    strangers: list[str]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.running or self.users or self.directories)


@dataclass
class Purge:
    """All of one state. To be used within `with`: it is an owner itself, so that two do not work at once.

    Attributes:
        removed: what is gone.
        failed: what is not, and why.
    """

    settings: Settings
    removed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    _held: ExitStack = field(default_factory=ExitStack)
    _registry: Registry | None = None
    _owner: Owner | None = None

    def __enter__(self) -> Self:
        path = self.settings.state_dir / "registry.db"
        if path.exists():  # looking must not make one
            self._registry = self._held.enter_context(Registry(path))
            self._owner = self._held.enter_context(Owner(self.settings.state_dir))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._held.close()

    def plan(self) -> Plan:
        """Look at what there is; nothing is changed."""
        places = (self.settings.log_dir, self.settings.run_dir, self.settings.state_dir)
        users = [row for row in self._registry.users.rows() if self._is_there(row)] if self._registry else []
        known = {row.username for row in users}
        base = str(self.settings.users_base)
        running = []
        for slice_ in self._slices():
            with slice_:
                running += [f"{slice_.name}/{name}" for name in slice_.child_names()]
        return Plan(
            running=running,
            users=users,
            directories=[path for path in places if path.is_dir() and not path.is_symlink()],
            owners=self._others(),
            strangers=[
                login.pw_name
                for login in pwd.getpwall()
                if login.pw_name.startswith(PREFIX)
                and os.path.dirname(login.pw_dir) == base
                and login.pw_name not in known
            ],
        )

    def _is_there(self, row: UserRow) -> bool:
        if row.status != "deleted":
            return True
        assert self._registry is not None
        removal = self._registry.users.removal(row.key)
        return removal is not None and not removal.delete_home and row.home.exists()

    def carry_out(self, plan: Plan, *, force: bool = False) -> None:
        """Remove it all; what cannot be removed is in `failed` afterwards.

        Args:
            force: also if live processes use the state.

        Raises:
            StateError: some do.
        """
        if plan.owners and not force:
            uses = "process uses" if len(plan.owners) == 1 else "processes use"
            raise StateError(
                f"{len(plan.owners)} live {uses} {self.settings.state_dir}",
                remedy=f"stop them first (fuser {self.settings.state_dir}/owners/*), or give --force",
            )
        self._end_sandboxes()
        self._remove_users(plan.users)
        self._remove_cgroups()
        for login in plan.strangers:
            self.failed[f"login {login}"] = f"the registry does not know it; if it is yours: userdel {login}"
        if self.failed:
            self.failed[str(self.settings.state_dir)] = "kept, to try again once the rest can be removed"
            return
        self._remove_directories()

    @contextlib.contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        try:
            yield
        except (RunnerError, CgroupError) as error:
            self.failed[what] = str(error)
        except OSError as error:
            self.failed[what] = error.strerror or str(error)
        else:
            self.removed.append(what)

    def _others(self) -> list[str]:
        if self._owner is None:
            return []
        names = [name for name in os.listdir(self._owner.directory) if _OWNER_ID.fullmatch(name)]
        return [name for name in names if name != self._owner.owner_id and self._owner.alive(name)]

    # Cgroups ----------------------------------------------------------------------------------------------------

    def _slices(self) -> Iterator[Cgroup]:
        """The slices that bear our mark, wherever in the tree they are; the caller's to close."""
        if self._registry is None:
            return
        mark = self._registry.state_id.encode()
        for path in _named(lambda name: name.startswith("pactown-") and name.endswith(".slice")):
            with contextlib.suppress(CgroupError):
                group = Cgroup.open(path)
                if group.marks(_MARK) == mark:
                    yield group
                else:
                    group.close()

    def _end_sandboxes(self) -> None:
        for slice_ in self._slices():
            with slice_, ExitStack() as held, contextlib.suppress(GoneError):
                # Before they are killed: then a live owner removes them, too.
                scopes = [held.enter_context(scope) for scope in slice_.children()]
                with contextlib.suppress(CgroupError):
                    slice_.kill()  # at once: one process that traces another could keep it from ending
                for scope in scopes:
                    with self._doing(f"sandbox {slice_.name}/{scope.name}"):
                        _end(scope)
        if self._registry is not None and not self.failed:
            for row in self._registry.sandboxes.rows():
                self._registry.sandboxes.release(row.key, row.service_id, row.run_id)

    def _remove_cgroups(self) -> None:
        for slice_ in self._slices():
            with slice_, self._doing(f"cgroup {slice_.path}"):
                _end(slice_)
        top = self.settings.cgroup_slice
        unit = f"{top.removesuffix('.slice')}-sandboxes.service"
        for path in _named(top.__eq__):
            if (path / unit).is_dir():
                _stop_unit(path / unit, unit)
            # Other states may use the same top.
            with contextlib.suppress(CgroupError), Cgroup.open(path) as group:
                group.remove()
                self.removed.append(f"cgroup {path}")

    # Users ------------------------------------------------------------------------------------------------------

    def _remove_users(self, rows: list[UserRow]) -> None:
        if self._registry is None or not rows:
            return
        # Whoever is only made to be removed needs no disk, and where limits cannot be enforced would not be made.
        users = Users(replace(self.settings, tenant_disk_max=None, tenant_inodes_max=None, tiers=()), self._registry)
        with ExitStack() as held:
            tree = self._tree(held)
            for row in rows:
                with self._doing(f"user {row.saas_id!r} ({row.username}, {row.home})"):
                    if row.status == "deleted":
                        users.get_or_create(row.saas_id)  # whose the home is again then, and can be emptied
                    users.check_ours(row.saas_id)
                    user = users.begin_removal(row.saas_id)
                    run = partial(self._as_tenant, tree, user)
                    # Without root the tenant's uid is the caller's own, and what carries it is the caller's.
                    if users.root_mode:
                        sweep(user, run)
                    remove_homes(user, run)
                    users.remove_account(user)

    def _tree(self, held: ExitStack) -> Tree | None:
        assert self._registry is not None
        try:
            tree = open_tree(
                cgroup_slice=self.settings.cgroup_slice, state_id=self._registry.state_id, tenant_limits=Limits()
            )
        except RunnerError:
            if self.settings.root_mode:
                raise
            return None  # our own files need no cgroup
        held.callback(tree.close)
        return tree

    def _as_tenant(
        self, tree: Tree | None, user: IsolatedUser, script: str, directory: str | Path, timeout: float, *words: str
    ) -> bool:
        """See `deletion.RunAs`. Of what it could not do the home's removal tells."""
        spec = LaunchSpec(
            argv=["/bin/sh", "-c", script, "purge", *words],
            mode="root" if self.settings.root_mode else "user",
            uid=user.linux_uid,
            gid=user.linux_gid,
            env={"PATH": DEFAULT_PATH, "LC_ALL": "C"},
            directories=[Directory(directory)],
        )
        with ExitStack() as held:
            scope = None
            if tree is not None:
                scope = held.enter_context(tree.scope(user.key, "_job-purge", "purge"))
                held.callback(_end, scope)
            null, fd = subprocess.DEVNULL, scope.fd if scope else None
            try:
                program, _ = launch_popen(spec, fd, null, null, null, timeout=min(timeout, START_TIMEOUT))
            except StartError as error:
                if error.step != "launcher" or error.errno:
                    raise
                return False  # what runs as the tenant stopped it, or killed it
            with program:
                try:
                    return program.wait(timeout) == 0
                except subprocess.TimeoutExpired:
                    program.kill()
                    return False

    # Files ------------------------------------------------------------------------------------------------------

    def _remove_directories(self) -> None:
        """Remove logs, FIFOs and registry: directories that nobody but us could enter, and of them what is ours."""
        settings = self.settings
        self._held.close()  # the registry and our owner's lock
        self._remove_known(settings.log_dir, lambda name: name.startswith(PREFIX))
        api = settings.api_socket
        self._remove_known(settings.run_dir, lambda name: name in ("fifo", api, f"{api}.lock"))
        self._remove_known(settings.state_dir, lambda name: name == "owners" or name.startswith("registry.db"))
        # Homes of others, or whatever the operator put there, may be in it.
        with contextlib.suppress(OSError):
            settings.users_base.rmdir()
            self.removed.append(str(settings.users_base))

    def _remove_known(self, directory: Path, ours: _Matches) -> None:
        if not directory.is_dir() or directory.is_symlink():
            return
        with self._doing(str(directory)):
            for name in filter(ours, os.listdir(directory)):
                path = directory / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            rest = sorted(os.listdir(directory))
            if rest:
                raise StateError(f"it holds what is not ours: {', '.join(rest)}", remedy="look, and remove it yourself")
            directory.rmdir()


def _end(group: Cgroup) -> None:
    with contextlib.suppress(GoneError):  # a live owner was quicker
        if group.populated():
            group.kill()
            group.wait_empty(KILL_SECONDS)
        group.remove(recursive=True)


def _named(matches: _Matches) -> Iterator[Path]:
    try:
        mount = find_mount()
    except CgroupError:
        return
    for directory, names, _ in os.walk(mount.path):
        # What is below a match is looked at, too: the top of the tree and a tenant's slice can have like names.
        for name in filter(matches, names):
            yield Path(directory, name)


def _stop_unit(path: Path, unit: str) -> None:
    """Stop the unit that held the tree, if its keeper is all that is left in it."""
    with contextlib.suppress(CgroupError), Cgroup.open(path) as group:
        if all(name == "_keeper.scope" for name in group.child_names()):
            subprocess.run(["systemctl", "stop", unit], check=False, capture_output=True)  # noqa: S607
