"""What the server answers, as values, and how they are read from JSON. What is the library's own is that.

A server may be newer than its client: what is not known is left out.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from cgroups import Limits, Pressure, Stats

from ..models import Event, IsolatedUser, IsolationReport, LogRecord, Outcome, State
from ..specs import RestartPolicy, SandboxSpec
from ..tiers import Tier
from .errors import BadAnswerError

__all__ = [
    "ExecResult",
    "ExecStatus",
    "Health",
    "ImportedHome",
    "SandboxView",
    "Transferred",
    "UserStats",
    "UserTier",
    "event_of",
    "outcome_of",
    "record_of",
    "spec_body",
    "stats_of",
    "tier_of",
    "understood",
    "user_of",
]

T = TypeVar("T")


@contextmanager
def understood() -> Generator[None, None, None]:
    """For the time in which an answer is read: what is not as it should be is the answer's fault.

    Raises:
        BadAnswerError: it is not.
    """
    try:
        yield
    # Errors of a spec or a limit are values' as well: nobody gave these here.
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadAnswerError(
            f"the server's answer is not understood: {type(error).__name__}: {error}",
            remedy="see that client and server are of the same version",
        ) from error


def _known(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: values[item.name] for item in fields(kind) if item.init and item.name in values}


def _made(kind: type[T], values: Mapping[str, Any]) -> T:
    return kind(**_known(kind, values))


@dataclass(frozen=True, slots=True)
class Health:
    """How a server is.

    Attributes:
        status: `ok` if it answers, `ready` if it can do what it is for.
    """

    status: str

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Read it from an answer."""
        return cls(values["status"])


@dataclass(frozen=True, kw_only=True)
class SandboxView:
    """A service or run, as it was when the server answered; see `Sandbox`, of which this is a picture.

    Attributes:
        user_id, service_id: whose, and which.
        kind: `service`, or `run` for one that ends with its caller.
        run_id: tells this run from others of the same service.
        state: where it is in its life.
        ready: whether it is ready to serve.
        pid: of its first process; 0 if there is none.
        started_at: when this run was, in seconds since the epoch.
        restarts: how often it was started again.
        command: as in its spec.
        restart: the same.
        limits: what was asked for; None for the default.
        isolation: what holds for it; None as long as nothing was started.
        outcome: how it ended; None as long as it has not.
        last_outcome: how its last run did.
    """

    user_id: str
    service_id: str
    kind: Literal["service", "run"]
    run_id: str
    state: State
    ready: bool
    pid: int
    started_at: float
    restarts: int
    command: str | tuple[str, ...]
    restart: RestartPolicy
    limits: Limits | None = None
    isolation: IsolationReport | None = None
    outcome: Outcome | None = None
    last_outcome: Outcome | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Read it from an answer."""
        command, limits, isolation = values["command"], values["limits"], values["isolation"]
        read = {
            "state": State(values["state"]),
            "command": command if isinstance(command, str) else tuple(command),
            "restart": _made(RestartPolicy, values["restart"]),
            "limits": None if limits is None else Limits.from_dict(limits),
            "isolation": None if isolation is None else IsolationReport.from_dict(_known(IsolationReport, isolation)),
            "outcome": outcome_of(values["outcome"]),
            "last_outcome": outcome_of(values["last_outcome"]),
        }
        return cls(**_known(cls, values) | read)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-serializable dictionary."""
        limits = None if self.limits is None else self.limits.to_dict()
        command = self.command if isinstance(self.command, str) else list(self.command)
        return asdict(self) | {"state": str(self.state), "limits": limits, "command": command}


@dataclass(frozen=True, kw_only=True)
class ExecStatus:
    """How a further program ended.

    Attributes:
        exit_code: None if a signal ended it.
        signal: that signal's number, or None.
        timed_out: whether it was killed because its time was over.
    """

    exit_code: int | None
    signal: int | None
    timed_out: bool

    @property
    def ok(self) -> bool:
        """Whether it ended by itself, with exit code 0."""
        return self.exit_code == 0 and not self.timed_out

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Read it from an answer."""
        return cls(**_known(cls, values))


@dataclass(frozen=True, kw_only=True)
class ExecResult(ExecStatus):
    """How a further program ended, and what it printed.

    Attributes:
        stdout, stderr: the bytes, of each the first MiB.
        dropped: bytes beyond that, of both together.
    """

    stdout: bytes
    stderr: bytes
    dropped: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Read it from an answer."""
        read = {name: bytes_of(values[name], values.get(f"{name}_b64")) for name in ("stdout", "stderr")}
        return cls(**_known(cls, values) | read)


