"""`pactown-runner serve`: look after services, in the foreground or as a unit of systemd."""

from __future__ import annotations

import logging
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .messages import errors_told, say
from .options import Config, UsersBase
from .visible import visible

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, MutableMapping

    from ..config import Settings
    from ..supervisor import Supervisor

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="[bold]Signals[/bold]: SIGTERM and control-C end it, once more at once. Exit code 0 after an end in "
        "order.\n\n[bold]As a unit[/bold]: deploy/pactown-runner.service"
    )(serve)


def serve(
    *,
    on_exit: Annotated[
        str | None,
        typer.Option(
            "--on-exit",
            metavar="stop|leave",
            help="What becomes of services when this command ends: they are stopped, or go on and the next one takes "
            "them over.",
            show_default=False,
        ),
    ] = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Look after services until asked to end: adopt those that run, bring back those that are to run always.

    Logs what happens to standard error: for people on a terminal, elsewhere as lines of JSON.
    """
    with errors_told(1, as_json=False):
        import asyncio  # noqa: PLC0415
        import faulthandler  # noqa: PLC0415

        from ..config import Settings  # noqa: PLC0415
        from ..serving import serve as serve_until_asked  # noqa: PLC0415

        on_terminal = sys.stderr.isatty()
        settings = Settings.load(
            config=config, users_base=users_base.absolute() if users_base else None, on_exit=on_exit
        )
        _log_to_stderr(on_terminal=on_terminal)
        # A watchdog that finds us stuck ends us by SIGABRT: let it be seen where.
        faulthandler.enable()
        asyncio.run(serve_until_asked(settings, beside=partial(_with_api, on_terminal=on_terminal)))


@asynccontextmanager
async def _with_api(supervisor: Supervisor, *, on_terminal: bool) -> AsyncGenerator[None, None]:
    """Serve the API as well, if its libraries are there, and say for people what is served."""
    async with AsyncExitStack() as held:
        try:
            from ..api import served  # noqa: PLC0415
        except ModuleNotFoundError as error:
            if supervisor.settings.api_listen is not None:
                raise ConfigError(
                    f"the API cannot be served: {error}", remedy="pip install 'pactown-runner[api]'"
                ) from error
            api = f"not served: {error.name} is not installed (pip install 'pactown-runner[api]')"
        else:
            where = await held.enter_async_context(served(supervisor))
            tcp = [] if where.address is None else [f"http://{where.address[0]}:{where.address[1]}"]
            api = ", ".join(([] if where.socket is None else [str(where.socket)]) + tcp)
        if on_terminal:
            _show(supervisor.settings, api)
        else:
            logging.getLogger(__name__).info("API: %s", api)
        yield


def _show(settings: Settings, api: str) -> None:
    leaves = settings.on_exit == "leave"
    for name, value in (
        ("homes", settings.users_base),
        ("state", settings.state_dir),
        ("logs", settings.log_dir),
        ("API", api),
        (
            "mode",
            "root: each tenant has an account of its own" if settings.root_mode else "no root: all tenants are you",
        ),
        ("control-C", "leaves services running" if leaves else "ends all sandboxes, once more at once"),
    ):
        say(f"  {name:<10} {value}")


def _log_to_stderr(*, on_terminal: bool) -> None:
    import structlog  # noqa: PLC0415

    first: list[structlog.types.Processor] = [
        structlog.stdlib.ExtraAdder(("user_id", "service_id", "run_id", "details")),
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=not on_terminal),
    ]
    last: list[structlog.types.Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if on_terminal:
        # Not the formatter that shows the values of variables: among them are secrets of tenants.
        plain = structlog.dev.plain_traceback
        last += [_made_visible, structlog.dev.ConsoleRenderer(exception_formatter=plain)]
    else:
        first.append(structlog.stdlib.add_logger_name)
        last += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    handler = logging.StreamHandler()
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=first, processors=last))
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)


def _made_visible(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """What tenants have a hand in must not drive the operator's terminal."""
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = visible(value.encode("utf-8", "backslashreplace")).decode()
    return event
