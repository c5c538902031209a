"""Sockets, and the HTTP server behind them: uvicorn's, in the event loop that is there, without its signal handlers."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import ipaddress
import logging
import os
import socket
import stat
import time
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..config import Settings
from ..errors import ConfigError, StateError
from ..passage import exposed
from ..supervisor import Supervisor
from .access import Peer, group_id, peer_of
from .app import Application, create_app
from .crowd import Crowd

__all__ = ["STOP_TIMEOUT", "Listening", "listening", "served"]

_log = logging.getLogger(__name__)

STOP_TIMEOUT = 10
"""Seconds that requests have to end in when the server stops. Streams end at once, and say why."""

_KEEP_ALIVE = 30
_BACKLOG = 128
_TICK = 1.0
"""Seconds for which the time that answers bear may be old."""


@dataclass(frozen=True)
class Listening:
    """Where the API is served.

    Attributes:
        socket: the Unix socket; None for none.
        address: host and port by TCP; None for none.
    """

    socket: Path | None
    address: tuple[str, int] | None


def served(supervisor: Supervisor) -> AbstractAsyncContextManager[Listening]:
    """Serve the API of a supervisor, as its settings say; see `listening`, and `serving.serve`."""
    return listening(create_app(supervisor), supervisor.settings)


@asynccontextmanager
async def listening(
    app: Application, settings: Settings, *, stop_timeout: int = STOP_TIMEOUT
) -> AsyncGenerator[Listening, None]:
    """Serve the API for as long as the block lasts.

    Leave it before the supervisor ends: streams are told that the server stops, other requests have `stop_timeout`
    seconds and are then told as well, and nothing new is taken meanwhile.

    Raises:
        ConfigError: there is nowhere to listen, no token for TCP, or the address or socket cannot be had.
        StateError: another server listens on the socket.
    """
    with ExitStack() as held:
        sockets, where = _open_sockets(settings, held)
        server = _Server(app, settings, stop_timeout)
        serving = asyncio.create_task(server.serve(sockets), name="pactown-api")
        try:
            await server.until_started(serving)
            async with app.server.metrics.watching():
                yield where
        finally:
            app.server.stopping.set()
            server.stop()
            await _until_over(serving)


async def _until_over(serving: asyncio.Task[None]) -> None:
    """Wait for its end; who is cancelled meanwhile is so afterwards."""
    cancelled: asyncio.CancelledError | None = None
    while not serving.done():
        try:
            await asyncio.wait([serving])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    serving.result()


# Sockets -----------------------------------------------------------------------------------------------------------


def _open_sockets(settings: Settings, held: ExitStack) -> tuple[list[socket.socket], Listening]:
    sockets = []
    path, address = settings.api_socket_path, None
    if path is not None:
        sockets.append(held.enter_context(_unix_socket(path, settings)))
    if settings.api_listen is not None:
        if not any(time.time() < token.expires for token in settings.tokens):
            raise ConfigError(
                "api_listen needs a token, and there is none that has not expired",
                remedy="add one to [tokens.NAME], see the settings, or leave api_listen out",
            )
        sockets.append(tcp := held.enter_context(_tcp_socket(settings.api_listen)))
        address = tcp.getsockname()[:2]
    if not sockets:
        raise ConfigError("there is nowhere to listen", remedy="set api_socket or api_listen")
    return sockets, Listening(path, address)


@contextmanager
def _unix_socket(path: Path, settings: Settings) -> Generator[socket.socket, None, None]:
    """A socket that only those who may use it can connect to, from its first moment on."""
    gid = None if settings.api_group is None else group_id(settings.api_group)
    with ExitStack() as held:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (reason := exposed(path)) is not None:
                # Another socket there would be told all that callers send.
                raise ConfigError(f"api_socket {path} is not safe: {reason}", remedy="name another place for it")
            if gid is not None and path.parent == settings.run_dir:
                _let_pass(path.parent, gid)
            held.enter_context(_only_one(path))
            sock = held.enter_context(socket.socket(socket.AF_UNIX))
            with contextlib.suppress(FileNotFoundError):
                # Not a file that happens to be there.
                if stat.S_ISSOCK(os.lstat(path).st_mode):
                    path.unlink()
            # The file takes its mode from here, unix_bind in net/unix/af_unix.c; nobody connects before `listen`.
            os.fchmod(sock.fileno(), 0o600)
            _bind(sock, path)
            held.callback(_remove, path, os.lstat(path).st_ino)
            if gid is not None:
                os.chown(path, -1, gid)
                path.chmod(0o660)
        except OSError as error:
            raise ConfigError(f"cannot listen on {path}: {error.strerror}", remedy="see api_socket") from error
        yield sock


def _bind(sock: socket.socket, path: Path) -> None:
    """Bind a socket to a path of any length: an address has room for 107 bytes only."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.bind(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)


