"""Health: a service is asked whether it is ready and whether it is alive, and what its answers amount to.

`Health` decides, and knows neither clocks nor sockets. The rest asks, by the probes of a spec, in the words and with
the consequences that Kubernetes has for them:

- Readiness and liveness are asked for side by side, from the start of the program on.
- Until its first good answer a service is starting: it may fail as often as it likes, but not for longer than `within`.
  One that is late has failed, with either.
- One that was ready and fails `failures` times in a row is not ready until the next good answer, and goes on. One that
  was alive and fails so often has failed. A good answer makes up for all bad ones before it.
- Nothing is concluded from what the service cannot help: time in which it is frozen does not count, nor does a question
  that could not be asked, for want of descriptors perhaps.

A service can make a question fail, but neither last nor cost much: it is over after `timeout` seconds, and after a
bounded number of reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import random
import re
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from cgroups import Cgroup, CgroupError

from .errors import RunnerError, StartError
from .ports import HOST, connect
from .specs import Probe, SandboxSpec

__all__ = ["Health", "Run", "Turn", "ask", "look_after"]

_log = logging.getLogger(__name__)

FIRST_PAUSE = 0.05
"""Seconds before the second question to a service that starts; they double up to the probe's interval."""

JITTER = 0.25
"""The share of a pause by which it is shortened at random: what starts at once is not asked at once for long."""

READS = 32
"""So many pieces of an HTTP answer are read until its status is known, and again for the rest of it."""

READ_SIZE = 1024
"""Bytes of such a piece while the status is not known. What comes then is thrown away in larger ones."""

DRAIN_TIMEOUT = 0.25
"""Seconds for the rest of an HTTP answer: closing before it is read would be an error in the service's log."""

Run = Callable[[str | Sequence[str], float], Awaitable[bool]]
"""Runs a command in the sandbox, and kills it after so many seconds. Returns whether it exited with 0."""

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})[ \r]")
_STATUS_SIZE = len(b"HTTP/1.1 200 ")


class Turn(enum.Enum):
    """What an answer changed."""

    WELL = "well"
    UNWELL = "unwell"
    LATE = "late"


@dataclass(slots=True)
class Health:
    """What the answers to one probe amount to. Pure: times are seconds of any clock.

    Attributes:
        probe: what is asked.
        since: from when on the time for the first good answer counts.
        proven: whether a good answer was ever given.
        well: whether it is well, as far as was told by `heard`.
        failed: bad answers in a row.
    """

    probe: Probe
    since: float
    proven: bool = False
    well: bool = False
    failed: int = 0

    @classmethod
    def of_age(cls, probe: Probe, age: float, now: float) -> Health:
        """That of a service that was started `age` seconds ago. Had it been late, it would not be there."""
        return cls(probe, since=now - age, proven=age >= probe.within)

    def heard(self, good: bool, now: float) -> Turn | None:
        """Take an answer into account. Returns what it changed."""
        if good:
            self.failed = 0
            if self.well:
                return None
            self.proven = self.well = True
            return Turn.WELL
        self.failed += 1
        if not self.proven:
            return Turn.LATE if now >= self.since + self.probe.within else None
        if self.failed != self.probe.failures:
            return None
        self.well = False
        return Turn.UNWELL

    def unheard(self, seconds: float) -> None:
        """Let time not count in which it could not be asked."""
        self.since += seconds

    def first_pause(self, chance: float) -> float:
        """Seconds before the first question."""
        return chance * (self.probe.interval if self.proven else min(FIRST_PAUSE, self.probe.interval))

    def pause(self, now: float, chance: float) -> float:
        """Seconds before the next question.

        Args:
            chance: a random number from 0 to 1, for the jitter.
        """
        shortened = 1 - JITTER * chance
        if self.proven:
            return shortened * self.probe.interval
        pause = shortened * min(FIRST_PAUSE * 2.0 ** min(self.failed, 32), self.probe.interval)
        # It is asked a last time when its time is up.
        return max(0.0, min(pause, self.since + self.probe.within - now))


async def look_after(
    spec: SandboxSpec,
    scope: Cgroup,
    run: Run,
    *,
    on_ready: Callable[[], None],
    on_unready: Callable[[str], None],
    age: float = 0.0,
) -> str:
    """Ask a service by its probes until it has failed. Returns why; its end is the caller's to bring about.

    To be cancelled when the service is asked to end, and before its scope is closed.

    Args:
        spec: what was started, with at least one probe.
        scope: where it runs.
        run: runs a probe's command in the sandbox.
        on_ready: called when it is ready: for the first time, and each time it is again. At once without a probe.
        on_unready: called, with the reason, when it is ready no longer.
        age: seconds since its program was started, for one that was taken over.
    """
    watches: list[Coroutine[Any, Any, str]] = []
    if spec.ready is None:
        on_ready()
    else:
        watches.append(_keep_ready(_Watch(spec, spec.ready, scope, run, age), on_ready, on_unready))
    if spec.alive is not None:
        watches.append(_keep_alive(_Watch(spec, spec.alive, scope, run, age)))
    return await _first(watches)


