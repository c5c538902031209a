"""One state, and at the same time a server that is called over its socket, one-shot runs of the command, and another
process with a `Supervisor` of its own: each name is one process's at a time, and nothing of it is lost or left."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

import pytest

from cgroups import find_mount
from pactown_runner import Client, SandboxSpec, Settings, Supervisor
from pactown_runner.errors import AlreadyRunningError
from pactown_runner.registry import Registry
from tests.cli.conftest import Start
from tests.supervising import eventually, leftovers, processes_of, soon, spec

pytestmark = [pytest.mark.host, pytest.mark.deadline(240)]

USERS = ("one", "two")
SERVICES = ("a", "b")
COMMANDS, CALLS, RUNS = 6, 25, 40
"""Starts by the command, by callers of the server, and by the supervisor of this process."""

# The kernel says whether another process has this name now: it holds the lock for as long as anything of it lives.
PROGRAM = "exec 9>lock; flock -n 9 || { echo %s >>doubled; exit 9; }; echo %s >>begun; %s"


@dataclass
class Told:
    """What became of starts, as those who wanted them were told; each has a word of its own."""

    begun: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    words: Iterator[str] = field(default_factory=lambda: (f"start-{number}" for number in count()))


@pytest.fixture
def environ(environ: dict[str, str]) -> dict[str, str]:
    return {**environ, "PACTOWN_TAKEOVER_INTERVAL": "0.05"}


def program(word: str, then: str) -> str:
    return PROGRAM % (word, word, then)


def written(settings: Settings, name: str) -> list[str]:
    """What all services' programs have written into files of this name."""
    return [
        line for path in settings.users_base.glob(f"*/sandboxes/*/{name}") for line in path.read_text().splitlines()
    ]


async def call(client: Client, settings: Settings, told: Told, user: str, service: str) -> None:
    """Have the server start a service, and stop it a little later."""
    word = next(told.words)
    try:
        await client.start(spec(program(word, "exec sleep 1000"), user=user, service=service))
    except AlreadyRunningError:
        told.refused.add(word)
        return
    told.begun.add(word)
    await eventually(lambda: word in written(settings, "begun"))
    await client.stop(user, service, grace=0)


async def run(supervisor: Supervisor, told: Told, user: str, service: str) -> None:
    word = next(told.words)
    try:
        outcome = await supervisor.run(spec(program(word, "sleep 0.01"), user=user, service=service))
    except AlreadyRunningError:
        told.refused.add(word)
        return
    assert outcome.ok
    told.begun.add(word)


async def command(start: Start, told: Told, user: str, service: str) -> None:
    word = next(told.words)
    words = ["run", "--user", user, "--service", service, "--", "sh", "-c", program(word, "sleep 0.05")]
    process = await asyncio.to_thread(start, *words)
    _, errors = await asyncio.to_thread(process.communicate)
    if process.returncode == 125:
        assert b" already" in errors, errors
        told.refused.add(word)
        return
    assert process.returncode == 0, errors
    told.begun.add(word)


async def in_turn(times: int, act: Callable[[str, str], Awaitable[None]]) -> None:
    """Do something so often, with any name."""
    chance = random.Random(times)
    for _ in range(times):
        await act(chance.choice(USERS), chance.choice(SERVICES))


def rows(settings: Settings) -> set[tuple[str, str]]:
    """Which services of whom are meant to be alive."""
    with Registry(settings.state_dir / "registry.db") as registry:
        users = {row.key: row.saas_id for row in registry.users.rows()}
        return {(users[row.key], row.service_id) for row in registry.sandboxes.rows()}


def scopes(settings: Settings) -> set[str]:
    return {path.name for path in (find_mount().path / settings.cgroup_slice).glob("*/*.scope")}


async def test_no_sandbox_is_owned_twice_or_lost(
    serving: subprocess.Popen[bytes], start: Start, settings: Settings
) -> None:
    told = Told()
    address = settings.api_socket_path
    assert address is not None
    async with Client(address) as client, Supervisor(settings=settings, role="one-shot") as supervisor:
        # Two that live through it all: a service of the server's, and a run of a command that will be killed.
        lasting = await client.start(spec(program("lasting", "exec sleep 1000"), user="one", service="lasting"))
        words = ["--user", "two", "--service", "killed", "--", "sh", "-c", program("killed", "sleep 1000 & wait")]
        victim = await asyncio.to_thread(start, "run", *words)
        await eventually(lambda: "killed" in written(settings, "begun"))
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(in_turn(CALLS, lambda user, service: call(client, settings, told, user, service)))
                group.create_task(in_turn(RUNS, lambda user, service: run(supervisor, told, user, service)))
                group.create_task(in_turn(COMMANDS, lambda user, service: command(start, told, user, service)))
            group.create_task(_kill(victim, told, settings))
        # All that began is what was said to have begun, each once; and what was refused has not.
        assert sorted(written(settings, "begun")) == sorted(told.begun | {"lasting", "killed", "again"})
        assert written(settings, "doubled") == []
        assert len(told.begun | told.refused) == 2 * (CALLS + RUNS + COMMANDS)
        print(f"{len(told.begun)} of {len(told.begun | told.refused)} began")
        assert told.refused, "they never met"
        # What has lasted is the server's still, and alone.
        assert rows(settings) == {("one", "lasting")}
        assert scopes(settings) == {"lasting.scope"}
        assert await client.get_sandbox("one", "lasting") == lasting
        assert [*processes_of(await _uid(supervisor, "one"))] == [lasting.pid]
        assert processes_of(await _uid(supervisor, "two")) == {}
        # Whoever has a name, it is taken for all.
        with pytest.raises(AlreadyRunningError):
            await supervisor.run(spec("exit 0", user="one", service="lasting"))
    serving.send_signal(signal.SIGTERM)
    assert await soon(asyncio.to_thread(serving.wait)) == 0
    assert leftovers(settings) == []


async def _kill(victim: subprocess.Popen[bytes], told: Told, settings: Settings) -> None:
    """Kill a command outright amid all this. The server ends its run, and the name is free for another."""
    await eventually(lambda: len(told.begun) >= 10)
    victim.kill()
    await eventually(lambda: ("two", "killed") not in rows(settings))
    assert "killed.scope" not in scopes(settings)
    async with Supervisor(settings=settings, role="one-shot") as another:
        command: SandboxSpec = spec(program("again", "true"), user="two", service="killed")
        assert (await soon(another.run(command))).ok


async def _uid(supervisor: Supervisor, user: str) -> int:
    known = await supervisor.users.get(user)
    assert known is not None
    return known.linux_uid
