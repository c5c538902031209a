"""What one supervisor has room for: the host's memory and its own descriptors. What tenants may claim is a `Quota`.

Caps on sandboxes and start rates are the registry's to check, together with the claim: all processes of a state share
them. What is here is about this host and this process, takes microseconds, and belongs on the event loop just before a
sandbox is made.

**Memory.** A sandbox is let in while the host has what that one may take, its `memory_max`, and `memory_reserve` beyond
it. Where it has no `memory_max`, the reserve alone must be there. What the others may yet take is not added up: most
never take it, and a sum would leave hosts idle. So limits may be overcommitted, and the reserve is what keeps the host,
and the supervisor, out of the kernel's choice whom to kill. Who wants the sum held caps it: `memory_max` in
`tenant_limits`, and `max_sandboxes`. A `memory_reserve` of 0 says not to look at memory at all.

What a spec leaves open, and what its tenant may take, is the tier's to say. Which one that is takes a look into the
registry, some microseconds; while there is room for a sandbox of any tier it does not matter, and nobody looks.

**Descriptors.** One that is missing half-way through a start, or an end, costs more than a refusal. So a sandbox is let
in while there are enough for all that it may ever come to hold, and as many for each that runs.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Callable
from typing import NamedTuple, Self

import psutil

from cgroups import Limits

from .config import Settings
from .errors import AdmissionError
from .registry import Quota, Quotas
from .specs import SandboxSpec
from .tiers import Tier

__all__ = ["DESCRIPTORS_EACH", "DESCRIPTORS_SPARE", "MEMORY_AGE", "Admission", "raise_descriptor_limit"]

DESCRIPTORS_EACH = 12
"""The most that a sandbox holds: 4 while it is idle, 3 more when it prints, one each for its standard input and for its
memory events, and 3 for its tenant's pressure. For the milliseconds of a start it is 10."""

DESCRIPTORS_SPARE = 64
"""For the rest of the process: jobs, readers of logs, what the host program opens after this was made."""

MEMORY_AGE = 0.25
"""Seconds for which a reading of the host's memory is good: it costs 20 to 100 microseconds."""


class Admission:
    """Says whether one more sandbox fits on this host and into this process. For one event loop.

    Args:
        settings: those of the supervisor.
        tier_of: tells the name of the tier of the user with an id, or None.

    Attributes:
        quota: what a tenant's own starts may claim, for `SandboxTable.claim` and `ServiceTable.register`.
        caps: the same for what starts by itself, such as services that come back: it costs no tenant a start.
    """

    def __init__(self, settings: Settings, tier_of: Callable[[str], str | None]) -> None:
        self.quota = _quotas(settings)
        self.caps = Quotas(
            _capped(self.quota.general), {name: _capped(own) for name, own in self.quota.of_tiers.items()}
        )
        self._reserve = settings.memory_reserve
        self._tier_of = tier_of
        self._memory = _Memory.of(settings)
        self._memory_of_tiers = {tier.name: _Memory.of(settings, tier) for tier in settings.tiers}
        every = (self._memory, *self._memory_of_tiers.values())
        self._most_by_default = max(memory.most(None) for memory in every)
        self._most_unlimited = max(memory.tenant or 0 for memory in every)
        self._available = 0
        self._read_at = float("-inf")
        # What is there besides sandboxes. Listed once: it costs microseconds each.
        self._others = len(os.listdir("/proc/self/fd"))

    def check(self, spec: SandboxSpec, running: int) -> None:
        """See whether one more fits.

        Args:
            spec: what is to be started.
            running: how many sandboxes this process has, those that are starting or ending with them.

        Raises:
            AdmissionError: it does not, now.
            RegistryError: the user's tier cannot be read.
        """
        self._check_descriptors(spec, running)
        if self._reserve:
            self._check_memory(spec)

    def _check_descriptors(self, spec: SandboxSpec, running: int) -> None:
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # The kernel's own count knows what the host program has opened since. Before Linux 6.2 it is 0.
        open_now = os.stat("/proc/self/fd").st_size
        needed = max(self._others + running * DESCRIPTORS_EACH, open_now) + DESCRIPTORS_EACH + DESCRIPTORS_SPARE
        if needed > most:
            raise AdmissionError(
                f"cannot start {spec.service_id!r}: {running} sandboxes run here, and {most} descriptors, of which "
                f"{open_now or self._others} are in use, are not enough for another",
                limit="descriptors",
                remedy="stop others, or raise LimitNOFILE= of the supervisor's unit (`ulimit -n`)",
            )

    def _check_memory(self, spec: SandboxSpec) -> None:
        available = self._memory_available()
        if available >= self._most_in_any_tier(spec) + self._reserve:
            return
        memory = self._memory_of_tiers.get(self._tier_of(spec.user_id) or "", self._memory)
        most = memory.most(spec.limits)
        if available < most + self._reserve:
            wanted = f", and it may take {_mib(most)}" if most else ""
            raise AdmissionError(
                f"cannot start {spec.service_id!r}: this host has {_mib(available)} of memory available, of which "
                f"{_mib(self._reserve)} are reserved{wanted}",
                limit="memory_reserve",
                remedy="stop others, or lower its memory_max, or memory_reserve in the settings",
            )

    def _most_in_any_tier(self, spec: SandboxSpec) -> int:
        if spec.limits is None:
            return self._most_by_default
        own = _memory_max(spec.limits)
        return self._most_unlimited if own is None else own

    def _memory_available(self) -> int:
        now = time.monotonic()
        if now - self._read_at >= MEMORY_AGE:
            self._available, self._read_at = psutil.virtual_memory().available, now
        return self._available


def raise_descriptor_limit() -> int:
    """Let this process have as many descriptors as it ever may: its soft limit becomes the hard one. Returns that.

    The launcher gives tenants limits of their own. What the host program starts itself inherits it, and what in it
    still uses select(2) cannot watch descriptors from 1,024 on.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # Refused where the hard limit is above what /proc/sys/fs/nr_open allows by now.
        with contextlib.suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _quotas(settings: Settings) -> Quotas:
    general = Quota(settings.max_sandboxes, settings.max_sandboxes_per_user, settings.starts_per_minute)
    return Quotas(general, {tier.name: _quota_of(tier, general) for tier in settings.tiers})


def _quota_of(tier: Tier, general: Quota) -> Quota:
    most = general.max_per_user if tier.max_sandboxes is None else tier.max_sandboxes
    return general._replace(max_per_user=most, starts_per_hour=tier.starts_per_hour)


def _capped(quota: Quota) -> Quota:
    """Without its rates."""
    return quota._replace(starts_per_minute=None, starts_per_hour=None)


class _Memory(NamedTuple):
    """Bytes of memory that limits let be taken; None for no limit."""

    default: int | None
    """By a sandbox whose spec gives no limits."""
    tenant: int | None
    """By all of its tenant's together."""

    @classmethod
    def of(cls, settings: Settings, tier: Tier | None = None) -> Self:
        default, tenant = settings.default_limits, settings.tenant_limits
        if tier is not None:
            default = default if tier.default_limits is None else tier.default_limits
            tenant = tenant if tier.tenant_limits is None else tier.tenant_limits
        return cls(_memory_max(default), _memory_max(tenant))

    def most(self, limits: Limits | None) -> int:
        """What a sandbox with these limits may take, which is not more than its tenant may; 0 if that has no end."""
        own = self.default if limits is None else _memory_max(limits)
        return min((most for most in (own, self.tenant) if most is not None), default=0)


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"


def _memory_max(limits: Limits) -> int | None:
    return limits.memory_max if isinstance(limits.memory_max, int) else None
