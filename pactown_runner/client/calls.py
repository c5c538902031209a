"""What all calls have in common."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

from ..errors import ConfigError
from .answers import understood
from .errors import MissingExtraError

if TYPE_CHECKING:
    from ..config import Settings
    from .connection import Connection, Options

__all__ = ["TIMEOUT", "Calls", "default_socket"]

TIMEOUT = 30.0
"""Seconds, see `Client`."""

PAGE = 1000
"""Items that a list's pages hold."""

T = TypeVar("T")


class Calls:
    """Calls of a server, see `Client`."""

    def __init__(
        self, address: str | Path | None = None, *, token: str | None = None, timeout: float = TIMEOUT
    ) -> None:
        self._connection: Connection = _connection(_where(address), token, timeout)

    @property
    def address(self) -> str | Path:
        """Where the server is: a socket's path, or a URL."""
        return self._connection.address

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections, and end with them what is under way."""
        await self._connection.aclose()

    async def _ask(self, of: Callable[[Mapping[str, Any]], T], method: str, path: str, **options: Unpack[Options]) -> T:
        """Ask, and read the answer; with the `options` of a connection."""
        found = await self._connection.call(method, path, **options)
        with understood():
            return of(found)

    async def _pages(
        self, of: Callable[[Mapping[str, Any]], T], path: str, name: str, **params: Any
    ) -> AsyncGenerator[T, None]:
        """All items of a list that comes in pages."""
        after: str | None = None
        while True:
            page = await self._connection.call("GET", path, params={**params, "limit": PAGE, "after": after})
            with understood():
                items, after = [of(item) for item in page[name]], page.get("next")
            for item in items:
                yield item
            if after is None:
                return


def default_socket(settings: Settings, *, remedy: str = "give its address: http://HOST:PORT") -> Path:
    """Where the server listens that whoever has these settings means.

    Raises:
        ConfigError: it has no socket; with the `remedy`.
    """
    path = settings.api_socket_path
    if path is None:
        raise ConfigError("the server has no socket: api_socket is empty", remedy=remedy)
    if not settings.root_mode and not path.exists():
        # The settings are of what this user would run itself; the host's server may still be open to it.
        from ..config import Settings  # noqa: PLC0415 - only who asks for them needs them

        for_all = Settings().api_socket_path
        if for_all is not None and for_all.exists():
            return for_all
    return path


def _where(address: str | Path | None) -> str | Path:
    if address is None:
        from ..config import Settings  # noqa: PLC0415 - only who asks for them needs them

        return default_socket(Settings.load())
    return address if isinstance(address, str) and "://" in address else Path(address)


def _connection(address: str | Path, token: str | None, timeout: float) -> Connection:
    try:
        from .connection import Connection  # noqa: PLC0415 - httpx takes 70 ms, and is an extra
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "pactown_runner":
            raise
        raise MissingExtraError(
            f"a client needs {error.name}, which is not installed", remedy="pip install 'pactown-runner[api]'"
        ) from error
    return Connection(address, token, timeout)
