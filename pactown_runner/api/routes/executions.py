"""Further programs in sandboxes that run, and signals."""

from __future__ import annotations

import asyncio
import base64
import codecs
import signal
from collections.abc import AsyncGenerator

from anyio import EndOfStream
from fastapi import Request

from ...errors import SpecError
from ...execution import Execution
from ...outcomes import ExitStatus
from ...pipes import OutputPipe
from ..schemas import ExecIn, ExecOut, ServiceId, SignalIn, SignalOut, UserId
from ..server import caller_of, server_of, while_connected
from ..sse import Closing, Message, chained, end, event_stream

__all__ = ["execute", "execute_stream", "send_signal"]


async def execute(request: Request, user_id: UserId, service_id: ServiceId, body: ExecIn) -> ExecOut:
    """Execute a further program in it, and answer with what it printed when it has ended.

    It ends with the caller, and with the sandbox's run.
    """
    server_of(request).supervisor.get(user_id, service_id)
    return await while_connected(request, _execute(request, user_id, service_id, body))


async def _execute(request: Request, user_id: str, service_id: str, body: ExecIn) -> ExecOut:
    sandbox = server_of(request).supervisor.get(user_id, service_id)
    given = body.input()
    execution = await sandbox.exec(body.command, stdin=given, env=body.env, cwd=body.cwd)
    async with execution:
        communicating = asyncio.ensure_future(execution.communicate())
        try:
            done, _ = await asyncio.wait([communicating], timeout=body.timeout)
            if not done:
                await execution.kill()
            status, stdout, stderr, dropped = await communicating
        finally:
            communicating.cancel()
            await asyncio.wait([communicating])
    return _answer(status, stdout, stderr, dropped, timed_out=not done)


def _answer(status: ExitStatus, stdout: bytes, stderr: bytes, dropped: int, *, timed_out: bool) -> ExecOut:
    (out, out_b64), (err, err_b64) = _text(stdout), _text(stderr)
    return ExecOut(
        exit_code=status.exit_code,
        signal=status.signal,
        timed_out=timed_out,
        stdout=out,
        stderr=err,
        stdout_b64=out_b64,
        stderr_b64=err_b64,
        dropped=dropped,
    )


async def execute_stream(request: Request, user_id: UserId, service_id: ServiceId, body: ExecIn) -> Closing:
    """Execute a further program in it, and answer with what it prints as it prints it, as server-sent events.

    The first is `started`. Each `stdout` and `stderr` has a `text`, or a `b64` where it is not UTF-8; nothing is left
    out, and a program waits for a caller that is slow. The last event is `end`, and says why: `exited`, with
    `exit_code`, `signal` and `timed_out`; or, and then the program was killed, `server-stopping`, `token-expired`,
    `time` (it lasted as long as a stream may) or `failed`, with the problem. It ends with the caller, too.
    """
    server = server_of(request)
    sandbox = server.supervisor.get(user_id, service_id)
    executing = sandbox.exec(body.command, stdin=body.input(), env=body.env, cwd=body.cwd)
    told = _told(await while_connected(request, executing), body.timeout)
    return event_stream(server, caller_of(request), chained(await anext(told), told))


async def _told(execution: Execution, timeout: float) -> AsyncGenerator[Message, None]:
    """What a program prints, and how it ends, which it does after `timeout` seconds. It is killed if this is closed."""
    loop = asyncio.get_running_loop()
    over, timed_out = loop.time() + timeout, False
    outputs = [_Output("stdout", execution.stdout), _Output("stderr", execution.stderr)]
    try:
        yield Message("started", {})
        while coming := {output.coming: output for output in outputs if output.coming is not None}:
            left = None if timed_out else max(0.0, over - loop.time())
            done, _ = await asyncio.wait(coming, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not timed_out and loop.time() >= over:
                timed_out = True
                await execution.kill()
            for output in map(coming.__getitem__, done):
                if (data := output.taken()) is not None:
                    yield Message(output.name, data)
        status = await execution.wait()
        yield end("exited", exit_code=status.exit_code, signal=status.signal, timed_out=timed_out)
    finally:
        async with execution:
            for output in outputs:
                await output.close()


class _Output:
    """One of a program's outputs on its way to a caller, a piece at a time.

    Attributes:
        coming: the next piece; None at the end.
    """

    def __init__(self, name: str, pipe: OutputPipe) -> None:
        self.name = name
        self._pipe = pipe
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.coming: asyncio.Future[bytes | None] | None = asyncio.ensure_future(self._receive())

    def taken(self) -> dict[str, str] | None:
        """What to tell of the piece that has come, if anything, and wait for the next."""
        assert self.coming is not None
        piece = self.coming.result()
        self.coming = None if piece is None else asyncio.ensure_future(self._receive())
        # What is cut off within a character waits for its rest.
        waiting = self._decoder.getstate()[0]
        try:
            text = self._decoder.decode(piece or b"", final=piece is None)
        except UnicodeDecodeError:
            self._decoder.reset()
            return {"b64": base64.b64encode(waiting + (piece or b"")).decode()}
        return {"text": text} if text else None

    async def close(self) -> None:
        if self.coming is not None:
            self.coming.cancel()
            await asyncio.wait([self.coming])

    async def _receive(self) -> bytes | None:
        try:
            return await self._pipe.receive()
        except EndOfStream:
            return None


def _text(raw: bytes) -> tuple[str, str | None]:
    try:
        return raw.decode(), None
    except UnicodeDecodeError:
        return raw.decode("utf-8", "replace"), base64.b64encode(raw).decode()


async def send_signal(request: Request, user_id: UserId, service_id: ServiceId, body: SignalIn) -> SignalOut:
    """Send a signal to every process of it. One that is frozen acts on it once it is thawed."""
    supervisor = server_of(request).supervisor
    sandbox = supervisor.get(user_id, service_id)
    return SignalOut(signalled=await sandbox.signal(_number(body.signal)))


def _number(given: str | int) -> int:
    try:
        return int(signal.Signals[given] if isinstance(given, str) else signal.Signals(given))
    except (KeyError, ValueError):
        raise SpecError(f"there is no signal {given!r}", remedy="write SIGHUP, or a number") from None
