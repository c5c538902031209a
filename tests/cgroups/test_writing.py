"""Limits are written all or none; on a fake tree, with real refusals from procfs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cgroups import (
    Cgroup,
    FormatError,
    LimitRefusedError,
    Limits,
    NotSupportedError,
    controllers,
    devices,
    files,
    writing,
)
from tests.cgroups.fake import make_fake

HEADING = "Filename\tType\tSize\tUsed\tPriority\n"


def contents(group: Cgroup) -> dict[str, str]:
    return {path.name: path.read_text().strip() for path in group.path.iterdir() if path.is_file()}


def replace(group: Cgroup, name: str, target: str) -> None:
    """Put a real kernel file in the place of a plain one."""
    (group.path / name).unlink()
    (group.path / name).symlink_to(target)


def test_every_file_is_written_and_read_back(fake: Cgroup) -> None:
    held = fake.apply(Limits(memory_max="1M", cpu_max=0.5, pids_max=7))
    assert held == {
        "memory.swap.max": "0",
        "memory.max": "1048576",
        "cpu.max": "50000 100000",
        "pids.max": "7",
    }
    assert held.items() <= contents(fake).items()


def test_no_limits_touch_nothing(fake: Cgroup) -> None:
    before = contents(fake)
    assert fake.apply(Limits()) == {}
    assert contents(fake) == before


def test_a_refused_value_takes_back_those_written_before(fake: Cgroup) -> None:
    # The real kernel answers EINVAL to "max" there.
    replace(fake, "pids.max", "/proc/self/oom_score_adj")
    before = contents(fake)
    with pytest.raises(LimitRefusedError) as caught:
        fake.apply(Limits(memory_max="1M", memory_high="1K", cpu_weight=5, pids_max="max"))
    assert contents(fake) == before
    assert caught.value.path == str(fake.path / "pids.max")
    assert caught.value.value == "max"
    assert "EINVAL" in str(caught.value)


def test_what_cannot_be_put_back_is_said(fake: Cgroup, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(fake, "pids.max", "/proc/self/oom_score_adj")
    real = files.write

    def write(dir_fd: int, name: str, text: str) -> None:
        if name == "pids.max":
            (fake.path / "memory.min").unlink(missing_ok=True)
        real(dir_fd, name, text)

    monkeypatch.setattr(files, "write", write)
    with pytest.raises(LimitRefusedError) as caught:
        fake.apply(Limits(memory_min=1, cpu_weight=5, pids_max="max"))
    assert contents_of(fake, "cpu.weight") == "100"
    assert [note.partition(":")[0] for note in caught.value.__notes__] == ["memory.min could not be set back to '0'"]


def contents_of(group: Cgroup, name: str) -> str:
    return (group.path / name).read_text().strip()


def test_all_missing_controllers_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    with make_fake(tmp_path / "poor.slice", ["cpu"]) as group:
        before = contents(group)
        with pytest.raises(NotSupportedError, match=r"poor.slice lacks controllers: memory, pids \(") as caught:
            group.apply(Limits(cpu_max=1, pids_max=1, memory_max="1M"))
        assert caught.value.value == "memory, pids"
        assert contents(group) == before


def test_what_the_parent_has_and_did_not_enable_is_in_the_remedy(tmp_path: Path) -> None:
    with (
        make_fake(tmp_path / "top.slice") as parent,
        make_fake(tmp_path / "top.slice/below.scope", ["cpu"]) as group,
        pytest.raises(NotSupportedError) as caught,
    ):
        group.apply(Limits(memory_max="1M", pids_max=1))
    assert caught.value.remedy == f"write '+memory +pids' to {parent.path}/cgroup.subtree_control"


def test_a_controller_that_v1_holds_is_in_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proc").write_text("4:memory:/\n0::/\n")
    monkeypatch.setattr(controllers, "_OWN_CGROUP", tmp_path / "proc")
    with make_fake(tmp_path / "poor.slice", []) as group, pytest.raises(NotSupportedError) as caught:
        group.apply(Limits(memory_max="1M", pids_max=1))
    assert caught.value.remedy is not None
    held, far = caught.value.remedy.split("; ", 1)
    assert held.startswith("memory: in use by cgroup v1")
    assert "systemd.unified_cgroup_hierarchy=1" in caught.value.remedy
    assert "pids: enable in cgroup.subtree_control" in far


def test_a_missing_file_of_a_controller_that_is_there(fake: Cgroup) -> None:
    (fake.path / "memory.oom.group").unlink()
    before = contents(fake)
    with pytest.raises(NotSupportedError, match=r"memory\.oom\.group: this kernel has no such control file"):
        fake.apply(Limits(pids_max=1, memory_oom_group=True))
    assert contents(fake) == before


@pytest.mark.parametrize("swaps", [HEADING, None])
def test_implied_no_swap_holds_where_there_is_no_swap(
    fake: Cgroup, swaps: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_SWAPS", tmp_path / "swaps")
    if swaps is not None:
        (tmp_path / "swaps").write_text(swaps)
    (fake.path / "memory.swap.max").unlink()
    assert fake.apply(Limits(memory_max="1M")) == {"memory.max": "1048576"}


@pytest.mark.parametrize(
    ("limits", "swaps"),
    [
        (Limits(memory_max="1M"), HEADING + "/swapfile file 1 0 -2\n"),
        (Limits(memory_max="1M", memory_swap_max=0), HEADING),
        (Limits(memory_swap_max="1M"), HEADING),
    ],
)
def test_swap_that_cannot_be_limited_is_an_error(
    fake: Cgroup, limits: Limits, swaps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_SWAPS", tmp_path / "swaps")
    (tmp_path / "swaps").write_text(swaps)
    (fake.path / "memory.swap.max").unlink()
    before = contents(fake)
    with pytest.raises(NotSupportedError, match="does not account for swap"):
        fake.apply(limits)
    assert contents(fake) == before


# Lowering memory.max: what the kernel would do is played by hooks on the gate to its files.


class Kernel:
    """Notes what is written, and changes `memory.current` after so many writes of `memory.high`."""

    def __init__(self, group: Cgroup, monkeypatch: pytest.MonkeyPatch, *, used: int, after: int, then: int) -> None:
        self.written: list[str] = []
        self._group, self._left, self._then = group, after, then
        self._real = files.write
        (group.path / "memory.current").write_text(f"{used}\n")
        monkeypatch.setattr(files, "write", self._write)
        monkeypatch.setattr(writing, "RECLAIM_TIMEOUT", 0.1)

    def _write(self, dir_fd: int, name: str, text: str) -> None:
        self.written.append(f"{name} {text}")
        self._real(dir_fd, name, text)
        if name == "memory.high":
            self._left -= 1
            if self._left == 0:
                (self._group.path / "memory.current").write_text(f"{self._then}\n")


def test_memory_goes_down_in_steps_that_kill_nothing(fake: Cgroup, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(fake, monkeypatch, used=9 * 4096, after=2, then=5 * 4096)
    assert fake.apply(Limits(memory_max=5 * 4096)) == {
        "memory.swap.max": "0", "memory.high": "max", "memory.max": "20480",
    }  # fmt: skip
    assert kernel.written == [
        "memory.swap.max 0", "memory.high 20480", "memory.high 20480", "memory.max 20480", "memory.high max",
    ]  # fmt: skip


@pytest.mark.parametrize(("high", "writes"), [(3 * 4096, ["12288"]), (7 * 4096, ["20480", "28672"])])
def test_a_wanted_high_is_held_in_the_end(
    fake: Cgroup, monkeypatch: pytest.MonkeyPatch, high: int, writes: list[str]
) -> None:
    kernel = Kernel(fake, monkeypatch, used=9 * 4096, after=1, then=3 * 4096)
    held = fake.apply(Limits(memory_max=5 * 4096, memory_high=high))
    assert (held["memory.high"], held["memory.max"]) == (str(high), "20480")
    assert [line.split()[1] for line in kernel.written if line.startswith("memory.high")] == writes


def test_memory_that_cannot_be_reclaimed_refuses_the_lower_limit(fake: Cgroup, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(fake, monkeypatch, used=9 * 4096, after=0, then=0)
    before = contents(fake)
    with pytest.raises(LimitRefusedError, match=r"memory\.max to 20 KiB: 36 KiB are in use") as caught:
        fake.apply(Limits(memory_max=5 * 4096, memory_high=7 * 4096, cpu_weight=5))
    assert caught.value.remedy
    assert contents(fake) == before
    assert not any(line.startswith("memory.max") for line in kernel.written)


@pytest.mark.parametrize(("used", "former", "new"), [(0, "max", 4096), (4096, "8192", 8192), (4096, "4096", 8192)])
def test_a_new_cgroup_and_a_higher_limit_take_no_extra_steps(
    fake: Cgroup, monkeypatch: pytest.MonkeyPatch, used: int, former: str, new: int
) -> None:
    (fake.path / "memory.max").write_text(f"{former}\n")
    kernel = Kernel(fake, monkeypatch, used=used, after=0, then=0)
    fake.apply(Limits(memory_max=new))
    assert kernel.written == ["memory.swap.max 0", f"memory.max {new}"]


# Disks and CPUs


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A disk 8:0 with a partition 8:1, as sysfs shows them; its scheduler can be chosen."""
    disk = tmp_path / "sys/devices/sda"
    (disk / "sda1").mkdir(parents=True)
    (disk / "dev").write_text("8:0\n")
    (disk / "sda1/dev").write_text("8:1\n")
    (disk / "sda1/partition").write_text("1\n")
    (disk / "queue").mkdir()
    (disk / "queue/scheduler").write_text("[none] bfq\n")
    numbers = tmp_path / "sys/dev"
    numbers.mkdir()
    (numbers / "8:0").symlink_to(disk)
    (numbers / "8:1").symlink_to(disk / "sda1")
    monkeypatch.setattr(devices, "_SYS_BLOCK", numbers)
    monkeypatch.setattr(devices, "_SCHEDULERS", disk.parent)
    return disk


