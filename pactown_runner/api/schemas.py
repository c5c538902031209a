"""What comes and goes as JSON: models that the OpenAPI document is made of. Their words are the library's own."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal, Self

from fastapi import Path, Query
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)

from cgroups import Limits, Stats

from ..errors import StateError
from ..models import IsolatedUser, IsolationReport, Outcome, State
from ..sandbox import Sandbox
from ..specs import MAX_USER_ID_BYTES, Namespace, Probe, RestartMode, RestartPolicy, SandboxSpec
from ..tiers import Tier

__all__ = [
    "After",
    "Deleted",
    "ExecIn",
    "ExecOut",
    "FilePath",
    "Grace",
    "Health",
    "ImportOut",
    "LimitsIn",
    "PageLimit",
    "SandboxIn",
    "SandboxView",
    "SandboxesPage",
    "ServiceId",
    "SignalIn",
    "SignalOut",
    "TierIn",
    "TierOut",
    "TierView",
    "TiersOut",
    "TransferOut",
    "User",
    "UserDetail",
    "UserId",
    "UserName",
    "UserStatsOut",
    "UsersPage",
]

MAX_SECONDS = 31 * 86_400.0
"""So long a client may have something last."""

UserId = Annotated[
    str,
    Path(
        description="The SaaS user's id, percent-encoded: a slash in it is `%2F`.",
        min_length=1,
        examples=["auth0|123456"],
        json_schema_extra={"maxLength": MAX_USER_ID_BYTES},
    ),
]
SERVICE_ID: dict[str, Any] = {"pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"}
"""For the document only: the library says what is wrong with an id."""
ServiceId = Annotated[
    str, Path(description="The service's id.", min_length=1, examples=["my-api"], json_schema_extra=SERVICE_ID)
]
FilePath = Annotated[
    str, Path(description="A path in the sandbox's directory, its parts percent-encoded.", examples=["main.py"])
]
Grace = Annotated[
    float | None,
    Query(
        description="Seconds between SIGTERM and SIGKILL; else as the spec or the settings say.",
        ge=0,
        le=MAX_SECONDS,
        allow_inf_nan=False,
    ),
]
PageLimit = Annotated[
    int, Query(description="The most items of one answer; what follows has `next` as its `after`.", ge=1, le=10_000)
]
After = Annotated[str | None, Query(description="Begin behind this one: the `next` of the answer before.")]


def _encodable(text: str) -> str:
    # JSON can write halves of characters, which no program can be given.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("this is no text: it has half a character") from error
    return text


Text = Annotated[StrictStr, AfterValidator(_encodable)]
Size = StrictInt | Text
# Strictly: `true` is no number, nor is "1".
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False, strict=True)]
Command = Text | list[Text]


class In(BaseModel):
    """What a caller says. What is not known is refused."""

    model_config = ConfigDict(extra="forbid")


# Users -------------------------------------------------------------------------------------------------------------


class User(BaseModel):
    """A SaaS user's identity on this host."""

    saas_user_id: str
    linux_username: str
    linux_uid: int
    linux_gid: int
    home_dir: str
    created_at: float = Field(description="Seconds since the epoch.")

    @classmethod
    def of(cls, user: IsolatedUser) -> Self:
        return cls(**user.to_dict())


class UsersPage(BaseModel):
    """Users, in the order of their ids."""

    users: list[User]
    count: int = Field(description="How many these are.")
    next: str | None = Field(None, description="Where the next page begins; absent in the last one.")


class UserName(BaseModel):
    """Who."""

    saas_user_id: str
    linux_username: str


class UserDetail(BaseModel):
    """What there is besides."""

    size_bytes: int = Field(description="What the home takes on the disk; the tenant's word.")
    entries: int = Field(description="Files, folders, links and all else in it; the tenant's word.")
    running: int = Field(description="Sandboxes that are alive under this server.")
    tier: str | None = Field(None, description="Absent for none.")
    blocked: bool


class UserStatsOut(BaseModel):
    """What a user has."""

    user: UserName
    sandbox_count: int = Field(description="Directories of services in the home.")
    total_size_mb: float = Field(description="What the home takes on the disk, in MiB.")
    detail: UserDetail | None = Field(None, description="With `detail=true`.")


class Deleted(BaseModel):
    """A user who is no more."""

    success: Literal[True] = True
    user_id: str


class ImportOut(BaseModel):
    """What an imported home holds."""

    entries: int
    files: int
    bytes: int


class TierView(BaseModel):
    """What tenants of a tier may have; null leaves it to the general settings."""

    name: str
    default_limits: dict[str, Any] | None
    tenant_limits: dict[str, Any] | None
    tenant_disk_max: int | Literal["max"] | None
    tenant_inodes_max: int | Literal["max"] | None
    max_sandboxes: int | None
    starts_per_hour: float | None

    @classmethod
    def of(cls, tier: Tier) -> Self:
        return cls(**tier.to_dict())


