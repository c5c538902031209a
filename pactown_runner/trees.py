"""Where in the host's cgroup v2 tree sandboxes live: `<tree>/pactown-<key>.slice/<service>.scope`.

A slice is a tenant and carries the tenant's limits; a scope is a sandbox, or with a leading `_` one of the runner's
own jobs. Each slice and scope is marked with the id of the state that it belongs to, so that two states on one host
never touch each other's. Processes are only ever placed in scopes: a cgroup whose controllers are enabled for its
children takes no process itself (Documentation/admin-guide/cgroup-v2.rst, "No Internal Process Constraint").
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from cgroups import (
    BusyError,
    Cgroup,
    CgroupError,
    GoneError,
    Limits,
    Stats,
    WaitTimeoutError,
)

from .errors import LimitsError, TreeError
from .places import enable_wanted, find_place

__all__ = [
    "END_TIMEOUT",
    "TRACER_PATIENCE",
    "Scope",
    "TenantLimits",
    "Tree",
    "apply_limits",
    "end_all",
    "open_tree",
    "slice_name",
]

END_TIMEOUT = 30.0
"""Seconds in which what was killed must be gone. Only what waits for a dead disk takes longer than milliseconds."""

TRACER_PATIENCE = 0.5
"""Seconds for a tracer's word on the end of what it traces, ptrace(2), before the tracer is killed, too."""

_ON_DEMAND = frozenset({"cpuset"})
"""Enabled with the first limit that needs it: it counts nothing, and its global lock makes starts in cgroups slower."""

TenantLimits = Limits | Callable[[str], Limits]

_STATE, _RUN = "pactown.state", "pactown.run"


@dataclass(frozen=True, slots=True)
class Scope:
    """A scope found in the tree: the names of its slice and its own, with their endings, and the run it is for."""

    slice_name: str
    name: str
    run_id: str


