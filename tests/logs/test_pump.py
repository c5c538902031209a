from __future__ import annotations

import asyncio
import fcntl
import json
import os
import sys
from pathlib import Path

import pytest

from pactown_runner.logs import LogError, LogHub, LogPaths, LogPump
from pactown_runner.logs.writer import TURN_RECORDS
from tests.hostguard import Run
from tests.logs.conftest import USER, MakePump, Write, records, soon, written

MILLION = 1_000_000


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def uid(test_run: Run) -> int:
    return test_run.uids[0]


@pytest.mark.each_loop
async def test_a_silent_run_leaves_nothing(make_pump: MakePump, write: Write, paths: LogPaths) -> None:
    before = fds()
    pump = make_pump()
    pump.create()
    pump.start()
    program = await write(pump, "true")
    await program.wait()
    assert paths.leftovers() == {("api", "r1")}
    await pump.finish()
    assert paths.leftovers() == set()
    assert not Path(paths.log_dir).exists()
    assert pump.feed.closed
    assert fds() == before


@pytest.mark.each_loop
async def test_both_streams_are_written_down(make_pump: MakePump, write: Write, paths: LogPaths) -> None:
    before = fds()
    pump = make_pump()
    pump.create()
    pump.start()
    program = await write(pump, "sh", "-c", "echo one; echo two >&2; printf three")
    await program.wait()
    await pump.finish()
    await pump.finish()
    found = await records(paths)
    assert [r.seq for r in found] == [1, 2, 3]
    assert sorted((r.stream, r.raw, r.partial) for r in found) == [
        ("stderr", b"two", False),
        ("stdout", b"one", False),
        ("stdout", b"three", True),
    ]
    assert os.listdir(paths.spool_dir) == os.listdir(paths.fifo_dir) == []
    assert fds() == before


async def test_numbers_go_on_over_runs(make_pump: MakePump, write: Write, paths: LogPaths) -> None:
    for run_id in ("r1", "r2", "r3"):
        pump = make_pump(run_id=run_id)
        pump.create()
        pump.start()
        await (await write(pump, "echo", run_id)).wait()
        await pump.finish()
    assert [(r.seq, r.line) for r in await records(paths)] == [(1, "r1"), (2, "r2"), (3, "r3")]


@pytest.mark.each_loop
async def test_a_million_lines_come_once_and_in_order_while_another_sandbox_is_heard(
    make_pump: MakePump, write: Write, paths: LogPaths
) -> None:
    on_uvloop = not isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop)
    count = MILLION // 5 if on_uvloop else MILLION  # the loop's part in it shows with fewer
    flood, other = make_pump("flood"), make_pump("other")
    for pump in (flood, other):
        pump.create()
        pump.start()
    flooding = await write(flood, "seq", str(count))
    talking = await write(other, "sh", "-c", "while read x; do echo $x; done", stdin=asyncio.subprocess.PIPE)
    stdin = talking.stdin
    assert stdin is not None

    async def talk() -> int:
        heard = 0
        while flooding.returncode is None:
            stdin.write(b"hello\n")
            await written(other, lambda: other.written > heard)  # noqa: B023 - awaited at once
            heard = other.written
        return heard

    heard = await soon(talk(), 90)
    stdin.close()
    await talking.wait()
    await soon(flood.finish())
    await other.finish()
    assert heard > 20, "a flood kept another sandbox from being heard"
    assert [r.raw for r in await records(paths, "other")] == [b"hello"] * heard
    wanted = 1
    for record in await records(paths, "flood"):
        assert (record.seq, record.raw) == (wanted, b"%d" % wanted)
        wanted += 1
    assert wanted == count + 1


async def test_long_lines_and_binary(make_pump: MakePump, write: Write, paths: LogPaths) -> None:
    script = """if 1:
        import sys
        out = sys.stdout.buffer
        out.write(b"x" * 300_000 + b"\\n" + bytes(range(256)) * 2 + b"\\n" + b"y" * 65536 + b"\\n" + b"z" * 65537)
    """
    pump = make_pump()
    pump.create()
    pump.start()
    await (await write(pump, sys.executable, "-c", script)).wait()
    await pump.finish()
    found = await records(paths)
    expected = b"x" * 300_000 + b"\n" + bytes(range(256)) * 2 + b"\n" + b"y" * 65536 + b"\n" + b"z" * 65537
    assert b"".join(r.data for r in found) == expected
    assert [len(r.raw) for r in found if r.partial] == [65536] * 4 + [65536, 1]


async def test_a_tenant_cannot_forge_a_record(make_pump: MakePump, write: Write, paths: LogPaths) -> None:
    forged = '{"user":"auth0|2","service":"api","run":"r1","ts":1,"seq":99,"stream":"stdout","line":"x","spool":[0,0]}'
    attack = f'{forged}\n","seq":99,"user":"\r{forged}\u2028{forged}\n'
    pump = make_pump()
    pump.create()
    pump.start()
    await (await write(pump, "printf", "%s", attack)).wait()
    await pump.finish()
    lines = Path(paths.log("api")).read_bytes().split(b"\n")
    assert lines.pop() == b""
    found = [json.loads(line) for line in lines]
    assert [(f["user"], f["seq"], f["run"]) for f in found] == [(USER, 1, "r1"), (USER, 2, "r1")]
    assert "".join(f["line"] + "\n" for f in found) == attack


