"""What `run` does while the program runs: its output out, our input in, signals, and what its end means.

Four things can end it from here: a signal to us, a reader of our output that went away, an output that cannot be
written, and the timeout, which the sandbox itself sees to. In each case we leave only when nothing of it runs any
more; a second signal is what makes that quick.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import Any, NamedTuple

from ..config import Settings
from ..errors import RunnerError
from ..models import Outcome
from ..sandbox import Sandbox
from ..specs import SandboxSpec
from ..supervisor import Supervisor
from .feeding import feed
from .interrupting import hearing
from .messages import NO_READER, say
from .output import Output, relay

__all__ = ["RunEnd", "exit_code", "run_to_end"]

LAST_WORDS_SECONDS = 1.0
"""For a reader to take what the program wrote before we were interrupted. One that does not read never will."""


class RunEnd(NamedTuple):
    """How a run ended.

    Attributes:
        status: the exit code for our caller.
        document: for `--json`; None if there was no program.
    """

    status: int
    document: dict[str, Any] | None = None


def run_to_end(settings: Settings, spec: SandboxSpec, *, raw: bool, as_json: bool) -> RunEnd:
    """Run a program, and return when nothing of it runs any more.

    Args:
        raw: see `Output`.
        as_json: send all output to standard error.

    Raises:
        RunnerError: it was not started, or its output could not be read.
        OSError: its output could not be written.
    """
    output = Output({"stdout": 2 if as_json else 1, "stderr": 2}, raw=raw)
    return asyncio.run(_Run(settings, spec, output).to_end())


def exit_code(outcome: Outcome, interrupted_by: int | None = None) -> int:
    """The exit code that tells our caller how the program ended."""
    match outcome.reason:
        case "exited" if outcome.exit_code is not None:
            return outcome.exit_code
        case "signaled" if outcome.signal is not None:
            return 128 + outcome.signal
        case "oom-killed":
            return 128 + signal.SIGKILL
        case "timed-out":
            return 124
        case "stopped" if interrupted_by is not None:
            return 128 + interrupted_by
    return 125


class _Run:
    def __init__(self, settings: Settings, spec: SandboxSpec, output: Output) -> None:
        self._spec = spec
        self._output = output
        self._supervisor = Supervisor(settings=settings, role="one-shot")
        self._signal: int | None = None
        self._signalled = asyncio.Event()
        self._unread = False
        self._stopping: set[asyncio.Task[None]] = set()

    async def to_end(self) -> RunEnd:
        with hearing(self._interrupt):
            async with self._supervisor:
                if self._signal is not None:
                    return RunEnd(128 + self._signal)
                sandbox = await self._supervisor.start_run(self._spec)
                if self._spec.stdin:
                    feed(sandbox, asyncio.get_running_loop())
                outcome = await self._follow(sandbox)
                # Within the supervisor's life: it would not wait for a stop that is under way.
                if self._stopping:
                    await asyncio.wait(self._stopping)
        if outcome.reason not in ("exited", "signaled", "stopped"):
            say(f"pactown-runner: {outcome.message}")
        status = NO_READER if self._unread else exit_code(outcome, self._signal)
        document = {
            "service": sandbox.service_id,
            "outcome": outcome.to_dict(),
            "isolation": sandbox.isolation.to_dict(),
        }
        return RunEnd(status, document)

    async def _follow(self, sandbox: Sandbox) -> Outcome:
        """Pass the output on until nothing of the sandbox runs any more and all is written."""
        relaying = asyncio.create_task(self._relay(sandbox))
        ending = asyncio.create_task(sandbox.wait())
        interrupted = asyncio.create_task(self._signalled.wait())
        try:
            await asyncio.wait({relaying, ending}, return_when=asyncio.FIRST_COMPLETED)
            if relaying.done() and (self._unread or relaying.exception() is not None):
                await sandbox.stop()
            outcome = await ending
            await asyncio.wait({relaying, interrupted}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({relaying}, timeout=LAST_WORDS_SECONDS if interrupted.done() else None)
            if relaying.done():
                relaying.result()
            return outcome
        finally:
            tasks = (relaying, ending, interrupted)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _relay(self, sandbox: Sandbox) -> None:
        try:
            dropped = await relay(sandbox.logs(follow=True), self._output)
        except BrokenPipeError:
            self._unread = True
            return
        if dropped:
            say(f"pactown-runner: {dropped} lines are missing: they were read too slowly, and the log was full")

    # Signals ----------------------------------------------------------------------------------------------------

    def _interrupt(self, number: int) -> None:
        """The first signal asks the sandbox to end, the second one kills it."""
        again = self._signal is not None
        self._signal = self._signal or number
        self._signalled.set()
        if not again and os.isatty(2):
            say("stopping; once more to kill at once")
        for sandbox in self._supervisor.list():
            task = asyncio.create_task(_end(sandbox, at_once=again))
            self._stopping.add(task)
            task.add_done_callback(self._stopping.discard)


async def _end(sandbox: Sandbox, *, at_once: bool) -> None:
    # Why it failed is told to whoever waits for the sandbox.
    with contextlib.suppress(RunnerError):
        await (sandbox.kill() if at_once else sandbox.stop())