class Tree:
    """The cgroups of one state. Thread-safe.

    Args:
        root: the cgroup that holds all of them.
        state_id: marks what is the state's.
        tenant_limits: limits on each tenant's slice; or what tells a tenant's by its key.
    """

    def __init__(self, root: Cgroup, state_id: str, tenant_limits: TenantLimits) -> None:
        self.root = root
        self.path = str(root.path)
        self._state_id = state_id.encode()
        self._tenant_limits = tenant_limits
        self._counts_memory = "memory" in root.enabled()
        self._made: set[str] = set()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let go of the tree, and remove the slices that nobody uses any more."""
        with suppress(CgroupError):
            self.remove_unused_slices()
        self.root.close()

    def slice(self, key: str) -> Cgroup:
        """The tenant's slice, made with the tenant's limits if it is not there. The caller's to close.

        No descriptor of it is kept: there may be more tenants than descriptors.

        Raises:
            LimitsError: a tenant limit cannot be enforced here.
            TreeError: a slice of that name belongs to another state.
            GoneError: somebody removed it in this very moment.
        """
        if self.has_slice(key):
            # Gone: another process of this state found it empty and removed it.
            with suppress(GoneError):
                return self.root.child(slice_name(key))
        with self._lock:
            group = self._make_slice(key)
            self._made.add(key)
            return group

    def has_slice(self, key: str) -> bool:
        """Whether this process made, or found, the tenant's slice before."""
        return key in self._made

    def tenant_oom(self, key: str) -> int:
        """How often the tenant as a whole ran into its `memory.max`; always 0 where memory is not controlled."""
        if not self._counts_memory:
            return 0
        with self.slice(key) as group:
            return group.ooms() or 0

    def stats(self, key: str, *, pressure: bool = False) -> Stats | None:
        """What all that runs of a tenant uses together; None if it has no slice."""
        with suppress(GoneError), self.root.child(slice_name(key)) as slice_:
            return slice_.stats(pressure=pressure)
        return None

    def limit(self, key: str, scope: Cgroup, limits: Limits) -> dict[str, str]:
        """Write limits on a scope of this tenant; see `apply_limits`."""
        if limits.cpuset_cpus is not None:
            with _translated(), self.slice(key) as group:
                self.root.enable(_ON_DEMAND)
                group.enable(_ON_DEMAND)
        return apply_limits(scope, limits)

    def limit_tenant(self, key: str, limits: Limits) -> dict[str, str]:
        """Write other limits on the tenant's slice; see `apply_limits`. Without one there is nothing to write on."""
        with suppress(GoneError), self.root.child(slice_name(key)) as group:
            if limits.cpuset_cpus is not None:
                with _translated():
                    self.root.enable(_ON_DEMAND)
            return apply_limits(group, limits)
        return {}

    def hold_still(self, key: str, still: bool, timeout: float = END_TIMEOUT) -> None:
        """Freeze all sandboxes of a tenant that there are now, whoever owns them, or thaw them; blocking.

        The runner's own jobs go on.

        Args:
            timeout: seconds for each.

        Raises:
            CgroupError: one did not stand still, or go on, in time.
        """
        with suppress(GoneError), self.root.child(slice_name(key)) as slice_:
            for scope in _closing(slice_.children()):
                if scope.marks(_STATE) == self._state_id and not scope.name.startswith("_"):
                    with suppress(GoneError):
                        scope.freeze(timeout) if still else scope.thaw(timeout)

    def let_begin(self, key: str, name: str, run_id: str) -> None:
        """Thaw the scope of a run that is just being started: what is born frozen cannot tell that it has been.

        Raises:
            CgroupError: it cannot be thawed.
        """
        with suppress(GoneError), self.open_run(key, name, run_id) as scope:
            scope.request_freeze(False)

    def scope(self, key: str, name: str, run_id: str) -> Cgroup:
        """Make the scope `<name>.scope` in the tenant's slice, marked with the state and the run.

        Raises:
            ExistsError: there is one of this name.
            LimitsError, TreeError: see `slice`.
            CgroupError: it cannot be made.
        """
        scope = self._make_scope(key, f"{name}.scope")
        try:
            scope.mark(_STATE, self._state_id)
            scope.mark(_RUN, run_id.encode())
        except BaseException:
            scope.remove()
            scope.close()
            raise
        return scope

    def _make_scope(self, key: str, name: str) -> Cgroup:
        # As often as somebody removes it, which may be a few times; only without the top there is no end to it.
        while True:
            # Gone: another process of this state found the slice empty and removed it.
            with suppress(GoneError):
                if self.has_slice(key):
                    return self.root.child(slice_name(key), name, create=True)
            with suppress(GoneError), self.slice(key) as parent:
                return parent.child(name, create=True)
            if self._is_gone():
                break
        raise TreeError(f"{self.root.path} was removed", remedy="start the supervisor anew")

    def _is_gone(self) -> bool:
        try:
            self.root.populated()
        except GoneError:
            return True
        return False

    def end_scope(self, slice_: str, name: str, run_id: str | None = None, timeout: float = END_TIMEOUT) -> bool:
        """Kill what runs in a scope, and remove it; blocking. False if it is not there, or is another run's.

        Args:
            run_id: end it only if it was made for this run, or for none that was written down.
            timeout: seconds.

        Raises:
            CgroupError: it cannot be ended, see `end_all`, or not removed.
        """
        try:
            scope = self.open_scope(slice_, name)
        except GoneError:
            return False
        with scope:
            if run_id is not None and (scope.marks(_RUN) or run_id.encode()) != run_id.encode():
                return False
            while True:
                with self.root.child(slice_) as parent:
                    end_all(scope, parent, timeout)
                try:
                    scope.remove(recursive=True)
                except GoneError:
                    return False
                except BusyError:
                    # A launcher whose supervisor died was about to start something there.
                    if not scope.populated():
                        raise
                else:
                    return True

    def remove_unused_slices(self) -> None:
        """Remove the slices of this state in which nothing is. A live `Tree` that had one makes it anew."""
        for slice_ in _closing(self.root.children()):
            if slice_.marks(_STATE) in (None, self._state_id) and slice_.name.startswith("pactown-"):
                _remove_if_unused(slice_)

    def remove_if_unused(self, key: str) -> None:
        """Remove the tenant's slice if nothing is in it, and this process has not used it itself."""
        if not self.has_slice(key):
            with suppress(GoneError), self.root.child(slice_name(key)) as slice_:
                _remove_if_unused(slice_)

    def open_scope(self, slice_: str, name: str) -> Cgroup:
        """Open the scope of this name, ending included.

        Raises:
            GoneError: it has been removed since.
        """
        return self.root.child(slice_, name)

    def open_run(self, key: str, name: str, run_id: str) -> Cgroup:
        """Open the scope that was made for this run.

        Raises:
            GoneError: it has been removed since, or another run's is in its place.
        """
        scope = self.open_scope(slice_name(key), f"{name}.scope")
        try:
            if (scope.marks(_STATE), scope.marks(_RUN)) != (self._state_id, run_id.encode()):
                raise GoneError(f"{scope.path} is not run {run_id}'s", path=str(scope.path))
        except BaseException:
            scope.close()
            raise
        return scope

    def scopes(self) -> Iterator[Scope]:
        """All scopes that bear this state's mark."""
        for slice_ in _closing(self.root.children()):
            if slice_.marks(_STATE) == self._state_id:
                for scope in _closing(slice_.children()):
                    if scope.marks(_STATE) == self._state_id:
                        yield Scope(slice_.name, scope.name, (scope.marks(_RUN) or b"").decode())

    def _make_slice(self, key: str) -> Cgroup:
        given = self._tenant_limits
        limits = given if isinstance(given, Limits) else given(key)
        group = self.root.child(slice_name(key), create=True, exist_ok=True)
        try:
            owner = group.marks(_STATE)
            if owner not in (None, self._state_id):
                raise TreeError(
                    f"{group.path} belongs to another state of the runner",
                    remedy="give one of the two a cgroup_slice of its own",
                )
            if owner is None:
                group.mark(_STATE, self._state_id)
            enable_wanted(group)
            if limits.cpuset_cpus is not None:
                with _translated():
                    self.root.enable(_ON_DEMAND)
            apply_limits(group, limits)
        except BaseException:
            _remove_if_unused(group)
            group.close()
            raise
        return group


