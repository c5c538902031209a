"""A supervisor that does things at random until it is killed; run as a program of its own by `test_chaos`.

It writes down what it begins and what it has done, so that whoever looks at the wreck knows what must be there. With a
number of steps it kills itself when so many lines of the package, or of a part of it, have been executed, in whatever
thread that is, and says where: a moment that no clock would hit.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import os
import random
import signal
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from pactown_runner import RestartPolicy, Sandbox, SandboxSpec, Settings, Supervisor
from pactown_runner.errors import RunnerError
from pactown_runner.events import EventReader

PACKAGE = ("/pactown_runner/", "/cgroups/")
# With the slice's name behind them, so that each run has users, and hence logins, of its own.
USERS = ["one", "two"]
MORE = ["more-1", "more-2"]
SERVICES = ["a", "b"]

PARTS = {
    "create": (
        "accounts.py:Accounts.create",
        "accounts.py:Accounts.free_uid",
        "accounts.py:_make",
        "home_dirs.py:_make_in",
        "home_dirs.py:make_home",
        "registry/users.py:UserTable.add",
        "registry/users.py:UserTable.mark_ready",
        "registry/users.py:UserTable.revive",
        "users.py:Users._choose",
        "users.py:Users._make",
        "users.py:Users._reserve",
    ),
    "start": (
        "attempt.py:Attempt._launch",
        "attempt.py:Attempt._take",
        "attempt.py:Attempt._write_down",
        "holdings.py:Holdings._claim",
        "holdings.py:Holdings._make_",
        "holdings.py:Holdings._take",
        "launcher/",
        "logs/fifo.py:Fifo.create",
        "main_process.py:Main.mark",
        "program.py:Program.launch",
        "registry/sandboxes.py:SandboxTable.claim",
        "registry/services.py:ServiceTable.register",
    ),
    "stop": (
        "attempt.py:Attempt._give_back",
        "attempt.py:Attempt.end",
        "ending.py:",
        "holdings.py:Holdings.is_removed",
        "holdings.py:ask_to_end",
        "holdings.py:kill_rest",
        "logs/pump.py:LogPump._drain",
        "logs/pump.py:LogPump.finish",
        "registry/services.py:ServiceTable.forget",
        "registry/sandboxes.py:SandboxTable.release",
    ),
    "rotate": (
        "logs/files.py:_link",
        "logs/files.py:begin_anew",
        "logs/files.py:number_of",
        "logs/files.py:successor_mark",
        "logs/journal.py:Journal._mark",
        "logs/journal.py:Journal._put_aside",
        "logs/journal.py:Journal._replace",
    ),
    "delete": (
        "accounts.py:Accounts.delete",
        "deletion/",
        "home_dirs.py:keep_home",
        "home_dirs.py:remove_home",
        "registry/users.py:UserTable.begin_removal",
        "registry/sandboxes.py:SandboxTable.claim_removal",
        "registry/users.py:UserTable.tombstone",
        "supervisor_users.py:SupervisorUsers.delete",
        "users.py:Users.begin_removal",
        "users.py:Users.remove_account",
    ),
}
"""Where the code of each deed is: a file of the package, or a function in it, or all that begin like this."""

# Each line has the process's own name and a number; what was written last stands in a file as well. It dies of itself,
# with a last line that nobody may have read yet.
PROGRAM = r"""
$| = 1; my $me = "$$-" . (-s "born" || 0); open(B, ">>", "born"); print B "x"; close(B); my $n = 0;
while (1) {
    $n++; print "$me $n\n"; open(F, ">", "count.$me"); print F $n; close(F);
    kill 9, $$ if rand() < 0.002;
    select(undef, undef, undef, 0.005) if $n % 20 == 0;
}
"""


class Diary:
    """What is begun and done, a line each; what stands there stands there, however soon we die."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, *words: str) -> None:
        os.write(self._fd, (" ".join(words) + "\n").encode())

    @contextlib.contextmanager
    def of(self, what: str, user: str, *how: str) -> Iterator[None]:
        self.write("begin", what, user, *how)
        try:
            yield
        except RunnerError as error:
            self.write("failed", what, user, *how, type(error).__name__, str(error).replace("\n", " "))
        else:
            self.write("done", what, user, *how)


@functools.cache
def part_of(code: CodeType) -> str | None:
    """The deed that a function is there for; None if it is for several, or none."""
    place = f"{code.co_filename.rpartition('/pactown_runner/')[2]}:{code.co_qualname}"
    return next((part for part, places in PARTS.items() if place.startswith(places)), None)


