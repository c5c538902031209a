"""How the server is."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from ..schemas import Health
from ..server import server_of, server_stopping

__all__ = ["alive", "document", "ready"]


async def alive(request: Request) -> Health:
    """Whether the server answers."""
    return Health(status="ok")


async def ready(request: Request) -> Health:
    """Whether the server can do what it is for: the registry can be read, and it does not stop."""
    server = server_of(request)
    if server.stopping.is_set():
        raise server_stopping()
    # No user has a longer id than this, nor this one.
    await server.supervisor.users.get("-")
    return Health(status="ready")


async def document(request: Request) -> dict[str, Any]:
    """What can be asked of this server, as OpenAPI has it."""
    found: dict[str, Any] = request.app.openapi()
    return found
