"""What a caller may not do to the server: large bodies and heads, slow ones, many connections; and where it listens."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from pactown_runner import Settings, Supervisor
from pactown_runner.api import create_app, listening
from pactown_runner.api.crowd import STRANGERS
from pactown_runner.api.listening import _Protocol
from pactown_runner.errors import ConfigError, StateError
from tests.api.conftest import USER, Api, serving, token
from tests.supervising import eventually, line_of, soon, spec

pytestmark = [pytest.mark.host]

BOX = f"/runner/sandboxes/{quote(USER, safe='')}/api"
Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected(api: Api) -> AsyncIterator[Ends]:
    """A connection to the socket on which anything can be said."""
    assert api.where.socket is not None
    reader, writer = await asyncio.open_unix_connection(str(api.where.socket))
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def said(ends: Ends, data: bytes) -> bytes:
    """Say this, and hear all until the server hangs up."""
    reader, writer = ends
    with suppress(ConnectionError):
        writer.write(data)
        await writer.drain()
    try:
        return await soon(reader.read())
    except ConnectionError:
        return b""


async def test_bodies_are_as_large_as_they_may_be(supervisor: Supervisor, api_settings: Settings) -> None:
    settings = replace(api_settings, api_body_bytes=2000, api_file_bytes=5000)
    async with serving(supervisor, settings) as api:
        client = await api.client()
        body = {"user_id": USER, "service_id": "api", "command": ["true"], "kind": "run", "env": {"A": "x" * 1500}}
        assert (await client.post("/runner/sandboxes", json=body)).status_code == 201
        body["env"] = {"A": "x" * 2000}
        answer = await client.post("/runner/sandboxes", json=body)
        assert (answer.status_code, answer.json()["code"]) == (413, "too-large")

        async def pieces(size: int) -> AsyncIterator[bytes]:
            for _ in range(size // 500):
                yield b"x" * 500

        assert (await client.put(BOX + "/files/a", content=pieces(5000))).status_code == 200
        assert (await client.put(BOX + "/files/b", content=pieces(5500))).status_code == 413
        assert (await client.put(BOX + "/files/b", content=b"x" * 5001)).status_code == 413
        assert (await client.get(BOX + "/files/a")).status_code == 200
        assert (await client.get(BOX + "/files/b")).status_code == 404
        await supervisor.files.put(USER, "api", b"x" * 5001, "large")
        assert (await client.get(BOX + "/files/large")).json()["code"] == "files"


async def test_a_body_without_end_is_not_kept(api: Api) -> None:
    async with connected(api) as (_, writer):
        writer.write(f"PUT {BOX}/files/a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        sent = 0
        with suppress(ConnectionError):
            while sent < 100 << 20:
                writer.write(chunk)
                await soon(writer.drain())
                sent += 1 << 20
        assert sent < 100 << 20
    user = await api.supervisor.users.get(USER)
    assert user is not None
    await eventually(lambda: not list((user.home_dir / "sandboxes/api").iterdir()))


async def test_heads_are_as_large_as_they_may_be(api: Api) -> None:
    client = await api.client()
    assert (await client.get("/healthz", headers={"X": "x" * 8000})).status_code == 200
    large = "x" * 17_000
    for path, headers in (("/healthz", {"X": large}), (f"/healthz?{large}", {}), (f"/{large}", {})):
        refused = await client.get(path, headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (431, "large-head")
    async with connected(api) as ends:
        answer = await said(ends, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (1 << 20))
        assert answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400")) or not answer


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET /healthz HTTP/1.1\r\n",
        b"PUT /runner/isolation/user/a HTTP/1.1\r\nHost: localhost\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /healthz",
    ],
)
async def test_who_does_not_come_to_the_point_is_hung_up_on(
    supervisor: Supervisor, api_settings: Settings, data: bytes
) -> None:
    async with serving(supervisor, replace(api_settings, api_timeout=0.2)) as api, connected(api) as ends:
        await said(ends, data)
    assert await supervisor.users.list() == []


async def test_a_body_that_does_not_come_is_not_waited_for(supervisor: Supervisor, api_settings: Settings) -> None:
    async with serving(supervisor, replace(api_settings, api_timeout=0.2)) as api, connected(api) as ends:
        head = f"PUT {BOX}/files/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n12345"
        assert (await said(ends, head.encode())).startswith(b"HTTP/1.1 408")


async def test_a_body_that_comes_a_byte_at_a_time_is_not_waited_for(
    supervisor: Supervisor, api_settings: Settings
) -> None:
    path = f"/runner/isolation/user/{quote(USER, safe='')}/import"
    async with serving(supervisor, replace(api_settings, api_timeout=0.5)) as api, connected(api) as (reader, writer):
        writer.write(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n".encode())

        async def drip() -> None:
            with suppress(ConnectionError):
                while True:
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        try:
            assert b" 408 " in await soon(reader.readline())
        finally:
            dripping.cancel()


async def test_who_does_not_take_the_answer_is_hung_up_on(supervisor: Supervisor, api_settings: Settings) -> None:
    await supervisor.run(spec("head -c 20000000 /dev/zero | tr '\\0' x | fold -w 1000"))
    async with serving(supervisor, replace(api_settings, api_timeout=0.2)) as api, connected(api) as (reader, writer):
        before = len(asyncio.all_tasks())
        writer.write(f"GET {BOX}/logs HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await soon(reader.readline())
        # Nobody answers any more; there is the server itself, as before.
        await eventually(lambda: len(asyncio.all_tasks()) <= before)
        # What is under way already arrives; the end never does.
        with suppress(ConnectionError):
            assert b"event: end" not in await soon(reader.read())


@pytest.mark.parametrize("more", ["", "Connection: close\r\n"])
async def test_a_slow_caller_gets_all_of_a_large_answer(
    supervisor: Supervisor, api_settings: Settings, more: str
) -> None:
    await supervisor.start(spec("sleep 600"))
    body = json.dumps({"command": "head -c 1000000 /dev/zero"}).encode()
    head = f"POST {BOX}/exec HTTP/1.1\r\nHost: localhost\r\n{more}Content-Length: {len(body)}\r\n"
    async with serving(supervisor, replace(api_settings, api_timeout=1.0)) as api, connected(api) as (reader, writer):
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        answer = await soon(reader.readuntil(b"\r\n\r\n"))
        size = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        assert size > 5 << 20
        while size:
            # It has to take longer than one may be silent.
            await asyncio.sleep(0.2)
            size -= len(await soon(reader.readexactly(min(size, 1 << 19))))


async def test_who_takes_nothing_of_the_last_answer_is_hung_up_on(
    supervisor: Supervisor, api_settings: Settings
) -> None:
    await supervisor.start(spec("sleep 600"))
    body = json.dumps({"command": "head -c 1000000 /dev/zero"}).encode()
    head = f"POST {BOX}/exec HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    async with serving(supervisor, replace(api_settings, api_timeout=0.2)) as api, connected(api) as (reader, writer):
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        answer = await soon(reader.readuntil(b"\r\n\r\n"))
        size = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await eventually(lambda: not [it for it in gc.get_objects() if isinstance(it, _Protocol) and it.connections])
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await soon(reader.readexactly(size))


async def test_one_caller_too_many_is_told_and_others_are_answered(
    supervisor: Supervisor, api_settings: Settings
) -> None:
    async with serving(supervisor, replace(api_settings, api_connections=3)) as api:
        opened = [await api.client("admin") for _ in range(3)]
        for one in opened:
            assert (await one.get("/healthz")).status_code == 200
        client = await api.client("admin")
        answer = await client.get("/healthz")
        assert (answer.status_code, answer.json()["code"]) == (503, "crowded")
        assert answer.headers["retry-after"] == "1"
        # Those on the socket are counted apart, and those who are there are answered.
        assert (await api.curl("/healthz")).status == 200
        assert (await opened[0].get("/healthz")).status_code == 200
        await opened[0].aclose()

        async def well() -> bool:
            return (await client.get("/healthz")).status_code == 200

        while not await soon(well()):
            await asyncio.sleep(0.01)


async def stuck(api: Api, held: AsyncExitStack) -> asyncio.StreamReader:
    """A connection that asks without end, and takes no answer."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, api.where.address or ())
    reader, writer = await asyncio.open_connection(sock=sock, limit=1)
    held.callback(writer.close)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20_000)
    await eventually(lambda: any(it.flow.write_paused for it in gc.get_objects() if isinstance(it, _Protocol)))
    return reader


