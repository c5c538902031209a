"""The nouns: who, what was done, and what came of it. Values only; what is asked for is in `specs`."""

from __future__ import annotations

import base64
import enum
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from cgroups import Stats

from .specs import Namespace

__all__ = [
    "Event",
    "EventKind",
    "IsolatedUser",
    "IsolationReport",
    "LogRecord",
    "Outcome",
    "Placement",
    "Reason",
    "State",
    "Stream",
]

Stream = Literal["stdout", "stderr"]
Placement = Literal["born", "joined", "none"]
"""How a process came into its cgroup: `clone3(CLONE_INTO_CGROUP)`, a write to `cgroup.procs`, or not at all."""


@dataclass(frozen=True)
class IsolatedUser:
    """One SaaS user's identity on this host.

    Attributes:
        saas_user_id: the id as the caller gave it, byte for byte.
        linux_username: the login, `pactown_<key>`; in non-root mode a name only.
        linux_uid, linux_gid: in non-root mode those of the calling process.
        home_dir: the home, mode 0700.
        created_at: seconds since the epoch.
    """

    saas_user_id: str
    linux_username: str
    linux_uid: int
    linux_gid: int
    home_dir: Path
    created_at: float

    @property
    def key(self) -> str:
        """What names this user in logins, cgroups and log paths: the login without `pactown_`."""
        return self.linux_username.removeprefix("pactown_")

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-serializable dictionary."""
        return {**asdict(self), "home_dir": str(self.home_dir)}


class State(enum.StrEnum):
    """Where a sandbox is in its life.

    `backing-off`: its program has ended and is started again soon. `crash-looping`: it failed too often, and is left
    alone until somebody restarts or stops it. In these two, and in `ended`, nothing of it runs.
    """

    STARTING = "starting"
    RUNNING = "running"
    FROZEN = "frozen"
    STOPPING = "stopping"
    BACKING_OFF = "backing-off"
    CRASH_LOOPING = "crash-looping"
    ENDED = "ended"


@dataclass(frozen=True, kw_only=True)
class IsolationReport:
    """What holds for a started program, as its launcher read it back from the kernel just before `execve`.

    Attributes:
        mode: `root` (an account of its own) or `user` (the caller's own identity; files and processes are not
            separated from it).
        uid, gid: real, effective and saved, in this order; with the file-system id they are always equal.
        groups: supplementary groups.
        capabilities: the five sets by name (`inheritable`, `permitted`, `effective`, `bounding`, `ambient`), as masks.
        no_new_privs: whether `execve` can no longer grant privileges.
        root_regainable: False if every way back to uid 0 was tried and refused; None in user mode, where root was
            never there.
        cgroup: the path in the cgroup v2 tree that the process reads in `/proc/self/cgroup`; None without one.
        placement: `born` in the cgroup, `joined` before `execve`, or `none`.
        keyring: whether the program has a session keyring of its own; False where the host's filter refused it.
        namespaces: those that were unshared.
        limits: each control file of the scope that was asked for, and what the kernel answers when it is read.
    """

    mode: Literal["root", "user"]
    uid: tuple[int, int, int]
    gid: tuple[int, int, int]
    groups: tuple[int, ...]
    capabilities: Mapping[str, int]
    no_new_privs: bool
    root_regainable: bool | None
    cgroup: str | None
    placement: Placement
    keyring: bool
    namespaces: tuple[Namespace, ...] = ()
    limits: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-serializable dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read what `to_dict` gave, also after a detour through JSON."""
        lists = ("uid", "gid", "groups", "namespaces")
        values = {name: tuple(value) if name in lists else value for name, value in values.items()}
        return cls(**values)


