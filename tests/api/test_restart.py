"""A server that is stopped and started again while callers are busy: each is told something whole, or nothing."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from pactown_runner import Settings, Supervisor
from pactown_runner.api import create_app, listening
from pactown_runner.api.problems import MEDIA_TYPE
from tests.api.conftest import NOW, USER
from tests.api.test_serving import BOX, BUSY, COUNT, Process
from tests.api.test_streams import Events
from tests.supervising import eventually, leftovers, line_of, soon, spec

pytestmark = [pytest.mark.host]

RESTARTS = 3
OTHER = "a/b"
OF_OTHER = f"/runner/sandboxes/{quote(OTHER, safe='')}"


@dataclass
class Heard:
    """What callers were told.

    Attributes:
        answers: by what was asked, and how it ended: a status with its problem's code, or `closed`.
        broken: answers that had begun, and did not end.
        listening: streams that are open.
        ends: why streams ended.
    """

    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    listening: set[str] = field(default_factory=set)
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)

    def well(self) -> Counter[str]:
        """How often what went well."""
        return Counter({name: self.answers[name, "200"] + self.answers[name, "201"] for name, _ in self.answers})


async def ask(client: httpx.AsyncClient, heard: Heard, name: str, method: str, path: str, **more: Any) -> bool:
    """Ask once; a hang fails, and so does what is no whole answer. Whether it went well."""
    begun = None
    try:
        async with asyncio.timeout(30), client.stream(method, path, **more) as answer:
            begun = answer
            content = await answer.aread()
    except httpx.TransportError as error:
        if begun is not None:
            heard.broken.append(f"{name}: {begun.status_code}, then {error!r}")
        heard.answers[name, "closed"] += 1
        await asyncio.sleep(0.01)
        return False
    told = str(answer.status_code)
    if answer.is_error:
        assert answer.headers["content-type"] == MEDIA_TYPE
        problem = json.loads(content)
        assert problem["status"] == answer.status_code
        told += f" {problem['code']}"
    elif answer.headers["content-type"] == "application/json":
        json.loads(content)
    heard.answers[name, told] += 1
    return answer.is_success


async def look(client: httpx.AsyncClient, heard: Heard) -> None:
    for path in ("/runner/sandboxes", BOX + "/stats", "/runner/isolation/users", "/metrics", "/readyz"):
        await ask(client, heard, "look", "GET", path)


async def put(client: httpx.AsyncClient, heard: Heard) -> None:
    await ask(client, heard, "put", "PUT", BOX + "/files/data", content=b"x" * 100_000)
    await ask(client, heard, "get", "GET", BOX + "/files/data")


async def start(client: httpx.AsyncClient, heard: Heard) -> None:
    body = {"user_id": OTHER, "service_id": "passing", "command": "exec sleep 600"}
    await ask(client, heard, "start", "POST", "/runner/sandboxes", json=body)
    await ask(client, heard, "stop", "DELETE", f"{OF_OTHER}/passing?grace=0")


async def run(client: httpx.AsyncClient, heard: Heard) -> None:
    body = {"user_id": OTHER, "service_id": "run", "kind": "run", "command": "exec sleep 600"}
    assert not await ask(client, heard, "run", "POST", "/runner/sandboxes", json=body)


async def execute(client: httpx.AsyncClient, heard: Heard) -> None:
    assert not await ask(client, heard, "exec", "POST", BOX + "/exec", json={"command": "exec sleep 600"})


def stream(path: str) -> Callable[[httpx.AsyncClient, Heard], Awaitable[None]]:
    async def listen(client: httpx.AsyncClient, heard: Heard) -> None:
        try:
            async with client.stream("GET", path) as answer:
                if answer.is_error:
                    problem = json.loads(await answer.aread())
                    heard.answers["stream", f"{answer.status_code} {problem['code']}"] += 1
                    return
                last, events = None, Events(answer)
                heard.listening.add(path)
                while (event := await events.next()) is not None:
                    last = event
                heard.ends[path, "none" if last is None else str(last.data.get("reason"))] += 1
        except httpx.TransportError as error:
            if path in heard.listening:
                heard.ends[path, repr(error)] += 1
        finally:
            heard.listening.discard(path)
        await asyncio.sleep(0.01)

    return listen


async def keep_on(process: Process, heard: Heard, what: Callable[[httpx.AsyncClient, Heard], Awaitable[None]]) -> None:
    async with process.client() as client:
        while True:
            try:
                await what(client, heard)
            except httpx.ConnectError:
                # Between two servers nobody listens.
                await asyncio.sleep(0.02)


LOGS, EVENTS = BOX + "/logs?follow=1&tail=0", "/runner/events"
WORK = ("put", "get", "start", "stop")
LOAD = (look, look, look, put, start, run, execute, stream(LOGS), stream(EVENTS))


def is_busy(heard: Heard, before: Counter[str]) -> bool:
    """Whether all callers have got on since then, and the streams are open."""
    since = heard.well() - before
    return heard.listening == {LOGS, EVENTS} and since["look"] > 50 and all(since[name] for name in WORK)


@pytest.mark.deadline(360)
async def test_callers_of_a_server_that_is_restarted_get_clean_errors(settings: Settings) -> None:
    process, heard = Process(settings), Heard()
    pids = set()
    work: list[asyncio.Task[None]] = []
    try:
        for number in range(RESTARTS):
            async with process.running() as client:
                if number == 0:
                    body = {"user_id": USER, "service_id": "api", "command": COUNT}
                    (await client.post("/runner/sandboxes", json=body)).raise_for_status()
                    work = [asyncio.create_task(keep_on(process, heard, what)) for what in LOAD]
                await eventually(partial(is_busy, heard, heard.well()), BUSY)
                pids.add((await client.get(BOX)).raise_for_status().json()["pid"])
            # What was said before the end may be read behind it.
            await eventually(lambda: not heard.listening)
            assert not any(task.done() for task in work), [task for task in work if task.done()]
    finally:
        for task in work:
            task.cancel()
        ended = await asyncio.gather(*work, return_exceptions=True)
    assert all(isinstance(error, asyncio.CancelledError) for error in ended), ended
    print(heard)
    assert len(pids) == 1, "the service did not go on"
    assert heard.broken == []
    # Each stream was told why it ended, each time.
    assert set(heard.ends) == {(path, "server-stopping") for path in (LOGS, EVENTS)}
    assert min(heard.ends.values()) >= RESTARTS
    # What would have lasted, too.
    for name in ("run", "exec"):
        assert heard.answers[name, "503 server-stopping"] >= 1
    known = {"200", "201", "closed", "503 server-stopping", "404 not-found", "409 already-running", "409 wrong-state"}
    assert {told for _, told in heard.answers} <= known
    await tidy(settings, process)


async def tidy(settings: Settings, process: Process) -> None:
    """What was left running is there for the next server, and nothing else."""
    async with process.running() as client:
        for box in (await client.get("/runner/sandboxes")).json()["sandboxes"]:
            assert (box["kind"], box["service_id"]) in {("service", "api"), ("service", "passing")}
            path = f"/runner/sandboxes/{quote(box['user_id'], safe='')}/{box['service_id']}?grace=0"
            assert (await soon(client.delete(path))).status_code == 200
    async with Supervisor(settings=settings):
        pass
    assert leftovers(settings) == []


async def test_what_takes_longer_than_a_server_that_stops_has_time_for_is_told(
    supervisor: Supervisor, api_settings: Settings
) -> None:
    sandbox = await supervisor.start(spec("trap '' TERM; echo ready; while :; do sleep 1; done"))
    await line_of(sandbox)
    path = f"{BOX}?grace=600"
    async with httpx.AsyncClient(timeout=30, headers={"Authorization": "Bearer admin"}) as client:
        app = create_app(supervisor, api_settings, clock=lambda: NOW)
        async with listening(app, api_settings, stop_timeout=1) as where:
            assert where.address is not None
            stopping = asyncio.create_task(client.delete(f"http://127.0.0.1:{where.address[1]}{path}"))
            await eventually(lambda: sandbox.state == "stopping")
        answer = await soon(stopping)
    assert (answer.status_code, answer.headers["content-type"]) == (503, MEDIA_TYPE)
    assert (answer.json()["code"], answer.headers["retry-after"]) == ("server-stopping", "1")
