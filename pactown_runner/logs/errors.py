"""The one error of this package."""

from __future__ import annotations

from ..errors import RunnerError

__all__ = ["LogError"]


class LogError(RunnerError):
    """Output could not be taken or written down. What was not written is still in the FIFO or the spool."""

    code = "logs"
