"""Limits on disks as a value: checked when made, and rendered to lines of `io.max` (cgroup-v2.rst, "IO")."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from .errors import FormatError
from .formats import parse_bytes, parse_count

__all__ = ["DeviceLimits", "IoMax", "check_io_max"]

_ACCEPTED = 'give disks with their limits, such as {"/dev/vda": {"wbps": "10M", "riops": 500}}'


@dataclass(frozen=True, kw_only=True)
class IoMax:
    """What may go to and from one disk each second; None leaves it alone, `"max"` is no limit.

    Attributes:
        rbps: bytes read.
        wbps: bytes written. What goes through the page cache counts when it is written back.
        riops: read operations.
        wiops: write operations.

    Raises:
        FormatError: a value that can never be right, or none at all.
    """

    rbps: int | str | None = None
    wbps: int | str | None = None
    riops: int | str | None = None
    wiops: int | str | None = None

    def __post_init__(self) -> None:
        for name in _NAMES:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _check(name, value))
        if not self.to_dict():
            raise FormatError("a disk has no limits", remedy=f"give one or more of {', '.join(_NAMES)}")

    @classmethod
    def make(cls, value: Any) -> Self:
        """Take one as it is, as a mapping, or as text: `"rbps=1M wiops=100"`."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            words = [word.partition("=") for word in value.split()]
            value = {name: number for name, _, number in words}
        if not isinstance(value, Mapping):
            raise FormatError(f"io_max of a disk cannot be {value!r}", remedy=_ACCEPTED, value=str(value))
        if unknown := sorted(str(name) for name in value if name not in _NAMES):
            raise FormatError(f"no such disk limit: {', '.join(unknown)}", remedy=f"choose from {', '.join(_NAMES)}")
        return cls(**value)

    def to_dict(self) -> dict[str, int | str]:
        """What is asked for: without the fields that are None."""
        return {name: value for name in _NAMES if (value := getattr(self, name)) is not None}

    def render(self) -> str:
        """What stands behind the device in a line of `io.max`."""
        return " ".join(f"{name}={value}" for name, value in self.to_dict().items())


_NAMES = tuple(item.name for item in fields(IoMax))


def _check(name: str, value: Any) -> int | str:
    what = f"io_max {name}"
    number = parse_bytes(value, what=what) if name.endswith("bps") else parse_count(value, what=what)
    if number == 0:
        raise FormatError(f"{what} cannot be {value!r}", remedy='give 1 or more, or "max"', value=str(value))
    return number


class DeviceLimits(Mapping[str, IoMax]):
    """Disks and their limits; a mapping that cannot change, and can be hashed."""

    __slots__ = ("_limits",)

    def __init__(self, limits: Mapping[str, IoMax]) -> None:
        self._limits = dict(sorted(limits.items()))

    def __getitem__(self, device: str) -> IoMax:
        return self._limits[device]

    def __iter__(self) -> Iterator[str]:
        return iter(self._limits)

    def __len__(self) -> int:
        return len(self._limits)

    def __hash__(self) -> int:
        return hash(frozenset(self._limits.items()))

    def __repr__(self) -> str:
        return repr(self._limits)


def check_io_max(value: Any, name: str) -> DeviceLimits:
    """Read limits by device: a path such as `/dev/vda`, or numbers such as `8:0`. Raises `FormatError`."""
    if isinstance(value, DeviceLimits):
        return value
    if not isinstance(value, Mapping) or not value:
        raise FormatError(f"{name} cannot be {value!r}", remedy=_ACCEPTED, value=str(value))
    for device in value:
        if not isinstance(device, str) or not device or set(device) & set("\0\n"):
            raise FormatError(f"{name} cannot be for {device!r}", remedy=_ACCEPTED, value=str(device))
    return DeviceLimits({device: IoMax.make(limits) for device, limits in value.items()})
