"""The one gate to cgroupfs: control files are read and written here, by name under a directory descriptor.

By descriptor, because a path may by now name another cgroup that was made under the same name. An error
carries the path, the value and the kernel's error number.
"""

from __future__ import annotations

import errno
import os

from .errors import BusyError, CgroupError, GoneError, LimitRefusedError, NotSupportedError

__all__ = [
    "DENIED",
    "DENIED_REMEDY",
    "directory_path",
    "exists",
    "is_gone",
    "read",
    "read_optional",
    "translate",
    "write",
]

_CHUNK = 16_384
_LISTS = ("cgroup.procs", "cgroup.threads")
_READ = os.O_RDONLY | os.O_CLOEXEC
_WRITE = os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC
_ABSENT = frozenset({errno.ENOENT, errno.EOPNOTSUPP})  # EOPNOTSUPP: pressure files where PSI is switched off
DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
DENIED_REMEDY = "run as root, or in a subtree that was delegated to this user"
_REFUSED = frozenset({errno.EINVAL, errno.ERANGE, errno.EOPNOTSUPP, errno.E2BIG})


def read(dir_fd: int, name: str) -> str:
    """The whole text of a control file.

    Raises:
        NotSupportedError: this cgroup has no such file.
        GoneError: the cgroup was removed.
        CgroupError: anything else that the kernel answers.
    """
    try:
        return _read(dir_fd, name)
    except OSError as error:
        raise translate(error, dir_fd, name) from error


def read_optional(dir_fd: int, name: str) -> str | None:
    """The same as `read`, but None where the cgroup lives and has no such file."""
    try:
        return _read(dir_fd, name)
    except OSError as error:
        if error.errno in _ABSENT and not is_gone(dir_fd):
            return None
        raise translate(error, dir_fd, name) from error


def _read(dir_fd: int, name: str) -> str:
    fd = os.open(name, _READ, dir_fd=dir_fd)
    try:
        data = os.read(fd, _CHUNK)
        # A list of ids comes in pieces of the kernel's choosing; only an empty read is the end. All else it writes in
        # one go, and one read takes it whole if there is room.
        if len(data) < _CHUNK and name not in _LISTS:
            return data.decode()
        while more := os.read(fd, _CHUNK):
            data += more
        return data.decode()
    finally:
        os.close(fd)


def write(dir_fd: int, name: str, text: str) -> None:
    """Write a control file, in one `write(2)`, as the kernel asks.

    Raises:
        LimitRefusedError: the kernel refused the value.
        NotSupportedError: this cgroup has no such file.
        GoneError: the cgroup was removed.
        BusyError: processes or children are in the way.
        CgroupError: anything else that the kernel answers; among them a want of permission.
    """
    try:
        fd = os.open(name, _WRITE, dir_fd=dir_fd)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise translate(error, dir_fd, name, text) from error


def exists(dir_fd: int, name: str) -> bool:
    """Whether the cgroup has this control file, or a child of this name."""
    try:
        os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise translate(error, dir_fd, name) from error
    return True


def is_gone(dir_fd: int) -> bool:
    """Whether the cgroup behind the descriptor was removed: every live one has `cgroup.procs`."""
    try:
        os.stat("cgroup.procs", dir_fd=dir_fd)
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ENODEV)
    return False


def directory_path(dir_fd: int) -> str:
    """The path behind a descriptor, for messages; the kernel adds ` (deleted)` where that is so."""
    try:
        return os.readlink(f"/proc/self/fd/{dir_fd}")
    except OSError:
        return f"<fd {dir_fd}>"


def translate(error: OSError, dir_fd: int, name: str, value: str | None = None) -> CgroupError:
    """Turn what the kernel answered for `name` under `dir_fd` into our error, to be raised from the first."""
    number = error.errno or 0
    directory = directory_path(dir_fd)
    path = f"{directory}/{name}" if name else directory
    reason = f"{os.strerror(number)} [{errno.errorcode.get(number, number)}]"
    deed = f"read {path}" if value is None else f"write {value!r} to {path}"
    remedy = None
    kind = CgroupError
    if number == errno.ENODEV or (number == errno.ENOENT and is_gone(dir_fd)):
        kind, reason = GoneError, "the cgroup was removed"
    elif number == errno.ENOENT or (number == errno.EOPNOTSUPP and value is None):
        kind, reason = NotSupportedError, "the kernel has no such control file here"
    elif number == errno.EBUSY:
        kind = BusyError
    elif number in DENIED:
        remedy = DENIED_REMEDY
    elif number in _REFUSED and value is not None:
        kind, reason = LimitRefusedError, f"the kernel refused it: {reason}"
    return kind(f"cannot {deed}: {reason}", remedy=remedy, path=path, value=value, errno=number)
