"""What of a uid lives in the kernel and has no process: System V IPC objects, POSIX message queues, keyrings.

Each is removed by its number, or by its name in the kernel's own flat directory; there is no path on the way that
somebody could change.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["remove_ipc", "remove_keys", "remove_queues"]

_log = logging.getLogger(__name__)

_libc = ctypes.CDLL(None, use_errno=True)

_IPC_RMID = 0
_SYSV = {"shm": ("shmid", _libc.shmctl), "msg": ("msqid", _libc.msgctl), "sem": ("semid", _libc.semctl)}
_GONE = frozenset({errno.EINVAL, errno.EIDRM})

# asm-generic/unistd.h: the same everywhere.
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6

_SYS_KEYCTL = {"x86_64": 250, "aarch64": 219}
_KEYCTL_CLEAR, _KEYCTL_INVALIDATE, _KEYCTL_GET_PERSISTENT = 7, 21, 22
_KEY_SPEC_THREAD_KEYRING = -1
_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4


def remove_ipc(uid: int) -> int:
    """Remove all System V shared memory, semaphores and queues that this uid owns or made, sysvipc(7); how many."""
    count = 0
    for kind, (column, control) in _SYSV.items():
        for number in _ipc_of(uid, kind, column):
            arguments = (number, 0, _IPC_RMID, 0) if kind == "sem" else (number, _IPC_RMID, None)
            if control(*arguments) == 0:
                count += 1
            elif ctypes.get_errno() not in _GONE:
                _log.warning("cannot remove %s %d of uid %d: %s", kind, number, uid, os.strerror(ctypes.get_errno()))
    return count


def _ipc_of(uid: int, kind: str, column: str) -> Iterator[int]:
    try:
        header, *rows = Path("/proc/sysvipc", kind).read_text().splitlines()
    except FileNotFoundError:  # a kernel without them
        return
    names = header.split()
    for row in rows:
        values = dict(zip(names, row.split(), strict=False))
        if uid in (int(values["uid"]), int(values["cuid"])):
            yield int(values[column])


def remove_queues(uid: int) -> int:
    """Remove all POSIX message queues of this uid, mq_overview(7); how many.

    They exist also where `/dev/mqueue` is not mounted, so the file system is opened without being mounted anywhere.
    """
    count = 0
    with _queues() as top:
        for name in os.listdir(top) if top >= 0 else ():
            # Nobody but its owner can put another queue in its place: the directory is sticky.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(name, dir_fd=top, follow_symlinks=False).st_uid == uid:
                    os.unlink(name, dir_fd=top)
                    count += 1
    return count


@contextlib.contextmanager
def _queues() -> Iterator[int]:
    """The directory of all queues, or -1 if this kernel has none, or does not let us look."""
    top = _open_queues()
    try:
        yield top
    finally:
        if top >= 0:
            os.close(top)


def _open_queues() -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    context = _libc.syscall(_SYS_FSOPEN, b"mqueue", _FSOPEN_CLOEXEC)
    if context >= 0:
        mount = -1
        try:
            if _libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0) == 0:
                mount = _libc.syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
            if mount >= 0:
                return os.open(".", flags, dir_fd=mount)
        finally:
            os.close(context)
            if mount >= 0:
                os.close(mount)
    # Without CAP_SYS_ADMIN, in a container, it may have been mounted for us.
    with contextlib.suppress(OSError):
        return os.open("/dev/mqueue", flags)
    return -1


def remove_keys(uid: int) -> int:
    """Remove what this uid has in keyrings that outlive its processes, keyrings(7); how many keyrings those were.

    They are its user keyring, its user session keyring and its persistent keyring. Keys that are in none of them are
    gone with the processes that had them.
    """
    if not os.path.exists("/proc/keys") or os.uname().machine not in _SYS_KEYCTL:
        return 0
    removed: list[int] = []

    def remove() -> None:
        with _fsuid(uid):
            keys = list(_keys_of(uid))
            removed.extend(key for key, _ in keys if _clear(key))
        # Not even its owner may change this one by its number alone: it has to be got by its owner's.
        if f"_persistent.{uid}" in {name for _, name in keys}:
            key = _keyctl(_KEYCTL_GET_PERSISTENT, uid, _KEY_SPEC_THREAD_KEYRING)
            removed.extend([key] if key > 0 and _clear(key) else [])

    _in_thread(remove)
    return len(removed)


def _clear(key: int) -> bool:
    # Both: a key that is invalidated goes when the kernel finds time for it, and what it holds is to go now.
    cleared = _keyctl(_KEYCTL_CLEAR, key) == 0
    return _keyctl(_KEYCTL_INVALIDATE, key) == 0 or cleared


def _keys_of(uid: int) -> Iterator[tuple[int, str]]:
    """Keyrings of this uid as far as the calling thread may view them: number and name."""
    for line in Path("/proc/keys").read_text(errors="replace").splitlines():
        match line.split(maxsplit=8):
            case [number, _, _, _, _, owner, _, "keyring", name] if owner == str(uid):
                yield int(number, 16), name.partition(":")[0]


def _keyctl(*arguments: int) -> int:
    padded = (*arguments, 0, 0, 0, 0)[:5]
    result: int = _libc.syscall(_SYS_KEYCTL[os.uname().machine], *map(ctypes.c_long, padded))
    return result


@contextlib.contextmanager
def _fsuid(uid: int) -> Iterator[None]:
    """Let the calling thread, and only it, have this file-system uid, setfsuid(2): all decisions on keys go by it.

    The process stays root's in all that others may do to it, and is no less dumpable afterwards.
    """
    dumpable = _libc.prctl(_PR_GET_DUMPABLE)
    _libc.setfsuid(uid)
    try:
        yield
    finally:
        _libc.setfsuid(os.geteuid())
        _libc.prctl(_PR_SET_DUMPABLE, dumpable)


def _in_thread(action: Callable[[], Any]) -> None:
    """Do this in a thread that does nothing else, before or after."""
    thread = threading.Thread(target=action, name="pactown-keys")
    thread.start()
    thread.join()