async def _keep_ready(watch: _Watch, on_ready: Callable[[], None], on_unready: Callable[[str], None]) -> str:
    while True:
        turn, why = await watch.turn()
        if turn is Turn.WELL:
            on_ready()
        elif turn is Turn.UNWELL:
            on_unready(f"no longer ready: {why}")
        else:
            return f"not ready within {watch.health.probe.within:g} s: {why}"


async def _keep_alive(watch: _Watch) -> str:
    while True:
        turn, why = await watch.turn()
        if turn is Turn.UNWELL:
            return f"no longer alive: {why}"
        if turn is Turn.LATE:
            return f"not alive within {watch.health.probe.within:g} s: {why}"


async def _first(watches: Sequence[Coroutine[Any, Any, str]]) -> str:
    """What the first of them returns; the others end with it."""
    tasks = [asyncio.create_task(watch) for watch in watches]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Watch:
    """One probe of one run."""

    def __init__(self, spec: SandboxSpec, probe: Probe, scope: Cgroup, run: Run, age: float) -> None:
        self.health = Health.of_age(probe, age, asyncio.get_running_loop().time())
        self._spec = spec
        self._scope = scope
        self._run = run
        self._pause = self.health.first_pause(_chance())
        self._warned = False

    async def turn(self) -> tuple[Turn, str]:
        """Ask until an answer changes something. Returns what, and why if it was a bad one."""
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            await asyncio.sleep(self._pause)
            good, why = await self._ask()
            if good is None:
                self.health.unheard(clock() - began)
                self._pause = self.health.probe.interval
                continue
            turn = self.health.heard(good, clock())
            self._pause = self.health.pause(clock(), _chance())
            if turn is not None:
                return turn, why

    async def _ask(self) -> tuple[bool | None, str]:
        """Whether the answer was good, and why not; None if it says nothing about the service."""
        try:
            if self._scope.frozen():
                return None, ""
            why = await ask(self.health.probe, self._scope, self._run)
            # It may have been frozen before it could answer.
            if why and self._scope.frozen():
                return None, ""
        except (CgroupError, OSError, RunnerError) as error:
            if not self._warned:
                _log.warning("cannot ask %r/%s how it is: %s", self._spec.user_id, self._spec.service_id, error)
            self._warned = True
            return None, ""
        self._warned = False
        return not why, why


def _chance() -> float:
    return random.random()  # noqa: S311 - nobody gains from guessing it


async def ask(probe: Probe, scope: Cgroup, run: Run) -> str:
    """Ask a service once. Returns why its answer was bad, or nothing.

    Raises:
        OSError, CgroupError, RunnerError: it could not be asked, for which it is not to blame.
    """
    try:
        if probe.command is not None:
            return "" if await run(probe.command, probe.timeout) else "the command failed"
        assert probe.port is not None
        async with asyncio.timeout(probe.timeout) as patience:
            with await connect(probe.port, scope) as connection:
                if probe.path is None:
                    return ""
                status = await _get(connection, probe.port, probe.path)
                patience.reschedule(None)
                await _drain(connection)
        return "" if 200 <= status < 400 else f"HTTP status {status}"
    except TimeoutError:
        return f"no answer within {probe.timeout:g} s"
    except ConnectionError as error:
        return error.strerror or str(error)
    except StartError as error:
        return error.message


async def _get(connection: socket.socket, port: int, path: str) -> int:
    """Ask by HTTP (RFC 9112). Returns the status, of which alone the answer consists here.

    Raises:
        ConnectionError: what came is no answer.
    """
    loop = asyncio.get_running_loop()
    lines = (f"GET {path} HTTP/1.1", f"Host: {HOST}:{port}", "User-Agent: pactown-runner", "Accept: */*")
    await loop.sock_sendall(connection, "\r\n".join((*lines, "Connection: close", "", "")).encode())
    head = b""
    # The number of reads is what bounds this: as long as there is something to read, the loop's clock does not run.
    for _ in range(READS):
        if not (data := await loop.sock_recv(connection, READ_SIZE)):
            raise ConnectionError("closed without an answer")
        head += data
        while len(head) >= _STATUS_SIZE:
            if (line := _STATUS_LINE.match(head)) is None:
                raise ConnectionError("its answer is not HTTP")
            if (status := int(line[1])) >= 200:
                return status
            # Something preliminary, such as 103 Early Hints.
            _, ended, rest = head.partition(b"\r\n\r\n")
            if not ended:
                break
            head = rest
    raise ConnectionError("its answer is too long in coming to a status")


async def _drain(connection: socket.socket) -> None:
    """Read the rest of an answer, within bounds."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(DRAIN_TIMEOUT):
            for _ in range(READS):
                if not await loop.sock_recv(connection, 1 << 16):
                    return
