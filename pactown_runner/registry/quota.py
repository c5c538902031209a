"""How much may be claimed, and how often: what is there is counted, and starts by the clock."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import AdmissionError
from .standings import standing_of
from .users import called

__all__ = ["BOUNDLESS", "Quota", "Quotas", "check_quota", "quota_of"]

_COUNT = "SELECT count(*) FROM sandboxes"
# Names that begin with `_` are the runner's own: its jobs count against nobody.
_COUNT_NAMED = _COUNT + " WHERE substr(service_id, 1, 1) <> '_'"
_COUNT_OF_USER = _COUNT_NAMED + " AND key = ?"
_FULL_AT = "SELECT full_at FROM starts WHERE key = ? AND seconds = ?"
_SET_FULL_AT = "INSERT OR REPLACE INTO starts VALUES (?, ?, ?)"
_MINUTE, _HOUR = 60, 3600


class Quota(NamedTuple):
    """How much may be claimed; None for no end. What the runner itself claims, by names that begin with `_`, is free.

    Attributes:
        max_sandboxes: rows of all users.
        max_per_user: rows of one user.
        starts_per_minute: how many claims a user may make in a minute; also how many at once, if it made none before.
        starts_per_hour: the same for an hour.
    """

    max_sandboxes: int | None = None
    max_per_user: int | None = None
    starts_per_minute: float | None = None
    starts_per_hour: float | None = None


BOUNDLESS = Quota()


@dataclass(frozen=True, slots=True)
class Quotas:
    """How much may be claimed, by the user's tier.

    Attributes:
        general: by users without a tier.
        of_tiers: by those that have one. Who has one that is not here may claim nothing.
    """

    general: Quota
    of_tiers: Mapping[str, Quota] = field(default_factory=dict)


def quota_of(db: sqlite3.Connection, key: str, service_id: str, quotas: Quotas) -> Quota:
    """What holds for this user, who is about to start this.

    Raises:
        AdmissionError: it has a tier that nobody knows.
    """
    tier = standing_of(db, key).tier
    if tier is None:
        return quotas.general
    if tier not in quotas.of_tiers:
        raise AdmissionError(
            f"cannot start {service_id!r}: user {called(db, key)} has the tier {tier!r}, which is not known",
            limit="tiers",
            remedy="give the user another tier, or add it to the settings",
        )
    return quotas.of_tiers[tier]


def check_quota(db: sqlite3.Connection, key: str, service_id: str, quota: Quota, clock: Callable[[], float]) -> None:
    """See that this user may have what it has just claimed, which is counted with the rest, and count the start.

    To be called in the transaction of the claim, which ends with what is raised here.

    Raises:
        AdmissionError: that is more than `quota` allows.
    """
    if quota.max_sandboxes is not None:
        _check_host(db, service_id, quota.max_sandboxes)
    if quota.max_per_user is not None:
        _check_user(db, key, service_id, quota.max_per_user)
    for limit, seconds in (("starts_per_minute", _MINUTE), ("starts_per_hour", _HOUR)):
        if (rate := getattr(quota, limit)) is not None:
            _count_start(db, key, service_id, _Rate(limit, rate, seconds), int(clock() * 1e6))


def _check_host(db: sqlite3.Connection, service_id: str, most: int) -> None:
    # The plain count looks at no row, and is enough unless it is close.
    if db.execute(_COUNT).fetchone()[0] <= most:
        return
    if (count := db.execute(_COUNT_NAMED).fetchone()[0]) > most:
        raise AdmissionError(
            f"cannot start {service_id!r}: {count - 1} sandboxes run on this host, and {most} may",
            limit="max_sandboxes",
            remedy="stop others, or raise max_sandboxes in the settings",
        )


def _check_user(db: sqlite3.Connection, key: str, service_id: str, most: int) -> None:
    if (count := db.execute(_COUNT_OF_USER, (key,)).fetchone()[0]) > most:
        raise AdmissionError(
            f"cannot start {service_id!r}: {count - 1} sandboxes of user {called(db, key)} run, and {most} may",
            limit="max_sandboxes_per_user",
            remedy="stop others of this user, or raise max_sandboxes_per_user in the settings",
        )


class _Rate(NamedTuple):
    limit: str
    starts: float
    seconds: int


def _count_start(db: sqlite3.Connection, key: str, service_id: str, rate: _Rate, now: int) -> None:
    """Take one of the starts that a user has: a bucket that holds a minute's, or an hour's, or one if that is less.

    What is written down is when the bucket is full again. Each start puts that off by what one takes to come back.
    """
    each = int(rate.seconds * 1e6 / rate.starts)
    whole = int(each * max(1, rate.starts))
    found = db.execute(_FULL_AT, (key, rate.seconds)).fetchone()
    full_at = found[0] if found else now
    # No bucket is emptier than empty: the clock was put back, or the rate was lower. Nobody is to wait for that.
    if not now < full_at <= now + whole:
        full_at = now
    full_at += each
    if (early := full_at - whole - now) > 0:
        user, starts = called(db, key), f"{rate.starts:g} {rate.limit.replace('_', ' ')}"
        raise AdmissionError(
            f"cannot start {service_id!r}: user {user} has had its {starts}",
            limit=rate.limit,
            retry_after=early / 1e6,
            remedy=f"try again in {early / 1e6:.3g} seconds",
        )
    db.execute(_SET_FULL_AT, (key, rate.seconds, full_at))
