"""Logs, events and output as they come: server-sent events, which end with a reason. Some can be resumed."""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Self, TypeVar

from ..models import Event, LogRecord, Outcome
from .answers import ExecStatus, bytes_of, event_of, outcome_of, record_of, understood
from .errors import (
    ClientError,
    ConnectionLostError,
    ServerStoppingError,
    TimedOutError,
    UnreachableError,
)
from .problems import error_of

if TYPE_CHECKING:
    import httpx

    from .connection import Connection, Options

__all__ = ["RECONNECT_SECONDS", "EventStream", "ExecOutput", "ExecStream", "LogStream", "Stream", "StreamEnd"]

RECONNECT_SECONDS = 60.0
"""For so long a stream that is to reconnect tries to, before it gives up."""

SILENCE_SECONDS = 60.0
"""A server is never silent for longer than a quarter of that."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_PASSING = (ConnectionLostError, ServerStoppingError, TimedOutError, UnreachableError)
"""What a server that is restarted looks like."""

T = TypeVar("T")


class Message(NamedTuple):
    """One server-sent event.

    Attributes:
        event: its kind.
        data: what it holds.
    """

    event: str
    data: Mapping[str, Any]


async def messages(pieces: AsyncIterable[bytes]) -> AsyncGenerator[Message, None]:
    """The events in a stream that comes in any pieces; one that is cut off is none."""
    rest = b""
    async for piece in pieces:
        *blocks, rest = (rest + piece).split(b"\n\n")
        for block in blocks:
            found = {}
            for line in block.split(b"\n"):
                name, _, value = line.partition(b": ")
                found[name] = value
            if b"data" in found:
                with understood():
                    message = Message(found[b"event"].decode(), json.loads(found[b"data"]))
                yield message


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """Why nothing follows in a stream.

    Attributes:
        reason: `read` (there is no more), `ended` (the service has), `not-running` (what was to be followed does not
            run, and there is no more), `exited` (a further program has).
        outcome: with `ended`, how.
    """

    reason: str
    outcome: Outcome | None = None


class Stream(ABC, AsyncIterator[T], Generic[T]):
    """What a server sends, item by item. It connects when the first is asked for, or the block is entered:

        async with client.events() as events:  # what happens from here on is heard
            async for event in events: ...

    Use it as such a block, or close it, if it is not read to its end. Waiting that is cancelled closes it.

    Attributes:
        end: why nothing follows, once that is so.
    """

    def __init__(self, connection: Connection, path: str, *, reconnect: bool) -> None:
        self._connection = connection
        self._path = path
        self._reconnect = reconnect
        self._answer: httpx.Response | None = None
        self._messages: AsyncGenerator[Message, None] | None = None
        self._connected_before = False
        self._over = False
        self.end: StreamEnd | None = None

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            RunnerError: what the server refuses, or a `ClientError`.
        """
        if self._messages is None and not self._over:
            await self._connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Read no further."""
        self._over = True
        await self._disconnect()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        """The next item.

        Raises:
            StopAsyncIteration: nothing follows, see `end`.
            ServerStoppingError: the server stops, and did not send it all.
            ConnectionLostError, TimedOutError, UnreachableError: the stream broke, and could not be resumed if it was
                to be.
            ClientError: the server ended it for another reason, which is the `code`, such as `token-expired`.
            RunnerError: what the server refuses.
        """
        while not self._over:
            try:
                item = await self._next()
            except _PASSING as error:
                await self._disconnect()
                if not (self._reconnect and self._connected_before):
                    self._over = True
                    raise
                if (item := await self._connect_again(error)) is not None:
                    return item
                continue
            except BaseException:
                await self.aclose()
                raise
            if item is not None:
                return item
            await self.aclose()
        raise StopAsyncIteration

    async def _next(self) -> T | None:
        """The next item; None at the end."""
        if self._messages is None:
            await self._connect()
            assert self._messages is not None
        async for message in self._messages:
            with understood():
                if message.event == "end":
                    self._ended(message.data)
                    return None
                if (item := self._item(message)) is not None:
                    return item
        raise ConnectionLostError("the stream broke off before its end", remedy="see what the server logged")

    async def _connect(self) -> None:
        method, options = self._question()
        options["accept"], options["read"] = "text/event-stream", SILENCE_SECONDS
        self._answer = await self._connection.open(method, self._path, **options)
        self._messages = messages(self._connection.pieces(self._answer))
        self._connected_before = True

    async def _connect_again(self, error: Exception) -> T | None:
        """Come back as soon as there is a server; returns what is to be told of it."""
        pause, deadline = _FIRST_PAUSE, time.monotonic() + RECONNECT_SECONDS
        while True:
            await asyncio.sleep(pause)
            try:
                await self._connect()
                return self._resumed()
            except _PASSING:
                if time.monotonic() >= deadline:
                    self._over = True
                    raise
            except BaseException:
                self._over = True
                raise
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _disconnect(self) -> None:
        stream, self._messages = self._messages, None
        answer, self._answer = self._answer, None
        if stream is not None:
            await stream.aclose()
        if answer is not None:
            await answer.aclose()

    @abstractmethod
    def _question(self) -> tuple[str, Options]:
        """The method, and what goes with it, to ask for it now."""

    @abstractmethod
    def _item(self, message: Message) -> T | None:
        """What a message means; None for nothing."""

    def _ended(self, data: Mapping[str, Any]) -> None:
        """Nothing follows, and this says why. Raises as `__anext__` does."""
        self.end = _end_of(data)

    def _resumed(self) -> T | None:
        """What is to be told of having come back, if anything."""
        return None


class LogStream(Stream[LogRecord]):
    """The lines of a log.

    Attributes:
        cursor: the number of the last record that was read, behind which another stream can begin; None as long as
            there is none.
    """

    def __init__(
        self,
        connection: Connection,
        path: str,
        *,
        follow: bool,
        since: int | None,
        tail: int | None,
        reconnect: bool,
    ) -> None:
        super().__init__(connection, path, reconnect=reconnect)
        self.cursor = since
        self._follow = follow
        self._tail = tail

    def _question(self) -> tuple[str, Options]:
        return "GET", {"params": {"follow": self._follow, "since": self.cursor, "tail": self._tail}}

    def _item(self, message: Message) -> LogRecord:
        record = record_of(message.data)
        # Whoever comes back goes on behind it, and begins no more with the last so many.
        self.cursor, self._tail = record.seq, None
        return record


class EventStream(Stream[Event]):
    """What happens, from the moment on in which it is connected."""

    def __init__(self, connection: Connection, path: str, *, user_id: str | None, reconnect: bool) -> None:
        super().__init__(connection, path, reconnect=reconnect)
        self._user_id = user_id

    def _question(self) -> tuple[str, Options]:
        return "GET", {"params": {"user_id": self._user_id}}

    def _item(self, message: Message) -> Event:
        return event_of(message.data)

    def _resumed(self) -> Event:
        # Nobody knows how many: the server keeps none for those who are not there.
        return Event(kind="missed", ts=time.time(), details={"count": None})


class ExecOutput(NamedTuple):
    """What a program printed.

    Attributes:
        stream: on which of its two outputs.
        data: a piece, which may begin and end anywhere.
    """

    stream: Literal["stdout", "stderr"]
    data: bytes


class ExecStream(Stream[ExecOutput]):
    """What a further program prints, as it prints it. The program is executed when the block is entered, or the first
    piece is asked for; it waits while nobody reads, and is killed when the stream is closed.

    Attributes:
        status: how it ended, once the stream has.
    """

    def __init__(self, connection: Connection, path: str, body: Mapping[str, Any]) -> None:
        super().__init__(connection, path, reconnect=False)
        self._body = body
        self.status: ExecStatus | None = None

    def _question(self) -> tuple[str, Options]:
        return "POST", {"body": self._body}

    def _item(self, message: Message) -> ExecOutput | None:
        match message.event:
            case "stdout" | "stderr" as stream:
                return ExecOutput(stream, bytes_of(message.data.get("text", ""), message.data.get("b64")))
        return None

    def _ended(self, data: Mapping[str, Any]) -> None:
        if data["reason"] != "exited":
            super()._ended(data)
        else:
            self.end, self.status = StreamEnd("exited"), ExecStatus.of(data)


def _end_of(data: Mapping[str, Any]) -> StreamEnd:
    """Why nothing follows.

    Raises:
        RunnerError: there would be more, but for that.
    """
    reason = str(data["reason"])
    match reason:
        case "read" | "ended" | "not-running":
            return StreamEnd(reason, outcome_of(data.get("outcome")))
        case "server-stopping":
            raise ServerStoppingError("the server stops, and with it this stream", remedy="resume it when it is back")
        case "time":
            raise ConnectionLostError(
                "the stream lasted as long as the server lets one", code=reason, remedy="resume it"
            )
        case "token-expired":
            raise ClientError("the token has expired", code=reason, remedy="ask the operator for another one")
        case "failed":
            raise error_of(data["problem"])
    raise ClientError(f"the server ended the stream: {reason}", code=reason)
