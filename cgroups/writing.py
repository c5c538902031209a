"""Writing limits: all or nothing, and an error that says what is missing and why."""

from __future__ import annotations

import errno
import mmap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import files
from .controllers import missing_controllers, read_controllers
from .devices import disk_number, weight_files
from .errors import CgroupError, FormatError, LimitRefusedError, NotSupportedError
from .formats import format_bytes, parse_cpus, parse_nested, parse_swaps, parse_value
from .limits import Limits

__all__ = ["write_limits"]

RECLAIM_TIMEOUT = 2.0
"""Seconds in which memory above a lowered `memory.max` must have been reclaimed."""

_RECLAIM_PAUSE = 0.02
_SWAPS = Path("/proc/swaps")
_SWAP_FILE, _HIGH, _MAX, _CURRENT = "memory.swap.max", "memory.high", "memory.max", "memory.current"
_CPUS, _IO_MAX, _IO_WEIGHT = "cpuset.cpus", "io.max", "io.weight"
_NO_IO_LIMIT = "rbps=max wbps=max riops=max wiops=max"


@dataclass(slots=True)
class _Line:
    """What is to be written to a control file, and what puts it back."""

    file: str
    text: str
    former: str


def write_limits(dir_fd: int, limits: Limits) -> dict[str, str]:
    """Write every limit, and return what the kernel answers when each file is read back.

    All or nothing: when one is refused, those written before it get their former values again.

    `memory.max` is lowered without a kill: a value below what is in use makes the kernel kill at once when it cannot
    reclaim enough, so `memory.high` goes down first, which reclaims and slows down, and only when what is in use fits
    does `memory.max` follow. What asks for more after that meets the new limit as it would any other.

    Raises:
        NotSupportedError: controllers or files are missing; nothing was written.
        LimitRefusedError: the kernel refused a value, or memory in use cannot be reclaimed.
        GoneError: the cgroup was removed.
        CgroupError: anything else; what could not be put back is added to it as a note.
    """
    # Read before anything is written: it is needed to go back, and it shows what is missing while nothing is done.
    lines = list(_plan(dir_fd, limits))
    lowered = _lower_memory(dir_fd, lines)
    written: list[_Line] = []
    try:
        for line in lines:
            if lowered and line.file == _MAX:
                _wait_for_room(dir_fd, line)
            written.append(line)
            _write(dir_fd, line.file, line.text)
            if line.file == _CPUS and line.text:
                _check_cpus(dir_fd, line)
        return {name: files.read(dir_fd, name).strip() for name in dict.fromkeys(line.file for line in lines)}
    except BaseException as error:
        _put_back(dir_fd, written, error)
        raise


def _plan(dir_fd: int, limits: Limits) -> Iterator[_Line]:
    lines = limits.render(disk=disk_number)
    disks = [text.partition(" ")[0] for name, text in lines if name == _IO_MAX]
    if len(set(disks)) < len(disks):
        raise FormatError("io_max names one disk twice", remedy="give each disk once; a partition stands for its disk")
    for name, text in lines:
        if name == _IO_WEIGHT:
            if "io" not in read_controllers(dir_fd):
                raise missing_controllers(dir_fd, limits.controllers() - read_controllers(dir_fd))
            for file in weight_files(dir_fd):
                yield _Line(file, text, files.read(dir_fd, file).partition("\n")[0])
        elif (former := _former(dir_fd, name, limits)) is not None:
            yield _Line(name, text, _former_of_disk(former, text) if name == _IO_MAX else former)


def _former(dir_fd: int, name: str, limits: Limits) -> str | None:
    """The file's present value; None if it may be passed over."""
    text = files.read_optional(dir_fd, name)
    if text is not None:
        return text.strip()
    if missing := limits.controllers() - read_controllers(dir_fd):
        raise missing_controllers(dir_fd, missing)
    path = f"{files.directory_path(dir_fd)}/{name}"
    if name != _SWAP_FILE:
        raise NotSupportedError(
            f"cannot limit {path}: this kernel has no such control file",
            remedy="use a newer kernel, or ask for no such limit; the root cgroup has none at all",
            path=path,
        )
    # Without swap on the host, "no swap" holds by itself. An explicit wish is not ours to drop.
    if limits.swap_implied and not _host_has_swap():
        return None
    raise NotSupportedError(
        f"cannot limit {path}: this kernel does not account for swap",
        remedy="boot with swapaccount=1, or switch swap off and leave memory_swap_max out",
        path=path,
    )


