"""The pump of one run: FIFO, spool, log.

    FIFO --splice--> spool --render--> log --notify--> readers

A readable FIFO is spliced into the spool at once, which is cheap. Rendering costs microseconds a record, so
it happens in bounded turns (`LogHub`). While more than `BACKLOG_BYTES` wait to be rendered nothing more is
taken: the FIFO fills, and the tenant's write blocks. So it does beyond the tenant's `Rate`, unless that drops.
A run that writes nothing has neither spool nor log: it costs two FIFOs.

All of the state that a successor needs is in the files: the log's last line says which bytes of which run
are in it, and the spool holds what follows. A pump may be killed at any point.
"""

from __future__ import annotations

import asyncio
import logging
import time
from enum import Enum
from functools import partial

from .errors import LogError
from .feed import LogFeed
from .fifo import Fifo
from .hub import LogHub
from .limits import LogLimits
from .paths import LogPaths
from .rate import Rate
from .tenant import TenantLogs
from .writer import Writer

__all__ = ["LogPump"]

_log = logging.getLogger(__name__)

BACKLOG_BYTES = 1 << 19
"""A stream's bytes in the spool that are not in the log yet, beyond which nothing more is taken."""
TAKE_BYTES = 1 << 18
"""The most that is spliced at once; a FIFO holds 64 KiB unless the tenant enlarged it, to 1 MiB at most."""
ROOM_BYTES = 2 * TAKE_BYTES
"""About the most room that one turn takes, in spool or log."""
PROBE_BYTES = 4096
"""How much is taken to see whether a disk has room again."""
RETRY_SECONDS = 0.25
"""How long to wait after a full or failing disk."""
COUNT_SECONDS = 0.25
"""How long after lines were dropped their count is in the log, at the latest."""
LOOK_SECONDS = 0.001
"""How long to wait for a look at what the tenant's logs take, before asking whether it is over."""
SAY_SECONDS = 60.0
"""How often at most one pump tells the operator that it cannot write."""


class _Ear(Enum):
    """Whether a FIFO is listened to: not at all; by the hub; not before its turn in the tenant's `Rate`."""

    DEAF = 0
    OPEN = 1
    WAITING = 2


