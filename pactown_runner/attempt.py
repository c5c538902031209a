"""One run of a sandbox's program: from its cgroup and log to the `Outcome`, after which nothing of it is left.

Only the claim on the name outlives it: that is the sandbox's, which may try again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Protocol

import anyio

from .ending import emptied, end_rest
from .errors import StartError, StateError
from .execution import Execution, execute
from .health import look_after
from .holdings import Claiming, Holdings, Run, ask_to_end
from .host import LoopHost
from .logs import LogError, LogFeed
from .main_process import Main
from .models import Outcome, Reason
from .outcomes import outcome_of
from .ports import check_ports
from .program import Program
from .registry import HeldError
from .venv_layout import Venv, venv_of
from .venvs import ensure_venv

__all__ = ["HELD_PAUSE", "Attempt", "LeftError", "Listener"]

_log = logging.getLogger(__name__)

PRESSURE_AFTER = 2.0
"""Seconds that a run must have lasted for its `Outcome` to tell of pressure: the kernel's own sampling period."""

HELD_PAUSE = 0.25
"""Seconds between two looks at a tenant that is held or blocked: by another process, perhaps, which tells nobody."""


class Listener(Protocol):
    """Is told what becomes of a run, in the order in which it happens, on the loop."""

    def executed(self, held: Holdings) -> None:
        """The program runs."""

    def ready(self) -> None:
        """It is ready to serve, for the first time or again."""

    def unready(self, reason: str) -> None:
        """It is no longer ready, though alive."""

    def unhealthy(self, reason: str) -> None:
        """It will be ended, because it never became ready, or is not alive any more."""

    def exited(self) -> None:
        """Its first process has exited, its time is up, or it could not be started."""


class LeftError(Exception):
    """The run was left to a successor, and goes on."""


