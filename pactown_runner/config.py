"""Settings: every knob of a supervisor or manager, from arguments, the environment and a TOML file."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from cgroups import FormatError, Limits

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
        if not 0 <= self.stop_grace < float("inf"):
            raise ConfigError(f"stop_grace must be a number of seconds, 0 or more, not {self.stop_grace!r}")
        # Without a pause the look for dead owners would be all that the loop does.
        if not 0 < self.takeover_interval < float("inf"):
            raise ConfigError(f"takeover_interval must be a number of seconds above 0, not {self.takeover_interval!r}")
        if self.tenant_limits.memory_oom_group:
            raise ConfigError(
                "tenant_limits cannot have memory_oom_group: one service would take all of its tenant's along",
                remedy="set it in default_limits",
            )
        if self.on_crash not in ("adopt", "kill"):
            raise ConfigError(f"on_crash must be 'adopt' or 'kill', not {self.on_crash!r}")

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


_PATHS = ("users_base", "state_dir", "log_dir", "run_dir")
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
    try:
        if name in _PATHS:
            return Path(value)
        if name == "uid_ranges":
            pairs = [pair.split("-") for pair in value.split(",")] if isinstance(value, str) else value
            return tuple((int(first), int(last)) for first, last in pairs)
        if name in ("default_limits", "tenant_limits"):
            table = tomllib.loads(f"x = {{{value}}}")["x"] if isinstance(value, str) else value
            return Limits(**table)
        if name in ("stop_grace", "takeover_interval"):
            return float(value)
    except (FormatError, TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {name} cannot be {value!r}: {error}") from error
    return value


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
