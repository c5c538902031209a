"""Settings: every knob of a supervisor or manager, from arguments, the environment and a TOML file."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from cgroups import MAX, FormatError, Limits, parse_bytes

from .errors import ConfigError
from .tiers import DEFAULT_TIERS, LEAST_DISK, Tier, parse_tiers
from .tokens import Token, parse_tokens

__all__ = ["DEFAULT_CONFIG", "DEFAULT_USERS_BASE", "Settings"]

DEFAULT_CONFIG = Path("/etc/pactown/pactown.toml")

DEFAULT_USERS_BASE = Path("/home/pactown_users")
_ENV_PREFIX = "PACTOWN_"
DEFAULT_UID_RANGES = ((60001, 61183), (65536, 99999))
"""The gap between is systemd's DynamicUser range; 65534 and 65535 are no users; sub-uids begin at 100000."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings, with the defaults of root mode.

    Use `Settings.load` for what this host and process should use; the constructor takes the values as they are.

    Attributes:
        users_base: homes, one directory a tenant, mode 0711.
        state_dir: the registry and its locks. Only its owner can enter.
        log_dir: logs, one directory a tenant. Only its owner can enter.
        run_dir: FIFOs and locks of what runs now. Only its owner can enter.
        cgroup_slice: the top of our part of the cgroup tree.
        uid_ranges: first and last uid, inclusive, from which tenants' uids are taken.
        default_limits: a sandbox's limits where its spec gives none.
        tenant_limits: limits on each tenant's slice, over all its sandboxes.
        tenant_disk_max: the most bytes of disk that each tenant's files take, on the file system that homes are on,
            wherever there they lie; a limit of each tenant like those of `tenant_limits`, but held by the file system's
            user quotas. `max` lifts it; None leaves it as it is.
        tenant_inodes_max: the same for how many files, folders and links there are.
        stop_grace: seconds between SIGTERM and SIGKILL.
        on_crash: what becomes of a dead supervisor's services: the next one adopts them, or kills them.
        takeover_interval: seconds between two looks for what a dead owner left.
        on_exit: what becomes of what runs when a supervisor ends in order: it is stopped, or left running for the next.
        log_rotate_bytes: a service's log is put aside at this size, and a new one begun.
        log_keep: how many that were put aside are kept of each service.
        log_cap_bytes: the most bytes that all logs of one tenant take, with what was printed and is not in them yet;
            beyond it the oldest records are dropped. Each further process that writes logs of the tenant at the same
            time may go beyond it by a sixteenth. What is not in a log yet is never dropped, and may take 3 MiB of each
            stream that floods.
        log_rate_bytes: bytes that one tenant may print per second, over all its sandboxes; None for no end.
        log_rate_policy: what becomes of output beyond that: its writer waits (`block`), or it is dropped and counted.
        max_sandboxes: the most that run on this host at once, over all tenants; None for no end.
        max_sandboxes_per_user: the most that one tenant runs at once; None for no end.
        starts_per_minute: how many starts one tenant has, as a rate and as the most at once; None for no end.
        memory_reserve: bytes of the host's memory that must be available beyond what a new sandbox may take.
        event_buffer: how many events are kept for a reader that is slow.
        memory_pressure_share: for which share of a second, 0 to 1, some of a tenant's tasks may wait for memory before
            a `pressure` event tells of it; None for never.
        cpu_pressure_share: the same for a CPU.
        throttled_share: for which share of `throttled_interval` a sandbox may have used up its `cpu_max` before a
            `throttled` event tells of it; None for never.
        throttled_interval: seconds between two looks at how often a sandbox was throttled.
        archive_max_bytes: the most bytes of content in an exported or imported home, and of an archive itself.
        archive_max_entries: the most files, folders and links in an exported or imported home.
        archive_max_depth: the most folders within each other there.
        archive_max_ratio: the most bytes that may come of each byte of an archive, once they are 64 MiB together.
        api_socket: the socket that the API is served on, relative to `run_dir` or absolute; empty for none. Root may
            use it, whoever runs the server, and `api_group`.
        api_group: the name of a group whose members may use it as well; None for nobody else.
        api_listen: an address and port, such as `127.0.0.1:8600`, to serve the API on by TCP as well, where a token is
            needed; None for no TCP. It is not encrypted: beyond this host it belongs behind a proxy that does that.
        api_hosts: further names, but `localhost` and the address itself, by which callers may call the server.
        api_origins: web pages whose scripts may call it, such as `https://admin.example`; by default none.
        api_body_bytes: the most bytes of a request that is no file and no archive.
        api_file_bytes: the most bytes of a file that is put or got in one request.
        api_head_bytes: the most bytes of a request's head.
        api_connections: how many callers may be connected at once, each by the socket and by TCP.
        api_timeout: seconds for a request's head, between two pieces of its body, and until a caller takes a piece of
            the answer.
        metrics_services_max: how many services have metrics of their own. Beyond that the smallest go together, with 0
            all services of a user.
        metrics_users_max: how many users have metrics of their own.
        tokens: who may call by TCP; see `tokens.Token`. In the file a table each, `[tokens.NAME]`.
        tiers: what the operator may let tenants have; see `tiers.Tier`. In the file a table each, `[tiers.NAME]`.
        venv_python: what executes programs with `requirements`; by default the first Python that tenants can execute.
        venv_index: the URL of the only package index that requirements are taken from; None leaves that to the host's
            `/etc/pip.conf` or `/etc/uv/uv.toml`, else it is PyPI. Tenants can read it, and a password that it holds.
        venv_uv: the `uv` that makes their environments: sought in the tenants' PATH, or an absolute path. Where they
            cannot execute it, and for an empty string, `venv` and `pip` do.
        venv_timeout: seconds in which an environment must have been made.
        venv_keep: how many environments of each tenant's are kept that no service has any more.
    """

    users_base: Path = DEFAULT_USERS_BASE
    state_dir: Path = Path("/var/lib/pactown")
    log_dir: Path = Path("/var/log/pactown")
    run_dir: Path = Path("/run/pactown")
    cgroup_slice: str = "pactown.slice"
    uid_ranges: tuple[tuple[int, int], ...] = DEFAULT_UID_RANGES
    default_limits: Limits = field(default_factory=Limits)
    tenant_limits: Limits = field(default_factory=Limits)
    tenant_disk_max: int | str | None = None
    tenant_inodes_max: int | str | None = None
    stop_grace: float = 10.0
    on_crash: Literal["adopt", "kill"] = "adopt"
    takeover_interval: float = 1.0
    on_exit: Literal["stop", "leave"] = "stop"
    log_rotate_bytes: int = 64 << 20
    log_keep: int = 3
    log_cap_bytes: int = 1 << 30
    log_rate_bytes: int | None = None
    log_rate_policy: Literal["block", "drop"] = "block"
    max_sandboxes: int | None = None
    max_sandboxes_per_user: int | None = None
    starts_per_minute: float | None = None
    memory_reserve: int = 64 << 20
    event_buffer: int = 1024
    memory_pressure_share: float | None = 0.1
    cpu_pressure_share: float | None = 0.5
    throttled_share: float | None = 0.5
    throttled_interval: float = 5.0
    archive_max_bytes: int = 64 << 30
    archive_max_entries: int = 1_000_000
    archive_max_depth: int = 128
    archive_max_ratio: int = 200
    api_socket: str = "api.sock"
    api_group: str | None = None
    api_listen: str | None = None
    api_hosts: tuple[str, ...] = ()
    api_origins: tuple[str, ...] = ()
    api_body_bytes: int = 1 << 20
    api_file_bytes: int = 16 << 20
    api_head_bytes: int = 16 << 10
    api_connections: int = 256
    api_timeout: float = 30.0
    metrics_services_max: int = 1000
    metrics_users_max: int = 1000
    tokens: tuple[Token, ...] = ()
    tiers: tuple[Tier, ...] = DEFAULT_TIERS
    venv_python: Path | None = None
    venv_index: str | None = None
    venv_uv: str = "uv"
    venv_timeout: float = 600.0
    venv_keep: int = 2

    def __post_init__(self) -> None:
        for name in _PATHS:
            path = Path(getattr(self, name))
            if not path.is_absolute():
                raise ConfigError(f"{name} must be an absolute path, not {str(path)!r}")
            object.__setattr__(self, name, path)
        if not self.cgroup_slice.endswith(".slice") or "/" in self.cgroup_slice:
            raise ConfigError(f"cgroup_slice must be a name that ends in .slice, not {self.cgroup_slice!r}")
        for first, last in self.uid_ranges:
            if not 0 < first <= last < 2**32 - 1:
                raise ConfigError(f"uid range {first}-{last} is not a range of uids above 0")
        if not self.uid_ranges:
            raise ConfigError("uid_ranges is empty, so no user could ever be made")
        self._check_numbers()
        self._check_api()
        self._check_venvs()
        if self.tenant_limits.memory_oom_group:
            raise ConfigError(
                "tenant_limits cannot have memory_oom_group: one service would take all of its tenant's along",
                remedy="set it in default_limits",
            )
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"{name} must be {' or '.join(map(repr, known))}, not {value!r}")

    def _check_numbers(self) -> None:
        if not 0 <= self.stop_grace < float("inf"):
            raise ConfigError(f"stop_grace must be a number of seconds, 0 or more, not {self.stop_grace!r}")
        for name in _INTERVALS:
            # Without a pause some of these looks would be all that the loop does.
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise ConfigError(f"{name} must be a number of seconds above 0, not {value!r}")
        for name in _SHARES:
            if (value := getattr(self, name)) is not None and not 0 < value <= 1:
                raise ConfigError(f"{name} must be a number above 0, and 1 at most, not {value!r}")
        for name, least in _WHOLE_NUMBERS.items():
            _check_whole_number(name, getattr(self, name), least)
        for name, least in LEAST_DISK.items():
            if (value := getattr(self, name)) != MAX:
                _check_whole_number(name, value, least)
        if self.log_cap_bytes < self.log_rotate_bytes:
            raise ConfigError(
                f"log_cap_bytes is {self.log_cap_bytes}, less than the {self.log_rotate_bytes} of one log",
                remedy="lower log_rotate_bytes or raise log_cap_bytes",
            )
        if self.starts_per_minute is not None and not 0 < self.starts_per_minute < float("inf"):
            raise ConfigError(f"starts_per_minute must be a number above 0, not {self.starts_per_minute!r}")

    def _check_venvs(self) -> None:
        if self.venv_python is not None:
            object.__setattr__(self, "venv_python", Path(self.venv_python))
            if not Path(self.venv_python).is_absolute():
                raise ConfigError(f"venv_python must be an absolute path, not {str(self.venv_python)!r}")
        if self.venv_index is not None and not _INDEX.fullmatch(str(self.venv_index)):
            raise ConfigError(f"venv_index must be a URL of http, https or file, not {self.venv_index!r}")
        if not isinstance(self.venv_uv, str) or "\0" in self.venv_uv:
            raise ConfigError(f"venv_uv must be the name or path of a program, not {self.venv_uv!r}")

    def _check_api(self) -> None:
        listen = self.api_listen
        if listen is not None and not (_LISTEN.fullmatch(str(listen)) and int(listen.rpartition(":")[2]) < 1 << 16):
            raise ConfigError(
                f"api_listen must be an address and a port, not {self.api_listen!r}",
                remedy="write 127.0.0.1:8600 or [::1]:8600",
            )
        if not isinstance(self.api_socket, str) or "\0" in self.api_socket:
            raise ConfigError(f"api_socket must be a path, or empty, not {self.api_socket!r}")
        if self.api_group is not None and (not isinstance(self.api_group, str) or not self.api_group):
            raise ConfigError(f"api_group must be the name of a group, not {self.api_group!r}")
        for name, form in (("api_hosts", _HOST), ("api_origins", _ORIGIN)):
            for text in getattr(self, name):
                if not isinstance(text, str) or not form.fullmatch(text):
                    raise ConfigError(f"{name} cannot hold {text!r}")
        for name in ("tokens", "tiers"):
            names = [item.name for item in getattr(self, name)]
            if len(names) != len(set(names)):
                raise ConfigError(f"{name} has two of one name")

    @property
    def api_socket_path(self) -> Path | None:
        """Where the API's socket is; None for none."""
        return self.run_dir / self.api_socket if self.api_socket else None

    @property
    def root_mode(self) -> bool:
        """Whether each tenant gets a Linux account of its own, which takes root."""
        return os.geteuid() == 0

    @classmethod
    def load(cls, *, config: Path | None = None, environ: Mapping[str, str] | None = None, **given: Any) -> Self:
        """Return the settings of this process: what is `given`, then `PACTOWN_*` variables, then the TOML file.

        Args:
            config: the TOML file. By default `PACTOWN_CONFIG`, else `/etc/pactown/pactown.toml` if it is there.
            environ: the environment to read; by default the process's own.
            given: settings by name; None counts as not given. With a `users_base` other than the configured one none of
                the configured directories counts: that is another state, which lies below it.

        Raises:
            ConfigError: for a key that is not a setting, a variable whose name is almost a setting's, a value that is
                malformed, or a file that cannot be read.
        """
        environ = os.environ if environ is None else environ
        if config is None and (named := environ.get(_ENV_PREFIX + "CONFIG")):
            config = Path(named)
        values = _from_toml(config or DEFAULT_CONFIG, must_exist=config is not None)
        values |= _from_environ(environ)
        given = {name: value for name, value in given.items() if value is not None}
        base = Path(values.get("users_base", DEFAULT_USERS_BASE))
        if Path(given.get("users_base", base)) != base:
            # Another state, of which the configured one's directories are no part.
            values = {name: value for name, value in values.items() if name not in _PATHS}
        values |= given
        if unknown := values.keys() - _NAMES:
            raise ConfigError(
                f"unknown settings: {', '.join(sorted(unknown))}", remedy=f"known are {', '.join(sorted(_NAMES))}"
            )
        return cls(**_default_dirs(values, environ))


