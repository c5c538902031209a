"""A supervisor that does things at random until it is killed; run as a program of its own by `test_chaos`.

It writes down what it begins and what it has done, so that whoever looks at the wreck knows what must be there. With a
number of steps it kills itself when so many lines of the package have been executed, in whatever thread that is, and
says where: a moment that no clock would hit.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from pactown_runner import RestartPolicy, Sandbox, SandboxSpec, Settings, Supervisor
from pactown_runner.errors import RunnerError

PACKAGE = ("/pactown_runner/", "/cgroups/")
USERS = ["one", "two"]
SERVICES = ["a", "b"]

# Each line has the process's own name and a number; what was written last stands in a file as well.
PROGRAM = r"""
$| = 1; my $me = "$$." . (-s "born" || 0); open(B, ">>", "born"); print B "x"; close(B); my $n = 0;
while (1) {
    $n++; print "$me $n\n"; open(F, ">", "count.$me"); print F $n; close(F);
    exit 1 if rand() < 0.002;
    select(undef, undef, undef, 0.001) if $n % 20 == 0;
}
"""


class Diary:
    """What is begun and done, a line each; what stands there stands there, however soon we die."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, *words: str) -> None:
        os.write(self._fd, (" ".join(words) + "\n").encode())

    @contextlib.contextmanager
    def of(self, what: str, user: str, service: str) -> Any:
        self.write("begin", what, user, service)
        try:
            yield
        except RunnerError as error:
            self.write("failed", what, user, service, type(error).__name__, str(error).replace("\n", " "))
        else:
            self.write("done", what, user, service)


def die_after(steps: int, where: Path) -> None:
    """Kill this process when so many lines of the package have been executed from now on."""
    left = itertools.count(steps, -1)

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        name = frame.f_code.co_filename
        if not any(part in name for part in PACKAGE):
            return None
        if event == "line" and next(left) <= 0:
            with open(where, "a") as file:
                file.write(f"{name.rpartition('/pactown_runner/')[2]}:{frame.f_lineno}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    threading.settrace(trace)
    sys.settrace(trace)


busy: set[tuple[str, str]] = set()
"""One thing at a time is done with a service, or the diary would not tell what came last."""


async def act(supervisor: Supervisor, diary: Diary, chance: random.Random) -> None:
    name = chance.choice(USERS), chance.choice(SERVICES)
    if name not in busy:
        busy.add(name)
        try:
            await _act(supervisor, diary, chance, *name)
        finally:
            busy.discard(name)


async def _act(supervisor: Supervisor, diary: Diary, chance: random.Random, user: str, service: str) -> None:
    there = {(sandbox.user_id, sandbox.service_id): sandbox for sandbox in supervisor.list()}
    sandbox = there.get((user, service))
    if sandbox is None:
        restart = RestartPolicy(chance.choice(["always", "on-failure"]), backoff=0.001, max_restarts=None)
        spec = SandboxSpec(user_id=user, service_id=service, command=["perl", "-e", PROGRAM], restart=restart)
        with diary.of("start", user, service):
            await supervisor.start(spec)
        return
    match chance.choice(["stop", "restart", "crash", "read", "create"]):
        case "stop":
            with diary.of("stop", user, service):
                await sandbox.stop(grace=chance.choice([0, 0.1]))
        case "restart":
            with diary.of("restart", user, service):
                await sandbox.restart(grace=0)
        case "crash":
            _crash(sandbox)
        case "read":
            async for _ in sandbox.logs(tail=3):
                pass
        case "create":
            await supervisor.users.get_or_create(f"more-{chance.randrange(5)}")


def _crash(sandbox: Sandbox) -> None:
    with contextlib.suppress(ProcessLookupError):
        if pid := sandbox.pid:
            fd = os.pidfd_open(pid)
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            os.close(fd)


async def main(given: dict[str, Any], base: Path, seed: int, steps: int) -> None:
    chance = random.Random(seed)
    diary = Diary(base / "diary")
    uid_ranges = tuple(tuple(pair) for pair in given.pop("uid_ranges"))
    if steps:
        die_after(steps, base / "points")
    async with Supervisor(settings=Settings(uid_ranges=uid_ranges, **given)) as supervisor:
        print("ready", flush=True)
        while True:
            await asyncio.gather(*(act(supervisor, diary, chance) for _ in range(chance.randrange(1, 3))))
            await asyncio.sleep(chance.uniform(0, 0.02))


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
