"""What cannot be brought to its end at once: said, kept in mind, and tried again."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from pactown_runner import Settings, Supervisor, recovery
from pactown_runner.errors import AlreadyRunningError
from pactown_runner.logs import LogError, LogPaths, LogPump
from pactown_runner.registry import Registry
from tests.supervising import USER, eventually, line_of, soon, spec

pytestmark = pytest.mark.host


@contextmanager
def nothing_released(settings: Settings) -> Iterator[None]:
    """The disk of the registry fails whenever something is to be given free."""
    with closing(sqlite3.connect(settings.state_dir / "registry.db", isolation_level=None)) as db:
        db.execute(
            "CREATE TRIGGER broken BEFORE DELETE ON sandboxes BEGIN SELECT raise(ABORT, 'the disk is broken'); END"
        )
        try:
            yield
        finally:
            db.execute("DROP TRIGGER broken")


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