class TiersOut(BaseModel):
    """All tiers."""

    tiers: list[TierView]
    count: int


class TierIn(In):
    """What a tenant is to have."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tier": "pro"}, {"tier": "free", "blocked": True}]})

    tier: Text | None = Field(None, description="A tier's name; null for none.")
    blocked: StrictBool = Field(
        False, description="What runs of the tenant stands still, and nothing is started for it."
    )


class TierOut(BaseModel):
    """What a tenant has."""

    user_id: str
    tier: str | None
    blocked: bool


# Sandboxes ---------------------------------------------------------------------------------------------------------


class LimitsIn(In):
    """Limits in the kernel's words (cgroup-v2.rst); what is absent or null is left alone."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"memory_max": "256M", "cpu_max": 0.5, "pids_max": 64}]})

    memory_max: Size | None = Field(None, description='Bytes, or "256M"; beyond it the kernel kills.')
    memory_high: Size | None = Field(None, description="Beyond it the kernel reclaims and slows down.")
    memory_low: Size | None = None
    memory_min: Size | None = None
    memory_swap_max: Size | None = Field(None, description="With `memory_max` it is 0 unless given.")
    memory_oom_group: StrictBool | None = None
    cpu_max: StrictFloat | StrictInt | Text | None = Field(None, description='Cores: 0.5, or "50%".')
    cpu_weight: StrictInt | None = Field(None, ge=1, le=10_000)
    pids_max: Size | None = Field(None, description="Processes and threads.")
    cpuset_cpus: Text | None = Field(None, description='Such as "0-1,3".')
    io_max: dict[Text, Text | dict[Literal["rbps", "wbps", "riops", "wiops"], Size]] | None = Field(
        None, description='By disk: {"8:0": {"wbps": "10M"}}.'
    )
    io_weight: StrictInt | None = Field(None, ge=1, le=10_000)

    def limits(self) -> Limits:
        """Raises FormatError: a value that can never be right."""
        return Limits.from_dict(self.model_dump(exclude_none=True))


class RestartIn(In):
    """When a service is started again after its end, and how soon."""

    mode: RestartMode = "no"
    backoff: Seconds = Field(0.5, description="Seconds before the first restart; doubles from then on.")
    backoff_max: Seconds = 60.0
    jitter: float = Field(0.2, ge=0, le=1, allow_inf_nan=False, strict=True)
    healthy_after: Seconds = Field(30.0, description="A run that lasted so many seconds was a good one.")
    max_restarts: Annotated[StrictInt, Field(ge=0)] | None = Field(
        10, description="Restarts in a row without a good run, after which the service is `crash-looping`."
    )


class ProbeIn(In):
    """How a service is asked; by a port, an HTTP path as well, or a command."""

    port: Annotated[StrictInt, Field(ge=1, le=65535)] | None = None
    path: Text | None = None
    command: Command | None = None
    interval: Seconds = 1.0
    timeout: Seconds = 2.0
    failures: Annotated[StrictInt, Field(ge=1)] = 3
    within: Seconds = 60.0

    def probe(self) -> Probe:
        return Probe(**self.model_dump())


