"""A server as its callers have it: on a real socket and a real port, driven by curl and httpx."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from pactown_runner import Settings, Supervisor
from pactown_runner.api import Listening, create_app, listening
from pactown_runner.tokens import Token
from tests.supervising import soon

USER = "auth0|123456"
NOW = 4_000_000_000.0
"""What the server's clock says, by which tokens expire. Later than any clock of a machine that runs this: a server does
not begin to listen to those whose tokens have all expired."""


def token(name: str, **options: Any) -> Token:
    """A token whose secret is its name."""
    values = {"role": "admin", "expires": NOW + 3600.0, **options}
    return Token(name=name, sha256=hashlib.sha256(name.encode()).hexdigest(), **values)


TOKENS = (
    token("admin"),
    token("read", role="read"),
    token("expired", expires=NOW),
    token("brief", expires=NOW + 0.05),
    token("shop", tenant=USER),
    token("shop-read", role="read", tenant=USER),
    token("other", tenant="other"),
)


@dataclass
class Curl:
    """curl, and what it was told."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Api:
    """A server that runs, and ways to call it."""

    supervisor: Supervisor
    settings: Settings
    where: Listening
    held: AsyncExitStack
    clients: dict[str, httpx.AsyncClient] = field(default_factory=dict)

    @property
    def url(self) -> str:
        assert self.where.address is not None
        return f"http://127.0.0.1:{self.where.address[1]}"

    async def client(self, bearer: str | None = None, **options: Any) -> httpx.AsyncClient:
        """Of httpx: on the socket, or by TCP with a token."""
        if bearer is None:
            assert self.where.socket is not None
            transport = httpx.AsyncHTTPTransport(uds=str(self.where.socket))
            options = {"transport": transport, "base_url": "http://localhost", **options}
        else:
            headers = {"Authorization": f"Bearer {bearer}", **options.pop("headers", {})}
            options = {"base_url": self.url, "headers": headers, **options}
        return await self.held.enter_async_context(httpx.AsyncClient(timeout=30, **options))

    async def curl(self, *words: str, stdin: bytes | None = None) -> Curl:
        """Of curl, on the socket: a path, and whatever else."""
        *options, path = words
        command = ["curl", "-sS", "-i", "--path-as-is", "--unix-socket", str(self.where.socket)]
        return await curl(*command, *options, f"http://localhost{path}", stdin=stdin)


async def curl(*command: str, stdin: bytes | None = None) -> Curl:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await soon(process.communicate(stdin))
    assert process.returncode == 0, err
    head, _, body = out.partition(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 100"):
        head, _, body = body.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
    return Curl(int(first.split()[1]), headers, body)


@pytest.fixture
def api_settings(settings: Settings) -> Settings:
    return replace(settings, api_listen="127.0.0.1:0", tokens=TOKENS)


@asynccontextmanager
async def serving(supervisor: Supervisor, settings: Settings, **options: Any) -> AsyncIterator[Api]:
    app = create_app(supervisor, settings, clock=lambda: NOW, **options)
    async with AsyncExitStack() as held, listening(app, settings) as where:
        api = Api(supervisor, settings, where, held)
        yield api


@pytest.fixture
async def api(supervisor: Supervisor, api_settings: Settings) -> AsyncIterator[Api]:
    """A server of the test's own, on a socket and a port."""
    async with serving(supervisor, api_settings) as api:
        yield api


@pytest.fixture
def reference() -> str:
    """The document whose routes are kept to."""
    return (Path(__file__).resolve().parents[1] / "data/USER_ISOLATION.md").read_text()
