"""Limits as a value: checked when made, and rendered to the control files that hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Self

from .errors import FormatError
from .formats import MAX, parse_bytes, parse_count, parse_cpu, parse_cpus, render_cpu_max, render_cpus
from .io_limits import IoMax, check_io_max

__all__ = ["Limits"]

_MIN_WEIGHT, _MAX_WEIGHT = 1, 10_000


def _positive(read: Callable[..., int | str]) -> Callable[[Any, str], int | str]:
    def check(value: Any, name: str) -> int | str:
        number = read(value, what=name)
        # In other tools 0 means "no limit"; to the kernel it means that nothing can run.
        if number == 0:
            raise FormatError(
                f"{name} cannot be {value!r}",
                remedy='give 1 or more, or "max" for no limit',
                value=str(value),
            )
        return number

    return check


def _size(value: Any, name: str) -> int | str:
    return parse_bytes(value, what=name)


def _cores(value: Any, name: str) -> float | str:
    return parse_cpu(value, what=name).cores


def _weight(value: Any, name: str) -> int:
    if type(value) is not int or not _MIN_WEIGHT <= value <= _MAX_WEIGHT:
        raise FormatError(
            f"{name} cannot be {value!r}",
            remedy=f"give a whole number from {_MIN_WEIGHT} to {_MAX_WEIGHT}; the kernel's default is 100",
            value=str(value),
        )
    return value


def _cpus(value: Any, name: str) -> str:
    return render_cpus(parse_cpus(value, what=name))


def _switch(value: Any, name: str) -> bool:
    if type(value) is not bool:
        raise FormatError(f"{name} cannot be {value!r}", remedy="give true or false", value=str(value))
    return value


# In the order of writing: what softens a breach (group kill, reclaim and throttling at `high`) is in place
# before the hard limits, because a `memory.max` below the present usage can kill as soon as it is written.
_CHECKS: Final[dict[str, Callable[[Any, str], Any]]] = {
    "memory_oom_group": _switch,
    "memory_swap_max": _size,
    "memory_min": _size,
    "memory_low": _size,
    "memory_high": _positive(parse_bytes),
    "memory_max": _positive(parse_bytes),
    "cpu_weight": _weight,
    "cpu_max": _cores,
    "pids_max": _positive(parse_count),
    "cpuset_cpus": _cpus,
    "io_max": check_io_max,
    "io_weight": _weight,
}
_FILES: Final = {name: name.replace("_", ".") for name in _CHECKS}
_RENDER: Final[dict[str, Callable[[Any], str]]] = {
    "memory_oom_group": lambda value: str(int(value)),
    "cpu_max": lambda value: render_cpu_max(parse_cpu(value)),
    "io_weight": lambda value: f"default {value}",
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a cgroup may use, in the kernel's words (cgroup-v2.rst, "Controllers"); None leaves it alone.

    Values are normalised: sizes to bytes, `cpu_max` to cores, and `"max"` (no limit) stays as it is. The
    kernel rounds sizes down to whole pages.

    What is in use already is not taken away, except by `memory_high`, above which it is swapped or written out:
    `Cgroup.apply` does not lower `memory_max` below what cannot be reclaimed, and with `pids_max` below the present
    number nothing ends, but no fork succeeds until it is below.

    Attributes:
        memory_max: bytes beyond which the kernel kills. With a number here and no `memory_swap_max`, swap is
            0.
        memory_high: bytes beyond which the kernel reclaims and slows down.
        memory_low: bytes that are spared while others have something to reclaim.
        memory_min: bytes that are never reclaimed.
        memory_swap_max: bytes of swap.
        memory_oom_group: whether the kernel, when it kills for want of memory, kills the whole cgroup.
        cpu_max: cores, such as `0.5` or `"50%"`; at least 0.01.
        cpu_weight: share against siblings when the CPU is contended, 1 to 10000; the kernel's default is 100.
        pids_max: tasks (processes and their threads).
        cpuset_cpus: the CPUs that it may run on, such as `"0-1,3"`; `""` is those of the cgroup above.
        io_max: by disk, a path such as `/dev/vda` or numbers such as `8:0`, what may go to and from it each second:
            an `IoMax`, a mapping of its fields, or text such as `"wbps=10M riops=500"`. A partition stands for its
            disk. Disks that are not named stay as they are.
        io_weight: share of disks against siblings when they are contended, 1 to 10000 (with the BFQ scheduler to
            1000); the kernel's default is 100.

    Raises:
        FormatError: a value that can never be right, named together with what is accepted.
    """

    memory_max: int | str | None = None
    memory_high: int | str | None = None
    memory_low: int | str | None = None
    memory_min: int | str | None = None
    memory_swap_max: int | str | None = None
    memory_oom_group: bool | None = None
    cpu_max: float | str | None = None
    cpu_weight: int | None = None
    pids_max: int | str | None = None
    cpuset_cpus: str | None = None
    io_max: Mapping[str, IoMax | Mapping[str, int | str] | str] | None = None
    io_weight: int | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, check(value, name))

    @property
    def swap_implied(self) -> bool:
        """Whether swap is 0 only because `memory_max` is set, and not because it was asked for."""
        return self.memory_swap_max is None and self.memory_max is not None and self.memory_max != MAX

    def render(self, *, disk: Callable[[str], str] = str) -> list[tuple[str, str]]:
        """The control files and their texts, in an order that is safe to write to a cgroup in use.

        Args:
            disk: what to write for a disk's name as it was given; each disk has a line of its own.
        """
        lines: list[tuple[str, str]] = []
        for name, file in _FILES.items():
            value = getattr(self, name)
            if name == "memory_swap_max" and self.swap_implied:
                lines.append((file, "0"))
            elif name == "io_max" and value is not None:
                lines += [(file, f"{disk(device)} {limits.render()}") for device, limits in value.items()]
            elif value is not None:
                render = _RENDER.get(name, str)
                lines.append((file, render(value)))
        return lines

    def controllers(self) -> frozenset[str]:
        """The controllers that these limits need, such as `memory`."""
        return frozenset(name.partition("_")[0] for name in _CHECKS if getattr(self, name) is not None)

    def merge(self, other: Limits) -> Limits:
        """These limits, with each that `other` gives put in their place."""
        return replace(self, **other.to_dict())

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        return any(getattr(self, name) is not None for name in _CHECKS)

    def to_dict(self) -> dict[str, Any]:
        """What is asked for, as JSON can hold it: without the fields that are None."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if self.io_max is not None:
            values["io_max"] = {device: IoMax.make(limits).to_dict() for device, limits in self.io_max.items()}
        return values

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The reverse of `to_dict`; values may also be written as people write them.

        Raises:
            FormatError: an unknown name, or a value that can never be right.
        """
        if unknown := sorted(str(name) for name in data if name not in _CHECKS):
            raise FormatError(
                f"no such limit: {', '.join(unknown)}", remedy=f"choose from {', '.join(sorted(_CHECKS))}"
            )
        return cls(**data)
