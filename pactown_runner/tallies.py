"""What has happened and been used, counted by tenant and service: a bounded number of counts, none of which goes back.

A service has a count of its own for as long as it lives and a while longer, while there is room. What is counted for
all others of a tenant goes together, and so does what is counted for tenants that there is no room for. A service that
comes to a count of its own begins there at 0, and what it leaves behind stays where it was counted: so rates are right
at any time, and in any sum over services.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from cgroups import Pressure, Stats

from .events import NoteKind
from .models import EventKind, Outcome

__all__ = ["OTHER", "RESOURCES", "TENANT", "Key", "Labels", "Tallies", "used"]

OTHER: Final = "_other"
"""Stands for all services that have no count of their own. No service can be called like this."""

TENANT: Final = ""
"""Stands for all that runs of a tenant, as its slice counts it."""

KEPT_SECONDS = 900.0
"""For so long an ended service's counts stay: some scrapes, so that none is missed."""

OUTGROWN = 2
"""So many times the CPU time of another must a service have used to take that one's place, or they would swap often."""

Key = str
"""What is counted, and behind a space of which kind, if there are several. A dictionary from text to numbers is nothing
that Python looks through for garbage, which for many sandboxes would hold the loop."""

_USED: Final[dict[str, Key]] = {
    "cpu_usage_usec": "cpu",
    "cpu_throttled_usec": "throttled",
    "cpu_nr_throttled": "throttled_periods",
    "pids_events_max": "forks_refused",
    "io_rbytes": "io_read",
    "io_wbytes": "io_written",
}
_CPU: Final[Key] = "cpu"
RESOURCES: Final = ("cpu", "io", "memory")
_PRESSURES: Final[dict[str, tuple[Key, Key]]] = {
    f"{resource}_pressure": (f"waiting {resource}", f"stalled {resource}") for resource in RESOURCES
}
_FROM_THE_BEGINNING: Final = (
    *("starts", "restarts", "adoptions", "unhealthy", "crash_loops"),
    *("log_lines", "log_bytes", "log_dropped_lines", "log_dropped_bytes"),
)
_COUNTED: Final[dict[str, tuple[str, ...]]] = {
    "started": ("starts",),
    "restarted": ("starts", "restarts"),
    "adopted": ("adoptions",),
    "unhealthy": ("unhealthy",),
    "crash-looping": ("crash_loops",),
}


class Labels(NamedTuple):
    """What a count goes by.

    Attributes:
        user: the SaaS user's id; empty for those that there is no room for.
        service: the service's id, `OTHER` or `TENANT`.
    """

    user: str
    service: str


def used(stats: Stats) -> dict[Key, int]:
    """The counters among a cgroup's numbers, those that this host has."""
    found = {key: value for name, key in _USED.items() if (value := getattr(stats, name)) is not None}
    for name, (waiting, stalled) in _PRESSURES.items():
        pressure: Pressure | None = getattr(stats, name)
        if pressure is not None:
            found[waiting] = pressure.total_usec
            if pressure.full_total_usec is not None:
                found[stalled] = pressure.full_total_usec
    return found


@dataclass(slots=True)
class _Service:
    """A service that is known.

    Attributes:
        labels: what it is counted under now.
        run_id: whose counters were `seen` last.
        seen: how far they are counted; None to begin with what they are when they are seen next.
        cpu: microseconds of CPU time, by which services are told from smaller ones.
        gone_at: when it ended, on the monotonic clock.
    """

    labels: Labels
    run_id: str | None = None
    seen: dict[Key, int] | None = field(default_factory=dict)
    cpu: int = 0
    gone_at: float | None = None

    @property
    def own(self) -> bool:
        """Whether it has a count of its own."""
        return self.labels.service not in (OTHER, TENANT)