def _check_whole_number(name: str, value: object, least: int) -> None:
    if value is None and name in _OPTIONAL:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be a whole number, {least} or more, not {value!r}")


_INDEX = re.compile(r"(?:https?|file)://[!-~]+")
_LISTEN = re.compile(r"(?:\[[0-9a-fA-F:.%]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9.-]+|\[[0-9a-fA-F:.]+\]", re.ASCII)
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\[\]:-]+", re.ASCII)
_PATHS = ("users_base", "state_dir", "log_dir", "run_dir")
_CHOICES = {"on_crash": ("adopt", "kill"), "on_exit": ("stop", "leave"), "log_rate_policy": ("block", "drop")}
_SIZES = (
    *("log_rotate_bytes", "log_cap_bytes", "log_rate_bytes", "memory_reserve", "archive_max_bytes"),
    *("api_body_bytes", "api_file_bytes", "api_head_bytes"),
)
_WHOLE_NUMBERS = {
    "log_rotate_bytes": 4096,
    "log_keep": 0,
    "log_cap_bytes": 4096,
    "log_rate_bytes": 4096,
    "max_sandboxes": 0,
    "max_sandboxes_per_user": 0,
    "memory_reserve": 0,
    "event_buffer": 1,
    "archive_max_bytes": 0,
    "archive_max_entries": 1,
    "archive_max_depth": 1,
    "archive_max_ratio": 1,
    "api_body_bytes": 1024,
    "api_file_bytes": 0,
    "api_head_bytes": 1024,
    "api_connections": 1,
    "metrics_services_max": 0,
    "metrics_users_max": 0,
    "venv_keep": 0,
}
"""And the least that each may be."""
_INTERVALS = ("takeover_interval", "throttled_interval", "api_timeout", "venv_timeout")
_SHARES = ("memory_pressure_share", "cpu_pressure_share", "throttled_share")
_OPTIONAL = (
    *("api_group", "api_listen"),
    *("log_rate_bytes", "max_sandboxes", "max_sandboxes_per_user", "starts_per_minute"),
    *LEAST_DISK,
    *("venv_python", "venv_index", *_SHARES),
)
"""May be `None`, which an environment variable says by the word `none`."""
_NAMES = frozenset(item.name for item in fields(Settings))


