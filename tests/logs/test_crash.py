from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from pactown_runner.logs import LogPaths
from pactown_runner.models import LogRecord
from tests.logs.conftest import USER, MakePump, Write, files, limited, records, soon

KILLS = 12
MOMENTS = 30
"""Of a pump's life: it takes up what another left, puts a full log aside twice or more, and drops the oldest."""
COUNT_UNTIL_TOLD = """if 1:
    import select, sys
    count = 0
    while not select.select([0], [], [], 0)[0]:
        sys.stdout.write("".join(f"{number}\\n" for number in range(count + 1, count + 501)))
        sys.stdout.flush()
        count += 500
    with open(sys.argv[1], "w") as file:
        file.write(str(count))
"""


async def pumping(paths: LogPaths, limits: dict[str, Any], die_at: int | None = None) -> asyncio.subprocess.Process:
    words = (str(paths.log_dir), str(paths.run_dir), paths.key, USER, "api", "r1", json.dumps(limits))
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.logs.pump_process",
        *words,
        "" if die_at is None else str(die_at),
        stdout=asyncio.subprocess.PIPE,
    )


async def killed_pump(paths: LogPaths, changes: int, limits: dict[str, Any]) -> None:
    """A process that pumps, and is killed right after it told of so many changes."""
    process = await pumping(paths, limits)
    assert process.stdout is not None
    try:
        await soon(process.stdout.readexactly(changes))
    finally:
        process.kill()
        assert await process.wait() == -signal.SIGKILL


def check(found: list[LogRecord], count: int) -> None:
    """Each line is there once, in order, or counted where it was dropped, or older than all that is there."""
    assert [record.seq for record in found] == list(range(found[0].seq, found[-1].seq + 1))
    assert found[0].seq == 1 or not any(record.dropped_bytes for record in found)
    number = found[0].seq
    for record in found:
        if record.dropped_bytes:
            lines = [b"%d\n" % n for n in range(number, number + record.dropped_lines)]
            assert record.dropped_bytes == len(b"".join(lines))
            number += record.dropped_lines
        else:
            assert record.raw == b"%d" % number
            number += 1
    assert number == count + 1


LIMITS: dict[str, dict[str, Any]] = {
    "all kept": {"rotate_bytes": 100_000, "keep": 10_000},
    "one kept": {"rotate_bytes": 100_000, "keep": 1},
    "dropped": {"rotate_bytes": 20_000, "keep": 10_000, "rate_bytes": 50_000, "rate_policy": "drop"},
    "blocked": {"rotate_bytes": 20_000, "keep": 10_000, "rate_bytes": 200_000, "rate_policy": "block"},
}
FROM_OUTSIDE, AT_EACH_CHANGE = "from outside", "at each change to a file"


@pytest.mark.deadline(360)
@pytest.mark.parametrize(
    ("kept", "way"),
    [(name, AT_EACH_CHANGE) for name in LIMITS] + [("all kept", FROM_OUTSIDE), ("dropped", FROM_OUTSIDE)],
)
async def test_pumps_that_are_killed_neither_lose_nor_double_a_line(
    make_pump: MakePump, write: Write, paths: LogPaths, tmp_path: Path, kept: str, way: str
) -> None:
    random.seed(4)
    told, limits = tmp_path / "count", LIMITS[kept]
    pump = make_pump()
    pump.create()
    command = (sys.executable, "-c", COUNT_UNTIL_TOLD, str(told))
    program = await write(pump, *command, stdin=asyncio.subprocess.PIPE)
    assert program.stdin is not None
    pump.detach()
    if way == FROM_OUTSIDE:
        for _ in range(KILLS):
            await killed_pump(paths, random.randint(1, 40), limits)
    else:
        for moment in range(MOMENTS):
            process = await pumping(paths, limits, die_at=moment)
            await soon(process.communicate())
            assert process.returncode == -signal.SIGKILL
    last = make_pump(tenant=limited(paths, **limits | {"rate_bytes": None}))
    last.adopt()
    last.start()
    program.stdin.close()
    await soon(program.wait())
    await soon(last.finish())
    check(await records(paths), int(told.read_text()))
    assert paths.leftovers() == set()
    assert len(files(paths)) > 1
