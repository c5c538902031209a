"""The live sandboxes of one supervisor, by name, and the tasks that lead their lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import anyio
from anyio import to_thread

from .course import Beginning, Course
from .errors import RunnerError, StartError
from .holdings import Run
from .host import Claim, LoopHost
from .models import IsolatedUser, State
from .sandbox import Sandbox

__all__ = ["LiveSandboxes"]

_log = logging.getLogger(__name__)


class LiveSandboxes:
    """Each is here from its beginning until it has ended for good. For one event loop."""

    def __init__(self) -> None:
        self._sandboxes: dict[tuple[str, str], Sandbox] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._sandboxes)

    def find(self, user_id: str, service_id: str) -> Sandbox | None:
        """The one of this name."""
        return self._sandboxes.get((user_id, service_id))

    def of(self, user_id: str | None = None) -> list[Sandbox]:
        """All, or those of one user."""
        return [sandbox for sandbox in self._sandboxes.values() if user_id in (None, sandbox.user_id)]

    def begin(self, host: LoopHost, run: Run, beginning: Beginning, claim: Claim | None = None) -> Sandbox:
        """Begin a sandbox's life, see `Course`; it takes the place of one of the same name."""
        name = (run.spec.user_id, run.spec.service_id)

        def forget() -> None:
            if self._sandboxes.get(name) is sandbox:
                del self._sandboxes[name]

        course = Course(host, run, forget, beginning=beginning, claim=claim)
        self._sandboxes[name] = sandbox = Sandbox(host, course)
        self._keep(asyncio.create_task(course.live()))
        return sandbox

    async def hold_all(self, host: LoopHost, user: IsolatedUser, still: bool) -> None:
        """Freeze all that runs of a user, and what is just being started when it does; or thaw it.

        What is to be frozen and only waits to be started, for an environment perhaps, is given up.
        """
        sandboxes = self.of(user.saas_user_id)
        if still:
            # The tenant's own code makes an environment, for as long as it likes.
            for sandbox in sandboxes:
                sandbox.course.attempt.stop_making()
        for sandbox in sandboxes:
            course, attempt = sandbox.course, sandbox.course.attempt
            try:
                if not attempt.executed.is_set():
                    begin = host.tree.let_begin
                    await to_thread.run_sync(begin, user.key, sandbox.service_id, sandbox.run_id)
                    if not still and (course.claim is None or course.started.is_set()):
                        continue  # no dead owner left it frozen; and it may take long
                await attempt.executed.wait()
                await (sandbox.freeze() if still else sandbox.thaw())
            except RunnerError:
                # One that has ended, or never began, does not run on either.
                if sandbox.state in (State.RUNNING, State.FROZEN):
                    raise

    async def stop_all(self, user_id: str) -> None:
        """Stop all of a user. What goes wrong is logged."""
        async with anyio.create_task_group() as stopping:
            for sandbox in self.of(user_id):
                stopping.start_soon(_quietly, sandbox, sandbox.stop)

    async def abandon(self, sandbox: Sandbox) -> None:
        """Stop one whose starter was cancelled, and perhaps is again: nobody else would ever look after it."""
        stopping = asyncio.create_task(_quietly(sandbox, sandbox.stop))
        self._keep(stopping)
        with anyio.CancelScope(shield=True):
            await asyncio.wait([stopping])

    async def end_all(self, *, leave_services: bool) -> None:
        """End all, or leave services to a successor, running as they are. Nothing may begin any more."""
        async with anyio.create_task_group() as ending:
            for sandbox in self.of():
                leave = leave_services and sandbox.run.kind == "service"
                ending.start_soon(_quietly, sandbox, sandbox.course.leave if leave else sandbox.course.end)

    async def gone(self) -> None:
        """Wait until no life goes on."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def hasten(self) -> None:
        """Let all grace be over."""
        for sandbox in self._sandboxes.values():
            sandbox.course.hasten()

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _quietly(sandbox: Sandbox, end: Callable[[], Awaitable[object]]) -> None:
    try:
        await end()
    except StartError:
        # It never ran, which its starter has been told.
        pass
    except Exception as error:
        _log.error("%r could not be ended in order: %s", sandbox, error)
