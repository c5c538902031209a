"""What all commands do that ask a running server: one question, and what came of it told."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from .messages import FAILED, errors_told, typed

if TYPE_CHECKING:
    from ..client import Client

__all__ = ["EXIT_CODES", "Ask", "with_remedies"]

T = TypeVar("T")

EXIT_CODES = """\
[bold]Exit code[/bold]: 0; 1 if it could not be done, or no server answers; 2 for words that are not understood; 130 and
143 after control-C and SIGTERM; 141 if nobody reads the output any more."""


@contextlib.contextmanager
def with_remedies() -> Iterator[None]:
    """Say for people what a server, whose callers are programs, need not: what to type next."""
    from ..errors import AlreadyRunningError, NotFoundError  # noqa: PLC0415

    try:
        yield
    except (AlreadyRunningError, NotFoundError) as error:
        raise type(error)(error.message, remedy=error.remedy or f"see what runs: {typed('ps')}") from error


class Ask(NamedTuple):
    """The options of a command that asks a server: see `connecting.asked`."""

    server: str | None
    users_base: Path | None
    config: Path | None
    as_json: bool
    failed: int = FAILED
    """The exit code of a failure."""

    def then(self, work: Callable[[Client], Awaitable[T]], tell: Callable[[T], None]) -> None:
        """Do this with a client, and tell what came of it.

        Raises:
            Ended: it failed, which is told, or was interrupted.
        """
        with errors_told(self.failed, as_json=self.as_json), with_remedies():
            from .connecting import asked  # noqa: PLC0415 - httpx takes 70 ms

            tell(asked(self.server, self.users_base, self.config, work))
