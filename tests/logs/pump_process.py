"""A pump in a process of its own, to be killed: takes over a run and tells of each change with one byte.

Arguments: log_dir run_dir key user_id service_id run_id limits die_at

`limits` are those of `LogLimits`, as JSON. `die_at` is empty, or a number: each change to a file is three moments, or
two, before, amid (of a write only) and behind it; the process kills itself at the moment of that number.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pactown_runner.logs import LogLimits, LogPaths, LogPump, TenantLogs

CHANGES = ("link", "rename", "unlink", "write", "ftruncate")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moments: int) -> None:
    """Die at the moment of this number: each change to a file has two, and a write three."""
    left = iter(range(moments, -1, -1))

    def wrap(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **options: Any) -> Any:
            if not next(left):
                die()
            if change is write and not next(left):
                fd, data = args
                write(fd, data[: len(data) // 2])
                die()
            done = change(*args, **options)
            if not next(left):
                die()
            return done

        return changed

    write = os.write
    for name in CHANGES:
        setattr(os, name, wrap(getattr(os, name)))


async def main() -> None:
    log_dir, run_dir, key, user_id, service_id, run_id, limits, die_at = sys.argv[1:]
    paths = LogPaths(Path(log_dir), Path(run_dir), key)
    pump = LogPump(
        paths=paths,
        user_id=user_id,
        service_id=service_id,
        run_id=run_id,
        uid=os.geteuid(),
        gid=os.getegid(),
        tenant=TenantLogs(paths, LogLimits(**json.loads(limits))),
    )
    if die_at:
        arm(int(die_at))
    pump.adopt()
    pump.start()
    while True:
        await pump.feed.changed(pump.feed.version)
        sys.stdout.buffer.write(b".")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    asyncio.run(main())
