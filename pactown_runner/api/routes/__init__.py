"""What is done for each row of the table."""

from __future__ import annotations

from . import executions, files, health, homes, sandboxes, streams, tiers, users

__all__ = ["executions", "files", "health", "homes", "sandboxes", "streams", "tiers", "users"]
