"""What cannot be brought to its end at once: said, kept in mind, and tried again."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace

import pytest

from pactown_runner import Settings, Supervisor, recovery
from pactown_runner.errors import AlreadyRunningError, RegistryError, StateError
from pactown_runner.logs import LogError, LogPaths, LogPump
from pactown_runner.registry import Registry
from pactown_runner.specs import RestartMode, RestartPolicy
from tests.supervising import USER, eventually, line_of, processes_of, soon, spec

pytestmark = pytest.mark.host


@contextmanager
def broken(settings: Settings, deed: str) -> Iterator[None]:
    """The disk of the registry fails whenever this is to be written."""
    with closing(sqlite3.connect(settings.state_dir / "registry.db", isolation_level=None)) as db:
        db.execute(f"CREATE TRIGGER broken BEFORE {deed} BEGIN SELECT raise(ABORT, 'the disk is broken'); END")
        try:
            yield
        finally:
            db.execute("DROP TRIGGER broken")


def nothing_released(settings: Settings) -> AbstractContextManager[None]:
    """It fails whenever something is to be given free."""
    return broken(settings, "DELETE ON sandboxes")


def nothing_forgotten(settings: Settings) -> AbstractContextManager[None]:
    """It fails whenever a service is not to come back."""
    return broken(settings, "DELETE ON services")


async def test_what_ends_while_the_registry_is_broken_is_told_and_its_name_comes_free(
    supervisor: Supervisor, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    sandbox = await supervisor.start(spec(["sleep", "1000"]))
    with nothing_released(settings):
        assert (await soon(sandbox.kill())).reason == "stopped"
        assert (await soon(sandbox.wait())).reason == "stopped"
        assert "the disk is broken" in caplog.text
        with pytest.raises(AlreadyRunningError):
            await supervisor.start(spec(["sleep", "1000"]))
    await eventually(lambda: not rows(settings))
    assert (await soon(supervisor.run(spec("exit 3")))).exit_code == 3


async def test_what_cannot_be_made_while_the_registry_is_broken_does_not_keep_its_name(
    supervisor: Supervisor, settings: Settings
) -> None:
    await soon(supervisor.run(spec("true")))
    with nothing_released(settings):
        outcome = await soon(supervisor.run(spec(["/nonexistent"])))
        assert outcome.reason == "failed-to-start"
    await eventually(lambda: not rows(settings))
    assert (await soon(supervisor.run(spec("exit 3")))).exit_code == 3


async def test_what_cannot_be_forgotten_is_ended_all_the_same(settings: Settings) -> None:
    async with Supervisor(settings=replace(settings, takeover_interval=1000.0)) as supervisor:
        sandbox = await supervisor.start(spec(["sleep", "1000"], restart=RestartPolicy("always")))
        uid = sandbox.user.linux_uid
        with nothing_forgotten(settings):
            with pytest.raises(RegistryError, match="the disk is broken"):
                await soon(sandbox.kill())
            assert processes_of(uid) == {}
            assert sandbox.state == "ended"
            assert rows(settings) == []
        # Said once more, it does not come back either.
        assert (await soon(sandbox.kill())).reason == "stopped"
        assert services(settings) == []


async def test_what_a_cancelled_starter_cannot_have_forgotten_does_not_run_on(settings: Settings) -> None:
    async with Supervisor(settings=replace(settings, takeover_interval=1000.0)) as supervisor:
        user = await supervisor.users.get_or_create(USER)
        with nothing_forgotten(settings):
            starting = asyncio.create_task(supervisor.start(spec(["sleep", "1000"], restart=RestartPolicy("always"))))
            await asyncio.sleep(0)
            (sandbox,) = supervisor.list()
            starting.cancel()
            await soon(asyncio.wait([starting]))
            assert sandbox.course.attempt.started
            assert (sandbox.state, supervisor.list(), processes_of(user.linux_uid)) == ("ended", [], {})


async def test_a_first_start_that_cannot_be_forgotten_keeps_no_name(settings: Settings) -> None:
    async with Supervisor(settings=replace(settings, takeover_interval=1000.0)) as supervisor:
        with nothing_forgotten(settings):
            with pytest.raises(RegistryError, match="the disk is broken"):
                await soon(supervisor.start(spec(["/nonexistent"], restart=RestartPolicy("always"))))
            assert rows(settings) == []
        sandbox = await soon(supervisor.start(spec(["sleep", "1000"], restart=RestartPolicy("always"))))
        assert (await soon(sandbox.kill())).reason == "stopped"
        assert services(settings) == []


@pytest.mark.parametrize("mode", ["no", "always"])
async def test_a_restart_that_the_registry_refuses_is_told(
    supervisor: Supervisor, settings: Settings, mode: RestartMode
) -> None:
    restart = RestartPolicy(mode, backoff=1000, backoff_max=1000)
    sandbox = await supervisor.start(spec(["sleep", "1000"], restart=restart))
    with broken(settings, "UPDATE OF run_id ON sandboxes"):
        with pytest.raises(RegistryError, match="the disk is broken"):
            await soon(sandbox.restart(0))
        if mode == "no":
            outcome = await soon(sandbox.wait())
            assert (outcome.reason, sandbox.state) == ("failed-to-start", "ended")
            return
        with pytest.raises(RegistryError):
            await soon(sandbox.restart(0))
    await soon(sandbox.restart(0))
    assert sandbox.state == "running"


async def test_a_stop_while_another_run_is_claimed_ends_the_restart(supervisor: Supervisor, settings: Settings) -> None:
    sandbox = await supervisor.start(spec(["sleep", "1000"]))
    with closing(sqlite3.connect(settings.state_dir / "registry.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        restarting = asyncio.create_task(sandbox.restart(0))
        await eventually(lambda: sandbox.state == "starting")
        stopping = asyncio.create_task(sandbox.stop())
        await asyncio.sleep(0)
        other.execute("ROLLBACK")
    assert (await soon(stopping)).reason == "stopped"
    with pytest.raises(StateError, match="ended"):
        await soon(restarting)


async def test_a_transfer_while_the_registry_is_broken_does_not_keep_its_user(
    supervisor: Supervisor, settings: Settings
) -> None:
    with nothing_released(settings):
        await soon(supervisor.files.put(USER, "api", b"x", "name"))
        assert len(rows(settings)) == 1
    await eventually(lambda: not rows(settings))


def rows(settings: Settings) -> list[str]:
    with Registry(settings.state_dir / "registry.db") as registry:
        return [row.service_id for row in registry.sandboxes.rows()]


def services(settings: Settings) -> list[str]:
    with Registry(settings.state_dir / "registry.db") as registry:
        return [row.service_id for row in registry.services.absent()]


async def test_a_log_that_could_not_be_finished_is_written_before_the_next_one(
    supervisor: Supervisor, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody else writes into it meanwhile: neither another supervisor that comes by, nor a later run."""
    finish = LogPump.finish

    async def fail(pump: LogPump) -> None:
        raise LogError("the disk is full")

    first = await supervisor.start(spec("echo first; exec sleep 1000"))
    await line_of(first, "first")
    monkeypatch.setattr(LogPump, "finish", fail)
    assert (await soon(first.kill())).reason == "stopped"
    assert "is not complete" in caplog.text
    second = await supervisor.start(spec("echo second; exec sleep 1000"))
    await line_of(second, "second")
    monkeypatch.setattr(LogPump, "finish", finish)
    async with Supervisor(settings=settings, role="one-shot"):
        pass
    paths = LogPaths(settings.log_dir, settings.run_dir, first.user.key)
    assert paths.leftovers() == {("api", first.run_id), ("api", second.run_id)}
    await soon(second.kill())
    monkeypatch.setattr(recovery, "WRITE_PAUSE", 0.0)
    await eventually(lambda: not paths.leftovers() and not rows(settings))
    numbers = [record.seq async for record in supervisor.logs(USER, "api")]
    assert numbers == list(range(1, len(numbers) + 1))
