"""A pump in a process of its own, to be killed: takes over a run and tells of each change with one byte.

Arguments: log_dir run_dir key user_id service_id run_id
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from pactown_runner.logs import LogPaths, LogPump


async def main() -> None:
    log_dir, run_dir, key, user_id, service_id, run_id = sys.argv[1:]
    pump = LogPump(
        paths=LogPaths(Path(log_dir), Path(run_dir), key),
        user_id=user_id,
        service_id=service_id,
        run_id=run_id,
        uid=os.geteuid(),
        gid=os.getegid(),
    )
    pump.adopt()
    pump.start()
    while True:
        await pump.feed.changed(pump.feed.version)
        sys.stdout.buffer.write(b".")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    asyncio.run(main())
