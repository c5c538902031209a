"""`pactown-runner users`: the tenants themselves, their data in and out, and their end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import user_tier
from .asking import Ask
from .human import size_of
from .messages import Ended, errors_told, say, typed, write_json
from .options import Config, Json, ServerInstead, User, UsersBase, load_settings
from .visible import one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..config import Settings
    from ..models import IsolatedUser
    from .user_views import UserView

__all__ = ["register"]

_LIST_EPILOG = """\
[bold]--json[/bold] writes {"users": [...], "count": N}. Each user has saas_user_id, linux_username, linux_uid,
linux_gid, home_dir, created_at (seconds since the epoch), status (ready; creating and deleting, which were begun and
not ended; kept, which was deleted but for its home), tier (a name or null), blocked, and running (how many sandboxes
are meant to be alive). Further names may be added; these stay. A server (--server) lists only users who are whole, and
not the last four.

[bold]Example[/bold]: pactown-runner users list --json | jq -r '.users[] | select(.blocked) | .saas_user_id'"""

_SHOW_EPILOG = """\
[bold]--json[/bold] writes what `users list` tells of the user, and log_dir, and sandboxes: a list of service_id, kind
(service or run), created_at, and looked_after, which is false where the process that did has died. With --server the
last two, log_dir, status and running are left out."""

_STATS_EPILOG = """\
[bold]--json[/bold] writes user (saas_user_id, linux_username), sandbox_count, total_size_mb (MiB), and usage: bytes,
entries, sandboxes, counted (quota: by the kernel, all that the tenant has on the file system; walk: by the tenant, in
its home), enforced, disk_max and inodes_max (null for no limit), and walked_at. Further names may be added. With
--server it is what the API answers."""

_EXPORT_EPILOG = """\
[bold]Examples[/bold]

pactown-runner users export alice /backup/alice.tar.gz

pactown-runner users export alice - | ssh other-host pactown-runner users import alice -"""

_IMPORT_EPILOG = """\
[bold]Examples[/bold]

pactown-runner users import alice /backup/alice.tar.gz

pactown-runner users import alice-2 --made-for alice /backup/alice.tar.gz"""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    users = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
    users.command("list", epilog=_LIST_EPILOG)(list_)
    users.command("create")(create)
    users.command("show", epilog=_SHOW_EPILOG)(show)
    users.command("stats", epilog=_STATS_EPILOG)(stats)
    users.command("export", epilog=_EXPORT_EPILOG)(export)
    users.command("import", epilog=_IMPORT_EPILOG)(import_)
    user_tier.register(users)
    users.command("delete")(delete)
    app.add_typer(
        users, name="users", help="The tenants: who there is, what they use, their data in and out, and their end."
    )


def list_(
    as_json: Json = False, server: ServerInstead = None, users_base: UsersBase = None, config: Config = None
) -> None:
    """List all tenants, in the order in which they were first made."""
    if server is not None:
        from . import users_asked  # noqa: PLC0415

        users_asked.list_(Ask(server, users_base, config, as_json))
        return
    with errors_told(1, as_json=as_json):
        from .user_views import list_users, show_users  # noqa: PLC0415

        views = list_users(load_settings(users_base, config))
        if as_json:
            write_json({"users": [view.to_dict() for view in views], "count": len(views)})
        elif views:
            show_users(views)
        else:
            say("there are no users; one is made at its first use, or by: pactown-runner users create ID")


def create(
    user: User,
    *,
    as_json: Json = False,
    server: ServerInstead = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Make a tenant: an account, as root, and a home. That there is one of this id already is no error.

    An id whose user was deleted gets the same login and uid again, and the home if that was kept.
    """
    if server is not None:
        from . import users_asked  # noqa: PLC0415

        users_asked.create(Ask(server, users_base, config, as_json), user)
        return
    with errors_told(1, as_json=as_json):
        from .user_views import find_user, show_user  # noqa: PLC0415
        from .user_work import make  # noqa: PLC0415

        settings = load_settings(users_base, config)
        made, is_new = make(settings, user)
        if as_json:
            write_json({**made.to_dict(), "created": is_new})
            return
        show_user(settings, find_user(settings, user))
        if is_new:
            say(f"made; to run something: {typed('run', '--user', user, '--', 'id')}")
        else:
            say("it was there already")


