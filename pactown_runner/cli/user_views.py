"""Users as an operator sees them: read from the registry, whoever else uses it, and nothing made by looking."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..config import Settings
from ..errors import NotFoundError
from ..logs import LogPaths
from ..owners import Owners
from ..registry import Registry, SandboxRow, Standing, UserRow
from ..specs import check_user_id
from .human import size_of, time_of
from .messages import LOOK_FOR_USERS, say
from .tables import show_pairs, show_table
from .visible import one_line

if TYPE_CHECKING:
    from ..archives import Exported, Imported
    from ..supervisor_users import UserStats

__all__ = [
    "UserView",
    "count",
    "details",
    "find_user",
    "list_users",
    "numbers",
    "show_stats",
    "show_user",
    "show_users",
    "tell_left_out",
]

Status = Literal["ready", "creating", "deleting", "kept"]
"""`creating` and `deleting`: begun, and not ended; `kept`: the user was deleted, and its home is there still."""

_COLOURS = {"ready": "green", "creating": "yellow", "deleting": "yellow", "kept": "dim", "blocked": "red"}
_SHOWN_LEFT_OUT = 10
_HEADINGS = ("user", "login", "uid", "created", "tier", "running", "status")


@dataclass(frozen=True)
class UserView:
    """A user, and what there is of it.

    Attributes:
        row: who.
        status: whether the user is whole.
        standing: what the operator lets it have.
        sandboxes: what is meant to be alive of it; the runner's own jobs aside.
    """

    row: UserRow
    status: Status
    standing: Standing
    sandboxes: list[SandboxRow]

    def to_dict(self) -> dict[str, Any]:
        """As `users list --json` tells it. Names are only ever added."""
        return {
            **self.row.user().to_dict(),
            "status": self.status,
            "tier": self.standing.tier,
            "blocked": self.standing.blocked,
            "running": len(self.sandboxes),
        }


@contextlib.contextmanager
def _opened_registry(settings: Settings) -> Iterator[Registry | None]:
    """The registry of a state, if there is one."""
    path = settings.state_dir / "registry.db"
    if not path.exists():  # looking must not make one
        yield None
        return
    with Registry(path) as registry:
        yield registry


def list_users(settings: Settings) -> list[UserView]:
    """All users, and those whose home was kept, in the order in which they were first made."""
    with _opened_registry(settings) as registry:
        if registry is None:
            return []
        sandboxes: dict[str, list[SandboxRow]] = {}
        for sandbox in registry.sandboxes.rows():
            sandboxes.setdefault(sandbox.key, []).append(sandbox)
        views = (_view(registry, row, sandboxes.get(row.key, [])) for row in registry.users.rows())
        return [view for view in views if view is not None]


def find_user(settings: Settings, user_id: str) -> UserView:
    """The user of this id.

    Raises:
        NotFoundError: there is none.
        SpecError: the id is malformed.
    """
    check_user_id(user_id)
    with _opened_registry(settings) as registry:
        row = registry.users.row(user_id) if registry else None
        view = _view(registry, row, registry.sandboxes.rows(key=row.key)) if registry and row else None
    if view is None:
        raise NotFoundError(f"there is no user {user_id!r} in {settings.state_dir}", remedy=LOOK_FOR_USERS)
    return view


def _view(registry: Registry, row: UserRow, sandboxes: list[SandboxRow]) -> UserView | None:
    if row.status == "deleted":
        if not row.home.exists():
            return None
        removal = registry.users.removal(row.key)
        if removal is None or removal.delete_home:
            return None
    named = [sandbox for sandbox in sandboxes if not sandbox.service_id.startswith("_")]
    return UserView(row, "kept" if row.status == "deleted" else row.status, registry.standings.get(row.key), named)


def show_users(views: list[UserView]) -> None:
    """Write a table of users."""
    show_table(
        _HEADINGS,
        [
            (
                view.row.saas_id,
                view.row.username,
                str(view.row.uid),
                time_of(view.row.created_at),
                view.standing.tier or "-",
                str(len(view.sandboxes)),
                "blocked" if view.standing.blocked and view.status == "ready" else view.status,
            )
            for view in views
        ],
        _COLOURS,
    )


def details(settings: Settings, view: UserView) -> dict[str, Any]:
    """All about a user, as `users show --json` tells it. Names are only ever added."""
    owners = Owners(settings.state_dir)
    return {
        **view.to_dict(),
        "log_dir": _log_dir(settings, view),
        "sandboxes": [
            {
                "service_id": sandbox.service_id,
                "kind": sandbox.kind,
                "created_at": sandbox.created_at,
                "looked_after": owners.alive(sandbox.owner),
            }
            for sandbox in view.sandboxes
        ],
    }


def show_user(settings: Settings, view: UserView) -> None:
    """Write all about a user, for people."""
    row = view.row
    owners = Owners(settings.state_dir)
    pairs = [
        ("user", row.saas_id),
        ("login", row.username + " (a name only)" * row.virtual),
        ("uid, gid", f"{row.uid}, {row.gid}"),
        ("home", str(row.home)),
        ("logs", _log_dir(settings, view)),
        ("created", time_of(row.created_at)),
        ("status", view.status),
        ("tier", (view.standing.tier or "-") + ", blocked" * view.standing.blocked),
    ]
    for sandbox in view.sandboxes:
        alone = "" if owners.alive(sandbox.owner) else ", which nobody looks after"
        pairs.append((sandbox.kind, f"{sandbox.service_id}, since {time_of(sandbox.created_at)}{alone}"))
    show_pairs(pairs)


def show_stats(counted: UserStats) -> None:
    """Write what a user takes of the disk, for people."""
    usage = counted.usage
    size, entries = f"{size_of(usage.bytes)} ({usage.bytes} bytes)", f"{usage.entries} files, folders and links"
    if usage.disk_max is not None:
        size += f", of {size_of(usage.disk_max)}"
    if usage.inodes_max is not None:
        entries += f", of {usage.inodes_max}"
    by = "the kernel, on the whole file system" if usage.counted == "quota" else "the tenant, in its home"
    limits = "the kernel holds the tenant to its limits" if usage.enforced else "no limit is enforced"
    show_pairs(
        [
            ("user", counted.user.saas_user_id),
            ("login", counted.user.linux_username),
            ("size", size),
            ("entries", entries),
            ("sandboxes", f"{usage.sandboxes} directories of services"),
            ("counted by", f"{by}; {limits}"),
        ]
    )


def numbers(done: Exported | Imported) -> dict[str, Any]:
    """What an archive and its home hold, as `--json` tells it."""
    return {
        "entries": done.entries,
        "files": done.files,
        "bytes": done.bytes,
        "left_out": [item._asdict() for item in done.left_out],
        "left_out_count": done.left_out_count,
    }


def count(done: Exported | Imported) -> str:
    """What an archive and its home hold, for people."""
    return f"{done.entries} entries, {done.files} of them files, {size_of(done.bytes)}"


def tell_left_out(done: Exported | Imported) -> None:
    """Say what an archive, or the home that was made of it, lacks."""
    named = done.left_out[:_SHOWN_LEFT_OUT]
    for item in named:
        say(f"left out ({one_line(item.reason)}): {one_line(item.path)}")
    if (more := done.left_out_count - len(named)) > 0:
        say(f"left out: {more} more")


def _log_dir(settings: Settings, view: UserView) -> str:
    return str(LogPaths(settings.log_dir, settings.run_dir, view.row.key).tenant_dir)
