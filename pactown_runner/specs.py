"""What is asked for: a command, for whom, within which limits, and what becomes of it when it ends."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any, Literal, Self, get_args

from cgroups import FormatError, Limits

from .errors import SpecError

__all__ = [
    "Namespace",
    "Probe",
    "RestartMode",
    "RestartPolicy",
    "SandboxSpec",
    "argv_of",
    "check_command",
    "check_service_id",
    "check_user_id",
]

Namespace = Literal["ipc", "net", "uts"]

_SERVICE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
_ENV_NAME = re.compile(r"[^=\0]+")
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\s*(?:[\[(<>=!~;@#].*)?", re.ASCII)
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


def check_command(command: object) -> None:
    """Raise `SpecError` unless a command can be executed: not empty, without NUL, a string or a sequence of them."""
    # A list of words holds strings; the words of a `bytes` are numbers.
    if not isinstance(command, str | Sequence):
        raise SpecError(f"command must be a string or a sequence of strings, not {command!r}")
    for word in (command,) if isinstance(command, str) else command:
        _refuse_nul("command", word)
    if not command or not command[0]:
        raise SpecError("command is empty")


def argv_of(command: str | Sequence[str]) -> tuple[str, ...]:
    """The words that are executed: a string is run by the shell."""
    return ("/bin/sh", "-c", command) if isinstance(command, str) else tuple(command)


def _requirements(given: object) -> tuple[str, ...]:
    # The words of a string are its letters.
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise SpecError(f"requirements must be a sequence of strings, not {given!r}")
    for text in given:
        _check_text("a requirement", text)
        # An option of pip's, such as another index, is the operator's; a path leads to what may change unnoticed.
        if not (text.isprintable() and _REQUIREMENT.fullmatch(text)):
            raise SpecError(
                f"requirement {text!r} is not allowed",
                remedy="write what a line of requirements.txt may hold that begins with a project's name: "
                "NAME, NAME>=VERSION, NAME @ URL",
            )
    return tuple(given)


def _check_text(what: str, text: object) -> None:
    if not isinstance(text, str):
        raise SpecError(f"{what} must be a string, not {text!r}")


def _check_seconds(what: str, seconds: object) -> None:
    if seconds is not None:
        _check_given_seconds(what, seconds)


def _check_count(what: str, count: object, *, least: int) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < least:
        raise SpecError(f"{what} must be a whole number, {least} or more, not {count!r}")


def _check_given_seconds(what: str, seconds: object) -> None:
    if not isinstance(seconds, int | float) or not 0 <= seconds < float("inf"):
        raise SpecError(f"{what} must be a number of seconds, 0 or more, not {seconds!r}")


def _refuse_nul(what: str, text: str) -> None:
    _check_text(what, text)
    if "\0" in text:
        raise SpecError(f"{what} holds a NUL byte, which no program can be given")


RestartMode = Literal["no", "on-failure", "always"]


@dataclass(frozen=True)
class RestartPolicy:
    """When a service's program is started again after its end, and how soon.

    Whoever stops a service has the last word: then it is not started again. Between two runs there is a pause that
    doubles from `backoff` to `backoff_max` seconds with each run that failed early; a run that lasted `healthy_after`
    seconds makes it begin anew.

    Attributes:
        mode: `no`; `on-failure`, for every end but an exit with code 0; or `always`, in which case the service also
            comes back after a restart of the supervisor or of the host, until it is stopped.
        backoff: seconds before the first restart.
        backoff_max: the longest pause, in seconds.
        jitter: the share of a pause, 0 to 1, by which it is shortened at random, so that many do not return at once.
        healthy_after: seconds after which a run counts as healthy.
        max_restarts: restarts in a row, without a healthy run, after which the service is `crash-looping` and left
            alone until somebody restarts it. None for no end.
    """

    mode: RestartMode = "no"
    _: KW_ONLY
    backoff: float = 0.5
    backoff_max: float = 60.0
    jitter: float = 0.2
    healthy_after: float = 30.0
    max_restarts: int | None = 10

    def __post_init__(self) -> None:
        if self.mode not in get_args(RestartMode):
            raise SpecError(f"restart mode must be one of {', '.join(get_args(RestartMode))}, not {self.mode!r}")
        for name in ("backoff", "backoff_max", "healthy_after"):
            _check_given_seconds(name, getattr(self, name))
        if not isinstance(self.jitter, int | float) or not 0 <= self.jitter <= 1:
            raise SpecError(f"jitter must be a share from 0 to 1, not {self.jitter!r}")
        if self.max_restarts is not None:
            _check_count("max_restarts", self.max_restarts, least=0)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read what `asdict` gave, also after a detour through JSON."""
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """How to ask a service whether it is ready, or still alive.

    With `port` alone it is asked by a TCP connection; with `path` as well by an HTTP GET, to which a status from 200 to
    399 is a yes (redirects are not followed); with `command` by a program that is run in the sandbox and exits with 0.
    A port counts only if it is a socket of the sandbox itself that answers there, and nobody else is sent anything.

    It is asked from its start on, at first in quick succession. While it is frozen it is not asked, and that time does
    not count.

    Attributes:
        port: a TCP port on 127.0.0.1.
        path: what is asked of it by HTTP; begins with a slash.
        command: as in `SandboxSpec`.
        interval: seconds between an answer and the next question.
        timeout: seconds within which an answer must come.
        failures: so many answers in a row must fail for a service that has given a good one to be unhealthy.
        within: seconds from its start in which the first good answer must come.
    """

    port: int | None = None
    path: str | None = None
    command: str | Sequence[str] | None = None
    interval: float = 1.0
    timeout: float = 2.0
    failures: int = 3
    within: float = 60.0

    def __post_init__(self) -> None:
        if (self.port is None) == (self.command is None):
            raise SpecError("a probe needs either a port or a command")
        if self.port is not None:
            _check_count("port", self.port, least=1)
            if self.port > 65535:
                raise SpecError(f"a port is a number from 1 to 65535, not {self.port}")
        if self.path is not None:
            _check_text("path", self.path)
            if self.port is None:
                raise SpecError("a probe by path needs a port")
            if not re.fullmatch(r"/[!-~]*", self.path):
                raise SpecError(f"a probe's path begins with a slash and is printable ASCII, not {self.path!r}")
        if self.command is not None:
            check_command(self.command)
        for name in ("interval", "timeout", "within"):
            _check_given_seconds(name, getattr(self, name))
            if not getattr(self, name):
                raise SpecError(f"a probe's {name} must be above 0 seconds")
        _check_count("failures", self.failures, least=1)

    @classmethod
    def from_dict(cls, values: dict[str, Any] | None) -> Self | None:
        """Read what `asdict` gave, also after a detour through JSON."""
        return None if values is None else cls(**values)


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
        limits: enforced by the kernel, or the start fails. None takes the `default_limits` of the user's tier, or of
            the settings.
        timeout: seconds of wall time of one run, after which everything in the sandbox is killed.
        stdin: give the program a pipe to be fed through `Sandbox.send`; else its standard input is `/dev/null`.
        stop_grace: seconds between SIGTERM and SIGKILL. None takes the settings' `stop_grace`.
        namespaces: further namespaces to unshare. `net` holds nothing but a loopback device.
        restart: whether a service's program is started again after its end. Not for one-shot runs.
        ready: how to know that it is ready to serve; without one it is when its program has been executed. One that is
            not in time is killed; one that is no longer ready is unhealthy, and goes on.
        alive: how to know that it still works; if it does not it is killed. Both start it again as `restart` says.
        requirements: Python packages, each as pip takes it (`NAME`, `NAME>=VERSION`, `NAME @ URL`). If there are any,
            the program runs in an environment that has them, `.venv` in its directory: it is first in PATH, so that a
            command `python` is its. It is made when it is first needed; newer packages are not looked for later.
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
    restart: RestartPolicy = RestartPolicy()
    ready: Probe | None = None
    alive: Probe | None = None
    requirements: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_user_id(self.user_id)
        check_service_id(self.service_id)
        check_command(self.command)
        if not isinstance(self.env, Mapping):
            # Not by its value: it may hold secrets.
            raise SpecError(f"env must be a mapping, not a {type(self.env).__name__}")
        for name, value in self.env.items():
            _check_text("environment name", name)
            if not _ENV_NAME.fullmatch(name):
                raise SpecError(f"environment name {name!r} is not allowed", remedy="names have no '=' and no NUL")
            _refuse_nul(f"environment variable {name}", value)
        if self.cwd is not None:
            _refuse_nul("cwd", str(self.cwd))
        if not isinstance(self.limits, Limits | None):
            raise SpecError(f"limits must be Limits, not {self.limits!r}", remedy="write Limits(memory_max=...)")
        for name in ("timeout", "stop_grace"):
            _check_seconds(name, getattr(self, name))
        if not isinstance(self.restart, RestartPolicy):
            raise SpecError(f"restart must be a RestartPolicy, not {self.restart!r}")
        for name in ("ready", "alive"):
            if not isinstance(getattr(self, name), Probe | None):
                raise SpecError(f"{name} must be a Probe, not {getattr(self, name)!r}")
        object.__setattr__(self, "requirements", _requirements(self.requirements))
        object.__setattr__(self, "namespaces", frozenset(self.namespaces))
        if unknown := self.namespaces - {"ipc", "net", "uts"}:
            raise SpecError(f"unknown namespaces: {', '.join(sorted(unknown))}", remedy="choose from ipc, net, uts")
        if "net" in self.namespaces and any(probe and probe.port for probe in (self.ready, self.alive)):
            raise SpecError("a port in a network namespace of its own cannot be asked", remedy="probe by a command")

    @property
    def argv(self) -> tuple[str, ...]:
        """The words that are executed."""
        return argv_of(self.command)

    def to_json(self) -> str:
        """Write the spec down, for `from_json`."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["env"] = dict(self.env)
        values["cwd"] = None if self.cwd is None else str(self.cwd)
        values["limits"] = None if self.limits is None else self.limits.to_dict()
        values["namespaces"] = sorted(self.namespaces)
        for name in ("restart", "ready", "alive"):
            value = getattr(self, name)
            values[name] = None if value is None else asdict(value)
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
            # Specs that an earlier version wrote down have no restart, no probes and no requirements.
            values["restart"] = RestartPolicy.from_dict(values.get("restart") or {})
            for name in ("ready", "alive"):
                values[name] = Probe.from_dict(values.get(name))
            return cls(**values)
        except (FormatError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise SpecError(f"not a sandbox's spec: {error}") from error