async def test_strangers_keep_no_caller_out(api: Api) -> None:
    assert api.where.address is not None
    client, late = await api.client("admin"), await api.client("admin")
    assert (await client.get("/healthz")).status_code == 200
    async with AsyncExitStack() as held:
        strangers = [await stuck(api, held)]
        for number in range(STRANGERS + 100):
            ends = await soon(asyncio.open_connection(*api.where.address))
            held.callback(ends[1].close)
            if number % 2:
                # Nor does it make one a caller that it says something.
                ends[1].write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert b" 401 " in await soon(ends[0].readline())
            strangers.append(ends[0])
        # The oldest make room for others; who may call is served, whether new or not.
        for reader in strangers[:100]:
            with suppress(ConnectionError):
                await soon(reader.read())
        for one in (client, late):
            assert (await one.get("/healthz")).status_code == 200
        assert not strangers[-1].at_eof()


async def test_one_tenants_callers_leave_room_for_others(supervisor: Supervisor, api_settings: Settings) -> None:
    async with serving(supervisor, replace(api_settings, api_connections=8)) as api, AsyncExitStack() as held:
        shop, same, other = [await api.client(name) for name in ("shop", "shop-read", "other")]
        first = await held.enter_async_context(shop.stream("GET", "/runner/events"))
        second = await held.enter_async_context(same.stream("GET", "/runner/events"))
        assert (first.status_code, second.status_code) == (200, 200)
        for one in (shop, same):
            answer = await one.get("/healthz")
            assert (answer.status_code, answer.json()["code"]) == (503, "crowded")
        assert (await other.get("/healthz")).status_code == 200
        await first.aclose()

        async def well() -> bool:
            return (await shop.get("/healthz")).status_code == 200

        while not await soon(well()):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "data", [b"\0\0\0\0\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
)
async def test_what_is_no_http_is_no_reason_to_stumble(api: Api, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with connected(api) as ends:
        assert (await said(ends, data)).startswith((b"HTTP/1.1 400", b"HTTP/1.1 421"))
    assert (await api.curl("/healthz")).status == 200
    assert [record for record in caplog.records if record.name.startswith("uvicorn")] == []


async def test_a_request_that_asks_for_another_protocol_gets_none(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    client = await api.client()
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x", "Sec-WebSocket-Version": "13"}
    assert (await client.get("/runner/events", headers={**headers, "Host": "evil"})).status_code == 421
    assert (await client.get("/healthz", headers=headers)).status_code == 200
    assert [record for record in caplog.records if record.name.startswith("uvicorn")] == []


# Where it listens --------------------------------------------------------------------------------------------------


async def refuses(supervisor: Supervisor, settings: Settings, says: str, error: type[Exception] = ConfigError) -> None:
    with pytest.raises(error, match=says):
        async with listening(create_app(supervisor, settings), settings):
            pass


async def test_by_tcp_nothing_is_served_without_a_token(supervisor: Supervisor, settings: Settings) -> None:
    settings = replace(settings, api_listen="127.0.0.1:0")
    await refuses(supervisor, settings, "needs a token")
    await refuses(supervisor, replace(settings, tokens=(token("old", expires=1.0),)), "needs a token")
    assert not (settings.run_dir / "api.sock").exists()


async def test_where_nobody_can_listen_is_told(supervisor: Supervisor, settings: Settings, tmp_path: Path) -> None:
    await refuses(supervisor, replace(settings, api_socket=""), "nowhere to listen")
    await refuses(supervisor, replace(settings, api_group="no-such-group"), "no group")
    tokens = (token("admin", expires=float("inf")),)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        await refuses(supervisor, replace(settings, tokens=tokens, api_listen=listen), "cannot listen on 127")
    for listen in ("no.such.host.invalid:80", "192.0.2.1:80"):
        await refuses(supervisor, replace(settings, tokens=tokens, api_listen=listen), "cannot listen on")
    file = settings.users_base / "api.sock"
    file.write_text("precious")
    await refuses(supervisor, replace(settings, api_socket=str(file)), "cannot listen on")
    assert file.read_text() == "precious"
    await refuses(supervisor, replace(settings, api_socket=str(settings.users_base / ("x" * 200))), "cannot listen on")
    open_to_all = settings.users_base / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    await refuses(supervisor, replace(settings, api_socket=str(open_to_all / "api.sock")), "not safe")


async def test_the_socket_is_one_servers_and_goes_with_it(supervisor: Supervisor, settings: Settings) -> None:
    path = settings.run_dir / "api.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with listening(create_app(supervisor, settings), settings) as where:
        assert (where.socket, where.address) == (path, None)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        await refuses(supervisor, settings, "another server", StateError)
        assert path.exists()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()
    async with listening(create_app(supervisor, settings), settings):
        assert path.exists()


async def test_the_group_is_let_to_the_socket(supervisor: Supervisor, settings: Settings) -> None:
    settings = replace(settings, api_group="daemon")
    before = settings.run_dir.stat()
    async with listening(create_app(supervisor, settings), settings):
        after = settings.run_dir.stat()
        assert not stat.S_IMODE(after.st_mode) & 0o066
        assert after.st_mode & 0o001 or (after.st_mode & 0o010 and after.st_gid != before.st_gid)
        assert stat.S_IMODE((settings.run_dir / "fifo").stat().st_mode) == 0o700


@pytest.mark.each_loop
async def test_peers_are_known_on_each_loop(supervisor: Supervisor, api_settings: Settings) -> None:
    async with serving(supervisor, api_settings) as api:
        assert (await api.curl("/healthz")).json == {"status": "ok"}
        client = await api.client("read")
        assert (await client.get("/healthz")).status_code == 200


async def test_requests_under_way_end_before_the_server_does(supervisor: Supervisor, api_settings: Settings) -> None:
    command = "trap 'sleep 3; exit 7' TERM; echo ready; while :; do sleep 0.1; done"
    sandbox = await supervisor.start(spec(command, stop_grace=60.0))
    await line_of(sandbox)
    transport = httpx.AsyncHTTPTransport(uds=str(api_settings.api_socket_path))
    client = httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30)
    async with client, serving(supervisor, api_settings):
        stopping: asyncio.Task[Any] = asyncio.create_task(client.delete(BOX))
        running = asyncio.create_task(
            client.post(
                "/runner/sandboxes", json={"user_id": USER, "service_id": "b", "command": "sleep 600", "kind": "run"}
            )
        )
        await eventually(lambda: sandbox.state == "stopping" and len(supervisor.list()) == 2)
        await eventually(lambda: {box.service_id: box for box in supervisor.list()}["b"].state == "running")
    answers = await soon(asyncio.gather(stopping, running))
    assert answers[0].json()["outcome"]["exit_code"] == 7
    assert (answers[1].status_code, answers[1].json()["code"]) == (503, "server-stopping")
    assert supervisor.list() == []
