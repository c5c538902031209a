"""The API's client. Needs the extra `api`, from the moment on in which a `Client` is made.

    client      all calls; about `sandboxes` and `users`, over what is in `calls`
    streams     logs and events, which can be resumed, and what programs print
    connection  the socket or the port, and what goes wrong on the way (`errors`); the only one to know httpx
    problems    what a server refuses, as the library's own errors
    answers     what comes and goes, as values

It has no part of the server, and no part of the server is needed for it.
"""

from __future__ import annotations

from .answers import ExecResult, ExecStatus, Health, ImportedHome, SandboxView, Transferred, UserStats, UserTier
from .client import Client
from .errors import (
    BadAnswerError,
    ClientError,
    ConnectionLostError,
    Fault,
    ForbiddenError,
    MissingExtraError,
    ServerStoppingError,
    TimedOutError,
    UnreachableError,
)
from .streams import EventStream, ExecOutput, ExecStream, LogStream, StreamEnd
from .users import OnProgress

__all__ = [
    "BadAnswerError",
    "Client",
    "ClientError",
    "ConnectionLostError",
    "EventStream",
    "ExecOutput",
    "ExecResult",
    "ExecStatus",
    "ExecStream",
    "Fault",
    "ForbiddenError",
    "Health",
    "ImportedHome",
    "LogStream",
    "MissingExtraError",
    "OnProgress",
    "SandboxView",
    "ServerStoppingError",
    "StreamEnd",
    "TimedOutError",
    "Transferred",
    "UnreachableError",
    "UserStats",
    "UserTier",
]
