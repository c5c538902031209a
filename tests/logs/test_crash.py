from __future__ import annotations

import asyncio
import random
import signal
import sys

from pactown_runner.logs import LogPaths
from tests.logs.conftest import USER, MakePump, Write, records, soon

KILLS = 20
COUNT_UNTIL_TOLD = """if 1:
    import select, sys
    count = 0
    while not select.select([0], [], [], 0)[0]:
        sys.stdout.write("".join(f"{number}\\n" for number in range(count + 1, count + 501)))
        sys.stdout.flush()
        count += 500
    sys.stderr.write(f"{count}\\n")
"""


async def killed_pump(paths: LogPaths, changes: int) -> None:
    """A process that pumps, and is killed right after it told of so many changes."""
    pumping = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.logs.pump_process",
        *(str(paths.log_dir), str(paths.run_dir), paths.key, USER, "api", "r1"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert pumping.stdout is not None
    try:
        await soon(pumping.stdout.readexactly(changes))
    finally:
        pumping.kill()
        assert await pumping.wait() == -signal.SIGKILL


async def test_pumps_that_are_killed_neither_lose_nor_double_a_line(
    make_pump: MakePump, write: Write, paths: LogPaths
) -> None:
    random.seed(4)
    pump = make_pump()
    pump.create()
    program = await write(pump, sys.executable, "-c", COUNT_UNTIL_TOLD, stdin=asyncio.subprocess.PIPE)
    assert program.stdin is not None
    pump.detach()
    for _ in range(KILLS):
        await killed_pump(paths, random.randint(1, 40))
    last = make_pump()
    last.adopt()
    last.start()
    program.stdin.close()
    await soon(program.wait())
    await soon(last.finish())
    found = await records(paths)
    [written] = [int(record.raw) for record in found if record.stream == "stderr"]
    assert [record.seq for record in found] == list(range(1, written + 2))
    numbers = [int(record.raw) for record in found if record.stream == "stdout"]
    assert numbers == list(range(1, written + 1))
    assert paths.leftovers() == set()
