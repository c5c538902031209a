"""The program's output on its way to our own standard output and error.

Our descriptors may be anything, and shared with others, so they are left in the mode that they are in: a thread
does what may block, and the loop that empties the sandbox's pipes never waits for a slow terminal.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import os
import queue
import select
import threading
from collections.abc import AsyncIterator, Callable

from ..models import LogRecord, Stream
from .visible import visible

__all__ = ["Output", "Shown", "relay"]

AHEAD_BYTES = 1 << 20
"""What may wait for a slow reader in our memory. The rest waits in the log."""

Part = tuple[int, bytes]


class Output:
    """Writes to descriptors without blocking the loop, in the order in which it is asked to.

    The thread is a daemon: one that is stuck in a write to a reader who never reads does not keep us from ending.

    Args:
        targets: the descriptor for each stream.
        raw: let control characters through to terminals.
    """

    def __init__(self, targets: dict[Stream, int], *, raw: bool) -> None:
        self._targets = targets
        self._visible = {stream for stream, fd in targets.items() if not raw and os.isatty(fd)}
        self._jobs: queue.SimpleQueue[tuple[list[Part], Callable[[OSError | None], None]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def part(self, record: LogRecord) -> Part:
        """Where a record goes, and as what."""
        data = record.data
        return self._targets[record.stream], visible(data) if record.stream in self._visible else data

    async def write(self, parts: list[Part]) -> None:
        """Write them all.

        Raises:
            OSError: a descriptor cannot be written; `BrokenPipeError` if nobody reads any more.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="pactown-output", daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def finish(error: OSError | None) -> None:
            if done.done():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        def tell(error: OSError | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits any more
                loop.call_soon_threadsafe(finish, error)

        self._jobs.put((parts, tell))
        await done

    def _work(self) -> None:
        while True:
            parts, tell = self._jobs.get()
            try:
                for fd, data in parts:
                    _write_all(fd, data)
            except OSError as error:
                tell(error)
            else:
                tell(None)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            # Whoever shares the open file with us may have made it non-blocking.
            poller = select.poll()
            poller.register(fd, select.POLLOUT)
            poller.poll()


async def relay(records: AsyncIterator[LogRecord], output: Output, *, expect: int | None = None) -> int:
    """Write all records, many at a time where they come fast; return how many the log's cap had dropped before.

    Args:
        expect: the number of the first record, if that is known.

    Raises:
        OSError: see `Output.write`.
        LogError: the log cannot be read.
    """
    waiting: list[Part] = []
    size = dropped = 0
    filled, emptied = asyncio.Event(), asyncio.Event()

    async def collect() -> None:
        nonlocal size, dropped, expect
        try:
            async for record in records:
                # Numbers have no gaps, but where a reader was slower than a flood that filled the log.
                dropped += record.seq - expect if expect is not None else 0
                expect = record.seq + 1
                fd, data = output.part(record)
                waiting.append((fd, data))
                size += len(data)
                filled.set()
                while size > AHEAD_BYTES:
                    emptied.clear()
                    await emptied.wait()
        finally:
            filled.set()

    collecting = asyncio.create_task(collect())
    try:
        while not collecting.done() or waiting:
            await filled.wait()
            filled.clear()
            parts, waiting, size = waiting, [], 0
            emptied.set()
            if parts:
                await output.write(_joined(parts))
    finally:
        collecting.cancel()
        await asyncio.wait([collecting])
    collecting.result()
    return dropped


def _joined(parts: list[Part]) -> list[Part]:
    """Fewer and larger parts: neighbours for the same descriptor become one."""
    joined: list[tuple[int, list[bytes]]] = []
    for fd, data in parts:
        if joined and joined[-1][0] == fd:
            joined[-1][1].append(data)
        else:
            joined.append((fd, [data]))
    return [(fd, b"".join(pieces)) for fd, pieces in joined]


class Shown:
    """Pieces on their way to a descriptor: to a terminal no control characters, unless they are wanted.

    Args:
        fd: the descriptor.
        raw: let control characters through.
    """

    def __init__(self, fd: int, *, raw: bool) -> None:
        passes = raw or not os.isatty(fd)
        # A piece may end within a character.
        self._decoder = None if passes else codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def __call__(self, data: bytes, *, final: bool = False) -> bytes:
        """What of this, and of what was kept back of the piece before it, is to be written."""
        return data if self._decoder is None else visible(self._decoder.decode(data, final).encode())
