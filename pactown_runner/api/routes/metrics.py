"""Metrics of the supervisor and its sandboxes."""

from __future__ import annotations

from fastapi import Request, Response

from ...metrics import MEDIA_TYPE
from ..server import server_of

__all__ = ["metrics"]


async def metrics(request: Request) -> Response:
    """What sandboxes do and use, and how the server is, for Prometheus: by user and service, read now."""
    return Response(await server_of(request).metrics.render(), media_type=MEDIA_TYPE)