@pytest.mark.usefixtures("disks")
def test_a_partition_stands_for_its_disk(fake: Cgroup) -> None:
    assert fake.apply(Limits(io_max={"8:1": "wbps=1M"})) == {"io.max": "8:0 wbps=1048576"}
    with pytest.raises(FormatError, match="io_max names one disk twice"):
        fake.apply(Limits(io_max={"8:1": "wbps=1M", "8:0": "wbps=2M"}))


@pytest.mark.usefixtures("disks")
@pytest.mark.parametrize(
    ("device", "reason"), [("9:9", "no such disk"), ("/dev/null", "not a block device"), ("/nowhere", "No such file")]
)
def test_what_is_no_disk_is_refused_and_nothing_is_written(fake: Cgroup, device: str, reason: str) -> None:
    before = contents(fake)
    with pytest.raises(NotSupportedError, match=f"cannot limit the disk {device}: .*{reason}"):
        fake.apply(Limits(memory_max="1M", io_max={device: "wbps=1M"}))
    assert contents(fake) == before


@pytest.mark.usefixtures("disks")
@pytest.mark.parametrize(
    ("former", "restored"),
    [
        ("", "8:0 rbps=max wbps=max riops=max wiops=max"),
        ("8:16 rbps=1 wbps=max riops=max wiops=max\n8:0 rbps=max wbps=7 riops=max wiops=max\n",
         "8:0 rbps=max wbps=7 riops=max wiops=max"),
    ],
)  # fmt: skip
def test_a_disk_gets_back_what_it_had(fake: Cgroup, former: str, restored: str) -> None:
    (fake.path / "io.max").write_text(former)
    (fake.path / "cpuset.cpus.effective").write_text("0\n")
    with pytest.raises(NotSupportedError):
        fake.apply(Limits(io_max={"8:0": "wbps=1M"}, io_weight=5))
    assert (fake.path / "io.max").read_text() == former
    refuse_weight(fake)
    with pytest.raises(LimitRefusedError):
        fake.apply(Limits(io_max={"8:0": "wbps=1M"}, io_weight=5))
    assert contents_of(fake, "io.max") == restored


