"""Disks, as the io controller sees them: their numbers, and whether anything here heeds a weight."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from . import files
from .errors import NotSupportedError
from .formats import parse_nested

__all__ = ["disk_number", "weight_files"]

_SYS_BLOCK = Path("/sys/dev/block")
_SCHEDULERS = Path("/sys/block")
_NUMBERS = re.compile(r"[0-9]+:[0-9]+", re.ASCII)
_WEIGHT, _BFQ_WEIGHT = "io.weight", "io.bfq.weight"
_MAX_DEPTH = 64


def disk_number(device: str) -> str:
    """The numbers, `major:minor`, of the whole disk that a device is or is a part of: the kernel takes no partition.

    Args:
        device: a path such as `/dev/vda1`, or numbers such as `254:1`.

    Raises:
        NotSupportedError: there is no such block device.
    """
    number = device if _NUMBERS.fullmatch(device) else _number_of(device)
    directory = _SYS_BLOCK / number
    try:
        # A partition's directory lies in that of its disk.
        if (directory / "partition").exists():
            number = (directory.resolve().parent / "dev").read_text().strip()
        elif not directory.exists():
            raise _no_disk(device, "the kernel knows of no such disk")
    except OSError as error:
        raise _no_disk(device, os.strerror(error.errno or 0)) from error
    return number


def _number_of(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError as error:
        raise _no_disk(path, os.strerror(error.errno or 0)) from error
    if not stat.S_ISBLK(status.st_mode):
        raise _no_disk(path, "not a block device")
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


def _no_disk(device: str, reason: str) -> NotSupportedError:
    return NotSupportedError(
        f"cannot limit the disk {device}: {reason}",
        remedy="lsblk lists the disks",
        path=device,
        value=device,
    )


def weight_files(dir_fd: int) -> list[str]:
    """The control files of io weights that have an effect on a disk of this host.

    `io.weight` is there whenever the kernel can do it, and does nothing until the cost model is switched on for a disk
    (`io.cost.qos`); `io.bfq.weight` acts on disks whose scheduler is BFQ.

    Raises:
        NotSupportedError: nothing here would heed a weight, or that cannot be seen.
    """
    found = []
    if files.exists(dir_fd, _WEIGHT) and _has_cost_model(dir_fd):
        found.append(_WEIGHT)
    if files.exists(dir_fd, _BFQ_WEIGHT) and _has_bfq():
        found.append(_BFQ_WEIGHT)
    if not found:
        raise NotSupportedError(
            f"cannot weigh {files.directory_path(dir_fd)}: no disk here is known to heed a weight",
            remedy="write bfq to /sys/block/DISK/queue/scheduler, or 'MAJOR:MINOR enable=1' to io.cost.qos at the top "
            "of the cgroup tree; or limit io_max instead",
            path=f"{files.directory_path(dir_fd)}/{_WEIGHT}",
        )
    return found


def _has_cost_model(dir_fd: int) -> bool:
    above = ""
    for _ in range(_MAX_DEPTH):
        above += "../"
        if not files.exists(dir_fd, f"{above}cgroup.type"):  # as only the top has none
            break
    # Seen from a container the top is hidden, and nothing is known.
    settings = parse_nested(files.read_optional(dir_fd, f"{above}io.cost.qos") or "")
    return any(disk.get("enable") == "1" for disk in settings.values())


def _has_bfq() -> bool:
    return any("[bfq]" in path.read_text() for path in _SCHEDULERS.glob("*/queue/scheduler"))
