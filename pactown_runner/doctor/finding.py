"""What a check answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

__all__ = ["Finding", "Status", "fail", "ok", "warn"]

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One thing about this host.

    Attributes:
        check: a stable name, such as `limits.memory`.
        status: `ok`; `warn` where sandboxes run and something is weaker or missing; `fail` where something essential
            does not work.
        message: what works, or what does not and what follows from it.
        remedy: what mends it, or None.
    """

    check: str
    status: Status
    message: str
    remedy: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        """Convert to a JSON-serializable dictionary."""
        return asdict(self)


def ok(check: str, message: str) -> Finding:
    """It works."""
    return Finding(check, "ok", message)


def warn(check: str, message: str, remedy: str | None = None) -> Finding:
    """It works less well than it could."""
    return Finding(check, "warn", message, remedy)


def fail(check: str, message: str, remedy: str | None = None) -> Finding:
    """Something essential does not work."""
    return Finding(check, "fail", message, remedy)
