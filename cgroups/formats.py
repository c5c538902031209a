"""The text of cgroupfs, both ways: values that people write, and files that the kernel writes.

Pure functions. The formats are those of the kernel's `Documentation/admin-guide/cgroup-v2.rst`, section
"Format".
"""

from __future__ import annotations

import re
from typing import Final, Literal, NamedTuple

from .errors import FormatError

__all__ = [
    "CPU_PERIOD_USEC",
    "MAX",
    "CpuQuota",
    "Max",
    "format_bytes",
    "parse_bytes",
    "parse_count",
    "parse_cpu",
    "parse_cpus",
    "parse_flat",
    "parse_nested",
    "parse_proc_cgroup",
    "parse_swaps",
    "parse_value",
    "render_cpu_max",
    "render_cpus",
]

Max = Literal["max"]
MAX: Final[Max] = "max"
"""The kernel's word for "no limit"."""

CPU_PERIOD_USEC: Final = 100_000
"""The kernel's default period; quotas are always given in it."""

_MIN_QUOTA_USEC = 1_000  # kernel/sched/core.c: min_cfs_quota_period, 1 ms
_MAX_QUOTA_USEC = 2**44 - 1  # kernel/sched/core.c: max_cfs_runtime, in microseconds
_MAX_BYTES = 2**63 - 1
_UNITS: Final = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"([0-9]{1,20})(?:\.([0-9]{1,20}))?\s*(?:([KMGT])(?:I?B)?|B)?", re.ASCII)
_CORES = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*(%?)", re.ASCII)
_COUNT = re.compile(r"[0-9]{1,20}", re.ASCII)
_CPU_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", re.ASCII)
_MAX_CPUS = 8_192  # kernel/Kconfig: the most that NR_CPUS can be


class CpuQuota(NamedTuple):
    """Microseconds of CPU time that may be used in each period of so many microseconds."""

    quota: int | Max
    period: int

    @property
    def cores(self) -> float | Max:
        """The same as a number of CPUs."""
        return MAX if self.quota == "max" else self.quota / self.period


def _refused(what: str, value: object, accepted: str) -> FormatError:
    return FormatError(f"{what} cannot be {value!r}", remedy=f"give {accepted}", value=str(value))


def parse_bytes(value: int | str, *, what: str = "a size") -> int | Max:
    """Read a size: bytes as an int, `"256M"`, `"1.5 GiB"`, or `"max"`.

    K, M, G and T are powers of 1024, in either case, with or without `B` or `iB` behind them. A fraction of a
    byte is dropped. `what` names the value in the error.

    Raises:
        FormatError: not a size, negative, or above 2**63 - 1.
    """
    accepted = 'bytes as a whole number, a size such as "256M" or "1.5G" (powers of 1024), or "max"'
    number: int
    if isinstance(value, str):
        text = value.strip().upper()
        if text == "MAX":
            return MAX
        match = _SIZE.fullmatch(text)
        if match is None:
            raise _refused(what, value, accepted)
        unit, fraction = _UNITS[match[3] or ""], match[2] or "0"
        number = int(match[1]) * unit + int(fraction) * unit // 10 ** len(fraction)  # exact, as floats are not
    elif type(value) is int:  # a bool is an int too, and never meant as a size
        number = value
    else:
        raise _refused(what, value, accepted)
    if not 0 <= number <= _MAX_BYTES:
        raise _refused(what, value, f"0 to {_MAX_BYTES} bytes")
    return number


def parse_cpu(value: float | str, *, what: str = "a CPU limit") -> CpuQuota:
    """Read an amount of CPU: cores as a number (`0.5`, `"1.5"`), a share of one core (`"50%"`), or `"max"`.

    Raises:
        FormatError: not an amount, or outside what the kernel can hold; it takes no quota below 1 ms in 100
            ms.
    """
    accepted = 'cores such as 0.5 or "1.5", a share of one core such as "50%", or "max"; at least 0.01'
    if isinstance(value, str):
        text = value.strip()
        if text.lower() == MAX:
            return CpuQuota(MAX, CPU_PERIOD_USEC)
        match = _CORES.fullmatch(text)
        if match is None:
            raise _refused(what, value, accepted)
        cores = float(match[1]) / (100 if match[2] else 1)
    elif type(value) in (int, float) and 0 < value <= _MAX_QUOTA_USEC:  # NaN is in no range
        cores = float(value)
    else:
        raise _refused(what, value, accepted)
    quota = round(cores * CPU_PERIOD_USEC)
    if not _MIN_QUOTA_USEC <= quota <= _MAX_QUOTA_USEC:
        raise _refused(what, value, accepted)
    return CpuQuota(quota, CPU_PERIOD_USEC)


