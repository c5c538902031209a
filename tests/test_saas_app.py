"""The embedding example, served by a real server: restarted while clients keep it busy, on both event loops."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from pactown_runner import Settings, Supervisor
from tests.supervising import ROOT, leftovers, soon

pytestmark = [pytest.mark.host, pytest.mark.deadline(120)]

COUNTER = b"""
import time
n = 0
while True:
    n += 1
    print(n)
    time.sleep(0.002)
"""


class Server:
    """The example under uvicorn, in a process of its own."""

    def __init__(self, settings: Settings, loop: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._loop = loop
        first, last = settings.uid_ranges[0]
        self._environ = {
            **os.environ,
            "PACTOWN_USERS_BASE": str(settings.users_base),
            "PACTOWN_STATE_DIR": str(settings.state_dir),
            "PACTOWN_LOG_DIR": str(settings.log_dir),
            "PACTOWN_RUN_DIR": str(settings.run_dir),
            "PACTOWN_CGROUP_SLICE": settings.cgroup_slice,
            "PACTOWN_UID_RANGES": f"{first}-{last}",
        }

    @asynccontextmanager
    async def running(self, how_to_end: signal.Signals = signal.SIGTERM) -> AsyncIterator[httpx.AsyncClient]:
        command = [sys.executable, "-m", "uvicorn", "--factory", "examples.saas_app:create_app", "--loop", self._loop]
        command += ["--port", str(self.port), "--log-level", "warning", "--timeout-graceful-shutdown", "2"]
        process = subprocess.Popen(command, cwd=ROOT, env=self._environ)
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=20) as client:
                await soon(self._answers(client, process))
                yield client
                process.send_signal(how_to_end)
                await soon(asyncio.to_thread(process.wait))
        finally:
            process.kill()
            process.wait()

    async def _answers(self, client: httpx.AsyncClient, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            try:
                await client.get("/apps")
            except httpx.TransportError:
                await asyncio.sleep(0.02)
            else:
                return
        raise AssertionError(f"the server ended with {process.returncode}")


async def _load(server: Server, seen: list[int]) -> None:
    """Ask for everything, all the time, and deploy; only clean errors are allowed."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=20) as client:
        for number in range(1_000_000):
            try:
                path = ("/apps", "/apps/one/counter", "/apps/nobody/nothing")[number % 3]
                answer = await client.get(path)
                if number % 15 == 0:
                    answer = await client.put("/apps/busy/short", content=b"print('x')")
                seen.append(answer.status_code)
            except httpx.TransportError:
                await asyncio.sleep(0.02)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_it_is_restarted_under_load_and_the_apps_go_on(settings: Settings, loop: str) -> None:
    server = Server(settings, loop)
    seen: list[int] = []
    loads = [asyncio.create_task(_load(server, seen)) for _ in range(4)]
    try:
        async with server.running() as client:
            first = (await client.put("/apps/one/counter", content=COUNTER)).raise_for_status().json()
            assert first["state"] == "running"
        for end in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
            async with server.running(end) as client:
                again = (await client.get("/apps/one/counter")).raise_for_status().json()
                assert again["pid"] == first["pid"]
                assert (await client.get("/apps/no/such")).json()["code"] == "not-found"
    finally:
        for task in loads:
            task.cancel()
        await asyncio.gather(*loads, return_exceptions=True)
    async with server.running() as client:
        for app in (await client.get("/apps")).json():
            await client.delete(f"/apps/{app['tenant']}/{app['name']}")
        assert (await client.get("/apps")).json() == []
    assert set(seen) <= {200, 404, 409}, set(seen)
    assert {200, 404} <= set(seen)
    async with Supervisor(settings=settings) as supervisor:
        lines = [record.line async for record in supervisor.logs("one", "counter")]
    assert lines == [str(number + 1) for number in range(len(lines))]
    assert len(lines) > 100
    assert leftovers(settings) == []
