"""`pactown-runner logs`: what a service has printed, over all its runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .messages import errors_told
from .options import Config, Raw, UsersBase, load_settings

if TYPE_CHECKING:
    from ..config import Settings

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="[bold]Example[/bold]: pactown-runner logs alice my-api -n 100")(logs)


def logs(
    user: Annotated[str, typer.Argument(metavar="USER", help="The tenant's id.", show_default=False)],
    service: Annotated[str, typer.Argument(metavar="SERVICE", show_default=False)],
    *,
    lines: Annotated[
        int | None,
        typer.Option("-n", "--lines", metavar="N", min=0, help="The last N lines only.", show_default=False),
    ] = None,
    raw: Raw = False,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Show what a service has printed, over all its runs, whether it runs or not.

    What it wrote to standard error comes out on standard error.
    """
    with errors_told(1, as_json=False):
        import asyncio  # noqa: PLC0415

        path = _log_of(load_settings(users_base, config), user, service)
        asyncio.run(_show(path, lines, raw=raw))


def _log_of(settings: Settings, user_id: str, service_id: str) -> str:
    from pathlib import Path  # noqa: PLC0415

    from ..errors import NotFoundError  # noqa: PLC0415
    from ..logs import LogPaths  # noqa: PLC0415
    from ..registry import Registry  # noqa: PLC0415
    from ..specs import check_service_id, check_user_id  # noqa: PLC0415

    check_user_id(user_id)
    check_service_id(service_id)
    registry_path = settings.state_dir / "registry.db"
    row = None
    if registry_path.exists():  # looking must not make one
        with Registry(registry_path) as registry:
            row = registry.user(user_id)
    if row is None:
        raise NotFoundError(f"there is no user {user_id!r} in {settings.state_dir}")
    path = LogPaths(settings.log_dir, settings.run_dir, row.key).log(service_id)
    if not Path(path).exists():
        raise NotFoundError(f"service {service_id!r} of user {user_id!r} has printed nothing yet, or never ran")
    return path


async def _show(path: str, lines: int | None, *, raw: bool) -> None:
    from ..logs import read_log  # noqa: PLC0415
    from .output import Output, relay  # noqa: PLC0415

    await relay(read_log(path, tail=lines), Output({"stdout": 1, "stderr": 2}, raw=raw))
