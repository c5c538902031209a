"""Sandboxes of a server: started, looked at, and acted upon."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from cgroups import Limits, Stats

from ..errors import NotFoundError, SpecError, StateError
from ..models import Event, Outcome, State
from ..specs import SandboxSpec, check_user_id
from .answers import ExecResult, SandboxView, Transferred, spec_body, stats_of
from .calls import Calls
from .errors import BadAnswerError
from .paths import file_path, sandbox_path
from .streams import EventStream, ExecStream, LogStream

if TYPE_CHECKING:
    from .connection import Options

__all__ = ["SandboxCalls"]


class SandboxCalls(Calls):
    """Calls about sandboxes, see `Client`."""

    async def list_sandboxes(self, user_id: str | None = None) -> list[SandboxView]:
        """Sandboxes that are alive under this server, by user and service; of one user if it is given."""
        if user_id is not None:
            check_user_id(user_id)
        return [view async for view in self._pages(SandboxView.of, "/runner/sandboxes", "sandboxes", user_id=user_id)]

    async def get_sandbox(self, user_id: str, service_id: str) -> SandboxView:
        """A sandbox that is alive.

        Raises:
            NotFoundError: there is none.
        """
        return await self._ask(SandboxView.of, "GET", sandbox_path(user_id, service_id))

    async def start(self, spec: SandboxSpec, *, wait_ready: bool = False) -> SandboxView:
        """Start a service; returns when its program has been executed.

        Args:
            wait_ready: return only when it is ready to serve.

        Raises:
            AlreadyRunningError: it runs.
            AdmissionError, BlockedError: it may not be started now, or at all.
            LimitsError: its limits cannot be enforced.
            StartError: its program could not be executed.
            StateError: with `wait_ready`, it ended or fell into `crash-looping` before it was ready.
            SpecError: it cannot be started so: standard input is not sent over HTTP.
        """
        _refuse_stdin(spec)
        if not wait_ready:
            return await self._start(spec)
        async with self.events(user_id=spec.user_id) as events:
            view = await self._start(spec)
            while not view.ready:
                event = await self._until_told_of(view, events)
                view = await self._not_ended(view, event)
            return view

    async def run(self, spec: SandboxSpec) -> Outcome:
        """Run a program to its end. It ends with the caller, also with one that is cancelled.

        Raises: as `start`.
        """
        _refuse_stdin(spec)
        body = spec_body(spec, "run")
        view = await self._ask(SandboxView.of, "POST", "/runner/sandboxes", body=body, read=None)
        if view.outcome is None:
            raise BadAnswerError("the server answered before the run had ended")
        return view.outcome

    async def _start(self, spec: SandboxSpec) -> SandboxView:
        body = spec_body(spec, "service")
        return await self._ask(SandboxView.of, "POST", "/runner/sandboxes", body=body, read=None)

    async def stop(self, user_id: str, service_id: str, *, grace: float | None = None) -> SandboxView:
        """Stop it: SIGTERM, after the grace time SIGKILL; returns when nothing of it runs any more, with its outcome.

        Args:
            grace: in seconds; None for the spec's or the settings'.

        Raises:
            NotFoundError: there is none that is alive.
        """
        return await self._act("DELETE", user_id, service_id, params={"grace": grace})

    async def restart(self, user_id: str, service_id: str, *, grace: float | None = None) -> SandboxView:
        """End its program as a stop does, and start it again, also if it is `crash-looping`.

        Raises:
            NotFoundError: there is none that is alive.
            BlockedError: its user is blocked.
            StartError: it could not be started again.
        """
        return await self._act("POST", user_id, service_id, "restart", params={"grace": grace})

    async def freeze(self, user_id: str, service_id: str) -> SandboxView:
        """Stop it from running; it cannot notice.

        Raises:
            NotFoundError: there is none that is alive.
            StateError: nothing runs.
        """
        return await self._act("POST", user_id, service_id, "freeze")

    async def thaw(self, user_id: str, service_id: str) -> SandboxView:
        """Let it run again.

        Raises:
            NotFoundError: there is none that is alive.
            BlockedError: its user is blocked.
            StateError: nothing runs.
        """
        return await self._act("POST", user_id, service_id, "thaw")

    async def signal(self, user_id: str, service_id: str, number: int) -> int:
        """Send a signal to every process of it; returns how many got it, 0 for SIGKILL, which is not counted.

        Raises:
            NotFoundError: there is none that is alive.
            StateError: nothing runs.
        """
        path = sandbox_path(user_id, service_id, "signal")
        return await self._ask(lambda found: int(found["signalled"]), "POST", path, body={"signal": int(number)})

    async def exec(
        self,
        user_id: str,
        service_id: str,
        command: str | Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout: float = 60.0,
    ) -> ExecResult:
        """Execute a further program in it, with its identity and limits, and return how it ended and what it printed.

        It ends with the caller, also with one that is cancelled, and with the sandbox's run.

        Args:
            command: a string is run by `/bin/sh -c`, a sequence is executed as it is.
            stdin: what it reads.
            env: added to the sandbox's.
            cwd: relative to the service's directory, or absolute.
            timeout: seconds after which it is killed.

        Raises:
            NotFoundError: there is none that is alive.
            StartError: it could not be executed.
            StateError: nothing runs.
        """
        body = _exec_body(command, stdin, env, cwd, timeout)
        path = sandbox_path(user_id, service_id, "exec")
        return await self._ask(ExecResult.of, "POST", path, body=body, read=None)

    def exec_stream(
        self,
        user_id: str,
        service_id: str,
        command: str | Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout: float = 60.0,
    ) -> ExecStream:
        """As `exec`, but with all that it prints, as it prints it:

            async with client.exec_stream("alice", "api", "make 2>&1") as output:
                async for stream, data in output: ...
            print(output.status)

        Raises:
            NotFoundError, StartError, StateError: see `exec`; when it is read.
        """
        body = _exec_body(command, stdin, env, cwd, timeout)
        return ExecStream(self._connection, sandbox_path(user_id, service_id, "exec/stream"), body)

    async def set_limits(self, user_id: str, service_id: str, limits: Limits) -> SandboxView:
        """Change limits while it runs: all that are given, or none. They hold for its later runs, too.

        Raises:
            NotFoundError: there is none that is alive.
            LimitsError: they cannot be enforced.
        """
        return await self._act("PATCH", user_id, service_id, "limits", body=limits.to_dict())

    async def stats(self, user_id: str, service_id: str) -> Stats:
        """What it uses. A counter that the host does not have is None.

        Raises:
            NotFoundError: there is none that is alive.
        """
        return await self._ask(stats_of, "GET", sandbox_path(user_id, service_id, "stats"))

    async def _act(
        self, method: str, user_id: str, service_id: str, what: str = "", **options: Unpack[Options]
    ) -> SandboxView:
        # What it does may take the grace time, and that is the caller's, the spec's or the settings' to say.
        options["read"] = None
        return await self._ask(SandboxView.of, method, sandbox_path(user_id, service_id, what), **options)

    async def _until_told_of(self, view: SandboxView, events: EventStream) -> Event | None:
        async for event in events:
            # Also one that was missed may have been about it.
            if event.kind == "missed" or (event.kind in _TELLING and _is_about(event, view)):
                return event
        return None

    async def _not_ended(self, view: SandboxView, event: Event | None) -> SandboxView:
        try:
            view = await self.get_sandbox(view.user_id, view.service_id)
        except NotFoundError:
            how = None if event is None else event.details.get("message")
            raise _not_ready(view, "has ended before it was ready", how) from None
        if view.state == State.CRASH_LOOPING:
            raise _not_ready(view, "is crash-looping", view.last_outcome.message if view.last_outcome else None)
        return view

    # Streams ----------------------------------------------------------------------------------------------------

    def logs(
        self,
        user_id: str,
        service_id: str,
        *,
        follow: bool = False,
        since: int | None = None,
        tail: int | None = None,
        reconnect: bool = False,
    ) -> LogStream:
        """What a service has printed, over all its runs; it need not run.

        Args:
            follow: go on as lines are printed, until the service has ended.
            since: begin behind the record of this number.
            tail: begin with the last so many records.
            reconnect: if the stream breaks, or the server is restarted, go on where it was when there is a server
                again.

        Raises:
            NotFoundError: there is no such user; when it is read.
        """
        path = sandbox_path(user_id, service_id, "logs")
        return LogStream(self._connection, path, follow=follow, since=since, tail=tail, reconnect=reconnect)

    def events(self, *, user_id: str | None = None, reconnect: bool = False) -> EventStream:
        """What happens to users and sandboxes from the moment on in which the stream is entered, or first read.

        Args:
            user_id: of this user only.
            reconnect: if the stream breaks, or the server is restarted, go on when there is a server again. What
                happened meanwhile is not told: an event `missed`, whose `count` is None, stands for it.
        """
        if user_id is not None:
            check_user_id(user_id)
        return EventStream(self._connection, "/runner/events", user_id=user_id, reconnect=reconnect)

    # Files ------------------------------------------------------------------------------------------------------

    async def put_file(self, user_id: str, service_id: str, path: str, content: bytes) -> Transferred:
        """Put a file into the service's directory; it appears whole, or not at all, also over an older one.

        The user and the directories on the way are made if they are missing. The service need not run.

        Args:
            path: relative to the service's directory.

        Raises:
            FilesError: it cannot be put.
            SpecError: the path leads elsewhere.
        """
        where = file_path(user_id, service_id, path)
        return await self._ask(Transferred.of, "PUT", where, content=content, read=None)

    async def get_file(self, user_id: str, service_id: str, path: str) -> bytes:
        """The content of a file in the service's directory. The service need not run.

        Raises:
            FilesError: it cannot be read.
            NotFoundError: there is no such user, service or file.
            SpecError: the path leads elsewhere.
        """
        return await self._connection.read("GET", file_path(user_id, service_id, path), read=None)


def _exec_body(
    command: str | Sequence[str], stdin: bytes, env: Mapping[str, str] | None, cwd: str | None, timeout: float
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "command": command if isinstance(command, str) else list(command),
        "env": dict(env or {}),
        "cwd": cwd,
        "timeout": timeout,
    }
    return {**body, "stdin_b64": base64.b64encode(stdin).decode()} if stdin else body


_TELLING = frozenset({"ready", "crash-looping", "stopped"})
"""Kinds of events that a start which waits until it is ready may have waited for. Others do not say how it ended."""


def _is_about(event: Event, view: SandboxView) -> bool:
    """Whether it is about this one, and not about another of its name, which had to go for it to start."""
    is_later = event.run_id == view.run_id or event.ts >= view.started_at
    return event.service_id == view.service_id and is_later


def _not_ready(view: SandboxView, what: str, how: str | None) -> StateError:
    remedy = "see its log"
    # Ids may hold what is not to be pasted into a terminal.
    if view.user_id.isprintable():
        remedy += f": pactown-runner logs {shlex.quote(view.user_id)} {view.service_id}"
    return StateError(f"{view.service_id} {what}{f': {how}' if how else ''}", remedy=remedy)


def _refuse_stdin(spec: SandboxSpec) -> None:
    if spec.stdin:
        raise SpecError("a program's standard input is not sent over HTTP", remedy="leave stdin out, and use exec")