async def test_what_is_in_the_log_takes_no_room_in_the_spool(
    make_pump: MakePump, write: Write, paths: LogPaths
) -> None:
    lines = 105_000
    script = f"import sys\nfor _ in range({lines // 1000}): sys.stdout.buffer.write((b'x' * 999 + b'\\n') * 1000)"
    pump = make_pump()
    pump.create()
    pump.start()
    await write(pump, sys.executable, "-c", script)
    await soon(written(pump, lambda: pump.written == lines))
    pump.detach()
    spool = os.stat(paths.spools("api", "r1")[0])
    assert spool.st_size == lines * 1000
    assert spool.st_blocks * 512 <= 2 << 20
    successor = make_pump()
    successor.adopt()
    await successor.finish()
    assert len(await records(paths)) == lines


async def test_a_run_ends_though_a_stranger_writes_to_its_fifo_for_ever(
    make_pump: MakePump, write: Write, paths: LogPaths
) -> None:
    pump = make_pump()
    pump.create()
    pump.start()
    await write(pump, "yes")
    await written(pump, lambda: pump.written > 0)
    await soon(pump.finish())
    assert paths.leftovers() == set()


def filled(pump: LogPump, text: bytes) -> int:
    """Put so much at once into the first FIFO that it is taken in parts; returns a copy of the sandbox's end."""
    out = os.dup(pump.child_fds[0])
    fcntl.fcntl(out, fcntl.F_SETPIPE_SZ, 1 << 20)
    assert os.write(out, text) == len(text)
    return out


NUMBERS = b"".join(b"%06d\n" % number for number in range(140_000))
"""Nearly 1 MiB, in lines that end at no power of 2."""


async def test_the_end_writes_down_what_no_turn_of_the_loop_has_taken(make_pump: MakePump, paths: LogPaths) -> None:
    pump = make_pump()
    pump.create()
    pump.start()
    out, err = pump.child_fds
    os.write(out, b"one\ntwo")
    os.write(err, b"three\n")
    await pump.finish()
    assert [(r.stream, r.data) for r in await records(paths)] == [
        ("stdout", b"one\n"),
        ("stdout", b"two"),
        ("stderr", b"three\n"),
    ]


async def test_the_end_cuts_no_line_of_what_it_takes_in_parts(make_pump: MakePump, paths: LogPaths) -> None:
    pump = make_pump()
    pump.create()
    os.close(filled(pump, NUMBERS))
    await pump.finish()
    assert [r.data for r in await records(paths)] == NUMBERS.splitlines(keepends=True)


async def test_runs_that_end_together_take_turns_with_all_others(make_pump: MakePump, paths: LogPaths) -> None:
    hub = LogHub(hold=0)  # one turn each time that the loop comes round
    pumps = [make_pump(f"s{number}", hub=hub) for number in range(5)]
    for pump in pumps:
        pump.create()
        os.write(pump.child_fds[0], b"\n" * 5000)
    ending = asyncio.gather(*(pump.finish() for pump in pumps))
    most = before = 0
    while not ending.done():
        await asyncio.sleep(0)
        total = sum(pump.written for pump in pumps)
        most, before = max(most, total - before), total
    await ending
    hub.close()
    assert before == 25_000
    assert most == TURN_RECORDS


async def test_an_end_that_is_cancelled_leaves_the_rest_to_a_successor(make_pump: MakePump, paths: LogPaths) -> None:
    troubles: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: troubles.append(context))
    pump = make_pump()
    pump.create()
    out = filled(pump, NUMBERS)
    ending = asyncio.ensure_future(pump.finish())
    await soon(written(pump, lambda: pump.written > 0))
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    pump.detach()
    successor = make_pump()
    successor.adopt()
    os.close(out)
    await soon(successor.finish())
    assert [r.data for r in await records(paths)] == NUMBERS.splitlines(keepends=True)
    assert troubles == []


async def test_the_end_does_not_wait_for_what_somebody_else_has_read(make_pump: MakePump, paths: LogPaths) -> None:
    """Any process of the tenant may open the FIFO, and read it too."""
    pump = make_pump()
    pump.create()
    out = filled(pump, NUMBERS)
    try:
        finishing = asyncio.ensure_future(pump.finish())
        await soon(written(pump, lambda: pump.written > 0))
        assert os.read(out, 1 << 20)
        await soon(finishing)
    finally:
        os.close(out)
    found = b"".join(r.data for r in await records(paths))
    assert found
    assert NUMBERS.startswith(found)
    assert paths.leftovers() == set()