def parse_count(value: int | str, *, what: str = "a count") -> int | Max:
    """Read a whole number of things, or `"max"`.

    Raises:
        FormatError: neither of the two, negative, or above 2**63 - 1.
    """
    number = -1
    if isinstance(value, str):
        text = value.strip()
        if text.lower() == MAX:
            return MAX
        if _COUNT.fullmatch(text):
            number = int(text)
    elif type(value) is int:
        number = value
    if not 0 <= number <= _MAX_BYTES:
        raise _refused(what, value, 'a whole number, 0 or more, or "max"')
    return number


def parse_cpus(value: str, *, what: str = "a list of CPUs") -> frozenset[int]:
    """Read a list of CPUs such as `"0-1,3"`, as `cpuset.cpus` has it; the empty text is the empty list.

    Raises:
        FormatError: not such a list, or a number that no CPU can have.
    """
    cpus: set[int] = set()
    for part in value.split(",") if isinstance(value, str) and value.strip() else []:
        match = _CPU_RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < _MAX_CPUS:
            raise _refused(what, value, 'CPU numbers and ranges, such as "0-1,3"')
        cpus.update(range(first, last + 1))
    if not isinstance(value, str):
        raise _refused(what, value, 'CPU numbers and ranges, such as "0-1,3"')
    return frozenset(cpus)


def render_cpus(cpus: frozenset[int]) -> str:
    """The shortest list of these CPUs, as the kernel writes it: `0-1,3`."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and parts[-1][-1] == cpu - 1:
            parts[-1][1:] = [cpu]
        else:
            parts.append([cpu])
    return ",".join("-".join(map(str, part)) for part in parts)


def render_cpu_max(quota: CpuQuota) -> str:
    """The text for `cpu.max`: quota and period in microseconds."""
    return f"{quota.quota} {quota.period}"


def parse_value(text: str) -> int | Max:
    """Read a file of one value, such as `memory.max`. Raises `FormatError` if it is not a number or `max`."""
    text = text.strip()
    if text == MAX:
        return MAX
    try:
        return int(text)
    except ValueError:
        raise FormatError(f"the kernel's answer {text!r} is not one number", value=text) from None


def parse_flat(text: str) -> dict[str, int]:
    """Read a flat-keyed file, such as `memory.events`. Raises `FormatError` if it is none."""
    try:
        return {key: int(number) for key, number in (line.split() for line in text.splitlines())}
    except ValueError:
        raise FormatError(f"the kernel's answer {text!r} is not flat-keyed", value=text) from None


def parse_nested(text: str) -> dict[str, dict[str, str]]:
    """Read a nested-keyed file, such as `memory.pressure` or `io.stat`.

    Raises:
        FormatError: a line without a key, or a word behind it that is not `name=value`.
    """
    result: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        key, *words = line.split() or [""]
        pairs = [word.partition("=") for word in words]
        if not key or "=" in key or any(not equals or not name for name, equals, _ in pairs):
            raise FormatError(f"the kernel's answer {line!r} is not nested-keyed", value=text)
        result[key] = {name: item for name, _, item in pairs}
    return result


def format_bytes(value: int | Max) -> str:
    """A size for people, such as `1.5 GiB`; `parse_bytes` reads it back, rounded to one decimal."""
    if value == "max":
        return MAX
    for unit in ("T", "G", "M", "K"):
        size = _UNITS[unit]
        if value >= size:
            return f"{f'{value / size:.1f}'.removesuffix('.0')} {unit}iB"
    return f"{value} B"


def parse_proc_cgroup(text: str) -> tuple[str | None, frozenset[str]]:
    """Read `/proc/PID/cgroup` (cgroups(7)): the path in v2, or None, and the controllers that v1 holds.

    Raises:
        FormatError: a line is not `hierarchy:controllers:path`.
    """
    path: str | None = None
    v1: set[str] = set()
    for line in text.splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            raise FormatError(f"the kernel's answer {line!r} is not hierarchy:controllers:path", value=text)
        hierarchy, controllers, place = parts
        if hierarchy == "0" and not controllers:
            path = place
        else:
            v1.update(name for name in controllers.split(",") if name and not name.startswith("name="))
    return path, frozenset(v1)


def parse_swaps(text: str) -> bool:
    """Whether `/proc/swaps` (proc_swaps(5)) lists any swap area below its heading."""
    return len(text.splitlines()) > 1
