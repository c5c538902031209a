from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgroups import FormatError, IoMax, Limits

GIB = 2**30

_size = st.one_of(st.integers(0, 2**63 - 1), st.just("max"))
_cap = st.one_of(st.integers(1, 2**63 - 1), st.just("max"))
_io = st.dictionaries(st.sampled_from(["rbps", "wbps", "riops", "wiops"]), _cap, min_size=1)
_limits = st.builds(
    Limits,
    memory_max=st.none() | _cap,
    memory_high=st.none() | _cap,
    memory_low=st.none() | _size,
    memory_min=st.none() | _size,
    memory_swap_max=st.none() | _size,
    memory_oom_group=st.none() | st.booleans(),
    cpu_max=st.none() | st.floats(0.01, 1000) | st.just("max"),
    cpu_weight=st.none() | st.integers(1, 10_000),
    pids_max=st.none() | _cap,
    cpuset_cpus=st.none() | st.sets(st.integers(0, 8191), max_size=20).map(lambda cpus: ",".join(map(str, cpus))),
    io_max=st.none() | st.dictionaries(st.sampled_from(["8:0", "/dev/vda", "/dev/sdb1"]), _io, min_size=1),
    io_weight=st.none() | st.integers(1, 10_000),
)


def test_values_are_normalised_to_the_kernels_units() -> None:
    limits = Limits(memory_max="1G", memory_high="0.5GiB", cpu_max="50%", pids_max="64", memory_low="MAX")
    assert limits == Limits(memory_max=GIB, memory_high=GIB // 2, cpu_max=0.5, pids_max=64, memory_low="max")
    assert (limits.memory_max, limits.cpu_max, limits.pids_max) == (GIB, 0.5, 64)


def test_nothing_asked_for_is_false_and_writes_nothing() -> None:
    assert not Limits()
    assert Limits().render() == []
    assert Limits().controllers() == frozenset()
    assert Limits(memory_oom_group=False)
    assert Limits(memory_min=0)


def test_every_field_is_written_and_the_hard_limits_after_the_soft() -> None:
    limits = Limits(
        memory_max=400, memory_high=300, memory_low=200, memory_min=100, memory_swap_max=500,
        memory_oom_group=True, cpu_max=1.5, cpu_weight=200, pids_max=10,
        cpuset_cpus="1,0,3", io_weight=7,
        io_max={"8:16": {"wiops": "max", "rbps": "1M"}, "/dev/vda": "riops=5 wbps=1.5K"},
    )  # fmt: skip
    assert limits.render() == [
        ("memory.oom.group", "1"),
        ("memory.swap.max", "500"),
        ("memory.min", "100"),
        ("memory.low", "200"),
        ("memory.high", "300"),
        ("memory.max", "400"),
        ("cpu.weight", "200"),
        ("cpu.max", "150000 100000"),
        ("pids.max", "10"),
        ("cpuset.cpus", "0-1,3"),
        ("io.max", "/dev/vda wbps=1536 riops=5"),
        ("io.max", "8:16 rbps=1048576 wiops=max"),
        ("io.weight", "default 7"),
    ]
    assert limits.controllers() == {"memory", "cpu", "pids", "cpuset", "io"}


@pytest.mark.parametrize(
    ("limits", "swap"),
    [
        (Limits(memory_max="1G"), "0"),
        (Limits(memory_max="1G", memory_swap_max="2G"), str(2 * GIB)),
        (Limits(memory_max="1G", memory_swap_max="max"), "max"),
        (Limits(memory_max="max"), None),
        (Limits(memory_high="1G"), None),
    ],
)
def test_a_memory_limit_means_no_swap_unless_asked_for(limits: Limits, swap: str | None) -> None:
    assert dict(limits.render()).get("memory.swap.max") == swap
    assert limits.swap_implied == (swap == "0")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("memory_max", "lots"),
        ("memory_max", 0),
        ("memory_high", "0M"),
        ("memory_low", -1),
        ("memory_min", 1.5),
        ("memory_swap_max", True),
        ("memory_oom_group", 1),
        ("memory_oom_group", "yes"),
        ("cpu_max", 0),
        ("cpu_max", "fast"),
        ("cpu_weight", 0),
        ("cpu_weight", 10_001),
        ("cpu_weight", "100"),
        ("cpu_weight", True),
        ("pids_max", 0),
        ("pids_max", "1.5"),
        ("cpuset_cpus", "2-1"),
        ("cpuset_cpus", "a"),
        ("cpuset_cpus", "0,,1"),
        ("cpuset_cpus", "8192"),
        ("cpuset_cpus", 1),
        ("io_max", "8:0 rbps=1"),
        ("io_max", {}),
        ("io_weight", 0),
    ],
)
def test_a_bad_value_is_named_with_its_field_and_what_is_accepted(field: str, value: Any) -> None:
    with pytest.raises(FormatError) as caught:
        Limits(**{field: value})
    assert caught.value.message == f"{field} cannot be {value!r}"
    assert caught.value.remedy is not None
    assert caught.value.remedy.startswith("give ")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"rbps": 0}, "io_max rbps cannot be 0"),
        ({"wiops": "1M"}, "io_max wiops cannot be '1M'"),
        ({"rps": 1}, "no such disk limit: rps"),
        ("rbps", "io_max rbps cannot be ''"),
        ({}, "a disk has no limits"),
        ("", "a disk has no limits"),
        (5, "io_max of a disk cannot be 5"),
    ],
)
def test_a_bad_disk_limit_is_named(limits: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        Limits(io_max={"8:0": limits})
    assert caught.value.remedy


@pytest.mark.parametrize("device", ["", "a\nb", 8])
def test_a_bad_disk_is_named(device: Any) -> None:
    with pytest.raises(FormatError, match="io_max cannot be for "):
        Limits(io_max={device: "rbps=1"})


def test_disk_limits_can_be_given_in_three_ways() -> None:
    one, two, three = ({"8:0": limits} for limits in (IoMax(rbps="1K"), {"rbps": 1024}, "rbps=1KiB"))
    assert Limits(io_max=one) == Limits(io_max=two) == Limits(io_max=three)
    assert len({Limits(io_max=one), Limits(io_max=two)}) == 1
    assert Limits(io_max=one) != Limits(io_max={"8:0": "rbps=1M"})


def test_all_cpus_can_be_asked_for_again() -> None:
    assert Limits(cpuset_cpus="").render() == [("cpuset.cpus", "")]


def test_merging_lets_the_others_fields_win() -> None:
    base = Limits(memory_max="1G", cpu_max=1)
    assert base.merge(Limits(cpu_max=2, pids_max=5)) == Limits(memory_max="1G", cpu_max=2, pids_max=5)
    assert base.merge(Limits()) == base
    assert Limits().merge(base) == base


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(FormatError, match=r"no such limit: mem, memory\.max \(choose from cpu_max,"):
        Limits.from_dict({"mem": 1, "memory.max": 2, "pids_max": 3})


@given(_limits)
def test_limits_survive_json(limits: Limits) -> None:
    assert Limits.from_dict(json.loads(json.dumps(limits.to_dict()))) == limits


@given(_limits)
def test_what_is_written_belongs_to_the_controllers_named(limits: Limits) -> None:
    assert {name.partition(".")[0] for name, _ in limits.render()} == limits.controllers()
    assert bool(limits) == bool(limits.render())


@given(_limits, _limits)
def test_a_merged_field_is_the_others_or_ones_own(one: Limits, other: Limits) -> None:
    assert one.merge(other).to_dict() == one.to_dict() | other.to_dict()


def test_limits_can_be_kept_in_a_set_and_not_be_changed() -> None:
    assert len({Limits(memory_max="1G"), Limits(memory_max=GIB)}) == 1
    with pytest.raises(AttributeError):
        Limits().memory_max = 1  # type: ignore[misc]  # that it cannot be done is the point
