"""What goes wrong between a client and its server: each has a type of its own, and says what can be done about it."""

from __future__ import annotations

import asyncio
import grp
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pactown_runner import Client, RunnerError, Settings, Supervisor, errors
from pactown_runner.archives import ArchiveError
from pactown_runner.client import (
    BadAnswerError,
    ClientError,
    ConnectionLostError,
    ForbiddenError,
    TimedOutError,
    UnreachableError,
)
from pactown_runner.client.problems import error_of_answer
from pactown_runner.errors import ConfigError
from pactown_runner.logs import LogError
from tests.api.conftest import USER, Api, serving
from tests.client.conftest import Relay
from tests.supervising import ROOT, eventually, soon, spec, usage

host = pytest.mark.host

AS_ANOTHER = """
import asyncio, os, sys
import pactown_runner.client.connection, pactown_runner.archives, pactown_runner.logs
from pactown_runner import Client, RunnerError

async def main():
    async with Client(sys.argv[1]) as client:
        try:
            print((await client.health()).status)
        except RunnerError as error:
            print(type(error).__name__, error.remedy)

os.setgroups([int(gid) for gid in sys.argv[3:]])
os.setresgid(*3 * [int(sys.argv[2])])
os.setresuid(*3 * [int(sys.argv[2])])
asyncio.run(main())
"""
NOBODY = 65534


def as_another(path: Path, *groups: int) -> str:
    """What somebody else hears, who has these groups."""
    words = [sys.executable, "-c", AS_ANOTHER, str(path), str(NOBODY), *map(str, groups)]
    return subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


async def test_where_no_server_is_it_is_said_how_to_start_one(tmp_path: Path) -> None:
    stale = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(stale))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = f"http://127.0.0.1:{listener.getsockname()[1]}"
    for address in (tmp_path / "none.sock", tmp_path / "no/such/dir.sock", tmp_path / ("x" * 200) / "s", stale, closed):
        async with Client(address, token="t") as client:
            for call in (client.health(), client.start(spec("true")), anext(client.events())):
                with pytest.raises(UnreachableError, match=r"no server answers on .*pactown-runner serve"):
                    await call


