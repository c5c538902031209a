"""One call of the launcher: what it is executed with, and the pipe that it answers through."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

from ..errors import LauncherError, StartError
from .spec import LaunchSpec
from .status import BUILD, StatusReader

__all__ = ["Call", "launcher_path", "no_launcher"]

_BINARY = Path(__file__).resolve().parent / "launch"
_READ_BYTES = 16384
_MFD_NOEXEC_SEAL = 8
"""memfd_create(2), from Linux 6.3 on; `os` has no name for it."""


def launcher_path() -> Path:
    """Return where the launcher is.

    Raises:
        LauncherError: it is not there, or cannot be executed.
    """
    if not os.access(_BINARY, os.X_OK):
        raise LauncherError(
            f"the launcher {_BINARY} is {'not executable' if _BINARY.exists() else 'missing'}",
            remedy=f"install a C compiler and reinstall, or run `{BUILD}`",
        )
    return _BINARY


class Call:
    """One call of the launcher: what it is executed with, and the pipe that it answers through.

    Args:
        spec: what is to be executed.
        cgroup_fd: the directory of the leaf to be born in; None places nowhere.
        member: a pidfd. The spec's namespaces are those of this process, and not new ones.

    Attributes:
        argv: the launcher's own words. The program's are in the spec.
        pass_fds: what it inherits beyond 0, 1 and 2.
        status_fd: where its records are read. Not blocking.
        status: the records so far.

    Raises:
        SpecError: from the constructor, see `LaunchSpec.pack`.
        LauncherError: from the constructor: there is no launcher, or SIGCHLD is ignored.
        StartError: from the constructor: no descriptor is left.
    """

    def __init__(self, spec: LaunchSpec, cgroup_fd: int | None, member: int | None = None) -> None:
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            raise LauncherError(
                "SIGCHLD is ignored in this process, so that children cannot be waited for",
                remedy="set it to signal.SIG_DFL",
            )
        packed = spec.pack()
        path = str(launcher_path())
        self.status = StatusReader(spec)
        self.status_fd = self._status_write = self._spec_fd = -1
        try:
            self._spec_fd = _memfd()
            os.write(self._spec_fd, packed)
            self.status_fd, self._status_write = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(self.status_fd, False)
        except OSError as error:
            self.close()
            raise no_launcher(error) from error
        self.pass_fds: tuple[int, ...] = (self._spec_fd, self._status_write)
        cgroup = "-1"
        if cgroup_fd is not None:
            self.pass_fds += (cgroup_fd,)
            cgroup = str(cgroup_fd)
        self.argv: tuple[str, ...] = (path, str(self._spec_fd), str(self._status_write), cgroup)
        if member is not None:
            self.pass_fds += (member,)
            self.argv += (str(member),)

    def started(self) -> None:
        """Close what only the launcher needs, or the end of the pipe would never be seen."""
        for fd in (self._spec_fd, self._status_write):
            if fd >= 0:
                os.close(fd)
        self._spec_fd = self._status_write = -1

    def close(self) -> None:
        """Close whatever is still open. Closing twice is fine."""
        self.started()
        if self.status_fd >= 0:
            os.close(self.status_fd)
            self.status_fd = -1

    def read(self) -> bool:
        """Take what the pipe holds now. Return whether the start is decided."""
        while True:
            try:
                data = os.read(self.status_fd, _READ_BYTES)
            except BlockingIOError:
                return False
            if self.status.feed(data):
                return True


def _memfd() -> int:
    try:
        # Without this flag a hardened host refuses (vm.memfd_noexec=2).
        return os.memfd_create("pactown-launch", os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create("pactown-launch", os.MFD_CLOEXEC)


def no_launcher(error: OSError) -> StartError:
    """Return the error that stands for an operating system's that kept the launcher from being started."""
    reason = (error.strerror or str(error)).lower()
    return StartError(f"cannot start the launcher: {reason}", step="launcher", errno=error.errno or 0)