def show(
    user: User,
    *,
    as_json: Json = False,
    server: ServerInstead = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Show who a tenant is on this host, and what is meant to be alive of it."""
    if server is not None:
        from . import users_asked  # noqa: PLC0415

        users_asked.show(Ask(server, users_base, config, as_json), user)
        return
    with errors_told(1, as_json=as_json):
        from .user_views import details, find_user, show_user  # noqa: PLC0415

        settings = load_settings(users_base, config)
        view = find_user(settings, user)
        if as_json:
            write_json(details(settings, view))
            return
        show_user(settings, view)
        if view.status != "ready":
            say(_advice(view))


def stats(
    user: User,
    *,
    as_json: Json = False,
    server: ServerInstead = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Count what a tenant takes of the disk, and say what it may take.

    Where the file system has user quotas the kernel counts and holds the tenant to its limits. Elsewhere the tenant's
    home is counted as the tenant, and what comes of it is the tenant's word.
    """
    if server is not None:
        from . import users_asked  # noqa: PLC0415

        users_asked.stats(Ask(server, users_base, config, as_json), user)
        return
    with errors_told(1, as_json=as_json):
        settings = load_settings(users_base, config)
        found = _ready(settings, user)
        from .user_views import show_stats  # noqa: PLC0415
        from .user_work import stats as count_usage  # noqa: PLC0415

        counted = count_usage(settings, found)
        if as_json:
            write_json(counted.to_dict(detail=True))
        else:
            show_stats(counted)


def export(
    user: User,
    target: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="The archive to write, a `tar.gz`; `-` for standard output. It appears whole or not at all, also in "
            "the place of an older one.",
            show_default=False,
            allow_dash=True,
        ),
    ],
    *,
    stopped: Annotated[
        bool,
        typer.Option(
            "--stopped", help="Refuse if anything of the tenant runs. Without it, what runs stands still meanwhile."
        ),
    ] = False,
    as_json: Json = False,
    server: ServerInstead = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Write a tenant's home into an archive, for `users import` on this or another host.

    Nothing of the tenant starts meanwhile; with `-` that is until all has been read. What was written to standard
    output is an archive only if this command ends with 0. Left out, and named, are FIFOs, sockets, devices, and
    virtual environments that sandboxes have for their requirements: those are made anew where they are needed.
    """
    to_stdout = target == Path("-")
    if to_stdout and as_json:
        raise typer.BadParameter("standard output is the archive's; name a file", param_hint="--json")
    if to_stdout and sys.stdout.isatty():
        raise typer.BadParameter("this would go to your terminal; name a file, or pipe it on", param_hint="FILE")
    if server is not None:
        if stopped:
            raise typer.BadParameter("a server has what runs stand still", param_hint="--stopped")
        from . import users_asked  # noqa: PLC0415

        users_asked.export(Ask(server, users_base, config, as_json), user, None if to_stdout else target)
        return
    with errors_told(1, as_json=as_json):
        settings = load_settings(users_base, config)
        found = _ready(settings, user)
        from .user_views import count, numbers, tell_left_out  # noqa: PLC0415
        from .user_work import export as write  # noqa: PLC0415

        done = write(settings, found, None if to_stdout else target, "stopped" if stopped else "frozen")
        if as_json:
            write_json({"path": str(target.absolute()), "archive_bytes": done.archive_bytes, **numbers(done)})
            return
        tell_left_out(done)
        what = f"exported {user!r}: {count(done)}, {size_of(done.archive_bytes)} packed"
        if to_stdout:
            say(what)
        else:
            say(f"{what}, in {target}")
            say(f"to have it on another host, copy it there, and: {typed('users', 'import', user, str(target))}")


def import_(
    user: User,
    archive: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="What `users export` wrote, or a `tar.gz` of a folder pactown_...; `-` for standard input.",
            show_default=False,
            allow_dash=True,
        ),
    ],
    *,
    made_for: Annotated[
        str | None,
        typer.Option(
            "--made-for", metavar="ID", help="The id that the archive was made for, if another.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
    server: ServerInstead = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Replace a tenant's home by what an archive holds, wholly or not at all. The tenant is made if there is none.

    What was in the home is gone then. Nothing of the tenant may run, nor does anything start meanwhile. All that the
    archive holds is unpacked with the tenant's uid, becomes the tenant's, and is compared with the archive's manifest.
    """
    from_stdin = archive == Path("-")
    if from_stdin and sys.stdin.isatty():
        raise typer.BadParameter("standard input is your terminal; name a file, or pipe one in", param_hint="FILE")
    if server is not None:
        from . import users_asked  # noqa: PLC0415

        users_asked.import_(Ask(server, users_base, config, as_json), user, None if from_stdin else archive, made_for)
        return
    with errors_told(1, as_json=as_json):
        from .user_views import count, numbers, tell_left_out  # noqa: PLC0415
        from .user_work import import_ as read  # noqa: PLC0415

        settings = load_settings(users_base, config)
        done, is_new = read(settings, user, None if from_stdin else archive, made_for)
        if as_json:
            write_json({"user_id": user, "created": is_new, "verified": done.verified, **numbers(done)})
            return
        tell_left_out(done)
        verified = "all of it as its manifest says" if done.verified else "unverified: the archive has no manifest"
        say(f"imported {user!r}: {count(done)}, {verified}")


