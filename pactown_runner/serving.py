"""A supervisor as a process of its own, which looks after services until it is asked to end.

The service manager that started it, if one did, hears when it is ready, that it is alive and when it is ending, and
keeps what must outlive it: `notify`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager

from .config import Settings
from .errors import TreeError
from .events import EventReader
from .notify import DescriptorStore, Notifier, received, watchdog_seconds
from .supervisor import Supervisor

__all__ = ["serve"]

_log = logging.getLogger(__name__)

Beside = Callable[[Supervisor], AbstractAsyncContextManager[object]]

BEAT_SECONDS = 10.0
"""The longest pause between two signs of life. The watchdog may want them sooner."""

PATIENCE_SECONDS = 30.0
"""For how long the manager is asked to wait for the next sign of life while starting or ending takes its time. Graces
are the operator's to choose, so no timeout of a unit would be right for all."""

LAST_EVENTS_SECONDS = 1.0


async def serve(settings: Settings, *, beside: Beside | None = None) -> None:
    """Look after services until SIGTERM or SIGINT, then end or leave them, as `Settings.on_exit` says.

    A second signal lets all grace be over. SIGHUP ends it too if it was started on a terminal, and does nothing
    elsewhere: settings are read once, and restarting with `on_exit="leave"` is how to change them. A signal that was
    ignored when it began stays ignored.

    To be called once in a process, in its main thread: signals and descriptors are the process's.

    Args:
        beside: what goes on meanwhile, such as an API: entered before it is ready, left before sandboxes end.

    Raises:
        RunnerError: it could not begin.
    """
    with contextlib.closing(Notifier.from_environment()) as notifier:
        await _Serving(settings, notifier, _inherited(notifier)).to_end(beside or contextlib.nullcontext)


def _inherited(notifier: Notifier) -> DescriptorStore:
    passed = received()
    store = DescriptorStore.inherited(notifier, passed)
    for name, fds in passed.items():
        _log.warning("nobody here wants what the service manager passed as %r", name)
        for fd in fds:
            os.close(fd)
    return store


class _Serving:
    def __init__(self, settings: Settings, notifier: Notifier, store: DescriptorStore) -> None:
        self._supervisor = Supervisor(settings=settings, store=store)
        self._notifier = notifier
        self._asked = asyncio.Event()
        self._busy = True

    async def to_end(self, beside: Beside) -> None:
        with self._listening():
            beating = asyncio.create_task(self._beat(), name="pactown-beat")
            telling: asyncio.Task[None] | None = None
            try:
                async with self._supervisor:
                    telling = self._begin_to_tell()
                    async with beside(self._supervisor):
                        try:
                            self._tell_ready()
                            await self._asked.wait()
                        finally:
                            self._tell_end()
            finally:
                await _ended(beating, telling)

    def _begin_to_tell(self) -> asyncio.Task[None] | None:
        try:
            events = self._supervisor.events()
        except TreeError as error:
            # Without root there may be users and logs, and no place for a sandbox.
            _log.warning("no sandbox can be started here: %s", error)
            return None
        return asyncio.create_task(_tell(events), name="pactown-events")

    def _tell_ready(self) -> None:
        self._busy = False
        status = f"looking after {self._supervisor.settings.state_dir}, {self._count()}"
        _log.info(status)
        self._notifier.ready(status)

    def _tell_end(self) -> None:
        leaves = self._supervisor.settings.on_exit == "leave"
        status = f"{'leaving' if leaves else 'ending'} {self._count()}"
        _log.info(status)
        self._busy = True
        self._notifier.stopping(status)
        self._notifier.patience(PATIENCE_SECONDS)

    def _count(self) -> str:
        count = len(self._supervisor.list())
        return "1 sandbox" if count == 1 else f"{count} sandboxes"

    async def _beat(self) -> None:
        """Tell that the loop turns, and, while it takes its time, that starting or ending goes on."""
        watchdog = watchdog_seconds()
        pause = min(BEAT_SECONDS, watchdog / 2 if watchdog else BEAT_SECONDS)
        while self._notifier.active:
            if watchdog:
                self._notifier.alive()
            if self._busy:
                self._notifier.patience(PATIENCE_SECONDS)
            await asyncio.sleep(pause)

    # Signals ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        on_terminal = any(os.isatty(fd) for fd in (0, 1, 2))
        does = {
            signal.SIGTERM: self._end,
            signal.SIGINT: self._end,
            signal.SIGHUP: self._end if on_terminal else _go_on,
        }
        # What we were started to ignore stays ignored: nohup(1), and shells that start a job in the background.
        heard = {number: do for number, do in does.items() if signal.getsignal(number) is not signal.SIG_IGN}
        for number, do in heard.items():
            loop.add_signal_handler(number, do, number)
        try:
            yield
        finally:
            for number in heard:
                loop.remove_signal_handler(number)

    def _end(self, number: signal.Signals) -> None:
        """The first signal asks for the end, each further one for it to come at once."""
        if self._asked.is_set():
            _log.warning("%s again: all grace is over", number.name)
            self._supervisor.hasten()
        self._asked.set()


def _go_on(number: signal.Signals) -> None:
    _log.warning("%s does nothing: settings are read at the start", number.name)


async def _tell(events: EventReader) -> None:
    """Log what happens to sandboxes, to the end."""
    async for event in events:
        what = event.to_dict()
        _log.info(what.pop("kind"), extra={name: value for name, value in what.items() if value and name != "ts"})


async def _ended(beating: asyncio.Task[None], telling: asyncio.Task[None] | None) -> None:
    beating.cancel()
    # The supervisor's end ended the stream of events: the last ones are still to be told.
    _, late = await asyncio.wait(filter(None, (beating, telling)), timeout=LAST_EVENTS_SECONDS)
    for task in late:
        task.cancel()
