"""What `exec` does: it finds a service by what is written down of it, and executes a program there as its own child.

Nothing is asked of the process that looks after the service, nor told to it. The service may end at any moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar, TypeVarTuple

from cgroups import Cgroup, GoneError

from ..config import Settings
from ..errors import NotFoundError, StateError
from ..execution import Execution, execute
from ..main_process import Main
from ..models import IsolatedUser
from ..outcomes import ExitStatus
from ..pipes import OutputPipe
from ..registry import Registry, SandboxRow
from ..specs import SandboxSpec, check_service_id
from ..trees import open_tree
from ..users import Users
from .feeding import feed
from .interrupting import interruptible
from .messages import LOOK_FOR_USERS, look_for_services, say
from .output import Output, Shown

__all__ = ["execute_to_end"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_UNKNOWN = 125
_MOMENT = 100
"""Milliseconds."""


def execute_to_end(
    settings: Settings,
    user_id: str,
    service_id: str,
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: str | None,
    stdin: bool,
    raw: bool,
) -> int:
    """Execute a program in a service, and return the exit code that tells our caller how it ended.

    Args:
        raw: see `Output`.

    Raises:
        Ended: we were interrupted.
        RunnerError: it was not executed.
        OSError: its output could not be written.
    """
    with _found(settings, user_id, service_id) as found:
        return asyncio.run(_to_end(found, command, env=env, cwd=cwd, stdin=stdin, raw=raw))


# Finding it -----------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    user: IsolatedUser
    spec: SandboxSpec
    cgroup: Cgroup
    first: int | None


@contextlib.contextmanager
def _found(settings: Settings, user_id: str, service_id: str) -> Iterator[_Found]:
    """The service, held by descriptors of its cgroup and its first process: they stand for this very run of it."""
    user, row, state_id = _registered(settings, user_id, check_service_id(service_id))
    tree = open_tree(cgroup_slice=settings.cgroup_slice, state_id=state_id, tenant_limits=settings.tenant_limits)
    with contextlib.ExitStack() as held:
        held.enter_context(tree.root)
        try:
            cgroup = held.enter_context(tree.open_run(user.key, service_id, row.run_id))
            main = Main.read(cgroup)
        except GoneError as error:
            raise StateError(
                f"nothing of {service_id!r} runs at this moment: it is being started, restarted or ended",
                remedy="try again in a moment",
            ) from error
        first = main.pidfd() if main else None
        if first is not None:
            held.callback(os.close, first)
        yield _Found(user, SandboxSpec.from_json(row.spec), cgroup, first)


def _registered(settings: Settings, user_id: str, service_id: str) -> tuple[IsolatedUser, SandboxRow, str]:
    """The user, the row of its service, and the id of the state."""
    path = settings.state_dir / "registry.db"
    no_user = NotFoundError(f"there is no user {user_id!r} in {settings.state_dir}", remedy=LOOK_FOR_USERS)
    if not path.exists():  # looking must not make one
        raise no_user
    with Registry(path) as registry:
        users = Users(settings, registry)
        user = users.get(user_id)
        if user is None:
            raise no_user
        users.verify(user)
        row = registry.sandboxes.row(user.key, service_id)
        state_id = registry.state_id
    if row is None:
        raise NotFoundError(f"no service {service_id!r} of user {user_id!r} runs", remedy=look_for_services(user_id))
    if row.kind == "run":
        raise StateError(
            f"{service_id!r} is a one-shot run: with what it was started, only its own process knows",
            remedy="start it as a service",
        )
    return user, row, state_id


# Executing ------------------------------------------------------------------------------------------------------


class _Here:
    """This process, as the parent of what it executes. What it cannot reap, init does in a moment."""

    def __init__(self) -> None:
        self.unreaped: set[int] = set()

    async def in_thread(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        return await asyncio.to_thread(call, *args)


async def _to_end(
    found: _Found, command: Sequence[str], *, env: Mapping[str, str], cwd: str | None, stdin: bool, raw: bool
) -> int:
    user, spec, cgroup, first = found

    async def work() -> ExitStatus:
        executing = execute(_Here(), user, spec, cgroup, command, first=first, stdin=stdin, env=env, cwd=cwd)
        async with await executing as execution:
            if stdin:
                feed(execution, asyncio.get_running_loop())
            await _relay(execution, raw=raw)
            return await execution.wait()

    status = await interruptible(work())
    if status.signal == signal.SIGKILL and first is not None and _ends(first):
        say(f"pactown-runner: service {spec.service_id!r} has ended")
    if status.signal is not None:
        return 128 + status.signal
    if status.exit_code is None:
        say("pactown-runner: it ended with a status that nobody could see")
    return _UNKNOWN if status.exit_code is None else status.exit_code


async def _relay(execution: Execution, *, raw: bool) -> None:
    """Pass both outputs on, each as fast as it is read from us, until they end."""
    output = Output({"stdout": 1, "stderr": 2}, raw=raw)
    tasks = [
        asyncio.create_task(_pass_on(stream, fd, output, raw=raw))
        for stream, fd in ((execution.stdout, 1), (execution.stderr, 2))
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


async def _pass_on(stream: OutputPipe, fd: int, output: Output, *, raw: bool) -> None:
    shown = Shown(fd, raw=raw)
    async for chunk in stream:
        await output.write([(fd, shown(chunk))])
    await output.write([(fd, shown(b"", final=True))])


def _ends(pidfd: int) -> bool:
    """Whether a process has ended, or does so in a moment: what is killed together does not end all at once."""
    end = select.poll()
    end.register(pidfd, select.POLLIN)
    return bool(end.poll(_MOMENT))
