"""A running server, as commands have it: where it is, and one question after the other."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from ..client import Client
from ..client.calls import default_socket
from .interrupting import interruptible
from .options import load_settings

__all__ = ["asked"]

T = TypeVar("T")

TIMEOUT = 30.0
"""Seconds in which a server has to answer what does not last by nature."""


def asked(
    server: str | None,
    users_base: Path | None,
    config: Path | None,
    work: Callable[[Client], Awaitable[T]],
    *,
    timeout: float = TIMEOUT,
) -> T:
    """Do this with a client of the server. A signal ends it.

    Args:
        server: the address as it was given; else it is that of the settings.
        users_base, config: lead to these.

    Raises:
        Ended: it was interrupted.
        RunnerError: there is no server, or what it refuses.
    """
    address = server or default_socket(load_settings(users_base, config), remedy="--server http://HOST:PORT")

    async def ask() -> T:
        async with Client(address, token=os.environ.get("PACTOWN_TOKEN") or None, timeout=timeout) as client:
            return await work(client)

    return asyncio.run(interruptible(ask()))
