"""Logs and events as server-sent events: complete, resumable, never silent for long, and ended with a reason."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx
import pytest

from pactown_runner import Settings, Supervisor
from tests.api.conftest import USER, Api, serving
from tests.api.test_limits import connected
from tests.supervising import eventually, soon, spec

pytestmark = [pytest.mark.host]

LOGS = f"/runner/sandboxes/{quote(USER, safe='')}/api/logs"
COUNT = "i=0; while [ $i -lt 50 ]; do i=$((i+1)); echo $i; done; cat >/dev/null"


class Event(NamedTuple):
    event: str
    data: dict[str, Any]
    id: int | None


class Events:
    """A stream's events, as a client has them."""

    def __init__(self, answer: httpx.Response) -> None:
        self._lines = answer.aiter_lines()
        self.beats = 0

    async def next(self) -> Event | None:
        fields: dict[str, str] = {}
        async for line in self._lines:
            if line.startswith(":"):
                self.beats += 1
            elif line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif fields:
                number = fields.get("id")
                return Event(fields["event"], json.loads(fields["data"]), None if number is None else int(number))
        return None

    async def rest(self) -> list[Event]:
        found = []
        while (event := await soon(self.next())) is not None:
            found.append(event)
        return found


@asynccontextmanager
async def stream(client: httpx.AsyncClient, path: str, **options: Any) -> AsyncIterator[Events]:
    async with client.stream("GET", path, **options) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield Events(answer)


async def test_a_log_is_read_to_its_end(api: Api) -> None:
    client = await api.client()
    for word in ("one", "two"):
        await api.supervisor.run(spec(f"printf '{word}\\n\\377\\n'; echo err >&2"))
    async with stream(client, LOGS) as events:
        *records, last = await events.rest()
    assert last == Event("end", {"reason": "read"}, None)
    assert [record.id for record in records] == [1, 2, 3, 4, 5, 6]
    assert {record.event for record in records} == {"record"}
    assert sorted(record.data["line"] for record in records if record.data["stream"] == "stdout") == [
        "one",
        "two",
        "\ufffd",
        "\ufffd",
    ]
    assert [record.data["line_b64"] for record in records if "line_b64" in record.data] == ["/w==", "/w=="]
    async with stream(client, LOGS + "?tail=2") as events:
        assert [record.id for record in await events.rest()] == [5, 6, None]
    async with stream(client, LOGS + "?since=4") as events:
        assert [record.id for record in await events.rest()] == [5, 6, None]
    async with stream(client, LOGS + "?follow=true") as events:
        assert (await events.rest())[-1].data == {"reason": "not-running"}


async def test_who_follows_gets_each_line_once_and_is_told_the_end(api: Api) -> None:
    client = await api.client()
    await api.supervisor.run(spec("echo before"))
    sandbox = await api.supervisor.start(spec(COUNT, stdin=True))
    async with stream(client, LOGS + "?follow=1") as events:
        found = [await soon(events.next()) for _ in range(51)]
        assert [event.data["line"] for event in found if event] == ["before", *map(str, range(1, 51))]
        sandbox.close_stdin()
        *more, last = await events.rest()
    assert more == []
    assert (last.data["reason"], last.data["outcome"]["reason"]) == ("ended", "exited")


async def test_who_comes_back_goes_on_where_it_was(api: Api) -> None:
    client = await api.client()
    sandbox = await api.supervisor.start(spec(COUNT, stdin=True))
    numbers: list[int] = []
    for _ in range(5):
        headers = {"Last-Event-ID": str(numbers[-1])} if numbers else {}
        async with stream(client, LOGS + "?follow=1&tail=1000", headers=headers) as events:
            for _ in range(10):
                event = await soon(events.next())
                assert event is not None
                assert event.id is not None
                numbers.append(event.id)
    assert numbers == list(range(1, 51))
    sandbox.close_stdin()
    await sandbox.wait()


@pytest.mark.parametrize("query", ["since=-1", "since=x", "tail=-1", "tail=99999999", f"since={2**63}", "follow=maybe"])
async def test_what_no_log_can_begin_with_is_refused(api: Api, query: str) -> None:
    client = await api.client()
    await api.supervisor.users.get_or_create(USER)
    assert (await client.get(f"{LOGS}?{query}")).status_code == 422
    assert (await client.get(LOGS, headers={b"Last-Event-ID": "\u00b2".encode()})).status_code == 200
    assert (await client.get("/runner/sandboxes/nobody/api/logs")).status_code == 404
    assert (await client.get(LOGS.replace("api", "%2e%2e"))).status_code == 422


