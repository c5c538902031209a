from __future__ import annotations

import fcntl
import os
import select
import sys
from pathlib import Path

import pytest

from pactown_runner.logs import LogPaths
from pactown_runner.logs.fifo import Fifo
from tests.logs.conftest import MakePump, Write, records


@pytest.fixture
def fifo(tmp_path: Path) -> Fifo:
    return Fifo(f"{tmp_path}/fifos/x.out")


def test_a_writer_that_closes_leaves_no_hang_up_to_spin_on(fifo: Fifo) -> None:
    fifo.create(os.geteuid(), os.getegid())
    os.write(fifo.child_fd, b"hello")
    assert fifo.waiting() == 5
    assert os.read(fifo.fd, 10) == b"hello"
    fifo.close_child()
    poll = select.poll()
    poll.register(fifo.fd, select.POLLIN)
    assert poll.poll(0) == []
    fifo.close()


def test_only_our_end_is_non_blocking_and_no_end_is_inherited(fifo: Fifo) -> None:
    fifo.create(os.geteuid(), os.getegid())
    assert os.get_blocking(fifo.child_fd)
    assert not os.get_blocking(fifo.fd)
    assert not os.get_inheritable(fifo.fd)
    assert not os.get_inheritable(fifo.child_fd)
    assert Path(fifo.path).stat().st_mode & 0o777 == 0o600
    assert Path(fifo.path).parent.stat().st_mode & 0o777 == 0o700
    fifo.close()
    fifo.close()


@pytest.mark.parametrize(
    "script",
    [
        # Each write a packet of its own, "O_DIRECT" in pipe(2).
        "import fcntl; fcntl.fcntl(1, fcntl.F_SETFL, os.O_DIRECT | os.O_RDWR); "
        "[os.write(1, b'x\\n') for _ in range(20000)]",
        # Pages of a file that the writer then takes away.
        "os.write(f, text); os.splice(f, 1, len(text), offset_src=0); os.ftruncate(f, 0)",
        # A pipe of the greatest size that a tenant may have.
        f"import fcntl; fcntl.fcntl(1, {fcntl.F_SETPIPE_SZ}, 1 << 20); os.write(1, text)",
        # Its end made non-blocking must not become ours, and what did not fit is the writer's loss.
        "os.set_blocking(1, False); os.write(1, text)",
    ],
)
async def test_what_a_tenant_does_to_its_pipe_harms_no_record(
    make_pump: MakePump, write: Write, paths: LogPaths, tmp_path: Path, script: str
) -> None:
    setup = f"import os; text = b'x\\n' * 20000; f = os.open({str(tmp_path / 'file')!r}, os.O_RDWR | os.O_CREAT);"
    pump = make_pump()
    pump.create()
    pump.start()
    program = await write(pump, sys.executable, "-c", f"{setup} {script}; os.write(1, b'end\\n')")
    assert await program.wait() == 0
    await pump.finish()
    assert [record.line for record in await records(paths)] == ["x"] * 20000 + ["end"]
