"""How much a tenant may print, and how much of it is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from ..config import Settings

__all__ = ["LogLimits"]


@dataclass(frozen=True, slots=True)
class LogLimits:
    """The settings of that name, without `log_`.

    Attributes:
        rotate_bytes: a service's log is put aside at this size.
        keep: how many that were put aside are kept of each service.
        cap_bytes: the most that all logs and spools of a tenant take.
        rate_bytes: bytes that a tenant may print per second; None for no end.
        rate_policy: what becomes of output beyond that.
    """

    rotate_bytes: int = 64 << 20
    keep: int = 3
    cap_bytes: int = 1 << 30
    rate_bytes: int | None = None
    rate_policy: Literal["block", "drop"] = "block"

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Those that the settings give."""
        return cls(
            rotate_bytes=settings.log_rotate_bytes,
            keep=settings.log_keep,
            cap_bytes=settings.log_cap_bytes,
            rate_bytes=settings.log_rate_bytes,
            rate_policy=settings.log_rate_policy,
        )