Reason = Literal["exited", "signaled", "oom-killed", "timed-out", "unhealthy", "stopped", "failed-to-start", "lost"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a sandbox ended. It exists only once nothing of the sandbox runs any more.

    Attributes:
        reason: `exited` and `signaled` by itself; `oom-killed` by the kernel, see `oom_level`; `timed-out`,
            `unhealthy` (it failed a probe) and `stopped` by us; `failed-to-start` see `failed_step`; `lost` if its
            exit status cannot be known.
        exit_code: of the first process, None if it was ended by a signal or its status is not known.
        signal: the number of the signal that ended the first process, or None.
        oom_level: whose `memory.max` was hit: the service's own or the whole tenant's.
        failed_step, failed_errno: the launcher's step that failed, and the kernel's error number.
        message: one line for people.
        survivors_killed: processes that outlived the first one or the grace time, and were killed.
        wall_seconds: from the start to the last process's end.
        stats: the cgroup's counters, read when it was empty and before it was removed.
    """

    reason: Reason
    exit_code: int | None = None
    signal: int | None = None
    oom_level: Literal["service", "tenant"] | None = None
    failed_step: str | None = None
    failed_errno: int | None = None
    message: str = ""
    survivors_killed: int = 0
    wall_seconds: float = 0.0
    stats: Stats | None = None

    @property
    def ok(self) -> bool:
        """Whether the program ended by itself, with exit code 0."""
        return self.reason == "exited" and self.exit_code == 0

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-serializable dictionary."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One line that a sandbox wrote, or the count of those that its tenant's rate limit dropped.

    Attributes:
        ts: seconds since the epoch, when the runner took the line.
        seq: counts the records of one service from 1, over all its runs, without a gap. Where a reader finds one, so
            many records as numbers are missing were there, and have made room for newer ones before it came to them.
        stream: `stdout` or `stderr`.
        raw: the bytes as written, without the newline.
        partial: the line goes on in the stream's next record, or ended without a newline.
        dropped_lines: so many lines that end here, in the stream, were dropped.
        dropped_bytes: all that was dropped here, newlines included: not 0 if this is such a count, though it may be of
            a part only of one line that is over 64 KiB.
    """

    ts: float
    seq: int
    stream: Stream
    raw: bytes
    partial: bool = False
    dropped_lines: int = 0
    dropped_bytes: int = 0

    @property
    def line(self) -> str:
        """The line as text; bytes that are not UTF-8 are shown as U+FFFD. Empty where lines were dropped."""
        return self.raw.decode("utf-8", "replace")

    @property
    def data(self) -> bytes:
        """The very bytes that the program wrote, newline included. None where lines were dropped."""
        return self.raw if self.partial or self.dropped_bytes else self.raw + b"\n"

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-serializable dictionary: `raw` becomes `line`, and `line_b64` where that is not UTF-8."""
        values: dict[str, Any] = {
            "ts": self.ts,
            "seq": self.seq,
            "stream": self.stream,
            "line": self.line,
            "partial": self.partial,
            "dropped_lines": self.dropped_lines,
            "dropped_bytes": self.dropped_bytes,
        }
        try:
            self.raw.decode()
        except UnicodeDecodeError:
            values["line_b64"] = base64.b64encode(self.raw).decode()
        return values


EventKind = Literal[
    "created",
    "started",
    "ready",
    "unhealthy",
    "oom",
    "pressure",
    "throttled",
    "restarted",
    "crash-looping",
    "stopped",
    "adopted",
    "limit-changed",
    "deleted",
    "missed",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a user or a sandbox.

    Attributes:
        kind: what happened. A reader that was too slow is told by `missed` how many others it did not get.
        ts: when, in seconds since the epoch.
        user_id: whose; empty for `missed`.
        service_id: the sandbox's; None where the user as a whole is meant.
        run_id: the run's, or None.
        details: more, by kind. `started`, `restarted`, `adopted`: the `pid`; `started`, `restarted`: the `seconds` that
            it took, without those in which an environment was made; `restarted`, `stopped`, `crash-looping`: the last
            outcome's `reason` and `message`; `unhealthy`: the `reason`; `oom`: the `count` of kills and the `level` of
            the limit (`service`, `tenant` or None); `pressure`: the `resource`, `avg10` (percent) and `total_usec`
            (microseconds); `throttled`: the `share` of the time and `usec`; `limit-changed`: the `limits` in effect;
            `missed`: the `count`.
    """

    kind: EventKind
    ts: float
    user_id: str = ""
    service_id: str | None = None
    run_id: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-serializable dictionary."""
        return asdict(self)
