"""A real server, on a socket and a port, clients of it, and a way between them that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from pactown_runner import Client, Settings, Supervisor
from tests.api.conftest import TOKENS, Api, serving


@pytest.fixture
def api_settings(settings: Settings) -> Settings:
    return replace(settings, api_listen="127.0.0.1:0", tokens=TOKENS)


@pytest.fixture
async def api(supervisor: Supervisor, api_settings: Settings) -> AsyncIterator[Api]:
    """A server of the test's own."""
    async with serving(supervisor, api_settings) as api:
        yield api


@pytest.fixture(params=["socket", "tcp"])
async def client(api: Api, request: pytest.FixtureRequest) -> AsyncIterator[Client]:
    """A client, once on the socket and once by TCP with a token."""
    options = {"address": api.where.socket} if request.param == "socket" else {"address": api.url, "token": "admin"}
    async with Client(**options) as client:
        yield client


class Relay:
    """What lies between a client and the server's socket: it carries bytes until it is cut, or holds them back.

    Attributes:
        path: the socket of this end.
        limit: cut when so many bytes came from the server; None for never.
    """

    def __init__(self, path: Path, server: Path) -> None:
        self.path = path
        self.limit: int | None = None
        self._server = server
        self._held = asyncio.Event()
        self._held.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._tasks)

    def hold(self) -> None:
        """Carry nothing any more."""
        self._held.clear()

    def cut(self) -> None:
        """Cut all connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        there, here = await asyncio.open_unix_connection(self._server)
        both = {writer, here}
        self._writers |= both
        try:
            await asyncio.gather(self._pump(reader, here), self._pump(there, writer, from_server=True))
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            for end in both:
                end.transport.abort()
            self._writers -= both
            self._tasks.discard(task)

    async def _pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, from_server: bool = False
    ) -> None:
        carried = 0
        while data := await source.read(1 << 16):
            await self._held.wait()
            carried += len(data)
            if from_server and self.limit is not None and carried > self.limit:
                self.cut()
                return
            target.write(data)
            await target.drain()
        with contextlib.suppress(OSError):
            target.write_eof()

    async def end(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def relaying(path: Path, server: Path) -> AsyncIterator[Relay]:
    relay = Relay(path, server)
    listening = await asyncio.start_unix_server(relay.carry, path)
    try:
        yield relay
    finally:
        listening.close()
        await relay.end()


@pytest.fixture
async def relay(api: Api) -> AsyncIterator[Relay]:
    """A way to the server of this test."""
    assert api.where.socket is not None
    async with relaying(api.where.socket.with_name("relay.sock"), api.where.socket) as relay:
        yield relay


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that many items do not fit into."""
    monkeypatch.setattr("pactown_runner.client.calls.PAGE", 3)