async def test_a_successor_goes_on_where_the_last_pump_stopped(
    make_pump: MakePump, write: Write, paths: LogPaths
) -> None:
    pump = make_pump()
    pump.create()
    pump.start()
    script = "echo one; printf tw; read x; echo o; echo three"
    program = await write(pump, "sh", "-c", script, stdin=asyncio.subprocess.PIPE)
    assert program.stdin is not None
    await soon(written(pump, lambda: pump.written == 1))
    pump.detach()
    pump.detach()
    successor = make_pump()
    successor.adopt()
    successor.start()
    program.stdin.write(b"\n")
    await soon(written(successor, lambda: successor.written == 3))
    await program.wait()
    await successor.finish()
    assert [(r.seq, r.line, r.partial) for r in await records(paths)] == [
        (1, "one", False),
        (2, "two", False),
        (3, "three", False),
    ]


async def test_a_run_that_ended_unseen_is_written_down_once_also_after_a_later_run(
    make_pump: MakePump, write: Write, paths: LogPaths
) -> None:
    pump = make_pump()
    pump.create()
    pump.start()
    await (await write(pump, "sh", "-c", "echo one; printf two")).wait()
    await soon(written(pump, lambda: pump.written == 1))
    pump.detach()
    later = make_pump(run_id="r2")
    later.create()
    later.start()
    await (await write(later, "seq", "20000")).wait()
    await later.finish()
    assert paths.leftovers() == {("api", "r1")}
    for path in paths.fifos("api", "r1"):
        os.unlink(path)
    for _ in range(2):
        orphan = make_pump()
        orphan.adopt(alive=False)
        await orphan.finish()
    found = await records(paths)
    assert [r.line for r in found] == ["one", *map(str, range(1, 20001)), "two"]
    assert [r.seq for r in found] == list(range(1, 20003))
    assert paths.leftovers() == set()


async def test_a_torn_last_line_is_written_anew(make_pump: MakePump, write: Write, paths: LogPaths) -> None:
    pump = make_pump()
    pump.create()
    pump.start()
    await (await write(pump, "sh", "-c", "echo one; echo two")).wait()
    await soon(written(pump, lambda: pump.written == 2))
    pump.detach()
    log = Path(paths.log("api"))
    whole = log.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole)):
        log.write_bytes(whole[:length])
        successor = make_pump()
        successor.adopt(alive=False)
        successor.start()
        await soon(written(successor, lambda: successor.written == 2))  # noqa: B023 - awaited at once
        successor.detach()
        assert [(r.seq, r.line) for r in await records(paths)] == [(1, "one"), (2, "two")]


async def test_a_log_that_is_none_is_not_written_on(make_pump: MakePump, paths: LogPaths) -> None:
    os.makedirs(paths.tenant_dir)
    Path(paths.log("api")).write_bytes(b"not json\n")
    with pytest.raises(LogError, match="not a log record"):
        make_pump().adopt(alive=False)
    assert Path(paths.log("api")).read_bytes() == b"not json\n"


async def test_a_living_run_without_its_fifos_is_an_error(make_pump: MakePump) -> None:
    before = fds()
    with pytest.raises(LogError, match="is gone"):
        make_pump().adopt()
    assert fds() == before


async def test_create_leaves_nothing_when_it_fails(make_pump: MakePump, paths: LogPaths) -> None:
    first = make_pump()
    first.create()
    out, err = paths.fifos("api", "r1")
    os.unlink(out)
    before = fds()
    with pytest.raises(FileExistsError):
        make_pump().create()
    assert fds() == before
    assert os.listdir(paths.fifo_dir) == [os.path.basename(err)]


def test_directories_that_others_can_enter_are_refused(paths: LogPaths) -> None:
    os.makedirs(paths.fifo_dir)
    os.chmod(paths.fifo_dir, 0o755)
    with pytest.raises(LogError, match="only its owner can enter"):
        paths.prepare()


async def test_a_pump_with_a_hub_of_its_own(make_pump: MakePump, write: Write, paths: LogPaths) -> None:
    before = fds()
    pump = make_pump(hub=None)
    pump.create()
    pump.start()
    await (await write(pump, "echo", "hi")).wait()
    await pump.finish()
    assert [r.line for r in await records(paths)] == ["hi"]
    assert fds() == before


@pytest.mark.host
async def test_a_tenant_can_reopen_its_output_and_nothing_else(
    make_pump: MakePump, write: Write, paths: LogPaths, uid: int
) -> None:
    pump = make_pump(uid=uid, gid=uid)
    pump.create()
    pump.start()
    script = f"""
        echo a > /dev/stdout; echo b >> /proc/self/fd/1; echo c > /dev/stderr
        echo x > {paths.fifos("api", "r1")[0]} || echo refused
    """
    program = await write(pump, "sh", "-c", script, user=uid, group=uid, extra_groups=[])
    await program.wait()
    await pump.finish()
    found = await records(paths)
    assert [r.line for r in found if r.stream == "stdout"] == ["a", "b", "refused"]
    errors = [r.line for r in found if r.stream == "stderr"]
    assert errors[0] == "c"
    assert "Permission denied" in errors[1]
