"""A running server, as commands have it: where it is, and one question after the other."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from ..client import Client
from ..config import Settings
from ..errors import ConfigError
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
    address = server or _socket(load_settings(users_base, config))

    async def ask() -> T:
        async with Client(address, token=os.environ.get("PACTOWN_TOKEN") or None, timeout=timeout) as client:
            return await work(client)

    return asyncio.run(interruptible(ask()))


def _socket(settings: Settings) -> Path:
    path = settings.api_socket_path
    if path is None:
        raise ConfigError("the server has no socket: api_socket is empty", remedy="--server http://HOST:PORT")
    if not settings.root_mode and not path.exists():
        # The settings are of what this user would run itself; the host's server may still be open to it.
        for_all = Settings().api_socket_path
        if for_all is not None and for_all.exists():
            return for_all
    return path
