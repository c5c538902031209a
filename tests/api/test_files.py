"""Files over the API: passed on as they come, whole or not at all, and never held as a whole."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from pactown_runner.api.listening import _Protocol
from tests.api.conftest import Api
from tests.api.test_limits import BOX, connected
from tests.supervising import USER, eventually, processes_of, soon

pytestmark = [pytest.mark.host]

SIZE = 16 << 20


async def inside_of(api: Api) -> Path:
    return (await api.supervisor.users.get_or_create(USER)).home_dir / "sandboxes/api"


def sizes(folder: Path) -> list[int]:
    with suppress(FileNotFoundError):
        return [path.stat().st_size for path in folder.iterdir()]
    return []


async def test_large_files_come_back_as_they_went(api: Api) -> None:
    client = await api.client()
    content = os.urandom(SIZE)

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(content), 100_000):
            yield content[at : at + 100_000]

    for body in (content, pieces()):
        answer = await client.put(BOX + "/files/a/b", content=body)
        assert answer.json() == {"files": 1, "bytes": SIZE}
        answer = await client.get(BOX + "/files/a/b")
        assert answer.content == content
        assert answer.headers["content-length"] == str(SIZE)
        await client.put(BOX + "/files/a/b", content=b"small")
        assert (await client.get(BOX + "/files/a/b")).content == b"small"
    # Whoever knows of no chunks sees where it has to end, too.
    assert (await api.curl("--http1.0", BOX + "/files/a/b")).headers["content-length"] == "5"


async def test_a_body_that_is_nearly_there_is_not_held_but_on_its_way(api: Api) -> None:
    await api.supervisor.files.put(USER, "api", b"old", "f")
    inside = await inside_of(api)
    head = f"PUT {BOX}/files/f HTTP/1.1\r\nHost: localhost\r\nContent-Length: {SIZE}\r\n\r\n".encode()
    for last in (b"", b"x"):
        async with connected(api) as (reader, writer):
            writer.write(head + b"x" * (SIZE - 1))
            await soon(writer.drain())
            # All but what pipes and sockets hold is the tenant's already, and counts as its.
            await eventually(lambda: max(sizes(inside), default=0) > SIZE - (2 << 20))
            assert (inside / "f").read_bytes() == b"old"
            if last:
                writer.write(last)
                assert b" 200 " in await soon(reader.readline())
        # Who hangs up before the end has put nothing, and left nothing.
        await eventually(lambda: sizes(inside) == [SIZE if last else len(b"old")])  # noqa: B023


async def test_an_answer_that_nobody_takes_is_not_held(api: Api) -> None:
    await api.supervisor.files.put(USER, "api", bytes(SIZE), "f")

    def held() -> int:
        found = [it for it in gc.get_objects() if isinstance(it, _Protocol)]
        return sum(it.transport.get_write_buffer_size() for it in found)

    async with connected(api) as (_, writer):
        writer.write(f"GET {BOX}/files/f HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await eventually(lambda: held() > 1 << 16, pause=0.05)
        assert held() < 1 << 20


async def test_a_file_that_cannot_be_read_to_its_end_does_not_look_whole(api: Api) -> None:
    await api.supervisor.files.put(USER, "api", os.urandom(SIZE), "f")
    user = await api.supervisor.users.get(USER)
    assert user is not None
    client = await api.client()
    async with client.stream("GET", BOX + "/files/f") as answer:
        assert answer.headers["content-length"] == str(SIZE)
        for pid in await asyncio.to_thread(processes_of, user.linux_uid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(httpx.RemoteProtocolError):
            await soon(answer.aread())
    assert len((await client.get(BOX + "/files/f")).content) == SIZE