async def test_events_are_told_of_whom_it_is_asked(api: Api) -> None:
    client, shop = await api.client(), await api.client("shop")
    async with (
        stream(client, "/runner/events") as everything,
        stream(client, "/runner/events?user_id=other") as others,
        stream(shop, "/runner/events") as own,
    ):
        for user in (USER, "other"):
            await api.supervisor.start(spec("sleep 600", user=user))
            await api.supervisor.stop(user, "api", 0)
        seen = [await soon(everything.next()) for _ in range(6)]
        assert [(event.event, event.data["user_id"]) for event in seen if event] == [
            (kind, user) for user in (USER, "other") for kind in ("started", "ready", "stopped")
        ]
        for reader, user in ((others, "other"), (own, USER)):
            seen = [await soon(reader.next()) for _ in range(3)]
            assert [(event.event, event.data["user_id"]) for event in seen if event] == [
                (kind, user) for kind in ("started", "ready", "stopped")
            ]


async def test_silence_is_told_and_so_is_the_servers_stop(supervisor: Supervisor, api_settings: Settings) -> None:
    await supervisor.start(spec("sleep 600"))
    async with httpx.AsyncClient(timeout=30) as client:
        async with serving(supervisor, api_settings, heartbeat=0.01) as api:
            opened = [
                client.stream("GET", f"{api.url}{path}", headers={"Authorization": "Bearer admin"})
                for path in ("/runner/events", LOGS + "?follow=1")
            ]
            readers = [Events(await answer.__aenter__()) for answer in opened]
            endings = [asyncio.create_task(reader.rest()) for reader in readers]
            await eventually(lambda: all(reader.beats > 3 for reader in readers))
        for ending in endings:
            assert await soon(ending) == [Event("end", {"reason": "server-stopping"}, None)]
        for answer in opened:
            await answer.__aexit__(None, None, None)
    assert supervisor.get(USER, "api").state == "running"


async def test_a_stream_lasts_no_longer_than_it_may(supervisor: Supervisor, api_settings: Settings) -> None:
    await supervisor.start(spec("echo ready; sleep 600"))
    async with serving(supervisor, api_settings, longest_stream=0.05) as api:
        client = await api.client()
        for path in ("/runner/events", LOGS + "?follow=1"):
            async with stream(client, path) as events:
                assert (await events.rest())[-1] == Event("end", {"reason": "time"}, None)


async def test_a_stream_lasts_no_longer_than_the_token_that_it_was_asked_for_with(api: Api) -> None:
    await api.supervisor.start(spec("echo ready; sleep 600"))
    client = await api.client("brief")
    for path in ("/runner/events", LOGS + "?follow=1"):
        async with stream(client, path) as events:
            assert (await events.rest())[-1] == Event("end", {"reason": "token-expired"}, None)


@pytest.mark.parametrize(
    ("body", "timeout"),
    [("Content-Length: 10\r\n\r\n", 0.1), ("Transfer-Encoding: chunked\r\n\r\n10\r\n", 30.0)],
)
async def test_a_body_that_nobody_asked_for_ends_no_stream(
    supervisor: Supervisor, api_settings: Settings, caplog: pytest.LogCaptureFixture, body: str, timeout: float
) -> None:
    sandbox = await supervisor.start(spec("cat", stdin=True))
    settings = replace(api_settings, api_timeout=timeout, api_body_bytes=2000)
    async with serving(supervisor, settings, heartbeat=0.05) as api, connected(api) as (reader, writer):
        writer.write(f"GET {LOGS}?follow=1 HTTP/1.1\r\nHost: localhost\r\n{body}".encode())
        for _ in range(10):
            await soon(reader.readuntil(b"\n:\n"))
        if "chunked" in body:
            writer.write(bytes(16) + b"\r\n" + 3 * (b"3e8\r\n" + bytes(1000) + b"\r\n"))
            for _ in range(10):
                await soon(reader.readuntil(b"\n:\n"))
        sandbox.close_stdin()
        assert b'"reason": "ended"' in await soon(reader.readuntil(b"\r\n0\r\n\r\n"))
    assert [record for record in caplog.records if record.name == "uvicorn.error"] == []


async def test_a_reader_that_goes_away_leaves_nothing(api: Api) -> None:
    client = await api.client()
    await api.supervisor.start(spec("sleep 600"))
    before = len(asyncio.all_tasks())
    for _ in range(5):
        async with stream(client, LOGS + "?follow=1"), stream(client, "/runner/events"):
            pass
    await client.aclose()
    await eventually(lambda: len(asyncio.all_tasks()) <= before)