class SandboxIn(In):
    """What to run, for whom, and within which limits."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "user_id": "auth0|123456",
                    "service_id": "my-api",
                    "command": ["python3", "main.py"],
                    "env": {"PORT": "8001"},
                    "restart": {"mode": "always"},
                },
                {"user_id": "auth0|123456", "service_id": "job", "command": "echo hello", "kind": "run"},
            ]
        }
    )

    user_id: Text = Field(description="The SaaS user; an account is made if there is none.")
    service_id: Text = Field(
        description="Unique within the user; 1 to 63 of A-Z a-z 0-9 . _ -.", json_schema_extra=SERVICE_ID
    )
    command: Command = Field(description="A string is run by `/bin/sh -c`, a list is executed as it is.")
    kind: Literal["service", "run"] = Field(
        "service", description="`run`: the answer comes when it has ended, with its outcome; it ends with the caller."
    )
    env: dict[Text, Text] = Field(default_factory=dict)
    cwd: Text | None = Field(None, description="Relative to the service's directory, or absolute.")
    limits: LimitsIn | None = Field(None, description="Null takes those of the tenant's tier, or of the settings.")
    timeout: Seconds | None = Field(None, description="Seconds of one run, after which all of it is killed.")
    stop_grace: Seconds | None = Field(None, description="Seconds between SIGTERM and SIGKILL.")
    namespaces: list[Namespace] = Field(default_factory=list)
    restart: RestartIn | None = Field(None, description="Null for never.")
    ready: ProbeIn | None = None
    alive: ProbeIn | None = None
    requirements: list[Text] = Field(
        default_factory=list, description="Python packages that it needs, as pip takes them."
    )

    def spec(self) -> SandboxSpec:
        """Raises SpecError, FormatError: what can never be right."""
        return SandboxSpec(
            user_id=self.user_id,
            service_id=self.service_id,
            command=self.command,
            env=self.env,
            cwd=self.cwd,
            limits=None if self.limits is None else self.limits.limits(),
            timeout=self.timeout,
            stop_grace=self.stop_grace,
            namespaces=frozenset(self.namespaces),
            restart=RestartPolicy() if self.restart is None else RestartPolicy(**self.restart.model_dump()),
            ready=None if self.ready is None else self.ready.probe(),
            alive=None if self.alive is None else self.alive.probe(),
            requirements=tuple(self.requirements),
        )


class SandboxView(BaseModel):
    """A service or run, as it is now. Its environment is not shown: secrets are kept there."""

    user_id: str
    service_id: str
    kind: Literal["service", "run"]
    run_id: str = Field(description="Tells this run from others of the same service.")
    state: State
    ready: bool
    pid: int = Field(description="Of its first process; 0 if there is none.")
    started_at: float = Field(description="Of this run, in seconds since the epoch.")
    restarts: int
    command: str | list[str]
    restart: RestartPolicy
    limits: dict[str, Any] | None = Field(description="What was asked for; null for the default.")
    isolation: IsolationReport | None = Field(description="What the kernel said just before it was executed.")
    outcome: Outcome | None = Field(description="How it ended.")
    last_outcome: Outcome | None = Field(description="How its last run did.")

    @classmethod
    def of(cls, sandbox: Sandbox) -> Self:
        spec = sandbox.spec
        return cls(
            user_id=spec.user_id,
            service_id=spec.service_id,
            kind=sandbox.run.kind,
            run_id=sandbox.run_id,
            state=sandbox.state,
            ready=sandbox.ready,
            pid=sandbox.pid,
            started_at=sandbox.started_at,
            restarts=sandbox.restarts,
            command=spec.command if isinstance(spec.command, str) else list(spec.command),
            restart=spec.restart,
            limits=None if spec.limits is None else spec.limits.to_dict(),
            isolation=_isolation(sandbox),
            outcome=sandbox.outcome,
            last_outcome=sandbox.last_outcome,
        )


def _isolation(sandbox: Sandbox) -> IsolationReport | None:
    try:
        return sandbox.isolation
    except StateError:
        return None


class SandboxesPage(BaseModel):
    """Sandboxes that are alive, by user and service."""

    sandboxes: list[SandboxView]
    count: int = Field(description="How many these are.")
    next: str | None = Field(None, description="Where the next page begins; null in the last one.")


class SignalIn(In):
    """A signal for every process of a sandbox."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"signal": "SIGHUP"}]})

    signal: Text | Annotated[StrictInt, Field(ge=1, le=64)] = Field(description="Its name, or its number.")


class SignalOut(BaseModel):
    """What came of a signal."""

    signalled: int = Field(description="Processes that got it; 0 for SIGKILL, which is not counted.")


class ExecIn(In):
    """A further program in a running sandbox, with its identity and limits."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"command": ["cat"], "stdin": "hello"}]})

    command: Command = Field(description="A string is run by `/bin/sh -c`, a list is executed as it is.")
    env: dict[Text, Text] = Field(default_factory=dict)
    cwd: Text | None = Field(None, description="Relative to the service's directory, or absolute.")
    stdin: Text | None = Field(None, description="What it reads; else it is `/dev/null`.")
    stdin_b64: Text | None = Field(None, description="The same for bytes that are not text.")
    timeout: Annotated[Seconds, Field(gt=0)] = Field(60.0, description="Seconds, after which it is killed.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stdin is not None and self.stdin_b64 is not None:
            raise ValueError("give stdin or stdin_b64, not both")
        self.input()
        return self

    def input(self) -> bytes | None:
        """What it reads. Raises ValueError: it is no base64."""
        if self.stdin_b64 is not None:
            return base64.b64decode(self.stdin_b64, validate=True)
        return None if self.stdin is None else self.stdin.encode()


class ExecOut(BaseModel):
    """How it ended, and what it printed."""

    exit_code: int | None = Field(description="Null if a signal ended it.")
    signal: int | None
    timed_out: bool
    stdout: str = Field(description="What is not UTF-8 is shown as U+FFFD; then the bytes are in `stdout_b64`.")
    stderr: str
    stdout_b64: str | None = None
    stderr_b64: str | None = None
    dropped: int = Field(description="Bytes beyond the first MiB of each output, of both together.")


class TransferOut(BaseModel):
    """What was put."""

    files: int
    bytes: int


StatsOut = Stats


class Health(BaseModel):
    """How the server is."""

    status: Literal["ok", "ready"]
