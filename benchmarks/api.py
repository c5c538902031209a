"""What a call through the API costs beside the same call in the process: `GET stats` and `POST /runner/sandboxes`.

Contenders take turns within each round, so that a machine whose speed drifts slows all of them alike. Server and client
share this process and its event loop, which is the worst case: elsewhere the client's part is another process's.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import secrets
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from pactown_runner import Client, SandboxSpec, Supervisor
from pactown_runner.api import served
from pactown_runner.tokens import Token

from .harness import bench_supervisor, machine, percentile

USER = "bench"
BASE = "in the process"

Call = Callable[[int], Awaitable[object]]
"""One call; the number tells rounds apart."""


def _spec(number: int) -> SandboxSpec:
    return SandboxSpec(user_id=USER, service_id=f"sleep-{number}", command=["sleep", "3600"])


class ByHand:
    """`GET stats` on a connection that stays open, without a client: what the server costs."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connected(cls, path: Path, held: AsyncExitStack) -> ByHand:
        """Connect to a socket for as long as the stack is held."""
        reader, writer = await asyncio.open_unix_connection(path)
        held.callback(writer.transport.abort)
        return cls(reader, writer)

    async def stats(self, _: int) -> None:
        """Ask once."""
        path = f"/runner/sandboxes/{USER}/looked-at/stats"
        self._writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        json.loads(await self._reader.readexactly(length))


async def rounds(calls: dict[str, Call], count: int, after: Call | None = None) -> dict[str, list[float]]:
    """Seconds of each call, so many times; what is done `after` each is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-10, count):
        for name, call in calls.items():
            began = time.perf_counter()
            await call(number + 10)
            taken = time.perf_counter() - began
            if number >= 0:
                seconds[name].append(taken)
            if after is not None:
                await after(number + 10)
    return seconds


def rows(taken: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """What is told of them."""
    return {
        name: {
            "p10_ms": round(percentile(values, 10) * 1e3, 3),
            "p50_ms": round(statistics.median(values) * 1e3, 3),
            "p99_ms": round(percentile(values, 99) * 1e3, 3),
        }
        for name, values in taken.items()
    }


async def measure(looks: int, starts: int) -> dict[str, Any]:
    """So many calls of either kind by each contender."""
    secret = secrets.token_hex(16)
    token = Token(
        name="bench", sha256=hashlib.sha256(secret.encode()).hexdigest(), role="admin", expires=time.time() + 3600
    )
    async with AsyncExitStack() as held:
        supervisor = await held.enter_async_context(bench_supervisor(api_listen="127.0.0.1:0", tokens=(token,)))
        where = await held.enter_async_context(served(supervisor))
        assert where.socket is not None
        assert where.address is not None
        clients = {
            "Client, socket": await held.enter_async_context(Client(where.socket)),
            "Client, TCP": await held.enter_async_context(Client(f"http://127.0.0.1:{where.address[1]}", token=secret)),
        }
        by_hand = await ByHand.connected(where.socket, held)
        return {
            "GET stats": rows(await _looks(supervisor, clients, by_hand, looks)),
            "POST /runner/sandboxes": rows(await _starts(supervisor, clients, starts)),
        }


async def _looks(
    supervisor: Supervisor, clients: dict[str, Client], by_hand: ByHand, count: int
) -> dict[str, list[float]]:
    sandbox = await supervisor.start(SandboxSpec(user_id=USER, service_id="looked-at", command=["sleep", "3600"]))
    calls: dict[str, Call] = {BASE: lambda _: sandbox.stats(), "HTTP by hand, socket": by_hand.stats}
    for name, client in clients.items():
        calls[name] = lambda _, client=client: client.stats(USER, "looked-at")  # type: ignore[misc]
    return await rounds(calls, count)


async def _starts(supervisor: Supervisor, clients: dict[str, Client], count: int) -> dict[str, list[float]]:
    calls: dict[str, Call] = {BASE: lambda number: supervisor.start(_spec(number))}
    for name, client in clients.items():
        calls[name] = lambda number, client=client: client.start(_spec(number))  # type: ignore[misc]

    async def stop(number: int) -> None:
        await supervisor.stop(USER, f"sleep-{number}", 0)

    return await rounds(calls, count, stop)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; as root, on a host with a cgroup v2 mount."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--looks", type=int, default=2000, help="calls of `stats` of each contender")
    parser.add_argument("--starts", type=int, default=400, help="starts of each contender")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    options = parser.parse_args(argv)
    if os.geteuid() != 0:
        print("starting programs as other users takes root", file=sys.stderr)
        return 1
    result = asyncio.run(measure(options.looks, options.starts))
    if options.json:
        print(json.dumps({"machine": machine(), "results": result}, indent=2))
        return 0
    print(machine())
    for what, found in result.items():
        print(f"\n{what:34} {'p10 ms':>8} {'p50 ms':>8} {'p99 ms':>8}")
        for name, row in found.items():
            print(f"{name:34} {row['p10_ms']:8.3f} {row['p50_ms']:8.3f} {row['p99_ms']:8.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
