"""`pactown-runner serve` with its API, as operators have it: killed and restarted while clients are busy."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from pactown_runner import Settings, Supervisor
from tests.api.conftest import USER
from tests.api.test_streams import Event, Events
from tests.supervising import ROOT, eventually, leftovers, soon

pytestmark = [pytest.mark.host]

BOX = f"/runner/sandboxes/{quote(USER, safe='')}/api"
BUSY = 90.0
"""Seconds in which callers get on, on a machine that has much else to do."""
COUNT = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.005; done"


class Process:
    """The command in a process of its own."""

    def __init__(self, settings: Settings) -> None:
        first, last = settings.uid_ranges[0]
        self.socket = settings.run_dir / "api.sock"
        self._environ = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PACTOWN_USERS_BASE": str(settings.users_base),
            "PACTOWN_CGROUP_SLICE": settings.cgroup_slice,
            "PACTOWN_UID_RANGES": f"{first}-{last}",
            "PACTOWN_ON_EXIT": "leave",
        }

    def client(self) -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(uds=str(self.socket))
        return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30)

    @asynccontextmanager
    async def running(self, end: signal.Signals = signal.SIGTERM) -> AsyncIterator[httpx.AsyncClient]:
        words = [sys.executable, "-m", "pactown_runner", "serve"]
        process = subprocess.Popen(words, cwd=ROOT, env=self._environ, stderr=subprocess.DEVNULL)
        try:
            async with self.client() as client:
                await soon(self._answers(client, process))
                yield client
                process.send_signal(end)
                code = await soon(asyncio.to_thread(process.wait))
                assert code == (0 if end == signal.SIGTERM else -end)
        finally:
            process.kill()
            process.wait()

    async def _answers(self, client: httpx.AsyncClient, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            try:
                (await client.get("/readyz")).raise_for_status()
            except httpx.TransportError:
                await asyncio.sleep(0.02)
            else:
                return
        raise AssertionError(f"the server ended with {process.returncode}")


async def load(process: Process, number: int, seen: list[int]) -> None:
    """Ask for everything, all the time, and start and stop; only clean errors are allowed."""
    async with process.client() as client:
        for turn in range(1_000_000):
            try:
                path = ("/runner/sandboxes", BOX + "/stats", "/runner/isolation/users", "/no/thing")[turn % 4]
                seen.append((await client.get(path)).status_code)
                if turn % 20 == 0:
                    body: dict[str, Any] = {"user_id": f"load{number}", "service_id": "x", "command": "sleep 60"}
                    seen.append((await client.post("/runner/sandboxes", json=body)).status_code)
                    seen.append((await client.delete(f"/runner/sandboxes/load{number}/x?grace=0")).status_code)
            except httpx.TransportError:
                await asyncio.sleep(0.02)


async def follow(process: Process, numbers: list[int], reasons: list[str]) -> None:
    """Follow the log across all servers, as `EventSource` does: from the last id on."""
    async with process.client() as client:
        while True:
            headers = {"Last-Event-ID": str(numbers[-1])} if numbers else {}
            try:
                async with client.stream("GET", BOX + "/logs?follow=1", headers=headers) as answer:
                    events = Events(answer)
                    while answer.status_code == 200 and (event := await events.next()) is not None:
                        _note(event, numbers, reasons)
            except httpx.TransportError:
                reasons.append("cut")
            await asyncio.sleep(0.02)


def _note(event: Event, numbers: list[int], reasons: list[str]) -> None:
    if event.id is None:
        reasons.append(event.data["reason"])
    else:
        numbers.append(event.id)


def is_ahead(seen: list[int], numbers: list[int], before: int, read: int) -> bool:
    return len(seen) > before + 60 and len(numbers) > read + 20


@pytest.mark.deadline(360)
async def test_it_is_restarted_under_load_and_sandboxes_go_on(settings: Settings) -> None:
    process = Process(settings)
    seen: list[int] = []
    numbers: list[int] = []
    reasons: list[str] = []
    work: list[asyncio.Task[None]] = []
    try:
        async with process.running() as client:
            answer = await client.post(
                "/runner/sandboxes", json={"user_id": USER, "service_id": "api", "command": COUNT}
            )
            first = answer.raise_for_status().json()
            work = [asyncio.create_task(load(process, number, seen)) for number in range(3)]
            work.append(asyncio.create_task(follow(process, numbers, reasons)))
            await eventually(partial(is_ahead, seen, numbers, 0, 0), BUSY)
        await eventually(lambda: reasons)  # what was said before the end may be read behind it
        assert reasons[0] == "server-stopping"
        for end in (signal.SIGKILL, signal.SIGTERM):
            before, read = len(seen), len(numbers)
            async with process.running(end) as client:
                assert (await client.get(BOX)).raise_for_status().json()["pid"] == first["pid"]
                await eventually(partial(is_ahead, seen, numbers, before, read), BUSY)
    finally:
        for task in work:
            task.cancel()
        ended = await asyncio.gather(*work, return_exceptions=True)
    assert all(isinstance(error, asyncio.CancelledError) for error in ended), ended
    async with process.running() as client:
        for box in (await client.get("/runner/sandboxes")).json()["sandboxes"]:
            path = f"/runner/sandboxes/{quote(box['user_id'], safe='')}/{box['service_id']}?grace=0"
            assert (await client.delete(path)).status_code == 200
    # A request that came when the server stopped may have been refused, with a reason; no answer was half of one.
    assert set(seen) <= {200, 201, 404, 409, 503}, set(seen)
    assert {200, 201, 404} <= set(seen)
    assert numbers == list(range(1, len(numbers) + 1)), "a line was lost or came twice"
    async with Supervisor(settings=settings):
        pass
    assert leftovers(settings) == []