class Attempt:
    """One run.

    Args:
        feed: told of what it prints; the caller's, since other runs may follow.

    Attributes:
        run: what was asked for, and what tells it from other runs of the same service.
        held: what it holds on its host, from the moment it does.
        program: its first process.
        executed: set when the program has been executed, or never will be.
        started: whether it has been executed.
        over: from here on nobody else may use what it holds.
    """

    # What is asked of a service costs a task, so only those have one that are asked.
    _care: asyncio.Task[str] | None = None

    def __init__(self, host: LoopHost, run: Run, feed: LogFeed) -> None:
        self.run = run
        self.held: Holdings | None = None
        self.program = Program()
        self.executed = asyncio.Event()
        self.started = False
        self.over = False
        self._host = host
        self._feed = feed
        self._ending: Reason | None = None
        self._leaving = False
        self._patience = anyio.CancelScope()
        self._making = anyio.CancelScope()
        self._began = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since it was begun, without those in which its tenant was held or an environment was made."""
        return time.monotonic() - self._began

    async def go(self, listener: Listener, claiming: Claiming | None) -> Outcome:
        """Begin and end it.

        Args:
            claiming: how it comes by its name. None: a dead owner left it running, and it is gone on with.

        Raises:
            LeftError: see `leave`.
            RunnerError, CgroupError, OSError: it could not be started, or not be ended.
        """
        try:
            if any(probe and probe.port for probe in (self.run.spec.ready, self.run.spec.alive)):
                check_ports()
            held = await self._take(claiming)
            failure: Exception | None = None
            try:
                if claiming is None:
                    self.program.recognise(held.main)
                    # It began before this process did.
                    self._began = time.monotonic() - _age(held.main, self.run)
                else:
                    await self._launch(held)
                    self._write_down(held)
                held.pump.start()
                self.started = True
                self._monitor(held, adopted=claiming is None)
                listener.executed(held)
                if claiming is not None:
                    # Its time is the program's: to make an account may take longer than that lasts.
                    self._began = time.monotonic()
                self.executed.set()
                self._look_after(held, listener, adopted=claiming is None)
                await self._first_exit(held)
            except Exception as error:
                failure = error
            await self._look_away()
            if self._leaving:
                self._leave(held)
                raise LeftError
            listener.exited()
            outcome = await self._give_back(held)
            if failure is not None:
                raise failure
            return outcome
        finally:
            self.over = True
            self.executed.set()

    async def _take(self, claiming: Claiming | None) -> Holdings:
        if claiming is None:
            self.held = await Holdings.take_over(self._host, self.run, self._feed)
            return self.held
        waits = False
        while True:
            try:
                self.held = await Holdings.take(self._host, self.run, claiming, self._feed)
            except HeldError as error:
                # Whoever brings services back comes again.
                if claiming == "return":
                    raise
                if not waits:
                    _log.info("the start of %s waits: %s", self.run.spec.service_id, error.message)
                waits = True
                await self._wait_held(error)
            else:
                return self.held

    async def _wait_held(self, error: HeldError) -> None:
        """Wait for a while, before the next look at whether the tenant is still held."""
        with self._making:
            await anyio.sleep(HELD_PAUSE)
        if self._making.cancel_called:
            raise StartError(f"it was stopped while it waited: {error.message}", step="claim") from error
        self._making = anyio.CancelScope()  # of which each is good for one use
        self._began = time.monotonic()

    async def _launch(self, held: Holdings) -> None:
        venv = self._venv(held)
        make = None if venv is None else partial(self._make_venv, held)
        unreaped = self._host.unreaped
        await self.program.launch(self.run.spec, held, unreaped=unreaped, venv=venv, make_venv=make)

    def _venv(self, held: Holdings) -> Venv | None:
        spec = self.run.spec
        if not spec.requirements:
            return None
        return venv_of(self._host.settings, held.user, spec.service_id, spec.requirements)

    async def _make_venv(self, held: Holdings) -> None:
        spec = self.run.spec
        with self._making:
            await self._host.work.run(
                spec.user_id,
                lambda stop: ensure_venv(self._host, held.user, spec.service_id, spec.requirements, stop=stop),
            )
        if self._making.cancelled_caught:
            raise StartError("it was stopped while the environment of its requirements was made", step="venv")
        # Its time is the program's.
        self._began = time.monotonic()

    def stop_making(self) -> None:
        """Wait neither for the end of a hold nor for an environment that it lacks: it is not to run."""
        self._making.cancel()

    def _write_down(self, held: Holdings) -> None:
        """Leave a note of the program on the cgroup, for whoever may have to go on with a service."""
        if self.run.kind == "service" and self.program.isolation is not None:
            Main.of(self.program.pid, self.program.isolation).mark(held.cgroup)

    def _monitor(self, held: Holdings, *, adopted: bool) -> None:
        self._host.monitor.add(
            held.user,
            self.run.spec.service_id,
            self.run.run_id,
            held.cgroup,
            has_cpu_max=held.has_cpu_max,
            tenant_ooms=held.ooms_before,
            adopted=adopted,
        )

    def _look_after(self, held: Holdings, listener: Listener, *, adopted: bool) -> None:
        """Ask it whether it is ready and alive, if anybody wants to know."""
        spec = self.run.spec
        if spec.ready is None and spec.alive is None:
            listener.ready()
            return

        def unwell(care: asyncio.Task[str]) -> None:
            if care.cancelled() or self.over or self._ending is not None:
                return
            if (error := care.exception()) is not None:
                _log.error("nobody looks after %s any more", held.place, exc_info=error)
                return
            listener.unhealthy(care.result())
            self._ending = "unhealthy"
            self.hasten(0.0)

        self._care = asyncio.create_task(
            look_after(
                spec,
                held.cgroup,
                self._answers,
                on_ready=listener.ready,
                on_unready=listener.unready,
                # The time that it takes to make a user is no part of the program's.
                age=time.monotonic() - self._began if adopted else 0.0,
            )
        )
        self._care.add_done_callback(unwell)

    async def _look_away(self) -> None:
        if self._care is not None:
            self._care.cancel()
            await asyncio.wait([self._care])

    async def execute(
        self,
        argv: str | Sequence[str],
        *,
        stdin: bytes | bool | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | PurePosixPath | None = None,
    ) -> Execution:
        """Execute a further program in its cgroup; see `Sandbox.exec`."""
        if self.held is None or self.over:
            raise StateError("the sandbox does not run", remedy="start it first")
        return await execute(
            self._host,
            self.held.user,
            self.run.spec,
            self.held.cgroup,
            argv,
            first=self.program.pidfd,
            stdin=stdin,
            env=env,
            cwd=cwd,
            venv=self._venv(self.held),
        )

    async def _answers(self, command: str | Sequence[str], timeout: float) -> bool:
        """Run a program beside it: whether that exits with code 0 within `timeout` seconds."""
        with anyio.move_on_after(timeout):
            async with await self.execute(command) as execution:
                return (await execution.communicate()).status.exit_code == 0
        return False

    async def _first_exit(self, held: Holdings) -> None:
        """Wait until the program has exited, or its time is up; when asked to end, for all of its processes."""
        if self.run.spec.timeout is not None:
            self._patience.deadline = anyio.current_time() + self._began + self.run.spec.timeout - time.monotonic()
        with self._patience:
            await self.program.exited()
            if self._ending is not None:
                await emptied(held.cgroup)
        if self._patience.cancelled_caught and self._ending is None and not self.program.has_exited():
            self._ending = "timed-out"

    async def end(self, reason: Reason, grace: float) -> None:
        """Send SIGTERM to each of its processes, thawed, and after `grace` seconds SIGKILL to what is left.

        Returns when SIGTERM is sent; once it is over it does nothing.
        """
        if self.over or self.held is None:
            return
        if self._care is not None:
            # One that ends in order stops answering first.
            self._care.cancel()
        # The deadline first: it is enforced even if the caller goes away in the meantime.
        self._ending = self._ending or reason
        self.hasten(grace)
        if grace > 0:
            await self.held.on_cgroup(ask_to_end)

    def hasten(self, grace: float) -> None:
        """Let the time of one that was asked to end be up in `grace` seconds at the latest."""
        if self._ending is not None:
            self._patience.deadline = min(self._patience.deadline, anyio.current_time() + grace)

    def leave(self) -> None:
        """Let go of it, running as it is, for a successor to take over. It must have been executed."""
        if not self.over and self._ending is None:
            self._leaving = True
            self._patience.cancel()

    def _leave(self, held: Holdings) -> None:
        self.over = True
        held.pump.detach()
        self._host.monitor.discard(self.run.run_id)
        held.cgroup.close()
        self.program.close()

    async def _give_back(self, held: Holdings) -> Outcome:
        """End what is left, finish the log, and give back all but the claim."""
        self.over = True
        try:
            survivors = await end_rest(self._host, held)
        except StateError:
            # Something of it is there, and cannot be ended now: its name stays taken until it is.
            self._host.monitor.discard(self.run.run_id)
            held.let_go()
            self.program.leave(self._host)
            self._host.unfinished[held.claim] = None
            raise
        wall_seconds = time.monotonic() - self._began
        self.program.close_stdin()
        try:
            await held.pump.finish()
            self._host.store.drop(self.run.run_id)
        except (LogError, OSError) as error:
            _log.error("log of %s is not complete: %s", held.place, error)
            held.pump.detach()
            self._host.unwritten[held.claim] = time.monotonic()
        try:
            return outcome_of(
                await self.program.status(self._host),
                asked=self._ending,
                stats=held.stats(pressure=wall_seconds >= PRESSURE_AFTER),
                tenant_oom=held.tenant_oom(),
                survivors=survivors,
                wall_seconds=wall_seconds,
            )
        finally:
            self._host.monitor.discard(self.run.run_id)
            while not held.is_removed():
                await end_rest(self._host, held)

    def dismiss(self) -> None:
        """It never was: a predecessor's run that is over, or one that nobody wants any more."""
        self.over = True
        self.executed.set()

    def let_go(self) -> None:
        """End it without waiting; the registry keeps its row, and the next owner finishes what is left."""
        if self.held is not None and not self.over:
            if self._care is not None:
                self._care.cancel()
            self._host.monitor.discard(self.run.run_id)
            self.held.let_go()
        self.program.close()


def _age(main: Main | None, run: Run) -> float:
    """Seconds since a predecessor started this. The wall clock, which may have been set since, is the last resort."""
    if main is None:
        return max(0.0, time.time() - run.started_at)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - main.start_time / os.sysconf("SC_CLK_TCK")
