"""Further programs in sandboxes that run, and signals."""

from __future__ import annotations

import asyncio
import base64
import signal

from fastapi import Request

from ...errors import SpecError
from ...outcomes import ExitStatus
from ..schemas import ExecIn, ExecOut, ServiceId, SignalIn, SignalOut, UserId
from ..server import server_of, while_connected

__all__ = ["execute", "send_signal"]


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
