"""A real server, on a socket and a port, and clients of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from pactown_runner import Client, Settings, Supervisor
from tests.api.conftest import TOKENS, Api, serving


@pytest.fixture
async def api(supervisor: Supervisor, api_settings: Settings) -> AsyncIterator[Api]:
    """A server of the test's own."""
    async with serving(supervisor, api_settings) as api:
        yield api


@pytest.fixture
def api_settings(settings: Settings) -> Settings:
    return replace(settings, api_listen="127.0.0.1:0", tokens=TOKENS)


@pytest.fixture(params=["socket", "tcp"])
async def client(api: Api, request: pytest.FixtureRequest) -> AsyncIterator[Client]:
    """A client, once on the socket and once by TCP with a token."""
    options = {"address": api.where.socket} if request.param == "socket" else {"address": api.url, "token": "admin"}
    async with Client(**options) as client:
        yield client