def _from_toml(path: Path, *, must_exist: bool) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        if must_exist:
            raise ConfigError(f"configuration file {path} does not exist") from error
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error}") from error
    return {name: _parse(name, value, source=str(path)) for name, value in table.items()}


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    ours = {name.upper() for name in _NAMES | _NO_SETTINGS}
    for variable in environ:
        if variable.startswith(_ENV_PREFIX) and (rest := variable.removeprefix(_ENV_PREFIX)) not in ours:
            _refuse_misspelled(variable, rest.lower())
    return {
        name: _parse(name, environ[variable], source=variable)
        for name in sorted(_NAMES)
        if (variable := _ENV_PREFIX + name.upper()) in environ
    }


_NO_SETTINGS = frozenset({"config", "server", "token"})
"""Variables of ours all the same: the first says where the file is, the others are for those who call a server."""


def _refuse_misspelled(variable: str, name: str) -> None:
    """Raise `ConfigError` if this looks like a setting's; else it is another program's, and not ours to judge."""
    # As a rule nobody needs it, nor is to wait for it.
    import difflib  # noqa: PLC0415

    if close := difflib.get_close_matches(name, _NAMES, n=1, cutoff=_CLOSE):
        raise ConfigError(
            f"{variable} is no setting", remedy=f"{_ENV_PREFIX}{close[0].upper()} is one; rename it, or unset it"
        )


