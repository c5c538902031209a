"""Our ends of a program's standard streams: fed and heard on the event loop, in bounded memory.

What is at the other end is a tenant's. It may keep a pipe open for longer than the program that it was made for, write
without end and without a line break, or read nothing: nothing here waits longer than the program lives, and whoever
looks after the program says when that is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import termios

import anyio
from anyio.abc import ByteReceiveStream

from .errors import StateError

__all__ = ["READ_BYTES", "InputPipe", "OutputPipe", "make_pipe"]

READ_BYTES = 1 << 16
"""What is read in one turn of the loop; as much as a pipe holds as a rule, pipe(7)."""


def make_pipe(uid: int, gid: int) -> tuple[int, int]:
    """Make a pipe that programs of this tenant can also open anew, as `/dev/stdin` and the like; reading end first."""
    ends = os.pipe2(os.O_CLOEXEC)
    try:
        if os.geteuid() == 0:
            os.fchown(ends[0], uid, gid)
    except BaseException:
        os.close(ends[0])
        os.close(ends[1])
        raise
    return ends


class _Pipe:
    """Our end of a pipe, and the task that waits for it. At most one does."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd: int | None = fd
        self._waiting: asyncio.Future[None] | None = None

    async def _ready(self, fd: int, *, to_write: bool) -> None:
        """Wait until it can be used again, or has been closed."""
        loop = asyncio.get_running_loop()
        self._waiting = waiting = loop.create_future()
        (loop.add_writer if to_write else loop.add_reader)(fd, _wake, waiting)
        try:
            await waiting
        finally:
            self._waiting = None
            # Closed meanwhile, its number may be another's.
            if self._fd is not None:
                (loop.remove_writer if to_write else loop.remove_reader)(fd)

    def _close(self) -> None:
        if self._fd is None:
            return
        if self._waiting is not None:
            loop = self._waiting.get_loop()
            loop.remove_writer(self._fd)
            loop.remove_reader(self._fd)
            _wake(self._waiting)
        os.close(self._fd)
        self._fd = None


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


class InputPipe(_Pipe):
    """The writing end of a program's standard input.

    Args:
        fd: the descriptor, from now on its own.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._turn = asyncio.Lock()

    async def send(self, data: bytes) -> None:
        """Write it all, as fast as it is read, and behind what others send meanwhile.

        Raises:
            StateError: it is closed, or nobody reads any more.
        """
        view = memoryview(data)
        async with self._turn:
            while True:
                if self._fd is None:
                    raise StateError("it has no open standard input any more")
                if not view:
                    return
                try:
                    view = view[os.write(self._fd, view) :]
                except BlockingIOError:
                    await self._ready(self._fd, to_write=True)
                except BrokenPipeError as error:
                    raise StateError("the program has closed its standard input") from error

    def close(self) -> None:
        """Give the program end-of-file. Closing twice is harmless."""
        self._close()


class OutputPipe(_Pipe, ByteReceiveStream):
    """The reading end of what a program writes, as a stream of bytes: `async for chunk in stream`, or `receive`.

    Nothing is read ahead: what nobody has read waits in the kernel's pipe, and when that is full the program waits. In
    `anyio.streams` there is what makes lines of it, within a bound.

    Args:
        fd: the descriptor, from now on its own.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._rest = b""
        self._closed = False

    async def receive(self, max_bytes: int = READ_BYTES) -> bytes:
        """Return what there is, at least one byte and at most so many; wait for it if need be.

        Raises:
            anyio.EndOfStream: there is nothing more, and will not be.
            anyio.BusyResourceError: another task waits for it.
            anyio.ClosedResourceError: it has been closed.
        """
        # Whoever reads a flood leaves the others their turn of the loop; and here nothing is lost when cancelled.
        await asyncio.sleep(0)
        while self._fd is not None:
            if self._waiting is not None:
                raise anyio.BusyResourceError("reading from")
            try:
                if data := os.read(self._fd, max_bytes):
                    return data
            except BlockingIOError:
                await self._ready(self._fd, to_write=False)
            else:
                self._close()
        if self._closed:
            raise anyio.ClosedResourceError
        if not self._rest:
            raise anyio.EndOfStream
        data, self._rest = self._rest[:max_bytes], self._rest[max_bytes:]
        return data

    def finish(self) -> None:
        """The program has ended: take what the pipe holds now, and let go of it, whoever else may still write there.

        That is no more than the pipe's size, which a tenant can raise to `/proc/sys/fs/pipe-max-size`, 1 MiB as a rule.
        """
        if self._fd is None:
            return
        parts = []
        left: int = struct.unpack("i", fcntl.ioctl(self._fd, termios.FIONREAD, bytes(4)))[0]
        with contextlib.suppress(OSError):
            while left > 0 and (data := os.read(self._fd, left)):
                parts.append(data)
                left -= len(data)
        self._rest = b"".join(parts)
        self._close()

    async def aclose(self) -> None:
        """Read no more: the program is told by SIGPIPE when it writes again. Closing twice is harmless."""
        self._closed, self._rest = True, b""
        self._close()
        await asyncio.sleep(0)
