"""Homes out and in through the client: files that are whole, or not there at all."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import tarfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from pactown_runner import Client, Settings, Supervisor
from pactown_runner.archives import ArchiveError
from pactown_runner.client import ClientError, ConnectionLostError
from pactown_runner.errors import FilesError, NotFoundError, StateError
from tests.api.conftest import USER, Api, serving
from tests.client.conftest import Relay
from tests.supervising import eventually, processes_of, soon, spec

pytestmark = [pytest.mark.host]


def under_way(api: Api) -> list[str]:
    """What the server moves in or out just now."""
    registry = api.supervisor._host.registry  # type: ignore[union-attr]
    return [row.service_id for row in registry.sandboxes.rows() if row.service_id.startswith("_")]


async def let_go(api: Api) -> None:
    """Wait until the server has noticed that its caller went away."""
    await eventually(lambda: not under_way(api))


async def test_a_home_moves_from_one_user_to_another(api: Api, client: Client, tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    await client.put_file(USER, "api", "data.bin", content)
    await client.put_file(USER, "api", "a b/\u00e9.txt", b"text")
    target = tmp_path / "home.tar.gz"
    target.write_bytes(b"an older one")
    told: list[tuple[int, int | None]] = []
    size = await client.export_user(USER, target, lambda *progress: told.append(progress))
    assert (size, told[-1]) == (target.stat().st_size, (size, None))
    assert [count for count, _ in told] == sorted(count for count, _ in told)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == [target.name]
    with tarfile.open(target) as tar:
        assert any(name.endswith("api/data.bin") for name in tar.getnames())

    told.clear()
    imported = await client.import_user("heir", target, lambda *progress: told.append(progress), made_for=USER)
    assert (imported.files, imported.bytes) == (2, len(content) + 4)
    assert told[-1] == (size, size)
    assert await client.get_file("heir", "api", "data.bin") == content

    async def pieces() -> AsyncIterator[bytes]:
        async with client.exported(USER) as exported:
            async for piece in exported:
                yield piece

    imported = await client.import_user("third", pieces(), made_for=USER)
    assert imported.files == 2
    assert await client.get_file("third", "api", "a b/\u00e9.txt") == b"text"


async def test_what_cannot_be_exported_leaves_nothing(api: Api, client: Client, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        await client.export_user("nobody", tmp_path / "x")
    await client.create_user(USER)
    for target in (tmp_path / "none/x", tmp_path):
        with pytest.raises(FilesError, match="cannot write"):
            await client.export_user(USER, target)
    assert os.listdir(tmp_path) == []


async def test_what_cannot_be_imported_changes_nothing(api: Api, client: Client, tmp_path: Path) -> None:
    await client.put_file(USER, "api", "kept", b"precious")
    bad = tmp_path / "bad.tar.gz"
    bad.write_bytes(b"no archive at all")
    with pytest.raises(ArchiveError):
        await client.import_user(USER, bad)
    with pytest.raises(FilesError, match="cannot read"):
        await client.import_user(USER, tmp_path / "none")
    with pytest.raises(FilesError, match="cannot read"):
        await client.import_user(USER, tmp_path)
    good = tmp_path / "good.tar.gz"
    await client.export_user(USER, good)
    await client.start(spec("sleep 600"))
    with pytest.raises(StateError):
        await client.import_user(USER, good)
    await client.stop(USER, "api", grace=0)
    with pytest.raises(ArchiveError):
        await client.import_user("heir", good)
    (tmp_path / "cut").write_bytes(good.read_bytes()[:-20])
    with pytest.raises(ArchiveError):
        await client.import_user(USER, tmp_path / "cut")
    assert await client.get_file(USER, "api", "kept") == b"precious"


async def test_an_export_that_is_cut_off_leaves_nothing(api: Api, relay: Relay, tmp_path: Path) -> None:
    await api.supervisor.files.put(USER, "api", os.urandom(4 << 20), "data.bin")
    target = tmp_path / "home.tar.gz"
    target.write_bytes(b"an older one")
    async with Client(relay.path) as client:
        for limit in (100, 1 << 20):
            relay.limit = limit
            with pytest.raises(ConnectionLostError):
                await client.export_user(USER, target)
            assert os.listdir(tmp_path) == [target.name]
            await let_go(api)
        relay.limit = None
        begun = asyncio.Event()

        def hold(*_: object) -> None:
            relay.hold()
            begun.set()

        exporting = asyncio.create_task(client.export_user(USER, target, hold))
        await soon(begun.wait())
        exporting.cancel()
        await asyncio.wait([exporting])
    assert exporting.cancelled()
    assert os.listdir(tmp_path) == [target.name]
    assert target.read_bytes() == b"an older one"


async def test_an_export_that_the_server_cannot_finish_is_none(api: Api, client: Client, tmp_path: Path) -> None:
    """The head of the answer says that all is well: only the missing end tells."""
    view = await client.start(spec(["sleep", "600"]))
    assert view.isolation is not None
    uid = view.isolation.uid[0]
    await api.supervisor.files.put(USER, "api", os.urandom(16 << 20), "data.bin")
    killed: list[int] = []

    def kill(*_: object) -> None:
        if not killed:
            killed.extend(pid for pid in processes_of(uid) if pid != view.pid)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(ConnectionLostError):
        await client.export_user(USER, tmp_path / "x", kill)
    assert len(killed) == 1
    assert os.listdir(tmp_path) == []
    await eventually(lambda: api.supervisor.get(USER, "api").state == "running")


async def test_an_import_that_is_refused_early_says_why(
    supervisor: Supervisor, api_settings: Settings, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    large.write_bytes(os.urandom(8 << 20))
    async with serving(supervisor, replace(api_settings, archive_max_bytes=10_000)) as api:
        for address, token in ((api.where.socket, None), (api.url, "admin")):
            async with Client(address, token=token) as client:
                for _ in range(20):
                    with pytest.raises(ClientError) as refused:
                        await client.import_user(USER, large)
                    assert (refused.value.code, refused.value.status) == ("too-large", 413)
    async with serving(supervisor, api_settings) as api:
        for address, token in ((api.where.socket, None), (api.url, "admin")):
            async with Client(address, token=token) as client:
                for _ in range(20):
                    with pytest.raises(ArchiveError):
                        await client.import_user(USER, large)


@pytest.mark.each_loop
async def test_a_source_without_end_is_left_when_the_server_has_answered(api: Api, client: Client) -> None:
    await client.start(spec("sleep 600"))

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(1 << 16)

    with pytest.raises(StateError):
        await soon(client.import_user(USER, endless()))


async def test_an_import_whose_source_fails_changes_nothing(api: Api, client: Client, tmp_path: Path) -> None:
    await client.put_file(USER, "api", "kept", b"precious")
    await client.export_user(USER, tmp_path / "x")
    archive = (tmp_path / "x").read_bytes()

    async def breaking() -> AsyncIterator[bytes]:
        yield archive[:100]
        await eventually(lambda: under_way(api))
        raise FilesError("it broke")

    with pytest.raises(FilesError, match="it broke"):
        await client.import_user(USER, breaking())
    await let_go(api)
    assert await client.get_file(USER, "api", "kept") == b"precious"
    assert (await client.import_user(USER, tmp_path / "x")).files == 1


async def test_users_come_and_go(api: Api, client: Client) -> None:
    made = await client.create_user(USER)
    assert await client.create_user(USER) == await client.get_user(USER) == made
    assert made == await api.supervisor.users.get(USER)
    await client.start(spec("sleep 600"))
    stats = await client.user_stats(USER)
    assert (stats.saas_user_id, stats.linux_username, stats.sandbox_count) == (USER, made.linux_username, 1)
    assert (stats.running, stats.tier, stats.blocked) == (1, None, False)
    assert stats.size_bytes > 0
    assert stats.entries >= 1
    assert await client.tiers() == list(api.settings.tiers)
    assert await client.set_tier(USER, None, blocked=True) == await client.user_tier(USER)
    assert (await client.get_sandbox(USER, "api")).state == "frozen"
    assert not (await client.set_tier(USER, None)).blocked
    await client.delete_user(USER, delete_logs=False)
    with pytest.raises(NotFoundError):
        await client.get_user(USER)
    with pytest.raises(NotFoundError):
        await client.delete_user(USER)
    assert await client.list_users() == []
    again = await client.create_user(USER)
    assert (again.linux_uid, again.linux_username) == (made.linux_uid, made.linux_username)
    assert [record async for record in client.logs(USER, "api")] == []