_CLOSE = 0.85
"""From 0 to 1. Closer is a name that lacks a letter or has one too many, and one of seven or more with one wrong."""


def _parse(name: str, value: Any, *, source: str) -> Any:
    """One value, from TOML's types or from the text of an environment variable."""
    if name in _OPTIONAL and value in (None, "none"):
        return None
    try:
        return _PARSERS[name](value) if name in _PARSERS else value
    except ConfigError as error:
        # It says enough by itself, and the value may hold what is not to be shown.
        raise ConfigError(f"{source}: {error.message}", remedy=error.remedy) from error
    except (FormatError, TypeError, ValueError) as error:
        remedy = f"write {_FORMS[name]}" if name in _FORMS and isinstance(value, str) else None
        # A token in the place of its digest, as it may be, is not to stand in a log.
        shown = "this" if name == "tokens" else repr(value)
        raise ConfigError(f"{source}: {name} cannot be {shown}: {error}", remedy=remedy) from error


def _whole(value: Any) -> int:
    # `int` would cut 2.5, and take true for 1.
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError("it must be a whole number")
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError("it must be a number")
    return float(value)


def _parse_ranges(value: Any) -> tuple[tuple[int, int], ...]:
    pairs = [pair.split("-") for pair in value.split(",")] if isinstance(value, str) else value
    return tuple((int(first), int(last)) for first, last in pairs)


