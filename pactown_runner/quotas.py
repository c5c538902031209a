"""User quotas of file systems: what a uid takes, which the kernel knows at once, and the most that it may take.

By uid and not by project: a file's owner can change the project that it counts for. So all files of a uid on the file
system count, wherever there they lie. Limits hold for whoever lacks CAP_SYS_RESOURCE: for a tenant's processes, and for
those that work on files in its place, but not for root.

quotactl_fd(2) takes any directory for the file system that it is on, and needs no device: Linux 5.14.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from errno import ENOENT
from pathlib import Path
from typing import Literal, NamedTuple

from cgroups import MAX

from .config import Settings
from .errors import LimitsError
from .models import IsolatedUser
from .registry import Registry
from .tiers import Tier

__all__ = ["DiskLimits", "Quotas", "State", "TenantQuotas", "UserQuota", "quotas_at"]

State = Literal["enforced", "counted", "off"]
"""What a file system does with user quotas: it holds users to their limits, it only counts, or neither."""

_QUOTACTL_FD = 443  # on every architecture
_USRQUOTA = 0
_Q_GETQUOTA, _Q_SETQUOTA, _Q_XGETQSTAT = 0x800007, 0x800008, (ord("X") << 8) + 5
_DQBLK = struct.Struct("8QI4x")
"""`struct if_dqblk` of linux/quota.h: limits of space, hard and soft, in KiB, and the bytes in use; the same of inodes;
two times; and which of all these are to be written."""
_QIF_BLIMITS, _QIF_ILIMITS = 1, 4
_QSTAT_BYTES = 256
_QSTAT_FLAGS = struct.Struct("2xH")  # of `struct fs_quota_stat`, linux/dqblk_xfs.h; it has 80 bytes
_ACCOUNTED, _ENFORCED = 1, 2
_KIB = 1024
_WITHOUT = "set neither tenant_disk_max nor tenant_inodes_max, nor for a tier"
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class UserQuota:
    """What a uid takes on a file system, by the kernel's count, and the most that it may take.

    Attributes:
        bytes: on the disk.
        inodes: files, folders, links and all else; one with several names counts once.
        disk_max, inodes_max: None for no limit.
    """

    bytes: int
    inodes: int
    disk_max: int | None
    inodes_max: int | None


class Quotas:
    """The user quotas of one file system. To be used within `quotas_at`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def state(self) -> State:
        """What the file system does with them."""
        found = ctypes.create_string_buffer(_QSTAT_BYTES)
        try:
            _quotactl(self._fd, _Q_XGETQSTAT, 0, found)
        except OSError:
            return "off"
        (flags,) = _QSTAT_FLAGS.unpack_from(found)
        return "off" if not flags & _ACCOUNTED else "enforced" if flags & _ENFORCED else "counted"

    def of(self, uid: int) -> UserQuota | None:
        """What this uid takes; None if nobody counts it here, or we may not ask."""
        try:
            limit, _, used, inode_limit, _, inodes, *_ = self._read(uid)
        except OSError:
            return None
        return UserQuota(used, inodes, limit * _KIB or None, inode_limit or None)

    def limit(self, uid: int, disk_max: int | str | None, inodes_max: int | str | None) -> None:
        """Set the most that this uid may take. What it has already stays, and only lets it take no more.

        Args:
            disk_max: bytes, of which whole KiB count, or `max`; None leaves it as it is.
            inodes_max: how many, or `max`; None leaves it as it is.

        Raises:
            LimitsError: it would not be enforced here, or cannot be set.
        """
        if _any_limit(disk_max, inodes_max):
            self.require()
        elif self.state == "off":
            return
        try:
            self._limit(uid, disk_max, inodes_max)
        except OSError as error:
            raise LimitsError(
                f"the disk quota of uid {uid} on {self._where()} cannot be set: {error.strerror}",
                remedy="in a container, give it CAP_SYS_ADMIN on the host, or set quotas there",
            ) from error

    def require(self) -> None:
        """Raise `LimitsError` if users would not be held to limits here."""
        if (state := self.state) != "enforced":
            raise LimitsError(
                f"the file system of {self._where()} does not hold users to disk quotas: "
                + ("it only counts" if state == "counted" else "it has none"),
                remedy=f"{self.remedy()}; or {_WITHOUT}",
            )

    def _limit(self, uid: int, disk_max: int | str | None, inodes_max: int | str | None) -> None:
        there = self._read(uid)
        wanted = list(there)
        for value, index, valid, unit in ((disk_max, 0, _QIF_BLIMITS, _KIB), (inodes_max, 3, _QIF_ILIMITS, 1)):
            limit = 0 if value == MAX else there[index] if value is None else int(value) // unit
            if limit != there[index]:
                wanted[index] = limit
                wanted[8] |= valid
        if wanted[8] != 0:
            block = ctypes.create_string_buffer(_DQBLK.pack(*wanted), _DQBLK.size)
            _quotactl(self._fd, _Q_SETQUOTA, uid, block)

    def _read(self, uid: int) -> tuple[int, ...]:
        """The fields of the uid's `struct if_dqblk`, of which none is to be written."""
        block = ctypes.create_string_buffer(_DQBLK.size)
        try:
            _quotactl(self._fd, _Q_GETQUOTA, uid, block)
        except OSError as error:
            if error.errno != ENOENT:  # xfs has nothing about those who never had anything
                raise
        return (*_DQBLK.unpack(block)[:8], 0)

    def remedy(self) -> str:
        """What makes this file system, or another one, hold users to their limits."""
        mount = _mount_of(self._fd)
        afresh = f"then mount {mount.point} with the option usrquota, in /etc/fstab as well"
        match mount.kind, self.state:
            case "ext4", "counted":
                return f"quotaon -u {mount.point}; and the option usrquota in /etc/fstab"
            case "ext4", _ if mount.point != "/":
                return f"unmount {mount.point}; tune2fs -O quota {mount.source}; {afresh}"
            case "xfs", _ if mount.point != "/":
                return f"unmount {mount.point}; {afresh}"
        return "keep users_base on a file system of its own: mkfs.ext4 -O quota, or xfs; mounted with usrquota"

    def _where(self) -> str:
        return os.readlink(f"/proc/self/fd/{self._fd}")


