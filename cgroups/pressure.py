"""Hearing of pressure: the kernel tells when tasks have waited too long for memory, CPU or disks (psi.rst)."""

from __future__ import annotations

import os
import select
from typing import Literal

from . import files
from .errors import FormatError
from .events import HasFileno, OpenFile
from .stats import Pressure, parse_pressure

__all__ = ["PressureTrigger", "PressureWatch"]

_OPEN = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
_MIN_WINDOW_USEC, _MAX_WINDOW_USEC = 500_000, 10_000_000  # kernel/sched/psi.c
_UNPRIVILEGED_USEC = 2_000_000


class PressureTrigger(OpenFile):
    """Makes the kernel tell when a cgroup's tasks have waited for a resource for too long, through one descriptor.

    For one epoll over many of them; `PressureWatch` is for one alone. Close it, or use it as a context manager.

    The kernel looks ten times in each window while there is pressure, and tells once in a window at most
    (Documentation/accounting/psi.rst, "Monitoring for pressure thresholds"). Without CAP_SYS_RESOURCE it looks every
    two seconds only.

    To close it takes some 10 milliseconds, in which the kernel waits for an RCU grace period; so does the removal of
    the cgroup while it is open. Many that are closed by many threads at once take no longer.

    Args:
        cgroup: a `Cgroup`, or the descriptor of its directory; it need not stay open.
        resource: what is waited for.
        stall_usec: microseconds of waiting within a window of which to tell; at most `window_usec`.
        window_usec: microseconds, 500,000 to 10,000,000. Without CAP_SYS_RESOURCE the kernel takes multiples of
            2,000,000 only.
        full: count only time in which all tasks waited at once, not just some.

    Raises:
        FormatError: values that the kernel never takes.
        LimitRefusedError: the kernel refused them.
        NotSupportedError: the kernel has no pressure files here, or was booted without them (`psi=0`).
        GoneError: the cgroup was removed.
    """

    __slots__ = ()

    POLL_FOR = select.EPOLLIN | select.EPOLLPRI | select.EPOLLET
    """What to register it for in an epoll that is itself watched by another, as every one in an event loop is.

    The kernel tells each event once, to whoever looks first. That may be the outer epoll, which looks whether there is
    anything in the inner one and does not keep what it saw. So the inner one asks for each waking of the file, which
    can always be read, and does not count on EPOLLPRI. Not every waking is an event: the first comes with the
    registration, others when a trigger of somebody else's on the same file tells or the cgroup goes. To `read` shows
    whether anything was waited for.
    """

    def __init__(
        self,
        cgroup: int | HasFileno,
        resource: Literal["memory", "cpu", "io"],
        stall_usec: int,
        window_usec: int,
        *,
        full: bool = False,
    ) -> None:
        self._fd = -1  # until there is something to close
        trigger = _render(stall_usec, window_usec, full=full)
        name = _file(resource)
        dir_fd = cgroup if isinstance(cgroup, int) else cgroup.fileno()
        super().__init__(dir_fd, name, _OPEN)
        try:
            os.write(self._fd, trigger.encode())
        except OSError as error:
            self.close()
            refused = files.translate(error, dir_fd, name, trigger)
            if window_usec % _UNPRIVILEGED_USEC:
                refused.remedy = f"give a window of whole {_UNPRIVILEGED_USEC} microseconds, or CAP_SYS_RESOURCE"
            raise refused from error

    def read(self) -> Pressure:
        """How long was waited so far.

        Raises:
            GoneError: the cgroup was removed.
        """
        return parse_pressure(self._text())


class PressureWatch(PressureTrigger):
    """A `PressureTrigger` with an epoll of its own: its descriptor is readable at each event, and at nothing else.

    Takes the same arguments and raises the same errors.
    """

    __slots__ = ("_epoll",)

    def __init__(
        self,
        cgroup: int | HasFileno,
        resource: Literal["memory", "cpu", "io"],
        stall_usec: int,
        window_usec: int,
        *,
        full: bool = False,
    ) -> None:
        super().__init__(cgroup, resource, stall_usec, window_usec, full=full)
        try:
            # The file itself counts as readable all the time; only the event is wanted.
            self._epoll = select.epoll()
            self._epoll.register(self._fd, select.EPOLLPRI)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """A descriptor that becomes readable at each event; for `add_reader`, `select` and their like.

        To see it there takes the event: the kernel tells each once. So act on it, and do not `wait` for it again.
        """
        return self._epoll.fileno()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the next event, for `timeout` seconds at most; whether there was one."""
        return bool(self._epoll.poll(timeout, 1))

    def close(self) -> None:
        """Close the descriptors, and with them what the kernel watches; a second time does nothing."""
        if hasattr(self, "_epoll"):
            self._epoll.close()
        super().close()


def _file(resource: str) -> str:
    if resource not in ("memory", "cpu", "io"):
        raise FormatError(f"no pressure on {resource!r} is known", remedy="choose from memory, cpu, io", value=resource)
    return f"{resource}.pressure"


def _render(stall_usec: int, window_usec: int, *, full: bool) -> str:
    if not _MIN_WINDOW_USEC <= window_usec <= _MAX_WINDOW_USEC:
        raise FormatError(
            f"window_usec cannot be {window_usec!r}",
            remedy=f"give {_MIN_WINDOW_USEC} to {_MAX_WINDOW_USEC} microseconds",
            value=str(window_usec),
        )
    if not 0 < stall_usec <= window_usec:
        raise FormatError(
            f"stall_usec cannot be {stall_usec!r}",
            remedy="give 1 microsecond or more, and no more than window_usec",
            value=str(stall_usec),
        )
    return f"{'full' if full else 'some'} {stall_usec} {window_usec}"
