"""Settings: every knob of a supervisor or manager, from arguments, the environment and a TOML file."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from cgroups import FormatError, Limits, parse_bytes

from .errors import ConfigError

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
        stop_grace: seconds between SIGTERM and SIGKILL.
        on_crash: what becomes of a dead supervisor's services: the next one adopts them, or kills them.
        takeover_interval: seconds between two looks for what a dead owner left.
        on_exit: what becomes of what runs when a supervisor ends in order: it is stopped, or left running for the next.
        log_rotate_bytes: a service's log is put aside at this size, and a new one begun.
        log_keep: how many that were put aside are kept of each service.
        log_cap_bytes: the most bytes that all logs of one tenant take; beyond it the oldest are dropped.
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
    """

    users_base: Path = DEFAULT_USERS_BASE
    state_dir: Path = Path("/var/lib/pactown")
    log_dir: Path = Path("/var/log/pactown")
    run_dir: Path = Path("/run/pactown")
    cgroup_slice: str = "pactown.slice"
    uid_ranges: tuple[tuple[int, int], ...] = DEFAULT_UID_RANGES
    default_limits: Limits = field(default_factory=Limits)
    tenant_limits: Limits = field(default_factory=Limits)
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
            # Without a pause these looks would be all that the loop does.
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise ConfigError(f"{name} must be a number of seconds above 0, not {value!r}")
        for name in _SHARES:
            if (value := getattr(self, name)) is not None and not 0 < value <= 1:
                raise ConfigError(f"{name} must be a number above 0, and 1 at most, not {value!r}")
        for name, least in _WHOLE_NUMBERS.items():
            _check_whole_number(name, getattr(self, name), least)
        if self.log_cap_bytes < self.log_rotate_bytes:
            raise ConfigError(
                f"log_cap_bytes is {self.log_cap_bytes}, less than the {self.log_rotate_bytes} of one log",
                remedy="lower log_rotate_bytes or raise log_cap_bytes",
            )
        if self.starts_per_minute is not None and not 0 < self.starts_per_minute < float("inf"):
            raise ConfigError(f"starts_per_minute must be a number above 0, not {self.starts_per_minute!r}")

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
            given: settings by name; None counts as not given.

        Raises:
            ConfigError: for a key that is not a setting, a value that is malformed, or a file that cannot be read.
        """
        environ = os.environ if environ is None else environ
        if config is None and (named := environ.get(_ENV_PREFIX + "CONFIG")):
            config = Path(named)
        values = _from_toml(config or DEFAULT_CONFIG, must_exist=config is not None)
        values |= _from_environ(environ)
        values |= {name: value for name, value in given.items() if value is not None}
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


_PATHS = ("users_base", "state_dir", "log_dir", "run_dir")
_CHOICES = {"on_crash": ("adopt", "kill"), "on_exit": ("stop", "leave"), "log_rate_policy": ("block", "drop")}
_SIZES = ("log_rotate_bytes", "log_cap_bytes", "log_rate_bytes", "memory_reserve", "archive_max_bytes")
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
}
"""And the least that each may be."""
_INTERVALS = ("takeover_interval", "throttled_interval")
_SHARES = ("memory_pressure_share", "cpu_pressure_share", "throttled_share")
_OPTIONAL = ("log_rate_bytes", "max_sandboxes", "max_sandboxes_per_user", "starts_per_minute", *_SHARES)
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
    return {
        name: _parse(name, environ[variable], source=variable)
        for name in sorted(_NAMES)
        if (variable := _ENV_PREFIX + name.upper()) in environ
    }


def _parse(name: str, value: Any, *, source: str) -> Any:
    """One value, from TOML's types or from the text of an environment variable."""
    if name in _OPTIONAL and value in (None, "none"):
        return None
    try:
        return _PARSERS[name](value) if name in _PARSERS else value
    except (FormatError, TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {name} cannot be {value!r}: {error}") from error


def _parse_ranges(value: Any) -> tuple[tuple[int, int], ...]:
    pairs = [pair.split("-") for pair in value.split(",")] if isinstance(value, str) else value
    return tuple((int(first), int(last)) for first, last in pairs)


def _parse_limits(value: Any) -> Limits:
    table = tomllib.loads(f"x = {{{value}}}")["x"] if isinstance(value, str) else value
    return Limits(**table)


_PARSERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(_PATHS, Path),
    **dict.fromkeys(_WHOLE_NUMBERS, int),
    **dict.fromkeys(_SIZES, parse_bytes),
    **dict.fromkeys(("stop_grace", "starts_per_minute", *_INTERVALS, *_SHARES), float),
    **dict.fromkeys(("default_limits", "tenant_limits"), _parse_limits),
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