@host
async def test_a_socket_is_where_the_settings_say(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACTOWN_USERS_BASE", str(api.settings.users_base))
    async with Client() as client:
        assert client.address == api.where.socket
        assert (await client.health()).status == "ok"
    monkeypatch.setenv("PACTOWN_API_SOCKET", "")
    with pytest.raises(ConfigError, match="api_socket is empty"):
        Client()


@host
async def test_a_socket_may_lie_deep(supervisor: Supervisor, api_settings: Settings, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    async with serving(supervisor, replace(api_settings, api_socket=str(deep / "api.sock"))) as api:
        assert api.where.socket is not None
        async with Client(api.where.socket) as client:
            assert (await client.health()).status == "ok"
            assert str(deep) in usage(api_settings).descriptors.values()
        assert str(deep) not in usage(api_settings).descriptors.values()


@host
async def test_who_may_not_use_the_socket_is_told_who_may(supervisor: Supervisor, api_settings: Settings) -> None:
    async with serving(supervisor, api_settings) as api:
        assert api.where.socket is not None
        said = await soon(asyncio.to_thread(as_another, api.where.socket))
        assert said == "ForbiddenError be root, or have api_group name a group of yours in the server's settings"
    group = grp.getgrnam("games")
    # Not within the state, which lets nobody pass.
    settings = replace(api_settings, api_group=group.gr_name, run_dir=api_settings.users_base / "run")
    async with serving(supervisor, settings) as api:
        assert api.where.socket is not None
        said = await soon(asyncio.to_thread(as_another, api.where.socket))
        assert said == "ForbiddenError become a member of the group games, which may use it"
        assert await soon(asyncio.to_thread(as_another, api.where.socket, group.gr_gid)) == "ok"


@host
async def test_who_has_no_good_token_is_refused(api: Api) -> None:
    for token in (None, "wrong", "expired"):
        async with Client(api.url, token=token) as client:
            with pytest.raises(ClientError) as refused:
                await client.health()
            assert (refused.value.code, refused.value.status) == ("unauthorised", 401)
    async with Client(api.url, token="read") as client:
        assert await client.list_users() == []
        with pytest.raises(ForbiddenError):
            await client.create_user(USER)
        with pytest.raises(errors.NotFoundError):
            await client.get_user(USER)
    async with Client(api.url, token="shop") as client:
        with pytest.raises(ForbiddenError):
            await client.get_user("other")


@host
async def test_a_server_that_does_not_answer_is_not_waited_for(api: Api, relay: Relay) -> None:
    relay.hold()
    async with Client(relay.path, timeout=0.05) as client:
        with pytest.raises(TimedOutError, match=r"0\.05 s"):
            await client.health()
        with pytest.raises(TimedOutError):
            await client.list_sandboxes()


@host
async def test_a_connection_that_is_cut_is_no_answer(api: Api, relay: Relay) -> None:
    relay.limit = 50
    async with Client(relay.path) as client:
        for _ in range(3):
            with pytest.raises(ConnectionLostError):
                await client.health()
        relay.limit = None
        assert (await client.health()).status == "ok"
        # What is kept for later and cut meanwhile is not used again.
        relay.cut()
        await eventually(lambda: not relay.connections)
        assert (await client.health()).status == "ok"


@host
async def test_one_too_many_is_told_when_to_come_again(supervisor: Supervisor, api_settings: Settings) -> None:
    async with (
        serving(supervisor, replace(api_settings, api_connections=1)) as api,
        Client(api.where.socket) as first,
        Client(api.where.socket) as second,
    ):
        async with first.events():
            with pytest.raises(ClientError) as refused:
                await second.health()
        assert (refused.value.code, refused.value.status, refused.value.retry_after) == ("crowded", 503, 1.0)


@pytest.mark.parametrize(
    ("head", "body"),
    [
        ("HTTP/1.1 502 Bad Gateway\r\nRetry-After: 7", b"<html>bad gateway</html>"),
        ("HTTP/1.1 302 Found\r\nLocation: http://elsewhere/", b""),
        ("HTTP/1.1 404 Not Found", b'{"detail": "Not Found"}'),
        ("HTTP/1.1 500 Oops", b'{"code": 5, "detail": []}'),
        ("HTTP/1.1 200 OK", b"[]"),
        ("HTTP/1.1 200 OK", b"{}"),
        ("HTTP/1.1 200 OK", b"\xff"),
        ("HTTP/1.1 200 OK", b""),
    ],
)
async def test_another_kind_of_server_is_not_understood(tmp_path: Path, head: str, body: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(answer, tmp_path / "s"), Client(tmp_path / "s") as client:
        with pytest.raises(BadAnswerError) as refused:
            await client.user_tier(USER)
        assert refused.value.retry_after == (7.0 if "502" in head else None)
        with pytest.raises((BadAnswerError, ConnectionLostError)):
            await anext(client.events())


async def test_what_is_no_http_is_not_understood(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 smtp.example ESMTP\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(answer, tmp_path / "s"), Client(tmp_path / "s") as client:
        with pytest.raises(ConnectionLostError):
            await client.health()


@pytest.mark.parametrize(
    "address",
    ["ftp://h:1", "http://", "http://h:1/path", "http://u:p@h:1", "http://h:x", "http://h:1?q", "http://h:1/#f"],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError):
        Client(address)


@pytest.mark.parametrize("token", ["", "a b", "a\n", "a\r\nX: y", "\u00e9", "a\0"])
def test_what_is_no_token_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Client("http://127.0.0.1:1", token=token)
    assert token.strip() == "" or token not in str(refused.value)


def test_each_error_of_the_library_comes_back_as_itself() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__]
    for kind in (*kinds, ArchiveError, LogError):
        if kind is RunnerError:
            continue
        body = b'{"code": "%s", "detail": "why", "remedy": "do", "limit": "l", "step": "s", "errno": 3}'
        error = error_of_answer(409, body % kind.code.encode(), "3")
        assert (type(error), error.code, error.message) == (kind, kind.code, "why")
        if kind is not errors.BlockedError:
            assert error.remedy == "do"
    for code in ("internal", "bad-limits", "cgroup", "caller-gone", "a-new-one", "runner-error"):
        error = error_of_answer(409, b'{"code": "%s", "detail": "why", "status": 409}' % code.encode())
        assert isinstance(error, ClientError)
        assert (error.code, error.message, error.status, error.remedy) == (code, "why", 409, None)


def test_without_the_extra_it_is_said_how_to_get_it() -> None:
    source = (
        "import sys; sys.modules['httpx'] = None\n"
        "from pactown_runner import Client, RunnerError\n"
        "try: Client('/x')\nexcept RunnerError as error: print(error.code, error)"
    )
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == (
        "missing-extra a client needs httpx, which is not installed (pip install 'pactown-runner[api]')\n"
    )


def test_a_client_needs_nothing_of_the_server() -> None:
    source = "from pactown_runner import Client; Client('/x'); import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"fastapi", "pydantic", "sqlite3", "starlette", "uvicorn", "pactown_runner.supervisor"}
