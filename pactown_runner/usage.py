"""How much of the disk a tenant takes: by the kernel's count where the file system has user quotas, else by a walk.

Root does not walk a tenant's tree. So a walk is the tenant's own, what comes of it is as much the tenant's word as the
files are, and it takes as long as the tenant has files. It is remembered for a while, so that whoever asks again and
again does not keep the disk busy.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal
from weakref import WeakValueDictionary

from .errors import FilesError
from .host import Host
from .jobs import Stop, job
from .launcher import DEFAULT_PATH, Directory
from .models import IsolatedUser
from .quotas import UserQuota, quotas_at

__all__ = ["USAGE_TIMEOUT", "Usage", "UsageMeter", "home_usage", "make_sandbox_directory"]

USAGE_TIMEOUT = 60.0
"""Seconds for one walk: a million files take about ten."""

KEPT_SECONDS = 5.0
"""For so long is it remembered what came of a walk."""

KEPT_SHARE = 4
"""And for so many times as long as it took: no more than a fifth of the time is spent on walking a home."""

KEPT_USERS = 1024
"""Of so many users it is remembered."""

_ANSWER_BYTES = 128
_LOOK_AGAIN = 0.5
"""Seconds until the next look at whether to give up waiting for another's walk."""

# What cannot be entered is its owner's own doing, and not counted.
_SANDBOXES = "find sandboxes -mindepth 1 -maxdepth 1 -type d -printf x 2>/dev/null | wc -c"
_WALK = f"""\
du -x -s -B1 . 2>/dev/null | cut -f1
du -x -s --inodes . 2>/dev/null | cut -f1
{_SANDBOXES}"""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tenant takes of the disk.

    Attributes:
        bytes: on the disk; a file with several names counts once, a hole not at all.
        entries: files, folders, links and all else; one with several names counts once.
        sandboxes: directories in `sandboxes` of the home; the tenant's word.
        counted: who counted bytes and entries. `quota`: the kernel, all of the tenant's that is on the file system of
            its home, wherever there it lies. `walk`: the tenant itself, what is in its home.
        enforced: whether the kernel holds the tenant to `disk_max` and `inodes_max`.
        disk_max: the most bytes, None for no limit.
        inodes_max: the most entries, None for no limit.
        walked_at: when the tenant counted what is its word, in seconds since the epoch.
    """

    bytes: int
    entries: int
    sandboxes: int
    counted: Literal["quota", "walk"]
    enforced: bool
    disk_max: int | None
    inodes_max: int | None
    walked_at: float


@dataclass(frozen=True, slots=True)
class _Walk:
    """What came of a walk: all three numbers, or that of sandboxes alone, or an error."""

    numbers: tuple[int, ...]
    at: float
    until: float
    """On the monotonic clock."""
    error: str | None = None


class UsageMeter:
    """Tells what users take, and remembers walks. Thread-safe.

    Args:
        host: for what is run as a tenant; None without root where there is no place for cgroups. Then all homes are our
            own, and so is the walk.
    """

    def __init__(self, host: Host | None) -> None:
        self._host = host
        self._kept: OrderedDict[tuple[str, float, bool], _Walk] = OrderedDict()
        self._lock = threading.Lock()
        self._walking: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    def usage(self, user: IsolatedUser, *, timeout: float = USAGE_TIMEOUT, stop: Stop | None = None) -> Usage:
        """What a user takes; blocking.

        Args:
            timeout: seconds for a walk.
            stop: lets another thread end it.

        Raises:
            FilesError: it could not be counted in time, now or lately.
            NotFoundError: there is no such user any more.
            StateError: the user is held by an export or import.
        """
        quota, enforced = self._quota(user)
        walk = self._walked(user, wholly=quota is None, timeout=timeout, stop=stop or Stop())
        if walk.error is not None:
            raise FilesError(walk.error)
        if quota is None:
            used, entries, sandboxes = walk.numbers
            return Usage(used, entries, sandboxes, "walk", False, None, None, walk.at)
        return Usage(
            quota.bytes,
            quota.inodes,
            walk.numbers[-1],
            "quota",
            enforced,
            quota.disk_max,
            quota.inodes_max,
            walk.at,
        )

    def _quota(self, user: IsolatedUser) -> tuple[UserQuota | None, bool]:
        # Without root all tenants' files are the same uid's.
        if self._host is not None and self._host.users.root_mode:
            with contextlib.suppress(OSError), quotas_at(user.home_dir) as quotas:
                return quotas.of(user.linux_uid), quotas.state == "enforced"
        return None, False

    def _walked(self, user: IsolatedUser, *, wholly: bool, timeout: float, stop: Stop) -> _Walk:
        name = (user.key, user.created_at, wholly)
        with self._alone(user.key, stop):
            with self._lock:
                kept = self._kept.get(name)
            if kept is None or time.monotonic() >= kept.until:
                kept = self._walk(user, wholly=wholly, timeout=timeout, stop=stop)
                with self._lock:
                    self._kept[name] = kept
                    self._kept.move_to_end(name)
                    while len(self._kept) > KEPT_USERS:
                        self._kept.popitem(last=False)
            return kept

    @contextlib.contextmanager
    def _alone(self, key: str, stop: Stop) -> Iterator[None]:
        """Let others who ask for this user wait for what comes of it."""
        with self._lock:
            turn = self._walking.setdefault(key, threading.Lock())
        while not turn.acquire(timeout=_LOOK_AGAIN):
            stop.check()
        try:
            yield
        finally:
            turn.release()

    def _walk(self, user: IsolatedUser, *, wholly: bool, timeout: float, stop: Stop) -> _Walk:
        at, began = time.time(), time.monotonic()
        numbers: tuple[int, ...] = ()
        error = None
        try:
            numbers = self._count(user, _WALK if wholly else _SANDBOXES, timeout, stop)
        except FilesError as failed:
            # What was given up early, or ended by the tenant, may succeed the next time.
            if time.monotonic() - began < timeout:
                raise
            error = failed.message
        ended = time.monotonic()
        return _Walk(numbers, at, ended + max(KEPT_SECONDS, KEPT_SHARE * (ended - began)), error)

    def _count(self, user: IsolatedUser, script: str, timeout: float, stop: Stop) -> tuple[int, ...]:
        """The numbers that a script prints, one for each of its lines."""
        if self._host is None:
            answer, code = _by_ourselves(user, script, timeout, stop)
        else:
            answer, code = _as_tenant(self._host, user, script, timeout, stop)
        try:
            numbers = tuple(map(int, answer.split()))
        except ValueError:
            numbers = ()
        if len(numbers) != len(script.splitlines()):
            raise FilesError(f"the home of {user.linux_username} could not be counted (exit code {code})")
        return numbers


def home_usage(host: Host, user: IsolatedUser, *, timeout: float = USAGE_TIMEOUT, stop: Stop | None = None) -> Usage:
    """As `UsageMeter.usage`, for who asks once: nothing is remembered."""
    return UsageMeter(host).usage(user, timeout=timeout, stop=stop)


def _as_tenant(host: Host, user: IsolatedUser, script: str, timeout: float, stop: Stop) -> tuple[bytes, int]:
    """What a script prints, and its exit code."""
    argv = ["/bin/sh", "-c", script]
    with job(
        host, user, argv, directories=[Directory(user.home_dir)], stdout=True, timeout=timeout, stop=stop
    ) as shell:
        return shell.output.read(_ANSWER_BYTES), shell.wait()


def _by_ourselves(user: IsolatedUser, script: str, timeout: float, stop: Stop) -> tuple[bytes, int]:
    """What a script prints, and its exit code. It has our uid, and ends with its process group."""
    deadline = time.monotonic() + timeout
    stop.check()
    try:
        shell = subprocess.Popen(
            ["/bin/sh", "-c", script],
            cwd=user.home_dir,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={"PATH": DEFAULT_PATH, "LC_ALL": "C"},
            process_group=0,
        )
    except OSError as error:
        raise FilesError(f"the home of {user.linux_username} could not be counted: {error.strerror}") from error
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return shell.communicate(timeout=min(_LOOK_AGAIN, timeout))[0], shell.returncode
            if time.monotonic() >= deadline:
                stop.now(f"it took longer than {timeout:g} s")
            stop.check()
    finally:
        if shell.returncode is None:  # not reaped yet: nobody else can have the number
            os.killpg(shell.pid, signal.SIGKILL)
            shell.communicate()


def make_sandbox_directory(host: Host, user: IsolatedUser, service_id: str) -> None:
    """Make `sandboxes/<service_id>`, if it is missing, as the tenant; blocking.

    Raises:
        StartError: it cannot be made; the tenant has put something else there, say, or has no disk left.
        NotFoundError: there is no such user any more.
    """
    directories = [Directory(user.home_dir), Directory("sandboxes", make=True), Directory(service_id, make=True)]
    with job(host, user, ["/bin/true"], directories=directories) as true:
        true.wait()
