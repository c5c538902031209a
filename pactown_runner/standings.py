"""What comes of a tenant's standing: its tier's limits, and that one who is blocked stands still.

How many sandboxes it may have, how often it may start one, and whether at all, the registry looks at with each claim.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import fields
from typing import Any

from cgroups import MAX, IoMax, Limits

from .config import Settings
from .errors import SpecError
from .models import IsolatedUser
from .quotas import TenantQuotas
from .registry import Registry, Standing
from .tiers import Tier
from .trees import Tree

__all__ = ["Standings", "succeeding"]

_UNLIMITED: dict[str, Any] = {
    "memory_max": MAX,
    "memory_high": MAX,
    "memory_low": 0,
    "memory_min": 0,
    "cpu_max": MAX,
    "cpu_weight": 100,
    "pids_max": MAX,
    "cpuset_cpus": "",
    "io_weight": 100,
}
"""What the kernel has where nobody asked for anything else."""


class Standings:
    """The standings of all users of a state. Thread-safe.

    Args:
        settings: those of the state; they say what a tier is.
        registry: says who has which.
    """

    def __init__(self, settings: Settings, registry: Registry) -> None:
        self._settings = settings
        self._registry = registry
        self._quotas = TenantQuotas(settings, registry)
        self._tiers = {tier.name: tier for tier in settings.tiers}
        # Otherwise no start needs to ask.
        self._limiting = any(tier.default_limits is not None for tier in settings.tiers)

    def of(self, key: str) -> Standing:
        """The standing of the user with this key."""
        return self._registry.standings.get(key)

    def tier_of(self, user_id: str, registry: Registry | None = None) -> str | None:
        """The name of the tier of the user with this id; None if it has none, or there is no such user.

        Args:
            registry: as in `default_limits`.
        """
        registry = registry or self._registry
        row = registry.users.row(user_id)
        return None if row is None else registry.standings.get(row.key).tier

    def default_limits(self, key: str, registry: Registry | None = None) -> Limits:
        """The limits of a sandbox of this user whose spec gives none.

        Args:
            key: the user's.
            registry: another connection to the registry, of a caller that must not wait for the disk.
        """
        if not self._limiting:
            return self._settings.default_limits
        tier = self._tier((registry or self._registry).standings.get(key))
        return self._settings.default_limits if tier is None or tier.default_limits is None else tier.default_limits

    def tenant_limits(self, key: str) -> Limits:
        """The limits on this user's slice."""
        return self._limits(self.of(key))

    def change(self, tree: Tree | None, user: IsolatedUser, standing: Standing) -> None:
        """Give a user another standing, and have it hold for what runs of it; blocking.

        What is just being started when the user is blocked runs on: whoever owns it is to freeze it when it has.

        Args:
            tree: where its sandboxes are, if there is a place for them.

        Raises:
            SpecError: there is no such tier.
            LimitsError: the tier's limits cannot be enforced here; the standing is what it was.
            RegistryError: it cannot be written down; the standing is what it was.
            CgroupError: something did not stand still, or go on. The call may be repeated.
        """
        if standing.tier is not None and standing.tier not in self._tiers:
            raise SpecError(
                f"there is no tier {standing.tier!r}", remedy=f"choose from {', '.join(sorted(self._tiers))}"
            )
        key = user.key
        before = self.of(key)
        with ExitStack() as undo:
            self._quotas.change(user, before.tier, standing.tier)
            undo.callback(self._quotas.change, user, standing.tier, before.tier)
            if tree is not None:
                had, given = self._limits(before), self._limits(standing)
                tree.limit_tenant(key, succeeding(had, given))
                undo.callback(tree.limit_tenant, key, succeeding(given, had))
            self._registry.standings.set(key, standing)
            undo.callback(self._registry.standings.set, key, before)
            if tree is not None and before.blocked and not standing.blocked:
                # While that fails it counts as blocked, so that the next call tries again.
                self._let_go_on(tree, key)
            undo.pop_all()
        if tree is not None and standing.blocked:
            tree.hold_still(key, True)

    def _let_go_on(self, tree: Tree, key: str) -> None:
        """Thaw what runs of a user: now, or when its home is no longer exported or imported."""
        with self._registry.holds.changing():
            services = {row.service_id for row in self._registry.sandboxes.rows(key=key)}
            named = [service for service in services if not service.startswith("_")]
            if not self._registry.holds.change(key, named, goes_on=True):
                tree.hold_still(key, False)

    def _limits(self, standing: Standing) -> Limits:
        tier = self._tier(standing)
        return self._settings.tenant_limits if tier is None or tier.tenant_limits is None else tier.tenant_limits

    def _tier(self, standing: Standing) -> Tier | None:
        return None if standing.tier is None else self._tiers.get(standing.tier)


def succeeding(before: Limits, after: Limits) -> Limits:
    """What to write so that `after` holds where `before` did: also that what is limited no more is not."""
    values = {item.name: getattr(after, item.name) for item in fields(after)}
    for name, unlimited in _UNLIMITED.items():
        if getattr(before, name) is not None and values[name] is None:
            values[name] = unlimited
    limited = before.swap_implied or before.memory_swap_max is not None
    if limited and values["memory_swap_max"] is None and not after.swap_implied:
        values["memory_swap_max"] = MAX
    if before.io_max:
        free = {disk: dict.fromkeys(("rbps", "wbps", "riops", "wiops"), MAX) for disk in before.io_max}
        given = {disk: IoMax.make(limits).to_dict() for disk, limits in (after.io_max or {}).items()}
        values["io_max"] = {disk: {**free.get(disk, {}), **given.get(disk, {})} for disk in free | given}
    return Limits(**values)