def die_after(steps: int, aim: str, where: Path) -> None:
    """Kill this process when so many lines of the package, or of the part that is aimed at, have been executed."""
    left = itertools.count(steps, -1)

    @functools.cache
    def counts(code: CodeType) -> bool:
        return any(part in code.co_filename for part in PACKAGE) and aim in ("any", part_of(code))

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if not counts(code):
            return None
        if event == "line" and next(left) <= 0:
            with open(where, "a") as file:
                name = code.co_filename.rpartition("/pactown_runner/")[2]
                file.write(f"{part_of(code) or 'other'} {name}:{frame.f_lineno} {code.co_qualname}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    threading.settrace(trace)
    sys.settrace(trace)


class Chaos:
    """Deeds at random. One thing at a time is done with a service, or the diary would not tell what came last."""

    def __init__(
        self, supervisor: Supervisor, diary: Diary, chance: random.Random, deletions: float, suffix: str
    ) -> None:
        self._supervisor = supervisor
        self._diary = diary
        self._chance = chance
        self._deletions = deletions
        self._users, self._more = ([name + suffix for name in names] for names in (USERS, MORE))
        self._busy: set[tuple[str, str]] = set()

    async def act(self) -> None:
        chance = self._chance
        if chance.random() < self._deletions:
            user = chance.choice(self._users + self._more)
            names, deed = {(user, service) for service in SERVICES}, self._delete(user)
        elif chance.random() < 0.1:
            user = chance.choice(self._more)
            names, deed = {(user, service) for service in SERVICES}, self._create(user)
        else:
            user, service = chance.choice(self._users), chance.choice(SERVICES)
            names, deed = {(user, service)}, self._serve(user, service)
        if names & self._busy:
            deed.close()
            return
        self._busy |= names
        try:
            await deed
        finally:
            self._busy -= names

    async def _create(self, user: str) -> None:
        with self._diary.of("create", user):
            await self._supervisor.users.get_or_create(user)

    async def _delete(self, user: str) -> None:
        if await self._supervisor.users.get(user) is None:
            return
        home, logs = self._chance.random() < 0.7, self._chance.random() < 0.7
        with self._diary.of("delete", user, "home" if home else "-", "logs" if logs else "-"):
            await self._supervisor.users.delete(user, delete_home=home, delete_logs=logs)

    async def _serve(self, user: str, service: str) -> None:
        chance, diary = self._chance, self._diary
        there = {(sandbox.user_id, sandbox.service_id): sandbox for sandbox in self._supervisor.list()}
        sandbox = there.get((user, service))
        if sandbox is None:
            restart = RestartPolicy(chance.choice(["always", "on-failure"]), backoff=0.001, max_restarts=None)
            spec = SandboxSpec(user_id=user, service_id=service, command=["perl", "-e", PROGRAM], restart=restart)
            with diary.of("start", user, service):
                await self._supervisor.start(spec)
            return
        match chance.choice(["stop", "restart", "crash", "read"]):
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


def _crash(sandbox: Sandbox) -> None:
    with contextlib.suppress(ProcessLookupError):
        if pid := sandbox.pid:
            fd = os.pidfd_open(pid)
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            os.close(fd)


async def note(diary: Diary, events: EventReader) -> None:
    """Write down which process a service has from now on, so that one before it has ended while we looked on."""
    async for event in events:
        if event.kind in ("started", "adopted", "restarted", "stopped"):
            pid = event.details.get("pid")
            # One that was adopted may have ended before, while nobody held its FIFOs open.
            there = pid and (event.kind != "adopted" or _lives(pid))
            diary.write("event", event.kind, event.user_id, str(event.service_id), str(pid) if there else "-")


def _lives(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    return False


@contextlib.asynccontextmanager
async def noting(diary: Diary, events: EventReader) -> AsyncIterator[None]:
    task = asyncio.create_task(note(diary, events))
    try:
        yield
    finally:
        task.cancel()


async def main(given: dict[str, Any], base: Path, seed: int, steps: int, aim: str) -> None:
    chance = random.Random(seed)
    diary = Diary(base / "diary")
    diary.write("event", "begun", "-", "-", "-")
    uid_ranges = tuple(tuple(pair) for pair in given.pop("uid_ranges"))
    if steps:
        die_after(steps, aim, base / "points")
    settings = Settings(uid_ranges=uid_ranges, **given)
    supervisor = Supervisor(settings=settings)
    async with noting(diary, supervisor.events()), supervisor:
        chaos = Chaos(
            supervisor, diary, chance, 0.3 if aim in ("create", "delete") else 0.03, f"@{settings.cgroup_slice}"
        )
        print("ready", flush=True)
        while True:
            await asyncio.gather(*(chaos.act() for _ in range(chance.randrange(1, 4))))
            await asyncio.sleep(chance.uniform(0, 0.02))


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]))
