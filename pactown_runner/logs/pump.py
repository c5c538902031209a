"""The pump of one run: FIFO, spool, log.

    FIFO --splice--> spool --render--> log --notify--> readers

A readable FIFO is spliced into the spool at once, which is cheap. Rendering costs microseconds a record, so
it happens in bounded turns (`LogHub`). While more than `BACKLOG_BYTES` wait to be rendered nothing more is
taken: the FIFO fills, and the tenant's write blocks. A run that writes nothing has neither spool nor log:
it costs two FIFOs.

All of the state that a successor needs is in the files: the log's last line says which bytes of which run
are in it, and the spool holds what follows. A pump may be killed at any point.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial

from .errors import LogError
from .feed import LogFeed
from .fifo import Fifo
from .hub import LogHub
from .journal import Journal
from .paths import STREAMS, LogPaths
from .records import RecordLogger, record_logger, split
from .spool import Spool

__all__ = ["LogPump"]

BACKLOG_BYTES = 1 << 19
"""A stream's bytes in the spool that are not in the log yet, beyond which nothing more is taken."""
TAKE_BYTES = 1 << 18
"""The most that is spliced at once; a FIFO holds 64 KiB unless the tenant enlarged it, to 1 MiB at most."""
READ_BYTES = 1 << 17
"""The most that one turn renders of a stream. More than a piece, or a long line would never be cut."""
TURN_RECORDS = 256
"""The most records that one turn renders of a stream, about 2 ms of work for both."""
CAP_BYTES = 256 << 20
"""Of one service's log, its two files together: a million short lines are 140 MB."""
RETRY_SECONDS = 0.25
"""How long to wait after a full or failing disk."""


