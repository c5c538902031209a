"""Homes out and in, streamed: whole, or not at all; and never held as a whole."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import hashlib
import io
import os
import signal
import tarfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from pactown_runner import Settings, Supervisor
from tests.api.conftest import USER, Api, serving
from tests.supervising import eventually, leaves_nothing, processes_of, soon, spec, usage

pytestmark = [pytest.mark.host]


def path(user_id: str, what: str) -> str:
    return f"/runner/isolation/user/{quote(user_id, safe='')}/{what}"


def content_of(archive: bytes, ending: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        member = next(member for member in tar if member.name.endswith(ending))
        data = tar.extractfile(member)
        assert data is not None
        return data.read()


async def exported(client: httpx.AsyncClient, user_id: str = USER) -> bytes:
    answer = await client.post(path(user_id, "export"))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/gzip"), answer.text
    return answer.content


async def test_a_home_moves_from_one_user_to_another(api: Api) -> None:
    client = await api.client()
    files = api.supervisor.files
    content = os.urandom(3 << 20)
    await files.put(USER, "api", content, "data.bin")
    await files.put(USER, "api", b"text", "a b/\u00e9.txt")
    sandbox = await api.supervisor.start(spec("sleep 600", service="other"))
    archive = await exported(client)
    assert sandbox.state == "running"
    assert content_of(archive, "api/data.bin") == content

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(archive), 100_000):
            yield archive[at : at + 100_000]

    answer = await client.post(path("heir", "import"), params={"made_for": USER}, content=pieces())
    assert answer.status_code == 200, answer.text
    assert answer.json()["files"] == 2
    assert await files.read("heir", "api", "data.bin") == content
    assert await files.read("heir", "api", "a b/\u00e9.txt") == b"text"


async def test_what_cannot_be_exported_or_imported_is_told(api: Api) -> None:
    client = await api.client()
    answer = await client.post(path("nobody", "export"))
    assert (answer.status_code, answer.json()["code"]) == (404, "not-found")
    await api.supervisor.files.put(USER, "api", b"precious", "kept")
    archive = await exported(client)
    for content in (b"", b"no archive", gzip.compress(b"x" * 100_000), archive[: len(archive) // 2]):
        answer = await client.post(path(USER, "import"), content=content)
        assert (answer.status_code, answer.json()["code"]) == (422, "archive"), answer.text
    assert await api.supervisor.files.read(USER, "api", "kept") == b"precious"
    await api.supervisor.start(spec("sleep 600"))
    answer = await client.post(path(USER, "import"), content=archive)
    assert (answer.status_code, answer.json()["code"]) == (409, "wrong-state")


async def test_a_caller_that_goes_away_changes_nothing_and_leaves_nothing(
    settings: Settings, api_settings: Settings
) -> None:
    async with Supervisor(settings=settings) as supervisor, serving(supervisor, api_settings) as api:
        await supervisor.files.put(USER, "api", os.urandom(8 << 20), "data.bin")
        open_before = len(os.listdir("/proc/self/fd"))
        client = await api.client()
        archive = await exported(client)
        await client.aclose()
        # The server sees a moment later that it has hung up.
        await eventually(lambda: len(os.listdir("/proc/self/fd")) <= open_before)
        held = usage(settings).descriptors
        with leaves_nothing(settings):
            transport = httpx.AsyncHTTPTransport(uds=str(api.where.socket))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30) as leaving:
                begun = asyncio.Event()

                async def half() -> AsyncIterator[bytes]:
                    yield archive[: len(archive) // 2]
                    begun.set()
                    await asyncio.Event().wait()

                importing = asyncio.create_task(leaving.post(path(USER, "import"), content=half()))
                await soon(begun.wait())
                importing.cancel()
                async with leaving.stream("POST", path(USER, "export")) as answer:
                    await anext(answer.aiter_bytes(1000))
            rows = supervisor._host.registry.sandboxes.rows  # type: ignore[union-attr]
            await eventually(lambda: not [row for row in rows() if row.service_id[0] == "_"])
            # What has been let go of is closed a moment later.
            await eventually(lambda: usage(settings).descriptors == held)
        digest = hashlib.sha256(await supervisor.files.read(USER, "api", "data.bin")).hexdigest()
        again = await exported(await api.client())
        assert hashlib.sha256(content_of(again, "data.bin")).hexdigest() == digest


async def test_a_caller_that_hangs_up_on_an_export_leaves_no_error_unseen(api: Api) -> None:
    unseen: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
    await api.supervisor.files.put(USER, "api", os.urandom(8 << 20), "data.bin")
    before = len(asyncio.all_tasks())
    client = await api.client()
    async with client.stream("POST", path(USER, "export")) as answer:
        await anext(answer.aiter_bytes(1000))
    await eventually(lambda: len(asyncio.all_tasks()) <= before)
    gc.collect()
    assert unseen == []


async def test_an_export_that_fails_on_the_way_is_cut_off_and_does_not_look_whole(api: Api) -> None:
    await api.supervisor.files.put(USER, "api", os.urandom(8 << 20), "data.bin")
    user = await api.supervisor.users.get(USER)
    assert user is not None
    client = await api.client()
    async with client.stream("POST", path(USER, "export")) as answer:
        assert answer.status_code == 200
        pieces = answer.aiter_raw()
        begun = await anext(pieces)
        packing = await asyncio.to_thread(processes_of, user.linux_uid)
        assert packing
        for pid in packing:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
            begun += b"".join([piece async for piece in pieces])
    answer = await client.post(path("heir", "import"), params={"made_for": USER}, content=begun)
    assert (answer.status_code, answer.json()["code"]) == (422, "archive")
    # The same once more, and nobody in its way.
    assert await exported(client)


async def test_where_an_end_could_not_be_seen_nothing_is_exported(api: Api) -> None:
    await api.supervisor.users.get_or_create(USER)
    told = await api.curl("--http1.0", "-X", "POST", path(USER, "export"))
    assert (told.status, told.json["code"]) == (505, "old-http")
    assert "proxy_http_version" in told.json["remedy"]


async def test_an_archive_is_as_large_as_it_may_be(supervisor: Supervisor, api_settings: Settings) -> None:
    async with serving(supervisor, replace(api_settings, archive_max_bytes=10_000)) as api:
        client = await api.client()
        answer = await client.post(path(USER, "import"), content=b"x" * 10_001)
        assert (answer.status_code, answer.json()["code"]) == (413, "too-large")
    assert not list(Path(supervisor.settings.users_base).glob("pactown_*"))