def delete(
    user: User,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    keep_home: Annotated[
        bool, typer.Option("--keep-home", help="Its home becomes root's, until the tenant is made again.")
    ] = False,
    keep_logs: Annotated[bool, typer.Option("--keep-logs", help="Its logs stay where they are.")] = False,
    as_json: Json = False,
    server: ServerInstead = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Delete a tenant, with all that carries its uid on this host: processes, files, home, logs, account.

    Its services have to be stopped before. Key, login and uid are never given to somebody else, and are this id's
    again if it comes back. When this is interrupted or fails, nothing starts for the tenant any more, and the same
    command finishes it.
    """
    if server is not None:
        from . import users_asked  # noqa: PLC0415

        with errors_told(1, as_json=as_json):
            if not yes:
                _ask(f"Have {server} delete {one_line(user)}, and all that is its", keep_home, keep_logs, as_json)
        users_asked.delete(
            Ask(server, users_base, config, as_json), user, delete_home=not keep_home, delete_logs=not keep_logs
        )
        return
    with errors_told(1, as_json=as_json):
        settings = load_settings(users_base, config)
        from .user_views import find_user  # noqa: PLC0415

        view = find_user(settings, user)
        if view.status == "kept":
            raise _not_there(view, "to delete that as well, first")
        if not yes:
            _confirm(settings, view, keep_home=keep_home, keep_logs=keep_logs, as_json=as_json)
        _delete(settings, user, delete_home=not keep_home, delete_logs=not keep_logs)
        if as_json:
            write_json({"success": True, "user_id": user, "home_kept": keep_home, "logs_kept": keep_logs})
            return
        say(f"deleted {user!r}: login {view.row.username}, uid {view.row.uid}")
        if keep_home:
            say(f"its home is kept in {view.row.home}; to have it again: {typed('users', 'create', user)}")


# ---- Help


def _ready(settings: Settings, user_id: str) -> IsolatedUser:
    """The user of this id, who is whole."""
    from ..errors import StateError  # noqa: PLC0415
    from .user_views import find_user  # noqa: PLC0415

    view = find_user(settings, user_id)
    match view.status:
        case "ready":
            return view.row.user()
        case "kept":
            raise _not_there(view)
    raise StateError(f"user {user_id!r} is {view.status}", remedy=_advice(view))


def _not_there(view: UserView, wish: str = "to have that again") -> Exception:
    from ..errors import NotFoundError  # noqa: PLC0415

    user_id = view.row.saas_id
    return NotFoundError(
        f"user {user_id!r} was deleted, and its home was kept", remedy=f"{wish}: {typed('users', 'create', user_id)}"
    )


def _advice(view: UserView) -> str:
    """What to do about a user who is not whole."""
    user_id = view.row.saas_id
    match view.status:
        case "creating":
            return f"to finish what was interrupted: {typed('users', 'create', user_id)}"
        case "deleting":
            return f"to finish what was interrupted: {typed('users', 'delete', user_id)}"
    return f"to have the home again: {typed('users', 'create', user_id)}"


def _confirm(settings: Settings, view: UserView, *, keep_home: bool, keep_logs: bool, as_json: bool) -> None:
    from .user_views import show_user  # noqa: PLC0415

    def show_first() -> None:
        show_user(settings, view)

    question = f"Delete {one_line(view.row.saas_id)} and all that is its"
    _ask(question, keep_home, keep_logs, as_json, show_first)


def _ask(
    question: str, keep_home: bool, keep_logs: bool, as_json: bool, first: Callable[[], None] = lambda: None
) -> None:
    from ..errors import StateError  # noqa: PLC0415

    if as_json or not sys.stdin.isatty():
        raise StateError("nobody is there to be asked", remedy="give --yes")
    first()
    kept = [name for name, is_kept in (("the home", keep_home), ("the logs", keep_logs)) if is_kept]
    but = f", but keep {' and '.join(kept)}" if kept else ""
    try:
        agreed = typer.confirm(f"{question}{but}?")
    except typer.Abort:
        agreed = False
    if not agreed:
        say("nothing was deleted")
        raise Ended(1)


def _delete(settings: Settings, user_id: str, *, delete_home: bool, delete_logs: bool) -> None:
    from ..errors import NotFoundError  # noqa: PLC0415
    from .user_work import delete as remove  # noqa: PLC0415

    try:
        remove(settings, user_id, delete_home=delete_home, delete_logs=delete_logs)
    except Ended:
        _tell_interrupted(settings, user_id)
        raise
    except NotFoundError:
        pass  # somebody else, who finished what was begun before, was quicker


def _tell_interrupted(settings: Settings, user_id: str) -> None:
    from ..errors import NotFoundError  # noqa: PLC0415
    from .user_views import find_user  # noqa: PLC0415

    try:
        view = find_user(settings, user_id)
    except NotFoundError:
        say("interrupted when all was done")
        return
    say("interrupted; nothing was deleted" if view.status == "ready" else f"interrupted; {_advice(view)}")
