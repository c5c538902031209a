"""Limits on disks, on a disk of this test's own: a loop device."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cgroups import Limits, find_mount
from pactown_runner import Supervisor
from pactown_runner.errors import LimitsError
from tests.kernel.conftest import MIB, Measure, cgroup_of
from tests.supervising import eventually, line_of, python, soon, spec

if TYPE_CHECKING:
    from tests.hostguard import Run

pytestmark = pytest.mark.kernel

DIRECT = """
import mmap, os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
os.unlink(sys.argv[1])
block = mmap.mmap(-1, {size})
block.write(b"x" * {size})
def write(): os.pwrite(fd, block, 0)
def read(): os.preadv(fd, [block], 0)
print("begins", flush=True)
write()
began = time.monotonic()
for _ in range({times}):
    {act}()
print("took", time.monotonic() - began, flush=True)
"""


class Disk:
    """A disk, mounted where every tenant may write."""

    def __init__(self, device: str, directory: Path) -> None:
        self.device = device
        self.directory = directory
        status = os.stat(device)
        self.number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        self.scheduler = Path("/sys/block", Path(device).name, "queue/scheduler")


@pytest.fixture(scope="module")
def disk(test_run: Run) -> Iterator[Disk]:
    image, directory = test_run.directory / "disk", test_run.directory / "mounted"
    directory.mkdir()
    with ExitStack() as stack:
        with image.open("wb") as file:
            file.truncate(64 * MIB)
        stack.callback(image.unlink)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", image], check=True)
        made = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
        device = made.stdout.strip()
        stack.callback(lambda: subprocess.run(["losetup", "--detach", device], check=True))
        subprocess.run(["mount", device, directory], check=True)
        stack.callback(lambda: subprocess.run(["umount", directory], check=True))
        directory.chmod(0o1777)
        yield Disk(device, directory)


def direct(disk: Disk, act: str, *, size: int, times: int) -> list[str]:
    """A command that reads or writes past the page cache, and prints how long it took."""
    return [*python(DIRECT.format(act=act, size=size, times=times)), str(disk.directory / "file")]


@pytest.mark.parametrize(
    ("limit", "act", "size", "times", "seconds"),
    [("wbps=1M", "write", MIB // 4, 12, 3), ("rbps=2M", "read", MIB // 4, 24, 3), ("wiops=8", "write", 4096, 16, 2),
     ("riops=8", "read", 4096, 16, 2)],
)  # fmt: skip
async def test_a_disk_is_used_no_faster_than_allowed(
    supervisor: Supervisor, disk: Disk, measured: Measure, limit: str, act: str, size: int, times: int, seconds: float
) -> None:
    command = direct(disk, act, size=size, times=times)
    free = await supervisor.start(spec(command, service="free"))
    unlimited = float((await line_of(free, "took")).split()[1])
    sandbox = await supervisor.start(spec(command, limits=Limits(io_max={disk.device: limit})))
    name, _, value = sandbox.isolation.limits["io.max"].partition(" ")
    assert name == disk.number
    assert limit.replace("M", "") in value or str(int(limit[5:-1]) * MIB) in value
    took = float((await line_of(sandbox, "took")).split()[1])
    outcome = await soon(sandbox.wait())
    measured(f"s for {times} x {size} bytes with {limit}, and without", f"{took:.3g}, {unlimited:.3g}")
    # How much longer it may take on a busy machine is no limit's business.
    assert took > seconds * 0.7
    assert unlimited < took / 2
    assert outcome.stats is not None
    assert outcome.stats.io_wbytes is not None
    assert outcome.stats.io_rbytes is not None
    if act == "write":
        assert outcome.stats.io_wbytes >= size * times
        assert (outcome.stats.io_wios or 0) >= times
    else:
        assert outcome.stats.io_rbytes >= size * times
        assert (outcome.stats.io_rios or 0) >= times


def waits_for_disk(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("D")


async def test_a_limit_is_lifted_under_a_running_program(supervisor: Supervisor, disk: Disk) -> None:
    # The first block alone would take minutes.
    command = direct(disk, "write", size=MIB, times=20)
    sandbox = await supervisor.start(spec(command, limits=Limits(io_max={disk.device: {"wbps": "4K"}})))
    await line_of(sandbox, "begins")
    await eventually(partial(waits_for_disk, sandbox.pid))
    await sandbox.set_limits(Limits(io_max={disk.number: {"wbps": "max"}}))
    await line_of(sandbox, "took")
    assert (cgroup_of(sandbox) / "io.max").read_text() == ""


async def test_what_is_no_disk_is_refused_and_nothing_started(supervisor: Supervisor) -> None:
    with pytest.raises(LimitsError, match="not a block device"):
        await supervisor.start(spec("true", limits=Limits(io_max={"/dev/null": "wbps=1M"})))
    assert supervisor.list() == []


async def test_a_weight_is_refused_where_no_disk_heeds_it(supervisor: Supervisor, disk: Disk) -> None:
    assert "[bfq]" not in disk.scheduler.read_text()
    with pytest.raises(LimitsError, match="no disk here is known to heed a weight") as caught:
        await supervisor.start(spec("true", limits=Limits(io_weight=200)))
    assert "io.cost.qos" in str(caught.value.remedy)


async def test_a_weight_is_held_by_the_scheduler_that_heeds_it(supervisor: Supervisor, disk: Disk) -> None:
    with suppress(FileNotFoundError):
        subprocess.run(["modprobe", "bfq"], check=True)
    before = disk.scheduler.read_text().partition("[")[2].partition("]")[0]
    disk.scheduler.write_text("bfq")
    try:
        sandbox = await supervisor.start(spec("exec sleep 1000", limits=Limits(io_weight=200)))
        assert sandbox.isolation.limits["io.bfq.weight"].splitlines()[0].split()[-1] == "200"
        with pytest.raises(LimitsError):
            await sandbox.set_limits(Limits(io_weight=5000))
        assert "200" in (cgroup_of(sandbox) / "io.bfq.weight").read_text()
        await sandbox.kill()
    finally:
        disk.scheduler.write_text(before)


async def test_a_weight_is_held_by_the_cost_model(supervisor: Supervisor, disk: Disk) -> None:
    qos = find_mount().path / "io.cost.qos"
    qos.write_text(f"{disk.number} enable=1")
    try:
        sandbox = await supervisor.start(spec("exec sleep 1000", limits=Limits(io_weight=5000)))
        assert sandbox.isolation.limits["io.weight"] == "default 5000"
        await sandbox.kill()
    finally:
        qos.write_text(f"{disk.number} enable=0")
