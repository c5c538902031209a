"""Sandboxes with requirements, started by a supervisor."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pactown_runner import RestartPolicy, SandboxSpec, Settings, Supervisor
from pactown_runner.errors import StartError
from pactown_runner.registry import Standing
from pactown_runner.specs import Probe
from tests.packages import Index, make_wheel, serving
from tests.supervising import USER, eventually, leaves_nothing, leftovers, line_of, lines, processes_of, soon, spec
from tests.test_venvs import UV

if TYPE_CHECKING:
    from tests.hostguard import Run

pytest_plugins = ("tests.supervising",)
pytestmark = pytest.mark.host

SAYS = ["python", "-c", "import tiny, sys; print(tiny.VERSION, sys.prefix, flush=True)"]
SERVES = ["python3", "-c", "import tiny, time; print('ready', tiny.VERSION, flush=True); time.sleep(1000)"]
TINY = ["tiny==1.0"]


@pytest.fixture
def index(test_run: Run) -> Iterator[Index]:
    folder = Path(tempfile.mkdtemp(prefix="wheels-", dir=test_run.directory))
    make_wheel(folder, "tiny")
    with serving(folder) as index:
        yield index


@pytest.fixture
async def runner(settings: Settings, index: Index) -> AsyncIterator[Supervisor]:
    settings = replace(settings, venv_uv=UV, venv_index=index.url)
    async with Supervisor(settings=settings) as supervisor:
        yield supervisor
    assert not leftovers(settings)


def wanting(command: list[str] | str = SAYS, **options: Any) -> SandboxSpec:
    return spec(command, **{"requirements": TINY, **options})


async def test_a_run_has_its_requirements(runner: Supervisor, settings: Settings, index: Index) -> None:
    sandbox = await soon(runner.start_run(wanting()), 60)
    assert (await soon(sandbox.wait())).ok
    [line] = await lines(sandbox)
    version, prefix = line.split()
    assert version == "1.0"
    assert prefix == f"{sandbox.user.home_dir}/sandboxes/api/.venv"
    assert index.lookups == ["tiny"]
    with leaves_nothing(runner.settings):
        for command in (SAYS, "tiny; echo $VIRTUAL_ENV"):
            assert (await soon(runner.run(wanting(command)))).ok
    assert index.lookups == ["tiny"]
    # The program is told where it is, whatever else its spec says of PATH.
    sandbox = await soon(runner.start_run(wanting("echo $PATH", env={"PATH": "/bin"})))
    await soon(sandbox.wait())
    assert await lines(sandbox) == [f"{prefix}/bin:/bin"]
    assert not (await soon(runner.run(spec(SAYS)))).ok


async def test_a_service_finds_it_again_and_makes_it_anew_when_it_is_broken(runner: Supervisor, index: Index) -> None:
    sandbox = await soon(runner.start(wanting(SERVES, ready=Probe(command=["python", "-c", "import tiny"]))), 60)
    await line_of(sandbox, "ready 1.0")
    await soon(sandbox.until_ready())
    cache = sandbox.user.home_dir / ".cache/venvs"
    [path] = [path for path in cache.iterdir() if path.name != ".lock"]
    (path / "bin/python").unlink()
    (path / "bin/python3").unlink()
    await soon(sandbox.restart(), 60)
    await soon(sandbox.until_ready())
    assert index.lookups == ["tiny", "tiny"]
    await soon(sandbox.stop())


async def test_a_failure_is_told(runner: Supervisor) -> None:
    with pytest.raises(StartError, match="no-such-package") as caught:
        await soon(runner.start(wanting(requirements=["no-such-package"])), 60)
    assert caught.value.step == "venv"
    outcome = await soon(runner.run(wanting(requirements=["no-such-package"])), 60)
    assert outcome.reason == "failed-to-start"
    assert "no-such-package" in (outcome.message or "")


async def test_another_reason_than_the_environment_is_told_as_it_is(runner: Supervisor, index: Index) -> None:
    for _ in range(2):
        with pytest.raises(StartError, match="nowhere"):
            await soon(runner.start(wanting(cwd="nowhere")), 60)
        with pytest.raises(StartError, match="no-such-program"):
            await soon(runner.start(wanting(["no-such-program"])), 60)
    assert index.lookups == ["tiny"]


async def test_making_it_does_not_count_against_a_run_s_time(runner: Supervisor, index: Index) -> None:
    index.open.clear()
    running = asyncio.create_task(runner.run(wanting(timeout=5)))
    assert await asyncio.to_thread(index.asked.wait, 60)
    await eventually(lambda: _age(runner) > 5)
    index.open.set()
    assert (await soon(running, 60)).reason == "exited"


def _age(runner: Supervisor) -> float:
    return time.time() - runner.list()[0].started_at


@pytest.mark.parametrize("how", ["stop", "cancel", "leave"])
async def test_what_is_being_made_can_be_stopped(settings: Settings, index: Index, how: str) -> None:
    index.open.clear()
    settings = replace(settings, venv_uv=UV, venv_index=index.url, on_exit="leave")
    async with Supervisor(settings=settings) as runner:
        starting = asyncio.create_task(runner.start(wanting(SERVES, restart=RestartPolicy("always"))))
        assert await asyncio.to_thread(index.asked.wait, 60)
        if how == "stop":
            with pytest.raises(StartError, match="stopped while"):
                await soon(runner.stop(USER, "api"))
        elif how == "cancel":
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await soon(starting)
            assert runner.list() == []
    if how != "cancel":
        with pytest.raises(StartError, match="stopped while"):
            await soon(starting)
    assert not leftovers(settings)


async def test_who_is_blocked_does_not_go_on_making_it(runner: Supervisor, index: Index) -> None:
    user = await runner.users.get_or_create(USER)
    index.open.clear()
    policy = RestartPolicy("always")
    starting = [asyncio.create_task(runner.start(wanting(SERVES, service=name, restart=policy))) for name in ("a", "b")]
    assert await asyncio.to_thread(index.asked.wait, 60)
    await eventually(lambda: len([box for box in runner.list() if box.course.attempt.held]) == 2)
    await soon(runner.users.set_standing(USER, Standing(None, blocked=True)))
    for task in starting:
        with pytest.raises(StartError, match="stopped while"):
            await soon(task)
    assert processes_of(user.linux_uid) == {}
    assert runner.list() == []


async def test_a_start_that_takes_long_keeps_no_block_waiting(runner: Supervisor, index: Index) -> None:
    user = await runner.users.get_or_create(USER)
    assert runner._host is not None
    index.open.clear()
    starting = asyncio.create_task(runner.start(wanting(SERVES)))
    assert await asyncio.to_thread(index.asked.wait, 60)
    # As if it had been begun as soon as the tenant is blocked no more.
    runner._host.registry.standings.set(user.key, Standing(None, blocked=True))
    await soon(runner.users.set_standing(USER, Standing()))
    assert not starting.done()
    await soon(runner.users.set_standing(USER, Standing(None, blocked=True)))
    with pytest.raises(StartError, match="stopped while"):
        await soon(starting)
