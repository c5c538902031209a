"""The rate at which one tenant may print: a token bucket, and the turns of those who wait for it to fill."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

__all__ = ["Rate"]

BURST_SECONDS = 1.0
"""What a tenant that was quiet may print at once, in seconds of its rate."""
DEBT_SECONDS = 10.0
"""The most that it may owe: what a run leaves behind at its end is written down at once, and paid for afterwards."""
BLOCK_TICK = 0.02
DROP_TICK = 0.005
"""Seconds between two rounds of turns. One round takes as much of a stream as its FIFO holds."""
LEAST_SHARE = 4096
"""Bytes that a turn takes at least, however many wait for theirs."""
HOLD_SECONDS = 0.001
"""How long one round may hold the loop."""

Turn = Callable[[int], None]


class Rate:
    """Bytes per second that one tenant may print, over all its sandboxes.

    Beyond that its FIFOs are not looked at any more when they have something, but in turns, each of which may take a
    share of what has come in. With `drops` it is not the taking that is limited but what is written down; turns then
    only see to it that dropping costs the loop little.

    Args:
        per_second: bytes.
        drops: what is beyond the rate is dropped, and does not wait.
        clock: seconds, that only grow.
    """

    __slots__ = ("_clock", "_dropping", "_per_second", "_seen", "_timer", "_tokens", "_turns", "drops")

    def __init__(self, per_second: int, *, drops: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.drops = drops
        self._per_second = per_second
        self._clock = clock
        self._seen = clock()
        self._tokens = per_second * BURST_SECONDS
        self._dropping = False
        self._turns: deque[Turn] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def left(self) -> int:
        """Bytes that may be printed now; below 0 if more was than might."""
        now = self._clock()
        filled = self._tokens + (now - self._seen) * self._per_second
        self._tokens = min(filled, self._per_second * BURST_SECONDS)
        self._seen = now
        return int(self._tokens)

    def spend(self, count: int) -> None:
        """So many were printed, whether they might be or not."""
        self._tokens = max(self._tokens - count, -self._per_second * DEBT_SECONDS)

    def dropping(self) -> bool:
        """Whether what comes now is dropped: until half a burst has come in, or each line would be another case."""
        left = self.left()
        self._dropping = left < self._per_second * BURST_SECONDS / 2 if self._dropping else left <= 0
        return self._dropping

    # ---- Turns

    def open(self) -> bool:
        """Whether what has come may be taken out of turn."""
        if self.drops:
            return not self.dropping()
        return not self._turns and self.left() > 0

    def wait(self, loop: asyncio.AbstractEventLoop, turn: Turn) -> None:
        """Call `turn` once, when it is its turn, with the most bytes that it may take."""
        self._turns.append(turn)
        if self._timer is None:
            self._timer = loop.call_later(self._tick, self._round, loop)

    @property
    def _tick(self) -> float:
        return DROP_TICK if self.drops else BLOCK_TICK

    def _round(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        deadline = time.monotonic() + HOLD_SECONDS
        # Those who come again in this round wait for the next one.
        for waiting in range(len(self._turns), 0, -1):
            left = self.left()
            if left <= 0 and not self.drops:
                break
            self._turns.popleft()(max(left // waiting, LEAST_SHARE))
            if time.monotonic() >= deadline:
                break
        if self._turns and self._timer is None:
            self._timer = loop.call_later(self._tick, self._round, loop)
