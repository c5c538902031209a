"""Put a file that is fed without end, to be killed in the middle. Arguments: settings as JSON, the source."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from pactown_runner.config import Settings
from pactown_runner.supervisor import Supervisor
from tests.files.helpers import SERVICE, USER


async def main() -> None:
    values = json.loads(sys.argv[1])
    settings = Settings(
        users_base=Path(values["users_base"]),
        state_dir=Path(values["state_dir"]),
        log_dir=Path(values["log_dir"]),
        run_dir=Path(values["run_dir"]),
        uid_ranges=tuple((first, last) for first, last in values["uid_ranges"]),
        cgroup_slice=values["cgroup_slice"],
    )

    def note(done: int, total: int | None) -> None:
        print("moving", flush=True)

    async with Supervisor(settings=settings, role="one-shot") as supervisor:
        await supervisor.files.put(USER, SERVICE, Path(sys.argv[2]), "f", on_progress=note)


asyncio.run(main())