@dataclass(frozen=True, slots=True)
class Transferred:
    """What was put.

    Attributes:
        files: how many.
        bytes: their content.
    """

    files: int
    bytes: int

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Read it from an answer."""
        return _made(cls, values)


@dataclass(frozen=True, slots=True)
class ImportedHome:
    """What a home was made of. The tenant's word, as the home is.

    Attributes:
        entries: files, folders and links, the home itself among them.
        files: how many of them are files.
        bytes: the content of these.
    """

    entries: int
    files: int
    bytes: int

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Read it from an answer."""
        return _made(cls, values)


@dataclass(frozen=True, kw_only=True)
class UserStats:
    """What a user has.

    Attributes:
        saas_user_id, linux_username: who.
        sandbox_count: directories of services in the home.
        size_bytes: what the user takes on the disk.
        entries: files, folders, links and all else.
        running: sandboxes that are alive under this server.
        tier: its name; None for none.
        blocked: whether what runs stands still, and nothing is started.
        raw: the whole answer, in which a newer server may tell more.
    """

    saas_user_id: str
    linux_username: str
    sandbox_count: int
    size_bytes: int
    entries: int
    running: int
    tier: str | None
    blocked: bool
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def total_size_mb(self) -> float:
        """What the user takes on the disk, in MiB."""
        return round(self.size_bytes / (1 << 20), 2)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Read it from an answer that has the details."""
        detail = values["detail"]
        found = {**values["user"], "sandbox_count": values["sandbox_count"], "tier": None, **detail, "raw": values}
        return _made(cls, found)


@dataclass(frozen=True, slots=True)
class UserTier:
    """What the operator lets a user have.

    Attributes:
        user_id: who.
        tier: its name; None for none.
        blocked: whether what runs of the user stands still, and nothing is started for it.
    """

    user_id: str
    tier: str | None
    blocked: bool

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Read it from an answer."""
        return _made(cls, values)


# The library's own -------------------------------------------------------------------------------------------------


def stats_of(values: Mapping[str, Any]) -> Stats:
    """A cgroup's counters."""
    read = _known(Stats, values)
    for name, value in read.items():
        if isinstance(value, Mapping):
            read[name] = _made(Pressure, value)
    return Stats(**read)


def outcome_of(values: Mapping[str, Any] | None) -> Outcome | None:
    """How a sandbox ended, if it did."""
    if values is None:
        return None
    stats = values.get("stats")
    return Outcome(**_known(Outcome, values) | {"stats": None if stats is None else stats_of(stats)})


def record_of(values: Mapping[str, Any]) -> LogRecord:
    """One line of a log."""
    return LogRecord(
        ts=values["ts"],
        seq=values["seq"],
        stream=values["stream"],
        raw=bytes_of(values["line"], values.get("line_b64")),
        partial=values["partial"],
        dropped_lines=values["dropped_lines"],
        dropped_bytes=values["dropped_bytes"],
    )


def event_of(values: Mapping[str, Any]) -> Event:
    """Something that happened. Its kind may be one that this client does not know."""
    return _made(Event, values)


def user_of(values: Mapping[str, Any]) -> IsolatedUser:
    """A user."""
    return IsolatedUser(**_known(IsolatedUser, values) | {"home_dir": Path(values["home_dir"])})


def tier_of(values: Mapping[str, Any]) -> Tier:
    """What tenants may have."""
    read = _known(Tier, values)
    for name in ("default_limits", "tenant_limits"):
        if read[name] is not None:
            read[name] = Limits.from_dict(read[name])
    return Tier(**read)


def bytes_of(text: str, encoded: str | None) -> bytes:
    """What was printed: a text, or what is not one, in base 64."""
    return text.encode() if encoded is None else base64.b64decode(encoded, validate=True)


# And the other way -------------------------------------------------------------------------------------------------


def spec_body(spec: SandboxSpec, kind: Literal["service", "run"]) -> dict[str, Any]:
    """A spec as the server takes it."""
    values: dict[str, Any] = json.loads(spec.to_json())
    del values["stdin"]
    return {**values, "kind": kind}
