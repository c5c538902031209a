"""`pactown-runner purge`: remove all that the runner ever made here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .messages import Ended, errors_told, say, write_json
from .options import Config, Json, UsersBase, load_settings

if TYPE_CHECKING:
    from ..purge import Plan, Purge

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(purge)


def purge(
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also while a supervisor uses the state. Its sandboxes are killed under it.")
    ] = False,
    as_json: Json = False,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Remove all that the runner ever made here for these settings: accounts, homes, logs, cgroups, registry.

    It shows what it would remove, and asks. Homes are emptied by their tenants' own uids. What cannot be removed is
    named, and the exit code is 1 then; nothing is forgotten, and the command can be repeated.
    """
    with errors_told(1, as_json=as_json):
        from ..purge import Purge  # noqa: PLC0415

        with Purge(load_settings(users_base, config)) as work:
            plan = work.plan()
            if not as_json:
                _show(plan, work)
            if not plan.empty and (force or not plan.owners):
                _confirm(yes=yes, as_json=as_json)
            work.carry_out(plan, force=force)
        _report(work, as_json=as_json)
        raise Ended(1 if work.failed else 0)


def _show(plan: Plan, work: Purge) -> None:
    if plan.empty:
        print("nothing to remove")
        return
    print("This removes, with all that is in it:")
    for name in plan.running:
        print(f"  running sandbox  {name}")
    for row in plan.users:
        print(f"  user             {row.saas_id!r}: login {row.username}, uid {row.uid}, home {row.home}")
    for path in plan.directories:
        print(f"  directory        {path}")
    print(f"  cgroups          {work.settings.cgroup_slice}", flush=True)


def _confirm(*, yes: bool, as_json: bool) -> None:
    from ..errors import StateError  # noqa: PLC0415

    if yes:
        return
    nobody = StateError("nobody is there to be asked", remedy="give --yes")
    if as_json:
        raise nobody
    try:
        agreed = typer.confirm("Remove all of it?")
    except typer.Abort:  # end of file
        raise nobody from None
    if not agreed:
        say("nothing was removed")
        raise Ended(1)


def _report(work: Purge, *, as_json: bool) -> None:
    if as_json:
        failed = [{"what": what, "why": why} for what, why in work.failed.items()]
        write_json({"removed": work.removed, "failed": failed})
        return
    for what in work.removed:
        print(f"removed  {what}")
    for what, why in work.failed.items():
        say(f"error: cannot remove {what}: {why}")
