"""Logs and events through the client: complete, told why they end, and resumed where they broke."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from pactown_runner import Client, Event, Settings, Supervisor
from pactown_runner.client import (
    BadAnswerError,
    ClientError,
    ConnectionLostError,
    LogStream,
    ServerStoppingError,
    StreamEnd,
    UnreachableError,
)
from pactown_runner.client.streams import Message, messages
from pactown_runner.errors import NotFoundError, RegistryError, SpecError
from tests.api.conftest import USER, Api, serving
from tests.client.conftest import Relay
from tests.supervising import eventually, soon, spec

pytestmark = [pytest.mark.host]

COUNT = "i=0; while [ $i -lt {} ]; do i=$((i+1)); echo $i; done; cat >/dev/null"


async def test_a_log_is_read_to_its_end(api: Api, client: Client) -> None:
    for word in ("one", "two"):
        await api.supervisor.run(spec(f"printf '{word}\\n\\377\\0\\r\\n\\342\\200\\250'; echo err >&2"))
    log = client.logs(USER, "api")
    records = [record async for record in log]
    assert records == [record async for record in api.supervisor.logs(USER, "api")]
    assert {(record.raw, record.partial) for record in records if record.stream == "stdout"} == {
        (b"one", False),
        (b"two", False),
        (b"\xff\0\r", False),
        (b"\xe2\x80\xa8", True),
    }
    assert (log.end, log.cursor) == (StreamEnd("read"), records[-1].seq)
    assert [record async for record in log] == []
    assert [record async for record in client.logs(USER, "api", tail=2)] == records[-2:]
    assert [record async for record in client.logs(USER, "api", since=4)] == records[4:]
    following = client.logs(USER, "api", follow=True)
    assert [record async for record in following] == records
    assert following.end == StreamEnd("not-running")


async def test_who_follows_gets_each_line_once_and_is_told_the_end(api: Api, client: Client) -> None:
    sandbox = await api.supervisor.start(spec(COUNT.format(500), stdin=True))
    async with client.logs(USER, "api", follow=True) as log:
        assert [int((await soon(anext(log))).line) for _ in range(500)] == list(range(1, 501))
        assert log.end is None
        sandbox.close_stdin()
        with pytest.raises(StopAsyncIteration):
            await soon(anext(log))
        assert log.end == StreamEnd("ended", await sandbox.wait())


async def test_what_cannot_be_read_is_refused_when_it_is(api: Api, client: Client) -> None:
    with pytest.raises(NotFoundError):
        await anext(client.logs("nobody", "api"))
    with pytest.raises(SpecError):
        client.logs(USER, "..")
    with pytest.raises(NotFoundError):
        async with client.logs("nobody", "api", follow=True, reconnect=True):
            pass


async def test_events_are_heard_from_the_blocks_beginning(api: Api, client: Client) -> None:
    async with client.events() as everything, client.events(user_id="other") as others:
        for user in (USER, "other"):
            await client.start(spec("sleep 600", user=user))
            await client.stop(user, "api", grace=0)
        seen = [await soon(anext(everything)) for _ in range(6)]
        assert [(event.kind, event.user_id) for event in seen] == [
            (kind, user) for user in (USER, "other") for kind in ("started", "ready", "stopped")
        ]
        assert seen[2].details["reason"] == "stopped"
        assert [await soon(anext(others)) for _ in range(3)] == seen[3:]


async def test_a_stream_that_is_left_leaves_nothing(api: Api, client: Client) -> None:
    await client.start(spec("sleep 600"))
    await client.health()
    await eventually(lambda: len(asyncio.all_tasks()) <= 6)
    before = len(asyncio.all_tasks())
    for _ in range(5):
        async with client.logs(USER, "api", follow=True), client.events() as events:
            waiting = asyncio.create_task(anext(events))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
        with pytest.raises(StopAsyncIteration):
            await anext(events)
    await eventually(lambda: len(asyncio.all_tasks()) <= before)


async def test_a_server_that_stops_says_so(supervisor: Supervisor, api_settings: Settings) -> None:
    await supervisor.start(spec("sleep 600"))
    async with AsyncExitStack() as held:
        async with serving(supervisor, api_settings) as api:
            client = await held.enter_async_context(Client(api.where.socket))
            log = await held.enter_async_context(client.logs(USER, "api", follow=True))
            events = await held.enter_async_context(client.events())
            waiting = [asyncio.ensure_future(anext(stream)) for stream in (log, events)]
        for future in waiting:
            with pytest.raises(ServerStoppingError):
                await soon(future)
        with pytest.raises(UnreachableError, match="pactown-runner serve"):
            await client.health()


async def test_a_log_goes_on_where_it_was_when_the_server_is_back(
    supervisor: Supervisor, api_settings: Settings
) -> None:
    """Five servers in turn over one supervisor, whose program goes on printing; and one reader."""
    sandbox = await supervisor.start(spec("while read n; do echo $n; done", stdin=True))
    assert api_settings.api_socket_path is not None
    numbers: list[int] = []

    def has(number: int) -> Callable[[], bool]:
        return lambda: numbers[-1:] == [number]

    async def read(log: LogStream) -> None:
        async for record in log:
            numbers.append(int(record.line))  # noqa: PERF401 - each as soon as it is there

    async with Client(api_settings.api_socket_path) as client:
        async with serving(supervisor, api_settings):
            log = client.logs(USER, "api", follow=True, tail=1, reconnect=True)
            reading = asyncio.create_task(read(log))
            await sandbox.send(b"0\n")
            await eventually(has(0))
        for round_ in range(1, 5):
            # Printed while nobody serves.
            await sandbox.send(f"{3 * round_ - 2}\n{3 * round_ - 1}\n".encode())
            async with serving(supervisor, api_settings):
                await sandbox.send(f"{3 * round_}\n".encode())
                await eventually(has(3 * round_))
                if round_ == 4:
                    sandbox.close_stdin()
                    await soon(reading)
    assert numbers == list(range(13))
    assert log.end is not None
    assert log.end.reason == "ended"


async def test_a_log_that_is_cut_anywhere_goes_on_where_it_was(api: Api, relay: Relay) -> None:
    await api.supervisor.run(spec("seq 3000"))
    relay.limit = 50_000
    async with Client(relay.path) as client:
        log = client.logs(USER, "api", reconnect=True)
        assert [int(record.line) async for record in log] == list(range(1, 3001))
        assert log.end == StreamEnd("read")
        log = client.logs(USER, "api")
        with pytest.raises(ConnectionLostError):
            [record async for record in log]
        assert log.cursor is not None
        assert (await anext(client.logs(USER, "api", since=log.cursor))).seq == log.cursor + 1


async def test_events_that_may_have_been_missed_are_told_of(api: Api, relay: Relay) -> None:
    async with Client(relay.path) as client, client.events(reconnect=True) as events:
        relay.cut()
        missed = await soon(anext(events))
        assert missed == Event(kind="missed", ts=missed.ts, details={"count": None})
        await client.create_user(USER)
        assert (await soon(anext(events))).kind == "created"


async def test_who_cannot_come_back_is_told_at_last(
    supervisor: Supervisor, api_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pactown_runner.client.streams.RECONNECT_SECONDS", 0.2)
    async with AsyncExitStack() as held:
        async with serving(supervisor, api_settings) as api:
            client = await held.enter_async_context(Client(api.where.socket))
            events = await held.enter_async_context(client.events(reconnect=True))
        with pytest.raises(UnreachableError):
            await soon(anext(events))
        with pytest.raises(StopAsyncIteration):
            await anext(events)


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        ({"reason": "time"}, ConnectionLostError),
        ({"reason": "token-expired"}, ClientError),
        ({"reason": "a-new-one"}, ClientError),
        ({"reason": "failed", "problem": {"code": "registry", "detail": "no", "status": 503}}, RegistryError),
        ({}, BadAnswerError),
        ({"reason": "failed"}, BadAnswerError),
    ],
)
async def test_what_ends_a_stream_before_its_end_is_told(tmp_path: Path, end: Any, kind: type[Exception]) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
        writer.write(f"{head}event: end\ndata: {json.dumps(end)}\n\n".encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(answer, tmp_path / "s"), Client(tmp_path / "s") as client:
        log = client.logs(USER, "api", follow=True)
        with pytest.raises(kind) as ended:
            await anext(log)
        assert type(ended.value) is kind
        assert log.end is None
        with pytest.raises(StopAsyncIteration):
            await anext(log)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
async def test_messages_come_in_any_pieces(size: int) -> None:
    sent = [Message("record", {"line": "a\nb: \u00e9", "n": n}) for n in range(3)]
    text = b":\n\n" + b":\n\n".join(
        b"id: %d\nevent: record\ndata: %s\n\n" % (n, json.dumps(message.data).encode())
        for n, message in enumerate(sent)
    )

    async def pieces() -> Any:
        for at in range(0, len(text), size):
            yield text[at : at + size]
        yield b"event: record\ndata: {}\n"

    assert [message async for message in messages(pieces())] == sent
