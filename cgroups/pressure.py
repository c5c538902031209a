"""Hearing of pressure: the kernel tells when tasks have waited too long for memory, CPU or disks (psi.rst)."""

from __future__ import annotations

import os
import select
import warnings
from types import TracebackType
from typing import Literal, Self

from . import files
from .errors import FormatError
from .events import HasFileno
from .stats import Pressure, parse_pressure

__all__ = ["PressureWatch"]

_OPEN = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
_CHUNK = 1024
_MIN_WINDOW_USEC, _MAX_WINDOW_USEC = 500_000, 10_000_000  # kernel/sched/psi.c
_UNPRIVILEGED_USEC = 2_000_000


class PressureWatch:
    """Tells when a cgroup's tasks have waited for a resource for too long. Close it, or use it as a context manager.

    The kernel looks ten times in each window while there is pressure, and tells once in a window at most
    (Documentation/accounting/psi.rst, "Monitoring for pressure thresholds").

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

    __slots__ = ("_closed", "_epoll", "_fd")

    def __init__(
        self,
        cgroup: int | HasFileno,
        resource: Literal["memory", "cpu", "io"],
        stall_usec: int,
        window_usec: int,
        *,
        full: bool = False,
    ) -> None:
        self._closed = True  # until there is something to close
        trigger = _render(stall_usec, window_usec, full=full)
        name = _file(resource)
        dir_fd = cgroup if isinstance(cgroup, int) else cgroup.fileno()
        try:
            self._fd = os.open(name, _OPEN, dir_fd=dir_fd)
        except OSError as error:
            raise files.translate(error, dir_fd, name) from error
        self._closed = False
        try:
            try:
                os.write(self._fd, trigger.encode())
            except OSError as error:
                refused = files.translate(error, dir_fd, name, trigger)
                if window_usec % _UNPRIVILEGED_USEC:
                    refused.remedy = f"give a window of whole {_UNPRIVILEGED_USEC} microseconds, or CAP_SYS_RESOURCE"
                raise refused from error
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

    def read(self) -> Pressure:
        """How long was waited so far.

        Raises:
            GoneError: the cgroup was removed.
        """
        try:
            text = os.pread(self._fd, _CHUNK, 0).decode()
        except OSError as error:
            raise files.translate(error, self._fd, "") from error
        return parse_pressure(text)

    def close(self) -> None:
        """Close the descriptors, and with them what the kernel watches; a second time does nothing."""
        if self._closed:
            return
        self._closed = True
        if hasattr(self, "_epoll"):
            self._epoll.close()
        os.close(self._fd)

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
