"""What can go wrong between a caller and the server. What the server refuses is the library's own error: `problems`."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RunnerError

__all__ = [
    "BadAnswerError",
    "ClientError",
    "ConnectionLostError",
    "Fault",
    "ForbiddenError",
    "MissingExtraError",
    "ServerStoppingError",
    "TimedOutError",
    "UnreachableError",
]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a request.

    Attributes:
        where: which part of it, such as `body.limits.memory_max`.
        message: what.
    """

    where: str
    message: str


class ClientError(RunnerError):
    """Something was asked of a server, and no error of the library's says what came of it.

    Attributes:
        code: the server's word for it, if it had one.
        status: of the HTTP answer; None if there was none.
        retry_after: seconds after which the server wants to be asked again; None if it did not say.
        faults: what is wrong with the request, by place, with the code `bad-request`.
    """

    code = "client"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        status: int | None = None,
        retry_after: float | None = None,
        faults: tuple[Fault, ...] = (),
        remedy: str | None = None,
    ) -> None:
        super().__init__(message, remedy=remedy)
        if code is not None:
            self.code = code
        self.status = status
        self.retry_after = retry_after
        self.faults = faults


class UnreachableError(ClientError):
    """No server listens there."""

    code = "unreachable"


class ForbiddenError(ClientError):
    """The caller may not do this, or may not use the socket at all."""

    code = "forbidden"


class TimedOutError(ClientError):
    """The server did not answer in time. Whether it has done what was asked is not known."""

    code = "timed-out"


class ConnectionLostError(ClientError):
    """The connection ended in the middle. Whether the server has done what was asked is not known."""

    code = "connection-lost"


class ServerStoppingError(ClientError):
    """The server stops. What it looks after goes on, if its settings say so."""

    code = "server-stopping"


class BadAnswerError(ClientError):
    """What answered is not understood: another kind of server, or one of another version."""

    code = "bad-answer"


class MissingExtraError(ClientError):
    """A package is not installed that the client needs."""

    code = "missing-extra"
