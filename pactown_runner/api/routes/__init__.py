"""What is done for each row of the table."""

from __future__ import annotations

from . import executions, files, health, sandboxes, streams, users

__all__ = ["executions", "files", "health", "sandboxes", "streams", "users"]
