"""Every error that this package raises on purpose: one small tree, under `CgroupError`."""

from __future__ import annotations

__all__ = [
    "BusyError",
    "CgroupError",
    "ExistsError",
    "FormatError",
    "FrozenTimeoutError",
    "GoneError",
    "LimitRefusedError",
    "NotSupportedError",
    "WaitTimeoutError",
]


class CgroupError(Exception):
    """Something about a cgroup could not be done.

    Attributes:
        message: what could not be done, and why; without the remedy.
        remedy: what the reader can do about it, or None.
        path: the directory or control file that it is about, or None.
        value: what was to be written, or the text that could not be understood, or None.
        errno: the kernel's error number, or None where the kernel was not asked.
    """

    def __init__(
        self,
        message: str,
        *,
        remedy: str | None = None,
        path: str | None = None,
        value: str | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(message)
        self.remedy = remedy
        self.path = path
        self.value = value
        self.errno = errno

    @property
    def message(self) -> str:
        """What could not be done, and why; without the remedy."""
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message


class FormatError(CgroupError, ValueError):
    """A value that can never be right, or a kernel file that does not read as documented."""


class NotSupportedError(CgroupError):
    """The kernel, the mount or this part of the tree has no such controller or control file."""


class LimitRefusedError(CgroupError):
    """The kernel has the control file, and refused the value."""


class GoneError(CgroupError):
    """The cgroup was removed. One that was made again under the same name is another cgroup."""


class ExistsError(CgroupError):
    """A cgroup was to be made, and its name is taken."""


class BusyError(CgroupError):
    """The cgroup still has processes or children, or the no-internal-process rule forbids the change."""


class WaitTimeoutError(CgroupError):
    """What was waited for did not come about in time. Nothing is known of whether it still will."""


class FrozenTimeoutError(WaitTimeoutError):
    """The kernel did not report the cgroup as frozen, or as thawed, in time."""
