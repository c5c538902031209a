"""The nouns: what is asked for, what was done, and what came of it. Values only, nothing here acts."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self

from cgroups import FormatError, Limits, Stats

from .errors import SpecError

__all__ = [
    "IsolatedUser",
    "IsolationReport",
    "LogRecord",
    "Namespace",
    "Outcome",
    "Placement",
    "Reason",
    "SandboxSpec",
    "State",
    "Stream",
    "check_service_id",
    "check_user_id",
]

Stream = Literal["stdout", "stderr"]
Namespace = Literal["ipc", "net", "uts"]
Placement = Literal["born", "joined", "none"]
"""How a process came into its cgroup: `clone3(CLONE_INTO_CGROUP)`, a write to `cgroup.procs`, or not at all."""

_SERVICE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
_ENV_NAME = re.compile(r"[^=\0]+")
MAX_USER_ID_BYTES = 1024


def check_user_id(user_id: str) -> str:
    """Return `user_id`, or raise `SpecError` if it is empty, longer than 1,024 bytes, holds NUL or is not UTF-8."""
    _check_text("user id", user_id)
    try:
        raw = user_id.encode()
    except UnicodeEncodeError as error:
        raise SpecError(f"user id {user_id!r} cannot be written as UTF-8") from error
    if not raw or len(raw) > MAX_USER_ID_BYTES or b"\0" in raw:
        raise SpecError(f"a user id has 1 to {MAX_USER_ID_BYTES} bytes, none of them NUL; got {len(raw)} bytes")
    return user_id


def check_service_id(service_id: str) -> str:
    """Return `service_id`, or raise `SpecError` unless it matches `[A-Za-z0-9][A-Za-z0-9._-]{0,62}`."""
    _check_text("service id", service_id)
    if not _SERVICE_ID.fullmatch(service_id):
        raise SpecError(
            f"service id {service_id!r} is not allowed",
            remedy="use 1 to 63 of A-Z a-z 0-9 . _ - and begin with a letter or digit",
        )
    return service_id


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


@dataclass(frozen=True, kw_only=True)
class SandboxSpec:
    """What to run, for whom, and within which limits.

    Attributes:
        user_id: the SaaS user; an account is made if there is none.
        service_id: the service's name, unique within the user; also the name of its directory.
        command: a string is run by `/bin/sh -c`, a sequence is executed as it is, its first word sought in PATH as
            the tenant.
        env: added to PATH, HOME, USER, LOGNAME, SHELL and LANG. Nothing of the caller's environment is passed on.
        cwd: a directory relative to `sandboxes/<service_id>`, or absolute; entered as the tenant.
        limits: enforced by the kernel, or the start fails. None takes the settings' `default_limits`.
        timeout: seconds of wall time, after which everything in the sandbox is killed.
        stdin: give the program a pipe to be fed through `Sandbox.send`; else its standard input is `/dev/null`.
        stop_grace: seconds between SIGTERM and SIGKILL. None takes the settings' `stop_grace`.
        namespaces: further namespaces to unshare. `net` holds nothing but a loopback device.
    """

    user_id: str
    service_id: str
    command: str | Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | PurePosixPath | None = None
    limits: Limits | None = None
    timeout: float | None = None
    stdin: bool = False
    stop_grace: float | None = None
    namespaces: frozenset[Namespace] = frozenset()

    def __post_init__(self) -> None:
        check_user_id(self.user_id)
        check_service_id(self.service_id)
        for word in self._words():
            _refuse_nul("command", word)
        if not self.argv[0]:
            raise SpecError("command is empty")
        for name, value in self.env.items():
            _check_text("environment name", name)
            if not _ENV_NAME.fullmatch(name):
                raise SpecError(f"environment name {name!r} is not allowed", remedy="names have no '=' and no NUL")
            _refuse_nul(f"environment variable {name}", value)
        if self.cwd is not None:
            _refuse_nul("cwd", str(self.cwd))
        for name in ("timeout", "stop_grace"):
            _check_seconds(name, getattr(self, name))
        object.__setattr__(self, "namespaces", frozenset(self.namespaces))
        if unknown := self.namespaces - {"ipc", "net", "uts"}:
            raise SpecError(f"unknown namespaces: {', '.join(sorted(unknown))}", remedy="choose from ipc, net, uts")

    def _words(self) -> Sequence[str]:
        if isinstance(self.command, str):
            return (self.command,)
        # A list of words holds strings; the words of a `bytes` are numbers.
        if not isinstance(self.command, Sequence):
            raise SpecError(f"command must be a string or a sequence of strings, not {self.command!r}")
        return self.command

    @property
    def argv(self) -> tuple[str, ...]:
        """The words that are executed."""
        if isinstance(self.command, str):
            return ("/bin/sh", "-c", self.command) if self.command else ("",)
        return tuple(self.command) or ("",)

    def to_json(self) -> str:
        """Write the spec down, for `from_json`."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["env"] = dict(self.env)
        values["cwd"] = None if self.cwd is None else str(self.cwd)
        values["limits"] = None if self.limits is None else self.limits.to_dict()
        values["namespaces"] = sorted(self.namespaces)
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            SpecError: it is no spec.
        """
        try:
            values = json.loads(text)
            values["limits"] = None if values["limits"] is None else Limits.from_dict(values["limits"])
            values["namespaces"] = frozenset(values["namespaces"])
            return cls(**values)
        except (FormatError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise SpecError(f"not a sandbox's spec: {error}") from error


def _check_text(what: str, text: object) -> None:
    if not isinstance(text, str):
        raise SpecError(f"{what} must be a string, not {text!r}")


def _check_seconds(what: str, seconds: object) -> None:
    if seconds is None:
        return
    if not isinstance(seconds, int | float) or not 0 <= seconds < float("inf"):
        raise SpecError(f"{what} must be a number of seconds, 0 or more, not {seconds!r}")


def _refuse_nul(what: str, text: str) -> None:
    _check_text(what, text)
    if "\0" in text:
        raise SpecError(f"{what} holds a NUL byte, which no program can be given")


class State(enum.StrEnum):
    """Where a sandbox is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    FROZEN = "frozen"
    STOPPING = "stopping"
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


Reason = Literal["exited", "signaled", "oom-killed", "timed-out", "stopped", "failed-to-start", "lost"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a sandbox ended. It exists only once nothing of the sandbox runs any more.

    Attributes:
        reason: `exited` and `signaled` by itself; `oom-killed` by the kernel, see `oom_level`; `timed-out` and
            `stopped` by us; `failed-to-start` see `failed_step`; `lost` if its exit status cannot be known.
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
    """One line that a sandbox wrote.

    Attributes:
        ts: seconds since the epoch, when the runner took the line.
        seq: counts the records of one service from 1, over all its runs.
        stream: `stdout` or `stderr`.
        raw: the bytes as written, without the newline.
        partial: the line goes on in the stream's next record, or ended without a newline.
    """

    ts: float
    seq: int
    stream: Stream
    raw: bytes
    partial: bool = False

    @property
    def line(self) -> str:
        """The line as text; bytes that are not UTF-8 are shown as U+FFFD."""
        return self.raw.decode("utf-8", "replace")

    @property
    def data(self) -> bytes:
        """The very bytes that the program wrote, newline included."""
        return self.raw if self.partial else self.raw + b"\n"
