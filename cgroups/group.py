"""One cgroup, held by its directory's descriptor."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL
from types import TracebackType
from typing import Self

from . import controllers, directories, files, processes, writing
from .errors import (
    BusyError,
    FrozenTimeoutError,
    GoneError,
    NotSupportedError,
    WaitTimeoutError,
)
from .events import Watch, read_events, wait_until
from .limits import Limits
from .stats import Stats, StatsPlan, read_ooms, read_stats

__all__ = ["Cgroup"]


def _mark_space() -> str:
    return "user" if os.geteuid() else "trusted"


class Cgroup:
    """A cgroup v2 directory. Close it, or use it as a context manager; the cgroup itself stays as it is.

    It stands for the cgroup that was there when it was opened: once that one is removed, everything raises
    `GoneError`, even if another was made under the same name.

    Attributes:
        fd: the directory's descriptor, for `clone3(CLONE_INTO_CGROUP)` and the like.
        name: the last part of the path.
    """

    __slots__ = ("_inode", "_mode", "_path", "_plan", "fd", "name")

    def __init__(self, fd: int, path: str, *, plan: StatsPlan | None = None) -> None:
        """Take over `fd`, an open cgroup directory. Use `open` or `child`."""
        status = os.fstat(fd)
        self.fd = fd
        self.name = path.rpartition("/")[2]
        self._path = path
        self._inode = status.st_ino
        self._mode = status.st_mode & 0o7777
        self._plan = plan or StatsPlan()

    @property
    def path(self) -> Path:
        """Where it was found; never opened again, since another cgroup may be there by now."""
        return Path(self._path)

    def fileno(self) -> int:
        """The same as `fd`."""
        return self.fd

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open an existing cgroup.

        Raises:
            GoneError: there is none.
            NotSupportedError: it is a directory, but none of a cgroup v2 mount.
            CgroupError: it cannot be opened, or is a link.
        """
        path = os.path.abspath(path)
        try:
            fd = directories.open_directory(path)
        except OSError as error:
            raise directories.translate("open", path, error) from error
        try:
            if not files.exists(fd, "cgroup.controllers"):
                raise NotSupportedError(
                    f"{path} is no cgroup v2 directory", remedy="find the mount with find_mount()", path=path
                )
            return cls(fd, path)
        except BaseException:
            os.close(fd)
            raise

    def child(self, *names: str, create: bool = False, exist_ok: bool = False) -> Cgroup:
        """Open a cgroup directly below this one, or with several names one further down.

        Args:
            names: its name, after those of the cgroups on the way to it, which exist.
            create: make it, with mode 0755.
            exist_ok: with `create`, take one that is there already.

        Raises:
            FormatError: no cgroup can have this name.
            ExistsError: it was to be made, and the name is taken.
            GoneError: it was to be opened and is not there, or this cgroup itself was removed.
            CgroupError: anything else, such as a want of permission or `cgroup.max.descendants` reached.
        """
        name = "/".join(map(directories.check_name, names))
        path = f"{self._path}/{name}"
        made = create and directories.make_directory(name, self.fd, path, exist_ok=exist_ok)
        try:
            fd = directories.open_directory(name, self.fd)
        except OSError as error:
            if made:
                # Such as too many open files; nobody would know of it.
                with suppress(OSError):
                    os.rmdir(name, dir_fd=self.fd)
            raise directories.translate("open", path, error) from error
        group = Cgroup(fd, path, plan=self._plan)
        if made and group._mode != directories.MODE:  # the umask took bits away
            os.fchmod(fd, directories.MODE)
        return group

    def dup(self) -> Cgroup:
        """Another hold of the same cgroup, with a descriptor of its own, and the caller's to close."""
        return Cgroup(os.dup(self.fd), self._path, plan=self._plan)

    def child_names(self) -> list[str]:
        """The names of the cgroups directly below, sorted."""
        return sorted(directories.child_names(self.fd))

    def children(self) -> Iterator[Cgroup]:
        """The cgroups directly below, each opened when its turn comes, and the caller's to close."""
        for name in self.child_names():
            try:
                child = self.child(name)
            except GoneError:  # removed meanwhile
                continue
            yield child

    # Controllers, limits and counters

    def controllers(self) -> frozenset[str]:
        """The controllers that this cgroup has, such as `memory`."""
        return controllers.read_controllers(self.fd)

    def enabled(self) -> frozenset[str]:
        """The controllers that its children have."""
        return controllers.read_controllers(self.fd, "cgroup.subtree_control")

    def enable(self, wanted: Iterable[str]) -> None:
        """Let its children have these controllers too.

        Raises:
            NotSupportedError: it lacks some of them, all of which are named.
            BusyError: it has processes of its own.
        """
        controllers.enable_controllers(self.fd, wanted)

    def apply(self, limits: Limits) -> Mapping[str, str]:
        """Set limits, all or none; returns what the kernel answers when each file is read back.

        Lowering `memory_max` kills nothing: what is above it is reclaimed first, for 2 seconds at most, in which the
        cgroup may be slowed down.

        Raises:
            NotSupportedError: controllers, control files or disks are missing; nothing was written.
            LimitRefusedError: the kernel refused a value, or the memory in use cannot be reclaimed; what was written
                before has its former value again.
        """
        return writing.write_limits(self.fd, limits) if limits else {}

    def stats(self, *, pressure: bool = False) -> Stats:
        """Read the counters; those of pressure only if asked for."""
        return read_stats(self.fd, self._plan, pressure=pressure)

    def ooms(self) -> int | None:
        """`Stats.oom` alone, in one read; None where memory is not controlled."""
        return read_ooms(self.fd)

    # Processes

    def move_here(self, pid: int) -> None:
        """Move a process here, with all its threads; 0 is the caller.

        What it forked before stays where it was, and the move waits for a global lock: to start something in
        a cgroup, have it born there by `clone3(CLONE_INTO_CGROUP)`.

        Raises:
            BusyError: controllers are enabled for the children, so this cgroup takes no process.
        """
        files.write(self.fd, "cgroup.procs", str(pid))

    def pids(self, *, recursive: bool = False) -> list[int]:
        """The ids of its processes; 0 for one outside our pid namespace."""
        return processes.list_pids(self.fd, recursive=recursive)

    def threads(self) -> list[int]:
        """The ids of its threads."""
        return [int(word) for word in files.read(self.fd, "cgroup.threads").split()]

    def populated(self) -> bool:
        """Whether anything still runs in it or below it."""
        return read_events(self.fd).populated

    def kill(self) -> None:
        """Kill everything in it and below it, atomically against forks. Use `wait_empty` to see the end.

        Raises:
            NotSupportedError: Linux before 5.14.
        """
        files.write(self.fd, "cgroup.kill", "1")

    def signal(self, number: int) -> int:
        """Send a signal to every process in it and below it; returns how many got it.

        A frozen process acts on it once it is thawed; SIGKILL is left to `kill`, and returns 0.

        Raises:
            WaitTimeoutError: it forks faster than its processes can be signalled.
            NotSupportedError: a process lies outside our pid namespace.
        """
        if number == SIGKILL:
            self.kill()
            return 0
        return processes.signal_all(self.fd, number)

    def kill_tracers(self, within: Cgroup) -> int:
        """Kill what traces processes of this cgroup (ptrace(2)), if it is in or below `within`; returns how many.

        For what does not end though it was killed: a tracer that asked for PTRACE_EVENT_EXIT and does not answer keeps
        it from ending, and from Linux 6.0 on no further SIGKILL gets through to it.
        """
        return processes.kill_tracers(self.fd, within.fd)

    # Events

    def watch(self, *, memory: bool = True) -> Watch:
        """Watch `cgroup.events` and, where there is one, `memory.events`."""
        return Watch(self.fd, memory=memory)

    def frozen(self) -> bool:
        """Whether everything in it and below it is frozen by now."""
        return read_events(self.fd).frozen

    def freeze_requested(self) -> bool:
        """Whether it was asked to freeze and not to thaw since, whatever is done by now, or asked of those above it."""
        return files.read(self.fd, "cgroup.freeze").strip() == "1"

    def request_freeze(self, frozen: bool) -> None:
        """Ask for freezing or thawing, and do not wait for it."""
        files.write(self.fd, "cgroup.freeze", "1" if frozen else "0")

    def freeze(self, timeout: float | None = 5.0) -> None:
        """Stop everything in it and below it, and wait until it stands still. Killing it still works.

        Raises:
            FrozenTimeoutError: not all stood still within `timeout` seconds, such as one that waits for a dead disk.
                The request stands until `thaw`.
        """
        self._freeze(True, timeout)

    def thaw(self, timeout: float | None = 5.0) -> None:
        """Let everything go on, and wait until it may.

        Raises:
            FrozenTimeoutError: not within `timeout` seconds, such as when a cgroup above is frozen.
        """
        self._freeze(False, timeout)

    def _freeze(self, frozen: bool, timeout: float | None) -> None:
        with self.watch(memory=False) as watch:
            self.request_freeze(frozen)
            if not wait_until(watch, lambda events: events.frozen == frozen, timeout):
                word = "freeze" if frozen else "thaw"
                raise FrozenTimeoutError(
                    f"cannot {word} {self._path}: not done after {timeout} s",
                    remedy=None if frozen else "thaw the cgroups above it first",
                    path=self._path,
                )

    def wait_empty(self, timeout: float | None = None) -> None:
        """Wait until nothing runs in it or below it, which is so too once it is removed.

        Raises:
            WaitTimeoutError: something still did after `timeout` seconds.
        """
        try:
            with self.watch(memory=False) as watch:
                empty = wait_until(watch, lambda events: not events.populated, timeout)
        except GoneError:
            return
        if not empty:
            raise WaitTimeoutError(
                f"{self._path} still has processes after {timeout} s", remedy="kill it", path=self._path
            )

    # Marks

    def mark(self, name: str, value: bytes) -> None:
        """Write a note that stays with the cgroup as long as it exists: an extended attribute (xattr(7)).

        It is a `trusted.` one where we may write such, which only the host's root can; else a `user.` one.

        Raises:
            NotSupportedError: Linux before 5.7, without root.
        """
        try:
            os.setxattr(self.fd, f"{_mark_space()}.{name}", value)
        except OSError as error:
            raise directories.translate(f"write mark {name} of", self._path, error) from error

    def marks(self, name: str) -> bytes | None:
        """What was marked under this name, or None."""
        try:
            return os.getxattr(self.fd, f"{_mark_space()}.{name}")
        except OSError as error:
            if error.errno == errno.ENODATA:
                return None
            raise directories.translate(f"read mark {name} of", self._path, error) from error

    # The end

    def remove(self, *, recursive: bool = False) -> None:
        """Remove the cgroup, with `recursive` those below it first. One that is gone already is no error.

        Raises:
            BusyError: it has processes, or children and not `recursive`.
            GoneError: its name now belongs to another cgroup, which is left alone.
        """
        try:
            directories.remove_directory(self.fd, self.name, self._inode, self._path)
        except BusyError:
            # As a rule there are none below, and to look takes as long as to remove.
            if not recursive:
                raise
            self._remove_children()
            directories.remove_directory(self.fd, self.name, self._inode, self._path)

    def _remove_children(self) -> None:
        for child in self.children():
            with child:
                child.remove(recursive=True)

    def close(self) -> None:
        """Close the descriptor; a second time does nothing."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Cgroup {self._path!r} {'closed' if self.fd < 0 else f'fd={self.fd}'}>"

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()