def slice_name(key: str) -> str:
    """The name of the slice of the tenant with this key."""
    return f"pactown-{key}.slice"


def end_all(scope: Cgroup, slice_: Cgroup, timeout: float = END_TIMEOUT) -> None:
    """Kill what runs in a scope, and return when nothing of it does any more; blocking.

    A process of the same tenant that traces it can keep it from ending, and is then killed as well.

    Raises:
        WaitTimeoutError: not all of it was gone within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        scope.kill()
        try:
            scope.wait_empty(min(TRACER_PATIENCE, timeout))
        except WaitTimeoutError:
            if time.monotonic() >= deadline:
                raise
            scope.kill_tracers(slice_)
        else:
            return


def apply_limits(group: Cgroup, limits: Limits) -> dict[str, str]:
    """Write limits; return what the kernel answers for each file. All of them hold, or none is changed.

    Raises:
        LimitsError: one of them cannot be enforced here, or was refused.
        GoneError: the cgroup was removed.
    """
    if not limits:
        return {}
    with _translated():
        return dict(group.apply(limits))


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except GoneError:
        raise
    except CgroupError as error:
        raise LimitsError(error.message, remedy=error.remedy) from error


def open_tree(*, cgroup_slice: str, state_id: str, tenant_limits: TenantLimits) -> Tree:
    """Open the tree of this state, see `find_place` and `Tree`.

    Raises:
        TreeError: there is no cgroup v2 mount, or no place in it that this process may use.
    """
    try:
        root = find_place(cgroup_slice)
    except (CgroupError, OSError) as error:
        remedy = error.remedy if isinstance(error, CgroupError) else None
        raise TreeError(f"no place for sandboxes in the cgroup tree: {error}", remedy=remedy) from error
    return Tree(root, state_id, tenant_limits)


def _closing(groups: Iterator[Cgroup]) -> Iterator[Cgroup]:
    for group in groups:
        with group:
            yield group


def _remove_if_unused(group: Cgroup) -> None:
    # Busy: somebody else's sandbox lives in it. Gone: somebody else removed it first.
    with suppress(CgroupError):
        group.remove()
