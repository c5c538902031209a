"""Tiers: what the operator lets a tenant have. A tier is a setting; which one a tenant has stands in the registry."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from cgroups import MAX, FormatError, Limits, parse_bytes

from .errors import ConfigError

__all__ = ["DEFAULT_TIERS", "LEAST_DISK", "Tier", "parse_tiers"]

LEAST_DISK = {"tenant_disk_max": 4096, "tenant_inodes_max": 1}
"""Limits on a tenant's disk, and the least that each may be: what an empty home takes."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Tier:
    """What a tenant of this tier may have. None leaves it to the setting of the same purpose.

    Attributes:
        name: such as `free`.
        default_limits: a sandbox's limits where its spec gives none.
        tenant_limits: limits on the tenant's slice, over all its sandboxes.
        tenant_disk_max: the most bytes of disk that the tenant's files take, or `max` for no limit.
        tenant_inodes_max: the same for how many files, folders and links there are.
        max_sandboxes: the most that the tenant runs at once; instead of the setting `max_sandboxes_per_user`.
        starts_per_hour: how many starts it has, as a rate and as the most at once; besides `starts_per_minute`.

    Raises:
        ConfigError: one of them cannot be.
    """

    name: str
    default_limits: Limits | None = None
    tenant_limits: Limits | None = None
    tenant_disk_max: int | str | None = None
    tenant_inodes_max: int | str | None = None
    max_sandboxes: int | None = None
    starts_per_hour: float | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"a tier's name is 1 to 63 of A-Z a-z 0-9 . _ -, not {self.name!r}")
        if self.tenant_limits is not None and self.tenant_limits.memory_oom_group:
            raise ConfigError(
                f"tenant_limits of tier {self.name} cannot have memory_oom_group: one service would take all along",
                remedy="set it in default_limits",
            )
        for name, least in {"max_sandboxes": 0, **LEAST_DISK}.items():
            most = getattr(self, name)
            if most is None or (most == MAX and name in LEAST_DISK):
                continue
            if not isinstance(most, int) or isinstance(most, bool) or most < least:
                raise ConfigError(f"{name} of tier {self.name} must be a whole number, {least} or more, not {most!r}")
        rate = self.starts_per_hour
        if rate is not None and not (isinstance(rate, int | float) and 0 < rate < float("inf")):
            raise ConfigError(f"starts_per_hour of tier {self.name} must be a number above 0, not {rate!r}")

    def changed(self, table: Mapping[str, Any]) -> Self:
        """This tier, but for what a table of the configuration says; the word `none` stands for None.

        Raises:
            ConfigError: it is no tier.
        """
        try:
            values: dict[str, Any] = {name: None if value == "none" else value for name, value in table.items()}
            for limits in {"default_limits", "tenant_limits"} & values.keys():
                if values[limits] is not None:
                    values[limits] = Limits(**values[limits])
            if values.get("tenant_disk_max") is not None:
                values["tenant_disk_max"] = parse_bytes(values["tenant_disk_max"])
            return replace(self, **{**values, "name": self.name})
        except ConfigError:
            raise
        except (AttributeError, FormatError, TypeError) as error:
            raise ConfigError(f"tier {self.name} cannot be {table!r}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-serializable dictionary."""
        limits = {
            name: None if (value := getattr(self, name)) is None else value.to_dict()
            for name in ("default_limits", "tenant_limits")
        }
        return asdict(self) | limits


DEFAULT_TIERS = (
    Tier(
        name="free",
        tenant_limits=Limits(memory_max="256M", cpu_max=0.5, pids_max=64),
        max_sandboxes=1,
        starts_per_hour=20,
    ),
    Tier(
        name="basic",
        tenant_limits=Limits(memory_max="1G", cpu_max=1.0, pids_max=256),
        max_sandboxes=5,
        starts_per_hour=100,
    ),
    Tier(
        name="pro",
        tenant_limits=Limits(memory_max="4G", cpu_max=2.0, pids_max=1024),
        max_sandboxes=20,
        starts_per_hour=500,
    ),
    Tier(
        name="enterprise",
        tenant_limits=Limits(memory_max="16G", cpu_max=8.0, pids_max=4096),
        max_sandboxes=100,
        starts_per_hour=5000,
    ),
)
"""Those that there are before anybody configures any."""


def parse_tiers(tables: Mapping[str, Mapping[str, Any]]) -> tuple[Tier, ...]:
    """Read the tiers of a configuration: each changes the default of its name, or is one more.

    Raises:
        ConfigError: one of them is no tier.
    """
    if not isinstance(tables, Mapping):
        raise ConfigError(f"tiers must be tables, by name, not {tables!r}", remedy="write [tiers.NAME]")
    tiers = {tier.name: tier for tier in DEFAULT_TIERS}
    for name, table in tables.items():
        tiers[name] = (tiers.get(name) or Tier(name=name)).changed(table)
    return tuple(tiers.values())
