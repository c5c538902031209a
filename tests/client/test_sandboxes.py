"""Sandboxes through the client: what the server does, in the library's own words."""

from __future__ import annotations

import pytest

from pactown_runner import Client
from tests.api.conftest import USER, Api
from tests.supervising import spec

pytestmark = [pytest.mark.host]


async def test_a_service_lives_through_a_client(api: Api, client: Client) -> None:
    assert (await client.health()).status == "ok"
    assert (await client.ready()).status == "ready"
    made = await client.start(spec(["sleep", "600"]))
    sandbox = api.supervisor.get(USER, "api")
    assert made.isolation == sandbox.isolation
    assert made == await client.get_sandbox(USER, "api")
    assert await client.list_sandboxes() == [made]
    ended = await client.stop(USER, "api", grace=0)
    assert ended.outcome is not None
