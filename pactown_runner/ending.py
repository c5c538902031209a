"""The end of a sandbox: nothing of it runs any more, whatever its processes do about it."""

from __future__ import annotations

import logging

import anyio

from cgroups import Cgroup, CgroupError, GoneError

from .errors import StateError
from .holdings import Holdings, kill_rest
from .host import LoopHost
from .trees import END_TIMEOUT, TRACER_PATIENCE
from .waiting import readable

__all__ = ["emptied", "end_rest"]

_log = logging.getLogger(__name__)

NOTICE_PAUSES = (0.0005, 0.001, 0.002, 0.004, 0.008)
"""Seconds between looks at a cgroup that has just been killed; the kernel's notice may be held back for 10 ms."""

RETRY_PAUSE = 0.1
"""Seconds until the next try to end a sandbox, where that failed for want of descriptors, say."""


async def end_rest(host: LoopHost, held: Holdings) -> int:
    """Kill what outlived the first process or its time. Returns, with how many that were, when nothing runs any more.

    Raises:
        StateError: something that was killed is not gone after `END_TIMEOUT` seconds.
    """
    survivors = 0
    deadline = anyio.current_time() + END_TIMEOUT
    while True:
        try:
            if not held.cgroup.populated():
                return survivors
            killed = await host.in_thread(kill_rest, held.cgroup)
            survivors = survivors or killed
            with anyio.move_on_after(TRACER_PATIENCE):
                await emptied(held.cgroup)
                return survivors
            if anyio.current_time() > deadline:
                raise StateError(f"{held.place} was killed, and not all of it is gone after {END_TIMEOUT:g} s")
            await host.in_thread(held.kill_tracers)
        except GoneError:
            return survivors
        except (CgroupError, OSError) as error:
            # Such as too many open files. To give up would leave it running with nobody to know of it.
            _log.error("cannot end %s yet: %s", held.place, error)
            await anyio.sleep(RETRY_PAUSE)


async def emptied(cgroup: Cgroup) -> None:
    """Wait for `populated 0`: nothing of it runs any more."""
    with cgroup.watch(memory=False) as watch:
        # The kernel holds the notice of a cgroup back that has just given one. At the end of a short life that is
        # most of the wait, so look again a few times by ourselves.
        for pause in NOTICE_PAUSES:
            if not watch.refresh().populated:
                return
            with anyio.move_on_after(pause):
                await readable(watch.fileno())
        while watch.refresh().populated:
            await readable(watch.fileno())