class DiskLimits(NamedTuple):
    """What a tenant may take of the file system that homes are on; see `Quotas.limit`."""

    disk_max: int | str | None
    inodes_max: int | str | None

    @property
    def any(self) -> bool:
        """Whether there is a limit to hold anybody to."""
        return _any_limit(*self)

    def succeeding(self, before: DiskLimits) -> DiskLimits:
        """What to set so that these hold where others did: also that what is limited no more is not."""
        return DiskLimits(
            *(MAX if new is None and old is not None else new for new, old in zip(self, before, strict=True))
        )


class TenantQuotas:
    """What the settings, and tiers, say of each tenant's disk, and whom this process holds to it already. Thread-safe.

    Args:
        settings: those of the state.
        registry: says who has which tier.
    """

    def __init__(self, settings: Settings, registry: Registry) -> None:
        self._root_mode = settings.root_mode
        self._base = Path(os.path.abspath(settings.users_base))
        self._registry = registry
        self._general = DiskLimits(settings.tenant_disk_max, settings.tenant_inodes_max)
        self._of_tiers = {tier.name: self._of_tier(tier) for tier in settings.tiers}
        self._limiting = any(limits.any for limits in (self._general, *self._of_tiers.values()))
        self._held: set[int] = set()

    def _of_tier(self, tier: Tier) -> DiskLimits:
        own = (tier.tenant_disk_max, tier.tenant_inodes_max)
        return DiskLimits(
            *(most if of_tier is None else of_tier for of_tier, most in zip(own, self._general, strict=True))
        )

    def limits(self, tier: str | None) -> DiskLimits:
        """Those of the tenants of a tier, or of none."""
        return self._general if tier is None else self._of_tiers.get(tier, self._general)

    def check(self, keys: Iterable[str | None]) -> None:
        """See that users with these keys could be held to their limits; None stands for one who is to be made.

        Raises:
            LimitsError: one of them could not.
        """
        if self._limiting:
            try:
                self._require()
            except LimitsError:
                if any(self._limits_of(key).any for key in keys):
                    raise

    def hold(self, user: IsolatedUser, *, anew: bool = False) -> None:
        """Hold a user to its limits.

        Args:
            anew: also if this process has done so before.

        Raises:
            LimitsError: they would not be enforced here, or cannot be set.
        """
        if anew or user.linux_uid not in self._held:
            self._set(user, self._limits_of(user.key))

    def change(self, user: IsolatedUser, before: str | None, after: str | None) -> None:
        """Hold a user to another tier's limits. Raises `LimitsError`, and changes nothing, if that cannot be done."""
        if (limits := self.limits(after)) != self.limits(before):
            self._set(user, limits.succeeding(self.limits(before)))

    def lift(self, uid: int) -> None:
        """Leave no limit to whoever has this uid next. Raises `LimitsError` if that cannot be done."""
        self._held.discard(uid)
        with contextlib.suppress(FileNotFoundError), quotas_at(self._base) as quotas:
            found = quotas.of(uid)
            if found is not None and (found.disk_max, found.inodes_max) != (None, None):
                quotas.limit(uid, MAX, MAX)

    def _limits_of(self, key: str | None) -> DiskLimits:
        return self._general if key is None else self.limits(self._registry.standings.get(key).tier)

    def _require(self) -> None:
        if not self._root_mode:
            raise LimitsError(
                "tenants' disk cannot be limited without root: all their files are the same user's",
                remedy=f"run as root, or {_WITHOUT}",
            )
        there = next(path for path in (self._base, *self._base.parents) if os.path.exists(path))
        with quotas_at(there.resolve()) as quotas:
            quotas.require()

    def _set(self, user: IsolatedUser, limits: DiskLimits) -> None:
        if not self._root_mode:
            # Users have one uid then, so that it tells of none that it is held.
            if limits.any:
                self._require()
            return
        if limits != (None, None):
            try:
                with quotas_at(user.home_dir) as quotas:
                    quotas.limit(user.linux_uid, *limits)
            except OSError as error:
                raise LimitsError(f"cannot look at the home {user.home_dir}: {error.strerror}") from error
        self._held.add(user.linux_uid)


