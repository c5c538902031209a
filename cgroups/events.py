"""Hearing of changes in a cgroup through one descriptor, without a thread, a timer or a second look.

The kernel raises EPOLLPRI on `cgroup.events` and `memory.events` when their content changes (cgroup-v2.rst,
"Core Interface Files"), and an epoll descriptor can itself be watched by an outer loop. So one inner epoll
holds both files, and its owner sees a plain descriptor that becomes readable.
"""

from __future__ import annotations

import os
import select
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from . import files
from .formats import parse_flat

__all__ = ["Events", "MemoryEvents", "OpenFile", "Watch", "read_events", "wait_until"]

_OPEN = os.O_RDONLY | os.O_CLOEXEC
_CHUNK = 1024
# The kernel may hold a notice back for so long (`Watch` tells why); whoever blocks anyway looks again meanwhile.
_HELD_BACK = 0.020  # seconds
_LOOK_AGAIN = 0.001  # seconds


class HasFileno(Protocol):
    """What is held by a descriptor."""

    def fileno(self) -> int:
        """The descriptor."""


@dataclass(frozen=True, slots=True)
class Events:
    """What `cgroup.events` and `memory.events` say.

    Attributes:
        populated: whether the cgroup or one below it has a process that is not yet dead.
        frozen: whether everything in the cgroup and below it is frozen.
        memory: the counters of `memory.events`, such as `oom_kill`, over the cgroup and those below it; empty
            where the kernel does not offer it here.
    """

    populated: bool
    frozen: bool
    memory: Mapping[str, int] = field(default_factory=dict)


def read_events(dir_fd: int) -> Events:
    """Read `cgroup.events` once; `memory` stays empty.

    Raises:
        NotSupportedError: the root cgroup has no events.
        GoneError: the cgroup was removed.
    """
    values = parse_flat(files.read(dir_fd, "cgroup.events"))
    return Events(populated=values["populated"] != 0, frozen=values["frozen"] != 0)


class OpenFile:
    """One control file that is held open. Close it, or use it as a context manager."""

    __slots__ = ("_fd",)

    def __init__(self, cgroup: int | HasFileno, name: str, flags: int = _OPEN) -> None:
        self._fd = -1  # until there is something to close
        dir_fd = cgroup if isinstance(cgroup, int) else cgroup.fileno()
        try:
            self._fd = os.open(name, flags, dir_fd=dir_fd)
        except OSError as error:
            raise files.translate(error, dir_fd, name) from error

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def _text(self) -> str:
        try:
            return os.pread(self._fd, _CHUNK, 0).decode()
        except OSError as error:
            raise files.translate(error, self._fd, "") from error

    def close(self) -> None:
        """Close the descriptor; a second time does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()


class MemoryEvents(OpenFile):
    """The counters of `memory.events`, held open: one descriptor, to be polled for EPOLLPRI along with many others.

    It is ready from each change until it is read, and from the beginning: what was never read counts as changed. A
    cgroup at its limit may change it all the time, of which the kernel tells 100 times a second at most.

    Args:
        cgroup: a `Cgroup`, or the descriptor of its directory; it need not stay open.

    Raises:
        NotSupportedError: memory is not controlled here.
        GoneError: the cgroup was removed.
    """

    __slots__ = ()

    def __init__(self, cgroup: int | HasFileno) -> None:
        super().__init__(cgroup, "memory.events")

    def read(self) -> dict[str, int]:
        """What they are now, such as `oom_kill`, over the cgroup and those below it.

        Raises:
            GoneError: the cgroup was removed.
        """
        return parse_flat(self._text())


class Watch:
    """Tells when a cgroup's events change. Close it, or use it as a context manager.

    The kernel holds back a second notice about one file until 10 ms after the first (`CGROUP_FILE_NOTIFY_MIN_INTV`,
    rounded up to its clock's ticks), so the end of a cgroup that lived for less is heard 10 to 20 ms late instead of
    within 1 ms. Who has another sign of the end, such as a pidfd, calls `refresh` then.

    Args:
        cgroup: a `Cgroup`, or the descriptor of its directory; it need not stay open.
        memory: whether to watch `memory.events` too, where there is one.

    Raises:
        NotSupportedError: the root cgroup has no events.
        GoneError: the cgroup was removed.
    """

    __slots__ = ("_cgroup_fd", "_closed", "_epoll", "_memory_fd", "current")

    current: Events
    """As last read."""

    def __init__(self, cgroup: int | HasFileno, *, memory: bool = True) -> None:
        dir_fd = cgroup if isinstance(cgroup, int) else cgroup.fileno()
        self._closed = True  # until there is something to close
        self._memory_fd = -1
        try:
            self._cgroup_fd = os.open("cgroup.events", _OPEN, dir_fd=dir_fd)
        except OSError as error:
            raise files.translate(error, dir_fd, "cgroup.events") from error
        self._closed = False
        try:
            self._epoll = select.epoll()
            self._epoll.register(self._cgroup_fd, select.EPOLLPRI)
            if memory:
                self._open_memory(dir_fd)
            # A file that was never read counts as changed: read both now, after which only news wakes us.
            self.refresh()
        except BaseException:
            self.close()
            raise

    def _open_memory(self, dir_fd: int) -> None:
        try:
            self._memory_fd = os.open("memory.events", _OPEN, dir_fd=dir_fd)
        except FileNotFoundError:
            return
        self._epoll.register(self._memory_fd, select.EPOLLPRI)

    def fileno(self) -> int:
        """A descriptor that is readable while there is news; for `add_reader`, `select` and their like."""
        return self._epoll.fileno()

    def read(self) -> Events:
        """Take the news, after which the descriptor is readable no more: what the files say now.

        Never blocks. Without news it costs one system call, and returns what was read last.

        Raises:
            GoneError: the cgroup was removed.
        """
        return self.refresh() if self._epoll.poll(0, 1) else self.current

    def refresh(self) -> Events:
        """Read what the files say now, news or not.

        Raises:
            GoneError: the cgroup was removed.
        """
        values = self._flat(self._cgroup_fd)
        memory = {} if self._memory_fd < 0 else self._flat(self._memory_fd)
        self.current = Events(values["populated"] != 0, values["frozen"] != 0, memory)
        return self.current

    def wait(self, timeout: float | None = None) -> bool:
        """Block until there is news, for `timeout` seconds at most; whether there is. `read` takes it."""
        return bool(self._epoll.poll(timeout, 1))

    def _flat(self, fd: int) -> dict[str, int]:
        try:
            return parse_flat(os.pread(fd, _CHUNK, 0).decode())
        except OSError as error:
            raise files.translate(error, fd, "") from error

    def close(self) -> None:
        """Close the descriptors; a second time does nothing."""
        if self._closed:
            return
        self._closed = True
        if hasattr(self, "_epoll"):
            self._epoll.close()
        os.close(self._cgroup_fd)
        if self._memory_fd >= 0:
            os.close(self._memory_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()


def wait_until(watch: Watch, done: Callable[[Events], bool], timeout: float | None) -> bool:
    """Wait until `done` holds for what the watch reads; False if it does not within `timeout` seconds."""
    began = time.monotonic()
    deadline = None if timeout is None else began + timeout
    while not done(watch.refresh()):
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            return False
        pause = None if deadline is None else deadline - now
        if now - began < _HELD_BACK:
            pause = _LOOK_AGAIN if pause is None else min(pause, _LOOK_AGAIN)
        watch.wait(pause)
    return True