def _host_has_swap() -> bool:
    try:
        return parse_swaps(_SWAPS.read_text())
    except FileNotFoundError:  # a kernel without CONFIG_SWAP
        return False


def _former_of_disk(former: str, line: str) -> str:
    disk = line.partition(" ")[0]
    limits = parse_nested(former).get(disk)
    return f"{disk} " + (" ".join(f"{name}={value}" for name, value in limits.items()) if limits else _NO_IO_LIMIT)


def _write(dir_fd: int, name: str, text: str) -> None:
    if name != _CPUS or text:
        files.write(dir_fd, name, text)
        return
    try:
        files.write(dir_fd, name, "\n")  # the kernel sees no write of 0 bytes
    except CgroupError as error:
        if error.errno != errno.ENOSPC:
            raise
        # A cgroup in use cannot have an empty list again; that of the cgroup above means the same.
        files.write(dir_fd, name, files.read(dir_fd, "../cpuset.cpus.effective").strip())


def _check_cpus(dir_fd: int, line: _Line) -> None:
    # CPUs that are not there, or not the parent's, are taken without a word, and then those of the parent count.
    effective = files.read(dir_fd, "cpuset.cpus.effective").strip()
    if not parse_cpus(effective) <= parse_cpus(line.text):
        path = f"{files.directory_path(dir_fd)}/{line.file}"
        raise LimitRefusedError(
            f"cannot write {line.text!r} to {path}: the kernel has the CPUs {effective} instead",
            remedy=f"choose from {effective}",
            path=path,
            value=line.text,
        )


# Lowering memory.max


def _lower_memory(dir_fd: int, lines: list[_Line]) -> bool:
    """Where `memory.max` is to go down on a cgroup in use, frame it with the steps that make room first."""
    place = next((number for number, line in enumerate(lines) if line.file == _MAX), None)
    if place is None or lines[place].text == "max":
        return False
    line = lines[place]
    former = parse_value(line.former)
    if former != "max" and former <= int(line.text):
        return False
    if files.read(dir_fd, _CURRENT).strip() == "0":  # one just made, as a rule
        return False
    high = next((other for other in lines if other.file == _HIGH), None)
    if high is None:
        present = files.read(dir_fd, _HIGH).strip()
        high = _Line(_HIGH, present, present)
        lines.insert(place, high)
        place += 1
    if high.text == "max" or int(high.text) > int(line.text):
        lines.insert(place + 1, _Line(_HIGH, high.text, high.former))
        high.text = line.text
    return True


def _wait_for_room(dir_fd: int, line: _Line) -> None:
    limit = int(line.text) // mmap.PAGESIZE * mmap.PAGESIZE
    deadline = time.monotonic() + RECLAIM_TIMEOUT
    while (used := int(files.read(dir_fd, _CURRENT))) > limit:
        if time.monotonic() >= deadline:
            path = f"{files.directory_path(dir_fd)}/{line.file}"
            raise LimitRefusedError(
                f"cannot lower {path} to {format_bytes(limit)}: {format_bytes(used)} are in use, "
                "and the kernel cannot reclaim enough",
                remedy="allow more memory or swap, or end what uses it",
                path=path,
                value=line.text,
            )
        time.sleep(_RECLAIM_PAUSE)
        # Each write makes the kernel reclaim once more, as it does not do by itself while nothing is allocated.
        files.write(dir_fd, _HIGH, files.read(dir_fd, _HIGH).strip())


def _put_back(dir_fd: int, written: list[_Line], error: BaseException) -> None:
    for line in reversed(written):
        try:
            _write(dir_fd, line.file, line.former)
        except CgroupError as second:
            error.add_note(f"{line.file} could not be set back to {line.former!r}: {second}")