@contextlib.contextmanager
def quotas_at(directory: Path) -> Iterator[Quotas]:
    """The user quotas of the file system that this directory is on.

    Raises:
        OSError: it is not there, or a link.
    """
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield Quotas(fd)
    finally:
        os.close(fd)


def _any_limit(*values: int | str | None) -> bool:
    return any(value not in (None, MAX) for value in values)


class _Mount(NamedTuple):
    point: str
    kind: str
    source: str


def _mount_of(fd: int) -> _Mount:
    """The mount that an open file was reached by, proc(5)."""
    match = re.search(r"^mnt_id:\s*(\d+)$", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE)
    assert match is not None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        words, (kind, source, *_) = before.split(), after.split(" ")
        if words[0] == match[1]:
            return _Mount(*(_OCTAL.sub(lambda code: chr(int(code[1], 8)), word) for word in (words[4], kind, source)))
    return _Mount("the file system", "unknown", "its device")  # of another mount namespace


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _quotactl(fd: int, command: int, uid: int, block: ctypes.Array[ctypes.c_char]) -> None:
    """quotactl_fd(2), for user quotas; raises `OSError`."""
    number = (command << 8 | _USRQUOTA) & 0xFFFFFFFF
    arguments = (ctypes.c_uint(fd), ctypes.c_uint(number), ctypes.c_uint(uid), ctypes.byref(block))
    if _libc().syscall(ctypes.c_long(_QUOTACTL_FD), *arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