def _parse_names(value: Any) -> tuple[str, ...]:
    return tuple(filter(None, value.split(","))) if isinstance(value, str) else tuple(value)


def _table(value: Any) -> Any:
    """A table of TOML; in the text of an environment variable an inline one, with or without its braces."""
    if not isinstance(value, str):
        return value
    return tomllib.loads(f"x = {value}" if value.lstrip().startswith("{") else f"x = {{{value}}}")["x"]


def _parse_limits(value: Any) -> Limits:
    return Limits(**_table(value))


_FORMS = {
    "uid_ranges": "60001-61183,65536-99999",
    **dict.fromkeys(("default_limits", "tenant_limits"), 'memory_max = "64M", pids_max = 64'),
    "tokens": 'NAME = { sha256 = "HASH", role = "read", expires = "never" }',
    "tiers": "NAME = { max_sandboxes = 5, tenant_limits = { pids_max = 64 } }",
}
"""What the text of an environment variable looks like where that is not plain to see."""


_PARSERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys((*_PATHS, "venv_python"), Path),
    **dict.fromkeys(_WHOLE_NUMBERS, _whole),
    **dict.fromkeys((*_SIZES, "tenant_disk_max"), parse_bytes),
    "tenant_inodes_max": lambda value: value if value == MAX else _whole(value),
    **dict.fromkeys(("stop_grace", "starts_per_minute", *_INTERVALS, *_SHARES), _number),
    **dict.fromkeys(("default_limits", "tenant_limits"), _parse_limits),
    **dict.fromkeys(("api_hosts", "api_origins"), _parse_names),
    "tokens": lambda value: parse_tokens(_table(value)),
    "tiers": lambda value: parse_tiers(_table(value)),
    "uid_ranges": _parse_ranges,
}
"""What makes a value of TOML, or the text of an environment variable, into a setting's."""


def _default_dirs(values: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Fill in directories: beside a `users_base` of its own; else the system's, or without root the user's own."""
    base = values.get("users_base")
    if base is not None and Path(base) != DEFAULT_USERS_BASE:
        state = Path(base) / ".state"
        own = {"state_dir": state, "log_dir": state / "log", "run_dir": state / "run"}
    elif os.geteuid() == 0:
        own = {}
    else:
        home = Path(environ.get("HOME") or "/")
        state_home = Path(environ.get("XDG_STATE_HOME") or home / ".local/state") / "pactown"
        data_home = Path(environ.get("XDG_DATA_HOME") or home / ".local/share") / "pactown"
        run_home = Path(environ.get("XDG_RUNTIME_DIR") or state_home)
        own = {
            "users_base": data_home / "users",
            "state_dir": state_home,
            "log_dir": state_home / "log",
            "run_dir": run_home / "pactown",
        }
        own = {name: path for name, path in own.items() if not _writable(getattr(Settings, name))}
    return own | values


def _writable(path: Path) -> bool:
    """Whether `path`, or else the nearest directory above it that exists, can be written by this process."""
    # Not `Path.exists`: it raises for a directory that may not be entered.
    while not os.path.exists(path):
        path = path.parent
    return os.access(path, os.W_OK | os.X_OK)