class LogPump:
    """Takes the output of one run and writes it down. `create` and `adopt` may be called in a worker thread.

    A log has one writer: the pump of a run that was left behind ends before the service's next one begins.

    While nothing can be written, as on a full disk, nothing is lost: the program waits in its write. That is told in
    the supervisor's own log, in `error`, and to those who wait for the `feed`; and so is that it goes on.

    Args:
        paths: the tenant's paths.
        user_id, service_id, run_id: written into each record; a run id has no dot and no slash.
        uid, gid: the tenant's, to whom the FIFOs belong.
        feed: told of each change; the caller closes it when no run will follow. Without one the pump has its
            own, and closes it in `finish`.
        hub: shared with all pumps of the loop; without one the pump has its own, which costs more.
        tenant: shared with all pumps of the tenant; without one the pump has its own, with the default limits.
        retry: seconds to wait after a full or failing disk.

    Attributes:
        feed: what readers wait for; it also tells when `error` appears, and when it goes.
        written: the number of the last record in the log; 0 until the first, or until `adopt`.
        error: why nothing is being written now, or None. It goes on by itself when the reason has gone.
    """

    __slots__ = (
        "_ears",
        "_fifos",
        "_gid",
        "_hub",
        "_owns_feed",
        "_owns_hub",
        "_queued",
        "_resumed",
        "_retry",
        "_said",
        "_started",
        "_telling",
        "_tenant",
        "_timer",
        "_told",
        "_uid",
        "_writer",
        "error",
        "feed",
        "paths",
        "run_id",
        "service_id",
        "user_id",
        "written",
    )

    def __init__(
        self,
        *,
        paths: LogPaths,
        user_id: str,
        service_id: str,
        run_id: str,
        uid: int,
        gid: int,
        feed: LogFeed | None = None,
        hub: LogHub | None = None,
        tenant: TenantLogs | None = None,
        retry: float = RETRY_SECONDS,
    ) -> None:
        self.paths = paths
        self.user_id = user_id
        self.service_id = service_id
        self.run_id = run_id
        self.feed = feed if feed is not None else LogFeed()
        self.error: LogError | None = None
        self.written = 0
        self._owns_feed = feed is None
        self._uid = uid
        self._gid = gid
        self._hub = hub
        self._owns_hub = hub is None
        self._tenant = tenant if tenant is not None else TenantLogs(paths, LogLimits())
        self._resumed = False
        self._started = False
        self._retry = retry
        self._said = float("-inf")
        self._told = False
        out, err = paths.fifos(service_id, run_id)
        self._fifos = (Fifo(out), Fifo(err))
        self._writer: Writer | None = None
        self._ears = [_Ear.DEAF, _Ear.DEAF]
        self._queued = False
        self._timer: asyncio.TimerHandle | None = None
        self._telling: asyncio.TimerHandle | None = None

    # ---- the run's start

    def create(self) -> None:
        """Make the FIFOs of a new run. Synchronous, and may be called in a worker thread.

        Raises:
            OSError: they cannot be made; nothing is left of them.
            LogError: the directory for FIFOs is not private.
        """
        out, err = self._fifos
        out.create(self._uid, self._gid)
        try:
            err.create(self._uid, self._gid)
        except BaseException:
            out.close()
            out.unlink()
            raise

    def adopt(self, *, alive: bool = True) -> None:
        """Go on with a run that another pump began. Synchronous, and may be called in a worker thread.

        Args:
            alive: whether processes of the run may still write. If not, missing FIFOs are no error: their
                contents vanished with the last process that held them open.

        Raises:
            OSError, LogError: what is left of the run cannot be opened.
        """
        self._resumed = True
        try:
            for fifo in self._fifos:
                try:
                    fifo.open_existing()
                except LogError:
                    if alive:
                        raise
            self._open_writer()
        except BaseException:
            self._close()
            raise

    @property
    def child_fds(self) -> tuple[int, int]:
        """What become the sandbox's standard output and standard error; valid until `close_child_fds`."""
        return self._fifos[0].child_fd, self._fifos[1].child_fd

    @property
    def fds(self) -> tuple[int, int]:
        """Our own ends of the two; valid until `finish` or `detach`."""
        return self._fifos[0].fd, self._fifos[1].fd

    def close_child_fds(self) -> None:
        """Close the sandbox's ends here, once it has them."""
        for fifo in self._fifos:
            fifo.close_child()

    def start(self) -> None:
        """Begin to take what is written. In the loop's thread."""
        self._have_hub()
        self._started = True
        self._listen()
        if self._writer is not None:
            self._enqueue()

    def _have_hub(self) -> LogHub:
        if self._hub is None:
            self._hub = LogHub()
        return self._hub

    # ---- its end

    async def finish(self) -> None:
        """Write down all that the run wrote, and remove its FIFOs and spools. No process of it may live.

        It does not wait for the tenant's rate: what is beyond it now is the tenant's debt.

        Raises:
            LogError: not all could be written. Nothing is removed, and `finish` can be called again;
                `detach` leaves the rest to a successor.
        """
        self._stop()
        # A process of another sandbox of this tenant may hold the FIFO open and write on and on: what waits
        # there now is all that this run wrote, and taking it comes to an end.
        owed = [fifo.waiting() for fifo in self._fifos]
        if self._writer is not None or owed != [0, 0]:
            try:
                await self._drain(owed)
            except (OSError, LogError) as error:
                self.error = self._trouble(error)
                raise self.error from error
        self.error = None
        # FIFOs first: spools without FIFOs are known to be of a run that has ended.
        for fifo in self._fifos:
            fifo.close()
            fifo.unlink()
        if self._writer is not None:
            self._writer.remove_spools()
        self._close()
        if self._owns_feed:
            self.feed.close()
        if not self._tenant.journals:
            # Whoever deletes the tenant now finds nobody else at work in its logs.
            await self._tenant.looked()

    def detach(self) -> None:
        """Stop, and leave FIFOs and spools to a successor that calls `adopt`. Harmless when called twice."""
        self._stop()
        self._close()

    def _stop(self) -> None:
        self._deafen()
        for timer in (self._timer, self._telling):
            if timer is not None:
                timer.cancel()
        self._timer = self._telling = None
        # A turn that is still queued sees this, and does nothing.
        self._started = False

    def _close(self) -> None:
        if self._owns_hub and self._hub is not None:
            self._hub.close()
            self._hub = None
        for fifo in self._fifos:
            fifo.close()
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    async def _drain(self, owed: list[int]) -> None:
        writer = self._open_writer()
        writer.flush()
        waits = True

        def turn() -> bool:
            nonlocal waits
            waits = self._tenant.is_behind(ROOM_BYTES)
            return not waits and self._drain_some(writer, owed)

        while waits:
            # In turn with all others: many runs may end at once, each with a full FIFO.
            await self._have_hub().complete(turn)
            if waits:
                await self._tenant.looked()
        writer.count_dropped()
        self._wrote(writer)

    def _drain_some(self, writer: Writer, owed: list[int]) -> bool:
        """Take and render a bounded part of what is left; True if there is more."""
        busy = False
        for index, fifo in enumerate(self._fifos):
            if owed[index] and writer.backlog(index) < BACKLOG_BYTES:
                moved = writer.take(index, fifo.fd, min(owed[index], TAKE_BYTES))
                self._spend(moved)
                # 0: somebody else with this uid has read it.
                owed[index] = owed[index] - moved if moved else 0
            if writer.render(index, at_end=not owed[index]):
                busy = True
        self._wrote(writer)
        return busy or any(owed)

    # ---- in between: taking

    def _listen(self) -> None:
        if self._hub is None:
            return
        for index, fifo in enumerate(self._fifos):
            if self._ears[index] is _Ear.DEAF and self._backlog(index) < BACKLOG_BYTES // 2 and fifo.fd >= 0:
                self._hub.listen(fifo.fd, partial(self._readable, index))
                self._ears[index] = _Ear.OPEN

    def _deafen(self, only: int | None = None) -> None:
        for index, fifo in enumerate(self._fifos):
            if only in (None, index):
                if self._ears[index] is _Ear.OPEN and self._hub is not None:
                    self._hub.unlisten(fifo.fd)
                # A turn that comes all the same sees this, and does nothing.
                self._ears[index] = _Ear.DEAF

    def _backlog(self, index: int) -> int:
        return self._writer.backlog(index) if self._writer is not None else 0

    def _readable(self, index: int) -> None:
        rate = self._tenant.rate
        if rate is None:
            self._take(index, TAKE_BYTES)
        elif rate.open():
            self._take(index, TAKE_BYTES if rate.drops else min(TAKE_BYTES, rate.left()))
        else:
            self._wait(rate, index)

    def _wait(self, rate: Rate, index: int) -> None:
        """Look at a FIFO again when it is its turn."""
        if self._hub is not None:
            self._deafen(index)
            self._ears[index] = _Ear.WAITING
            rate.wait(self._hub.loop, partial(self._take_turn, rate, index))

    def _take_turn(self, rate: Rate, index: int, share: int) -> None:
        if self._ears[index] is not _Ear.WAITING:
            return
        self._ears[index] = _Ear.DEAF
        if self._backlog(index) >= BACKLOG_BYTES // 2:
            return  # `_turn` listens again
        if self._take(index, TAKE_BYTES if rate.drops else min(TAKE_BYTES, share)) and not rate.open():
            self._wait(rate, index)
        elif self._timer is None:
            self._listen()

    def _take(self, index: int, limit: int) -> bool:
        """Take some of what a FIFO holds; False if there was nothing, or it has to wait."""
        if self._tenant.is_behind(ROOM_BYTES):
            self._pause(LOOK_SECONDS)
            return False
        try:
            moved = self._open_writer().take(index, self._fifos[index].fd, limit)
        except (OSError, LogError) as error:
            self._stall(error)
            return False
        self._spend(moved)
        if self._backlog(index) >= BACKLOG_BYTES:
            self._deafen(index)
        if moved:
            self._enqueue()
        return moved > 0

    def _spend(self, moved: int) -> None:
        rate = self._tenant.rate
        if rate is not None and not rate.drops:
            rate.spend(moved)

    # ---- in between: writing

    def _enqueue(self) -> None:
        if not self._queued and self._hub is not None:
            self._queued = True
            self._hub.add(self._turn)

    def _turn(self) -> bool:
        """Render a bounded part of what waits; True if there is more."""
        self._queued = False
        writer = self._writer
        if not self._started or self._timer is not None or writer is None:
            return False
        if self._tenant.is_behind(ROOM_BYTES):
            self._pause(LOOK_SECONDS)
            return False
        try:
            more = writer.render(0) | writer.render(1)
        except (OSError, LogError) as error:
            self._stall(error)
            return False
        self._wrote(writer)
        self._queued = more
        if _Ear.DEAF in self._ears:
            self._listen()
        if writer.dropped and self._telling is None and self._hub is not None:
            self._telling = self._hub.loop.call_later(COUNT_SECONDS, self._count_dropped)
        return more

    def _wrote(self, writer: Writer) -> None:
        if writer.seq != self.written:
            self.written = writer.seq
            self.feed.notify()

    def _count_dropped(self) -> None:
        self._telling = None
        if self._timer is not None or self._writer is None:
            return  # the first turn afterwards sees to it
        try:
            self._writer.count_dropped()
        except (OSError, LogError) as error:
            self._stall(error)
        else:
            self._wrote(self._writer)

    def _open_writer(self) -> Writer:
        """Log and spools, opened when first needed: most short runs write nothing."""
        if self._writer is None:
            writer = Writer(self.paths, self.user_id, self.service_id, self.run_id, self._tenant)
            writer.open(self.run_id, resumed=self._resumed)
            self._writer = writer
            self.written = writer.seq
        return self._writer

    # ---- a full disk, or one that is looked at

    def _stall(self, error: Exception) -> None:
        """Stop until the disk may have recovered; what is not written waits in FIFO and spool."""
        first, self.error = self.error is None, self._trouble(error)
        if first and time.monotonic() - self._said > SAY_SECONDS:
            self._said, self._told = time.monotonic(), True
            _log.error("%s; its program waits once it has printed a little more", self.error)
        self.feed.notify()
        self._pause(self._retry)

    def _pause(self, seconds: float) -> None:
        """Stop for a while: the disk is full, or is being looked at."""
        self._deafen()
        if self._hub is not None and self._timer is None:
            self._timer = self._hub.loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        self._timer = None
        if self._tenant.is_behind(ROOM_BYTES):
            self._pause(LOOK_SECONDS)
            return
        try:
            # After a look there is nothing to be tried. What that takes ends in the midst of a line, as a rule.
            if self.error is not None:
                self._try_again()
        except (OSError, LogError) as error:
            self._stall(error)
            return
        self.error = None
        if self._told:
            self._told = False
            waited = time.monotonic() - self._said
            _log.warning("the log of %s is written again, after %.1f s; nothing is lost", self.service_id, waited)
        self.feed.notify()
        self._listen()
        self._enqueue()

    def _try_again(self) -> None:
        writer = self._open_writer()
        writer.flush()
        # What has been dropped and not been counted may be all that fills the disk.
        writer.count_dropped()
        self._wrote(writer)
        # Before it is said that all is well: it may have been the spool that could not grow.
        for index, fifo in enumerate(self._fifos):
            if writer.backlog(index) < BACKLOG_BYTES and fifo.fd >= 0:
                self._spend(writer.take(index, fifo.fd, PROBE_BYTES))

    def _trouble(self, error: Exception) -> LogError:
        if isinstance(error, LogError):
            return error
        return LogError(
            f"cannot write the log of {self.service_id}: {error}",
            remedy=f"make room under {self.paths.log_dir}; what is not written yet is kept",
        )
