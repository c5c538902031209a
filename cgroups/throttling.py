"""How often `cpu.max` makes a cgroup wait. The kernel has no event for it; of two readings comes a share."""

from __future__ import annotations

from typing import NamedTuple

from . import files
from .errors import NotSupportedError
from .events import HasFileno
from .formats import CPU_PERIOD_USEC, parse_flat

__all__ = ["Throttled", "read_throttled"]


class Throttled(NamedTuple):
    """How often and how long a cgroup has waited for the quota of `cpu.max` since it was made.

    Attributes:
        periods: in so many periods it has used up its quota (`nr_throttled`).
        usec: microseconds that it has waited, added up over the CPUs on which it would have run (`throttled_usec`).
    """

    periods: int
    usec: int

    def share_since(self, before: Throttled, seconds: float) -> float:
        """In which share of the time since then, 0 to 1, it has used up its quota, with periods as `Limits` makes them.

        Args:
            before: what was read then.
            seconds: how long ago, more than 0.
        """
        return min(1.0, (self.periods - before.periods) * CPU_PERIOD_USEC / 1e6 / seconds)


def read_throttled(cgroup: int | HasFileno) -> Throttled:
    """Read how often a cgroup was throttled: one file, `cpu.stat`.

    Args:
        cgroup: a `Cgroup`, or the descriptor of its directory.

    Raises:
        NotSupportedError: the CPU is not controlled here.
        GoneError: the cgroup was removed.
    """
    dir_fd = cgroup if isinstance(cgroup, int) else cgroup.fileno()
    values = parse_flat(files.read(dir_fd, "cpu.stat"))
    try:
        return Throttled(values["nr_throttled"], values["throttled_usec"])
    except KeyError:
        path = files.directory_path(dir_fd)
        raise NotSupportedError(f"the CPU controller is not enabled for {path}", path=path) from None
