"""How a server is reached, on its Unix socket or by TCP, and what can go wrong on the way. Needs httpx."""

from __future__ import annotations

import json
import os
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Generator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypedDict, Unpack

import httpcore
import httpx

from ..errors import ConfigError
from .access import who_may_use
from .answers import understood
from .errors import (
    ClientError,
    ConnectionLostError,
    ForbiddenError,
    TimedOutError,
    UnreachableError,
)
from .problems import error_of_answer

__all__ = ["Connection"]

_LONGEST_ADDRESS = 107
"""Bytes that a Unix socket's address has room for; unix(7)."""
_KEPT = 10
"""Connections that are kept for later use."""
_KEEP_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
"""What lasts has no time-out: a host that is gone is noticed by TCP, after a minute."""


class Options(TypedDict, total=False):
    """How something is asked.

    Attributes:
        params: of the query; what is None is left out.
        body: goes as JSON.
        content: goes as it is.
        size: its bytes, if they are known and it comes in pieces.
        accept: what the answer is to be; JSON by default.
        read: seconds that each piece of the answer may take; None for as long as it takes.
    """

    params: Mapping[str, Any]
    body: Mapping[str, Any]
    content: bytes | AsyncIterable[bytes]
    size: int | None
    accept: str
    read: float | None


class Connection:
    """A server, and the connections to it that are open; each of many calls at once has its own.

    Args:
        address: a socket's path, or `http(s)://host:port`.
        token: the bearer token, by TCP.
        timeout: seconds for a connection to come about, for each piece that is sent, and for answers that do not last.

    Raises:
        ConfigError: the address or token cannot be one.
    """

    def __init__(self, address: Path | str, token: str | None, timeout: float) -> None:
        self.address = address
        self._timeout = timeout
        self._headers = {} if token is None else {"Authorization": f"Bearer {_checked_token(token)}"}
        self._url = "http://localhost" if isinstance(address, Path) else _checked_url(address)
        self._tls = self._url.startswith("https:")
        self._directory: int | None = None
        self._clients: dict[bool, httpx.AsyncClient] = {}

    async def aclose(self) -> None:
        """End all that is under way."""
        async with AsyncExitStack() as closing:
            if self._directory is not None:
                closing.callback(os.close, self._directory)
                self._directory = None
            while self._clients:
                closing.push_async_callback(self._clients.popitem()[1].aclose)

    async def call(self, method: str, path: str, **options: Unpack[Options]) -> Any:
        """Ask, and return the answer's JSON."""
        found = await self.read(method, path, **options)
        with understood():
            return json.loads(found)

    async def read(self, method: str, path: str, **options: Unpack[Options]) -> bytes:
        """Ask, and return the answer as it is."""
        async with self.stream(method, path, **options) as answer:
            with self._told():
                return await answer.aread()

    @asynccontextmanager
    async def stream(self, method: str, path: str, **options: Unpack[Options]) -> AsyncGenerator[httpx.Response, None]:
        """Ask, and read the answer's body piece by piece, with `pieces`."""
        answer = await self.open(method, path, **options)
        try:
            yield answer
        finally:
            await answer.aclose()

    async def open(self, method: str, path: str, **options: Unpack[Options]) -> httpx.Response:
        """Ask, and return the answer whose body is still to come. It is to be closed.

        Args:
            path: escaped.

        Raises:
            RunnerError: what the server refuses, or anything of `errors`.
        """
        content, headers = _body(options)
        params = options.get("params")
        in_pieces = content is not None and not isinstance(content, bytes)
        with self._told():
            request = httpx.Request(
                method,
                self._url + path,
                params=None if params is None else _query(params),
                content=content,
                headers=self._headers | headers,
                extensions={"timeout": httpx.Timeout(self._timeout, read=options.get("read", self._timeout)).as_dict()},
            )
            if in_pieces and not self._tls:
                assert isinstance(request.stream, httpx.AsyncByteStream)
                request.stream = wanted = _Wanted(request.stream)
                request.extensions["trace"] = wanted.trace
            http = self._client(keep=not in_pieces)
            answer = await http.send(request, stream=True)
            if answer.is_success:
                return answer
            try:
                said = await answer.aread()
            finally:
                await answer.aclose()
        raise error_of_answer(answer.status_code, said, answer.headers.get("retry-after"))

    async def pieces(self, answer: httpx.Response) -> AsyncGenerator[bytes, None]:
        """The body of an answer as it comes.

        Raises:
            ClientError: it does not come to its end.
        """
        with self._told():
            async for piece in answer.aiter_bytes():
                yield piece

    def _client(self, *, keep: bool) -> httpx.AsyncClient:
        """What keeps connections that were used for later use, or does not."""
        if keep not in self._clients:
            self._clients[keep] = self._made(keep)
        return self._clients[keep]

    def _made(self, keep: bool) -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(
            # What the host trusts. Without TLS there is nothing to trust, and to read that takes 20 ms.
            verify=ssl.create_default_context() if self._tls else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            uds=self._socket_path(),
            # How many there may be is the server's to say.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=_KEPT if keep else 0),
            socket_options=None if isinstance(self.address, Path) else _KEEP_ALIVE,
        )
        # Nothing in the environment is to lead elsewhere what is meant for this address.
        return httpx.AsyncClient(transport=transport, trust_env=False)

    def _socket_path(self) -> str | None:
        if not isinstance(self.address, Path):
            return None
        if len(os.fsencode(self.address)) <= _LONGEST_ADDRESS:
            return str(self.address)
        if self._directory is None:
            self._directory = os.open(self.address.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._directory}/{self.address.name}"

    # What goes wrong --------------------------------------------------------------------------------------------

    @contextmanager
    def _told(self) -> Generator[None, None, None]:
        """Say in our words what goes wrong on the way."""
        try:
            yield
        except httpx.TimeoutException as error:
            raise self._timed_out(error) from error
        except httpx.ConnectError as error:
            raise self._unreachable(_os_error(error), str(error)) from error
        except OSError as error:
            raise self._unreachable(error, str(error)) from error
        except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
            raise ConnectionLostError(
                f"the connection to {self.address} was lost: {str(error) or type(error).__name__}",
                remedy="see whether the server runs, and what it logged",
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ClientError(f"this cannot be asked of {self.address}: {error}") from error

    def _timed_out(self, error: httpx.TimeoutException) -> ClientError:
        what = "could not be connected to" if isinstance(error, httpx.ConnectTimeout) else "did not answer"
        return TimedOutError(
            f"{self.address} {what} in time ({self._timeout:g} s)", remedy="see whether the server is busy"
        )

    def _unreachable(self, error: OSError | None, text: str) -> ClientError:
        if isinstance(error, PermissionError) and isinstance(self.address, Path):
            return ForbiddenError(f"{self.address} is not for you", remedy=who_may_use(self.address))
        reason = error.strerror if error is not None and error.strerror else text
        return UnreachableError(
            f"no server answers on {self.address}: {reason}", remedy="start one: pactown-runner serve"
        )


class _Wanted(httpx.AsyncByteStream):
    """A body in pieces, of which no more is sent when the server has answered already, as it does to refuse it.

    For a connection that nobody has used before, without TLS, which sends of its own accord.
    """

    def __init__(self, body: AsyncIterable[bytes]) -> None:
        self._body = body
        self._network: httpcore.AsyncNetworkStream | None = None

    async def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Hear of the connection; https://www.encode.io/httpcore/extensions."""
        if event in ("connection.connect_tcp.complete", "connection.connect_unix_socket.complete"):
            self._network = info["return_value"]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._body:
            if self._network is not None and self._network.get_extra_info("is_readable"):
                # httpcore goes on to read the answer, as when the server has hung up after it.
                raise httpcore.WriteError("the server has answered")
            yield piece


def _os_error(error: BaseException | None) -> OSError | None:
    """What the kernel said, below what others made of it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__ or error.__context__
    return None


def _body(options: Options) -> tuple[bytes | AsyncIterable[bytes] | None, dict[str, str]]:
    """What is sent, and the headers that say what it is."""
    headers = {"Accept": options.get("accept", "application/json")}
    if "body" in options:
        # In ASCII: halves of characters are for the server to refuse, with the place where they are.
        return json.dumps(options["body"]).encode(), headers | {"Content-Type": "application/json"}
    if "content" not in options:
        return None, headers
    headers["Content-Type"] = "application/octet-stream"
    if (size := options.get("size")) is not None:
        headers["Content-Length"] = str(size)
    return options["content"], headers


def _query(params: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in params.items()
        if value is not None
    }


def _checked_token(token: str) -> str:
    if not (token.isascii() and token.isprintable()) or not token or " " in token:
        # It is not shown: it may be a good one with a line's end.
        raise ConfigError("this is no token: it is empty, or has a space or what is no printable ASCII")
    return token


def _checked_url(address: str) -> str:
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{address!r} is no address: {error}", remedy=_ADDRESSES) from error
    plain = url.raw_path == b"/" and not url.userinfo and not url.fragment
    if url.scheme not in ("http", "https") or not url.host or not plain:
        raise ConfigError("this is no address of a server", remedy=_ADDRESSES)
    return address.rstrip("/")


_ADDRESSES = "give a socket's path, or http://HOST:PORT"