def refuse_weight(group: Cgroup) -> None:
    (devices._SCHEDULERS / "sda/queue/scheduler").write_text("none [bfq]\n")
    (group.path / "io.bfq.weight").symlink_to("/proc/self/oom_score_adj")


def test_a_weight_goes_where_it_has_an_effect(tmp_path: Path, disks: Path) -> None:
    (tmp_path / "io.cost.qos").write_text("8:0 enable=0 ctrl=auto\n")
    with make_fake(tmp_path / "top") as group:
        with pytest.raises(NotSupportedError, match="no disk here is known to heed a weight") as caught:
            group.apply(Limits(io_weight=50))
        assert "bfq" in str(caught.value.remedy)
        (tmp_path / "io.cost.qos").write_text("8:0 enable=1 ctrl=auto\n")
        assert group.apply(Limits(io_weight=50)) == {"io.weight": "default 50"}
        (group.path / "io.bfq.weight").write_text("default 100\n")
        (disks / "queue/scheduler").write_text("none [bfq]\n")
        assert group.apply(Limits(io_weight=60)) == {"io.weight": "default 60", "io.bfq.weight": "default 60"}


def test_cpus_that_are_not_to_be_had_are_refused(fake: Cgroup) -> None:
    (fake.path / "cpuset.cpus.effective").write_text("0-1\n")
    assert fake.apply(Limits(cpuset_cpus="0-1,3")) == {"cpuset.cpus": "0-1,3"}
    assert fake.apply(Limits(cpuset_cpus="")) == {"cpuset.cpus": ""}
    with pytest.raises(LimitRefusedError, match="the kernel has the CPUs 0-1 instead"):
        fake.apply(Limits(cpuset_cpus="1,7"))
    assert contents_of(fake, "cpuset.cpus") == ""


def test_enabling_writes_only_what_is_new(fake: Cgroup) -> None:
    fake.enable(["pids", "memory"])
    assert contents_of(fake, "cgroup.subtree_control") == "+memory +pids"
    (fake.path / "cgroup.subtree_control").write_text("cpu memory\n")
    assert fake.enabled() == {"cpu", "memory"}
    fake.enable(["cpu", "pids"])
    assert contents_of(fake, "cgroup.subtree_control") == "+pids"
    (fake.path / "cgroup.subtree_control").write_text("cpu memory\n")
    fake.enable(["cpu"])
    assert contents_of(fake, "cgroup.subtree_control") == "cpu memory"


def test_enabling_what_is_missing_names_all_of_it(fake: Cgroup) -> None:
    with pytest.raises(NotSupportedError, match="lacks controllers: hugetlb, rdma"):
        fake.enable(["rdma", "cpu", "hugetlb"])
    assert contents_of(fake, "cgroup.subtree_control") == ""