class LogPump:
    """Takes the output of one run and writes it down. `create` and `adopt` may be called in a worker thread.

    A log has one writer: the pump of a run that was left behind ends before the service's next one begins.

    Args:
        paths: the tenant's paths.
        user_id, service_id, run_id: written into each record; a run id has no dot and no slash.
        uid, gid: the tenant's, to whom the FIFOs belong.
        feed: told of each change; the caller closes it when no run will follow. Without one the pump has its
            own, and closes it in `finish`.
        hub: shared with all pumps of the loop; without one the pump has its own, which costs more.
        cap: the most bytes that the service's log takes; beyond it the oldest half is dropped. None for no end.
        retry: seconds to wait after a full or failing disk.

    Attributes:
        feed: what readers wait for; it also tells when `error` appears.
        written: the number of the last record in the log; 0 until the first, or until `adopt`.
        error: why nothing is being written now, or None. It goes on by itself when the reason has gone.
    """

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
        cap: int | None = CAP_BYTES,
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
        self._resumed = False
        self._started = False
        self._cap = cap
        self._retry = retry
        out, err = paths.fifos(service_id, run_id)
        self._fifos = (Fifo(out), Fifo(err))
        self._spools: tuple[Spool, Spool] | None = None
        self._journal: Journal | None = None
        self._logger: RecordLogger | None = None
        self._seq = 0
        self._ends = [0, 0]
        self._listening = [False, False]
        self._queued = False
        self._timer: asyncio.TimerHandle | None = None

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
            self._open_files()
        except BaseException:
            self._close()
            raise

    @property
    def child_fds(self) -> tuple[int, int]:
        """What become the sandbox's standard output and standard error; valid until `close_child_fds`."""
        return self._fifos[0].child_fd, self._fifos[1].child_fd

    def close_child_fds(self) -> None:
        """Close the sandbox's ends here, once it has them."""
        for fifo in self._fifos:
            fifo.close_child()

    def start(self) -> None:
        """Begin to take what is written. In the loop's thread."""
        if self._hub is None:
            self._hub = LogHub()
        self._started = True
        self._listen()
        if self._journal is not None:
            self._enqueue()

    # ---- its end

    async def finish(self) -> None:
        """Write down all that the run wrote, and remove its FIFOs and spools. No process of it may live.

        Raises:
            LogError: not all could be written. Nothing is removed, and `finish` can be called again;
                `detach` leaves the rest to a successor.
        """
        self._stop()
        self.close_child_fds()
        # A process of another sandbox of this tenant may hold the FIFO open and write on and on: what waits
        # there now is all that this run wrote, and taking it comes to an end.
        owed = [fifo.waiting() for fifo in self._fifos]
        if self._journal is not None or owed != [0, 0]:
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
        if self._spools is not None:
            for spool in self._spools:
                spool.remove()
        self._close()
        if self._owns_feed:
            self.feed.close()

    def detach(self) -> None:
        """Stop, and leave FIFOs and spools to a successor that calls `adopt`. Harmless when called twice."""
        self._stop()
        self._close()

    def _stop(self) -> None:
        self._deafen()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # A turn that is still queued sees this, and does nothing.
        self._started = False
        if self._owns_hub and self._hub is not None:
            self._hub.close()
            self._hub = None

    def _close(self) -> None:
        for fifo in self._fifos:
            fifo.close()
        for spool in self._spools or ():
            spool.close()
        if self._journal is not None:
            self._journal.close()
        self._spools = None
        self._journal = None

    async def _drain(self, owed: list[int]) -> None:
        journal, spools = self._open_files()
        journal.flush()
        self.written = self._seq
        busy = True
        while busy or any(owed):
            busy = False
            for index, spool in enumerate(spools):
                if owed[index] and spool.size - self._ends[index] < BACKLOG_BYTES:
                    moved = spool.take(self._fifos[index].fd, min(owed[index], TAKE_BYTES))
                    # 0: somebody else with this uid has read it.
                    owed[index] = owed[index] - moved if moved else 0
                if self._render(index, at_end=not owed[index]):
                    busy = True
            await asyncio.sleep(0)

    # ---- in between

    def _listen(self) -> None:
        if self._hub is None:
            return
        for index, fifo in enumerate(self._fifos):
            if not self._listening[index] and self._backlog(index) < BACKLOG_BYTES // 2 and fifo.fd >= 0:
                self._hub.listen(fifo.fd, partial(self._readable, index))
                self._listening[index] = True

    def _deafen(self, only: int | None = None) -> None:
        for index, fifo in enumerate(self._fifos):
            if self._listening[index] and only in (None, index) and self._hub is not None:
                self._hub.unlisten(fifo.fd)
                self._listening[index] = False

    def _backlog(self, index: int) -> int:
        return self._spools[index].size - self._ends[index] if self._spools is not None else 0

    def _readable(self, index: int) -> None:
        try:
            _, spools = self._open_files()
            moved = spools[index].take(self._fifos[index].fd, TAKE_BYTES)
        except (OSError, LogError) as error:
            self._stall(error)
            return
        if self._backlog(index) >= BACKLOG_BYTES:
            self._deafen(index)
        if moved:
            self._enqueue()

    def _enqueue(self) -> None:
        if not self._queued and self._hub is not None:
            self._queued = True
            self._hub.add(self._turn)

    def _turn(self) -> bool:
        """Render a bounded part of what waits; True if there is more."""
        self._queued = False
        if not self._started or self._timer is not None:
            return False
        try:
            more = self._render(0) | self._render(1)
        except OSError as error:
            self._stall(error)
            return False
        self._queued = more
        if not all(self._listening):
            self._listen()
        return more

    def _render(self, index: int, *, at_end: bool = False) -> bool:
        """Write down some records of a stream; True if there may be more to write now.

        Raises:
            OSError: they could not be written; the journal keeps them.
        """
        if self._spools is None or self._journal is None or self._logger is None:
            return False
        spool, begin = self._spools[index], self._ends[index]
        data = spool.read(begin, READ_BYTES)
        pieces = split(data, TURN_RECORDS, at_end=at_end and begin + len(data) == spool.size)
        more = len(data) == READ_BYTES or len(pieces) >= TURN_RECORDS
        if not pieces:
            return more
        lines = self._logger.render(
            pieces, ts=time.time(), seq=self._seq, stream=STREAMS[index], ends=self._ends, index=index
        )
        self._seq += len(lines)
        self._journal.write(b"".join(lines))
        self.written = self._seq
        spool.give_back(self._ends[index])
        self.feed.notify()
        return more

    def _open_files(self) -> tuple[Journal, tuple[Spool, Spool]]:
        """Log and spools, opened when first needed: most short runs write nothing."""
        if self._journal is not None and self._spools is not None:
            return self._journal, self._spools
        journal = Journal(self.paths.log(self.service_id), self._cap)
        out, err = self.paths.spools(self.service_id, self.run_id)
        spools = (Spool(out), Spool(err))
        try:
            seq, ends = journal.open(self.run_id, resumed=self._resumed)
            for spool, end in zip(spools, ends, strict=True):
                spool.open(end)
        except BaseException:
            journal.close()
            for spool in spools:
                spool.close()
            raise
        self._seq = self.written = seq
        self._ends = list(ends)
        self._logger = record_logger(self.user_id, self.service_id, self.run_id)
        self._journal, self._spools = journal, spools
        return journal, spools

    def _stall(self, error: Exception) -> None:
        """Stop until the disk may have recovered; what is not written waits in FIFO and spool."""
        self.error = self._trouble(error)
        self._deafen()
        self.feed.notify()
        if self._hub is not None and self._timer is None:
            self._timer = self._hub.loop.call_later(self._retry, self._resume)

    def _resume(self) -> None:
        self._timer = None
        try:
            if self._journal is not None:
                self._journal.flush()
                self.written = self._seq
        except OSError as error:
            self._stall(error)
            return
        self.error = None
        self._listen()
        self._enqueue()

    def _trouble(self, error: Exception) -> LogError:
        if isinstance(error, LogError):
            return error
        return LogError(
            f"cannot write the log of {self.service_id}: {error}",
            remedy=f"make room under {self.paths.log_dir}; what is not written yet is kept",
        )
