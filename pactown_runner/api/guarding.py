"""Routes that let nobody through who may not pass, and bodies that are no larger or slower than they may be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import Message, Receive, Scope, Send

from .access import Access, Caller
from .paths import decoded
from .problems import ProblemError

__all__ = ["GuardedRoute"]

_LEAST_RATE = 16 << 10
"""Bytes of a body a second, while it is waited for: who sends one at a time would keep what takes them for hours."""


class GuardedRoute(APIRoute):
    """A route of the table.

    Args:
        access: what a caller needs.
        max_body: the most bytes of a request's body.
        timeout: seconds between two pieces of a body, and for each piece of the answer to be taken. In twice as many a
            body has to come at the least rate.
    """

    def __init__(
        self, path: str, endpoint: Callable[..., Any], *, access: Access, max_body: int, timeout: float, **options: Any
    ) -> None:
        super().__init__(path, endpoint, **options)
        self._access = access
        self._parameters = frozenset(field.alias for field in self.dependant.query_params)
        self._max_body = max_body
        self._timeout = timeout

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match against the canonical path, and decode what it holds; see `paths`."""
        match, child_scope = super().matches(scope)
        if match is not Match.NONE:
            found = child_scope["path_params"]
            child_scope["path_params"] = {name: decoded(value) for name, value in found.items()}
        return match, child_scope

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request whose path is this route's."""
        if scope["method"] in (self.methods or ()):
            caller = scope["pactown.caller"]
            assert isinstance(caller, Caller)
            if (user_id := scope["path_params"].get("user_id")) is not None:
                caller.must_reach(user_id)
            caller.must(self._access)
            self._check_query(scope["query_string"])
            begun = asyncio.Event()
            receive, send = self._bounded(scope, receive, begun), self._patient(scope, send, begun)
        await super().handle(scope, receive, send)

    def _check_query(self, query: bytes) -> None:
        """Refuse what is not known: who writes `?delete-home=false` does not get what it says."""
        given = [name for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True)]
        faults = {name: "there is no such parameter" for name in given if name not in self._parameters}
        faults |= {name: "it is there more than once" for name in self._parameters if given.count(name) > 1}
        if faults:
            places = [{"where": f"query.{name}", "message": message} for name, message in faults.items()]
            detail = "; ".join(f"{place['where']}: {place['message']}" for place in places[:3])
            raise ProblemError(422, "bad-request", f"the request is malformed: {detail}", errors=places[:32])

    def _bounded(self, scope: Scope, receive: Receive, begun: asyncio.Event) -> Receive:
        """A body that is refused when it is too large, or does not come; of no account once the answer has begun."""
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > self._max_body:
            raise self._too_large(endless=False)
        taken, over = 0, False
        pace = _Pace(2 * self._timeout)

        async def bounded() -> Message:
            nonlocal taken, over
            if over or begun.is_set():
                # What comes now is that the caller goes away, whenever that is.
                return await receive()
            try:
                async with asyncio.timeout(self._timeout):
                    message = await pace.keep(receive)
            except TimeoutError:
                if begun.is_set():
                    return await receive()
                raise ProblemError(
                    408, "too-slow", "the request's body did not come in time", headers={"Connection": "close"}
                ) from None
            taken += len(message.get("body", b""))
            over = not message.get("more_body", False)
            if taken > self._max_body and not begun.is_set():
                raise self._too_large(endless=True)
            return message

        return bounded

    def _too_large(self, *, endless: bool) -> ProblemError:
        # Who still sends when the connection is closed does not see the answer: what comes to an end is let come, for
        # as long as `listening` waits for the next head.
        headers = {"Connection": "close"} if endless else None
        return ProblemError(
            413, "too-large", f"the request's body has more than {self._max_body} bytes", headers=headers
        )

    def _patient(self, scope: Scope, send: Send, begun: asyncio.Event) -> Send:
        """Send to a caller who takes it, and hang up on one who does not."""
        hang_up = scope.get("state", {}).get("hang_up")

        async def patient(message: Message) -> None:
            begun.set()
            try:
                async with asyncio.timeout(self._timeout):
                    await send(message)
            except TimeoutError:
                if hang_up is not None:
                    hang_up()
                raise

        return patient


class _Pace:
    """How fast a body comes, while it is waited for.

    Args:
        seconds: of waiting, over which it is looked at.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._waited = 0.0
        self._taken = 0

    async def keep(self, receive: Receive) -> Message:
        """The next piece.

        Raises:
            TimeoutError: they come too slowly.
        """
        loop = asyncio.get_running_loop()
        before = loop.time()
        message = await receive()
        self._waited += loop.time() - before
        self._taken += len(message.get("body", b""))
        if self._waited >= self._seconds:
            if self._taken < self._waited * _LEAST_RATE and message.get("more_body", False):
                raise TimeoutError
            self._waited, self._taken = 0.0, 0
        return message