def _let_pass(directory: Path, gid: int) -> None:
    """Let a group through a directory that only its owner could enter, without showing what is in it."""
    mode = stat.S_IMODE(directory.stat().st_mode)
    if not mode & stat.S_IXOTH:
        os.chown(directory, -1, gid)
        directory.chmod(mode | stat.S_IXGRP)


@contextmanager
def _only_one(path: Path) -> Generator[None, None, None]:
    """Be the only server of this socket. The lock ends with the process, however that ends."""
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise StateError(f"another server listens on {path}", remedy="stop it, or set another api_socket") from None
    finally:
        os.close(lock)


def _remove(path: Path, inode: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        if os.lstat(path).st_ino == inode:
            path.unlink()


@contextmanager
def _tcp_socket(listen: str) -> Generator[socket.socket, None, None]:
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
            if not ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback:
                _log.warning("the API is served on %s without encryption: tokens can be read on the way", listen)
            yield sock
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno not in _BIND_ERRORS and not isinstance(error, socket.gaierror):
            raise
        raise ConfigError(f"cannot listen on {listen}: {error}", remedy="see api_listen") from error


_BIND_ERRORS = (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES, errno.EINVAL)


# The server --------------------------------------------------------------------------------------------------------


class _Protocol(H11Protocol):
    """uvicorn's protocol, told who is at the other end, that callers may be too many, and heads too slow."""

    seconds: float
    crowds: Mapping[bool, Crowd]
    """Of those on the socket (True), and by TCP."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._late: asyncio.TimerHandle | None = None
        self._untaken = 0
        sock = transport.get_extra_info("socket")
        unix = sock is not None and sock.family == socket.AF_UNIX
        self._crowd = self.crowds[unix]
        self._crowd.enter(self)
        state: dict[str, Any] = {"hang_up": self.hang_up, "admit": partial(self._crowd.admit, self)}
        if unix:
            try:
                state["peer"] = peer_of(sock)
            except OSError:
                # Somebody nobody knows; never taken for one who comes by TCP.
                state["peer"] = Peer(-1, frozenset())
        self.app_state = {**self.app_state, **state}
        self._wait_for_head()

    @property
    def answering(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def busy(self) -> bool:
        """As `Crowd` means it: who does not take the answer could be so for ever."""
        return self.answering and not self.flow.write_paused

    def hang_up(self) -> None:
        """Close the connection at once, whatever is still to be sent."""
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._crowd.leave(self)
        self._dismiss()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait_for_head()

    def _wait_for_head(self) -> None:
        """From here on the next head must come in time, unless a request is being answered.

        So must what the caller has yet to take of an answer that is complete for uvicorn, and waits in the transport's
        buffer; that of the last one, too, when no head can follow.
        """
        if self.answering:
            self._dismiss()
        elif self._late is None:
            self._untaken = self.transport.get_write_buffer_size()
            self._late = self.loop.call_later(self.seconds, self._be_late)

    def _dismiss(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _be_late(self) -> None:
        self._late = None
        if self.transport.get_write_buffer_size() < self._untaken:
            # Slow, but not silent.
            self._wait_for_head()
        else:
            self.hang_up()


class _Server(uvicorn.Server):
    """A server that somebody else starts and stops."""

    def __init__(self, app: Application, settings: Settings, stop_timeout: int) -> None:
        crowds = {unix: Crowd(settings.api_connections) for unix in (True, False)}
        protocol = type("Protocol", (_Protocol,), {"seconds": settings.api_timeout, "crowds": crowds})
        config = Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            # What it warns of are strangers: that they speak no HTTP, or of protocols that there are not.
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=stop_timeout,
            h11_max_incomplete_event_size=settings.api_head_bytes,
        )
        super().__init__(config)
        self._stop = asyncio.Event()
        self._up = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals to the program."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._up.set()

    async def main_loop(self) -> None:
        """Until `stop`: keep the time that answers bear."""
        while not self._stop.is_set():
            await self.on_tick(0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK):
                    await self._stop.wait()

    async def until_started(self, serving: asyncio.Task[None]) -> None:
        """Wait until connections are accepted.

        Raises: what keeps it from that.
        """
        up = asyncio.ensure_future(self._up.wait())
        try:
            await asyncio.wait([up, serving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            up.cancel()
        if serving.done():
            serving.result()

    def stop(self) -> None:
        """Accept nothing more, and let what is under way end."""
        self.should_exit = True
        self._stop.set()