class Tallies:
    """The counts. For one thread.

    Args:
        services_max: how many services have one of their own.
        users_max: how many users do.

    Attributes:
        counts: by labels, each by what is counted.
        refused: starts that were refused, by the limit that stood in the way.
    """

    def __init__(self, services_max: int, users_max: int) -> None:
        self.counts: dict[Labels, dict[Key, int]] = {}
        self.refused: defaultdict[str, int] = defaultdict(int)
        self._services_max = services_max
        self._users_max = users_max
        self._services: dict[tuple[str, str], _Service] = {}
        self._own = 0
        # Since when a user has had nothing that is known; None while it has.
        self._users: dict[str, float | None] = {}

    # What happens -----------------------------------------------------------------------------------------------

    def hear(
        self,
        kind: EventKind | NoteKind,
        user_id: str,
        service_id: str | None,
        run_id: str | None,
        details: Mapping[str, Any],
        *,
        now: float,
    ) -> None:
        """Count what a listener hears; see `events.Listener`."""
        if kind == "refused":
            self.refused[details["limit"]] += 1
        elif service_id is None:
            return
        elif kind == "gone":
            service = self._services.get((user_id, service_id))
            # Another run may have begun under this name already.
            if service is not None and service.run_id in (None, run_id):
                self._gone((user_id, service_id), now)
        elif kind == "ended":
            self._ended(user_id, service_id, run_id, details["outcome"])
        elif kind == "logged":
            counts = self._counts_of(user_id, service_id)
            for name, count in details.items():
                counts[f"log_{name}"] += count
        elif kind == "oom":
            _add(self._counts_of(user_id, service_id), f"ooms {details['level'] or 'unknown'}", details["count"])
        elif (names := _COUNTED.get(kind)) is not None:
            counts = self._counts_of(user_id, service_id)
            for name in names:
                counts[name] += 1
            if kind == "adopted":
                self.begin_with(user_id, service_id, run_id)

    def begin_with(self, user_id: str, service_id: str, run_id: str | None) -> None:
        """Count nothing of what a run has used before it is looked at next: somebody else has."""
        service = self._service(user_id, service_id)
        service.run_id, service.seen = run_id, None

    def use(self, user_id: str, service_id: str, run_id: str | None, found: Mapping[Key, int]) -> Labels:
        """Count what a run has used since it was looked at last. Returns what it is counted under."""
        service = self._service(user_id, service_id)
        if service.run_id != run_id:
            service.run_id, service.seen = run_id, {}
        counts, seen = self.counts[service.labels], service.seen
        for key, value in found.items():
            grown = 0 if seen is None else max(0, value - seen.get(key, 0))
            counts[key] = counts.get(key, 0) + grown
            if key == _CPU:
                service.cpu += grown
        if seen is None:
            service.seen = dict(found)
        else:
            # What could not be read this time was counted all the same.
            seen.update(found)
        return service.labels

    def _ended(self, user_id: str, service_id: str, run_id: str | None, outcome: Outcome) -> None:
        _add(self._counts_of(user_id, service_id), f"ends {outcome.reason}", 1)
        self.use(user_id, service_id, run_id, {} if outcome.stats is None else used(outcome.stats))

    def user_label(self, user_id: str) -> str:
        """What a user is counted under: its id, or nothing where there is no room."""
        if user_id not in self._users:
            if len(self._users) >= self._users_max:
                return ""
            self._users[user_id] = None
        return user_id

    # Who has a count of its own ---------------------------------------------------------------------------------

    def tidy(self, live: Collection[tuple[str, str]], now: float) -> None:
        """Forget what has ended a while ago, and give the room to the largest that have no count of their own.

        Args:
            live: the services that there are.
            now: on the monotonic clock.
        """
        for name, service in list(self._services.items()):
            if name in live:
                service.gone_at = None
            elif service.gone_at is None:
                self._gone(name, now)
            elif now - service.gone_at >= KEPT_SECONDS:
                self._forget(name)
        self._tidy_users(now)
        waiting = [name for name, service in self._services.items() if service.labels.service == OTHER and name in live]
        if waiting and self._services_max:
            self._make_room(waiting)

    def _tidy_users(self, now: float) -> None:
        known = {user_id for user_id, _ in self._services}
        for user_id, since in list(self._users.items()):
            if user_id in known:
                self._users[user_id] = None
            elif since is None:
                self._users[user_id] = now
            elif now - since >= KEPT_SECONDS:
                del self._users[user_id]
                for rest in (OTHER, TENANT):
                    self.counts.pop(Labels(user_id, rest), None)
        for (user_id, _), service in self._services.items():
            if not service.labels.user and self.user_label(user_id):
                self._count_under(service, service.labels._replace(user=user_id))

    def _make_room(self, waiting: list[tuple[str, str]]) -> None:
        """Let those that wait have counts of their own: where there is room, or in place of smaller or ended ones."""
        services = self._services
        waiting = [name for name in waiting if services[name].labels.user]
        waiting.sort(key=lambda name: services[name].cpu, reverse=True)
        own = [name for name, service in services.items() if service.own]
        own.sort(key=lambda name: (services[name].gone_at is None, services[name].cpu))
        smaller = iter(own)
        for name in waiting:
            if self._own >= self._services_max:
                other = next(smaller, None)
                if other is None:
                    return
                gone = services[other].gone_at is not None
                if not gone and services[name].cpu <= OUTGROWN * services[other].cpu:
                    return
                if gone:
                    self._forget(other)
                else:
                    self._disown(services[other])
            self._own += 1
            self._count_under(services[name], Labels(*name))

    def _service(self, user_id: str, service_id: str) -> _Service:
        service = self._services.get((user_id, service_id))
        if service is None:
            labels = Labels(self.user_label(user_id), OTHER if service_id != TENANT else TENANT)
            if labels == (user_id, OTHER) and self._own < self._services_max:
                labels = Labels(user_id, service_id)
                self._own += 1
            service = self._services[user_id, service_id] = _Service(labels)
            self._count_under(service, labels)
        return service

    def _counts_of(self, user_id: str, service_id: str) -> dict[Key, int]:
        return self.counts[self._service(user_id, service_id).labels]

    def _count_under(self, service: _Service, labels: Labels) -> None:
        service.labels = labels
        if labels not in self.counts:
            names = _FROM_THE_BEGINNING if labels.service != TENANT else ()
            self.counts[labels] = dict.fromkeys(names, 0)

    def _disown(self, service: _Service) -> None:
        """From now on it is counted with the others."""
        self._own -= 1
        del self.counts[service.labels]
        self._count_under(service, Labels(service.labels.user, OTHER))

    def _gone(self, name: tuple[str, str], now: float) -> None:
        service = self._services.get(name)
        if service is None:
            return
        if service.labels.service != OTHER:
            service.gone_at = now
        else:
            # There may be any number of them between two looks.
            del self._services[name]

    def _forget(self, name: tuple[str, str]) -> None:
        service = self._services.pop(name)
        if service.own:
            self._own -= 1
            del self.counts[service.labels]


def _add(counts: dict[Key, int], key: Key, count: int) -> None:
    counts[key] = counts.get(key, 0) + count
