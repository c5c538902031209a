"""Limits are written all or none; on a fake tree, with real refusals from procfs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cgroups import Cgroup, LimitRefusedError, Limits, NotSupportedError, files, writing
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
    monkeypatch.setattr(writing, "_OWN_CGROUP", tmp_path / "proc")
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
    with pytest.raises(NotSupportedError, match="lacks controllers: io, rdma"):
        fake.enable(["rdma", "cpu", "io"])
    assert contents_of(fake, "cgroup.subtree_control") == ""
