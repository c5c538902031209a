from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from cgroups import Cgroup, FormatError, GoneError, Pressure, Stats, StatsPlan, files, read_all, read_stats
from cgroups.stats import parse_pressure
from tests.cgroups.conftest import Start
from tests.cgroups.fake import make_fake

TEXTS = {
    "memory.current": "1\n",
    "memory.peak": "2\n",
    "memory.swap.current": "3\n",
    "memory.events.local": "low 0\nhigh 4\nmax 5\noom 6\noom_kill 7\noom_group_kill 0\n",
    "memory.events": "low 99\nhigh 99\nmax 99\noom 99\noom_kill 99\noom_group_kill 99\n",
    "cpu.stat": "usage_usec 8\nuser_usec 9\nsystem_usec 10\nnr_periods 0\nnr_throttled 11\nthrottled_usec 12\n",
    "pids.current": "13\n",
    "pids.peak": "14\n",
    "pids.events": "max 15\n",
    "io.stat": "8:0 rbytes=21 wbytes=22 rios=23 wios=24 dbytes=9 dios=9\n"
    "7:0 \n254:0 rbytes=100 wbytes=200 rios=300 wios=400 dbytes=9 dios=9 cost.usage=9\n",
    "memory.pressure": "some avg10=1.50 avg60=0.00 avg300=0.00 total=16\nfull avg10=9 avg60=9 avg300=9 total=9\n",
    "cpu.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=17\n",
}
ALL = Stats(
    memory_current=1, memory_peak=2, memory_swap_current=3,
    memory_events_high=4, memory_events_max=5, oom=6, oom_kill=7,
    cpu_usage_usec=8, cpu_user_usec=9, cpu_system_usec=10, cpu_nr_throttled=11, cpu_throttled_usec=12,
    pids_current=13, pids_peak=14, pids_events_max=15,
    io_rbytes=121, io_wbytes=222, io_rios=323, io_wios=424,
)  # fmt: skip


def fill(group: Cgroup) -> None:
    for name, text in TEXTS.items():
        (group.path / name).write_text(text)


def test_every_counter_comes_from_its_file(fake: Cgroup) -> None:
    fill(fake)
    assert fake.stats() == ALL


def test_pressure_is_read_when_asked_for(fake: Cgroup) -> None:
    fill(fake)
    (fake.path / "io.pressure").unlink()
    assert fake.stats(pressure=True) == dataclasses.replace(
        ALL,
        memory_pressure=Pressure(avg10=1.5, total_usec=16, full_avg10=9.0, full_total_usec=9),
        cpu_pressure=Pressure(avg10=0.0, total_usec=17),
        io_pressure=None,
    )


def test_what_the_kernel_does_not_offer_is_none_and_never_zero(tmp_path: Path) -> None:
    with make_fake(tmp_path / "bare.slice", []) as group:
        assert group.stats() == Stats(cpu_usage_usec=0, cpu_user_usec=0, cpu_system_usec=0)


def test_an_older_kernel_without_peaks(fake: Cgroup) -> None:
    fill(fake)
    for name in ("memory.peak", "pids.peak"):
        (fake.path / name).unlink()
    assert fake.stats() == dataclasses.replace(ALL, memory_peak=None, pids_peak=None)


def test_files_are_looked_for_once_for_each_set_of_controllers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = StatsPlan()
    with (
        make_fake(tmp_path / "a.scope") as one,
        make_fake(tmp_path / "b.scope") as twin,
        make_fake(tmp_path / "c.scope", ["pids"]) as other,
    ):
        fill(twin)
        read_stats(one.fd, plan)
        looked: list[str] = []
        real = files.exists

        def exists(dir_fd: int, name: str) -> bool:
            looked.append(name)
            return real(dir_fd, name)

        monkeypatch.setattr(files, "exists", exists)
        assert read_stats(twin.fd, plan) == ALL
        assert looked == []
        assert read_stats(other.fd, plan).pids_current == 0
        assert looked != []
        assert read_stats(other.fd, plan).memory_current is None


def test_many_are_read_at_once(tmp_path: Path) -> None:
    with make_fake(tmp_path / "a.scope") as full, make_fake(tmp_path / "b.scope", []) as bare:
        fill(full)
        found = read_all({"full": full.fd, "bare": bare.fd}, pressure=True)
    assert list(found) == ["full", "bare"]
    assert found["full"] is not None
    assert found["full"].oom == ALL.oom
    assert found["full"].cpu_pressure == Pressure(avg10=0.0, total_usec=17)
    assert found["bare"] is not None
    assert found["bare"].oom is None
    assert found["bare"].io_pressure == Pressure(avg10=0.0, total_usec=0, full_avg10=0.0, full_total_usec=0)


def test_as_many_disks_as_there_are(fake: Cgroup) -> None:
    lines = [f"8:{number} rbytes=1 wbytes=10 rios=100 wios=1000 dbytes=0 dios=0\n" for number in range(1000)]
    (fake.path / "io.stat").write_text("".join(lines))
    stats = fake.stats()
    assert (stats.io_rbytes, stats.io_wbytes, stats.io_rios, stats.io_wios) == (1000, 10_000, 100_000, 1_000_000)


def test_garbage_is_an_error_and_not_a_number(fake: Cgroup) -> None:
    (fake.path / "memory.current").write_text("many\n")
    with pytest.raises(FormatError):
        fake.stats()


def test_stats_survive_json(fake: Cgroup) -> None:
    fill(fake)
    stats = fake.stats()
    assert Stats(**json.loads(json.dumps(stats.to_dict()))) == stats


@pytest.mark.host
def test_a_real_cgroup_counts_cpu_time(group: Cgroup, start: Start) -> None:
    start("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo ready; read x < /dev/zero")
    stats = group.stats(pressure=True)
    assert stats.cpu_usage_usec is not None
    assert stats.cpu_usage_usec > 0
    offered = group.controllers()
    assert (stats.memory_current is None) == ("memory" not in offered)
    assert (stats.pids_current is None) == ("pids" not in offered)
    has_pressure = os.path.exists(group.path / "cpu.pressure")
    assert (stats.cpu_pressure is not None) == has_pressure


def test_ooms_are_read_alone(fake: Cgroup, tmp_path: Path) -> None:
    fill(fake)
    assert fake.ooms() == 6
    with make_fake(tmp_path / "bare.slice", []) as group:
        assert group.ooms() is None


def test_no_disk_used_is_zero_and_no_io_controller_is_none(fake: Cgroup) -> None:
    assert fake.stats().io_rbytes == 0
    (fake.path / "io.stat").unlink()
    assert read_stats(fake.fd).io_rbytes is None


def test_pressure_with_more_words_is_read_all_the_same() -> None:
    usual = "some avg10=1.25 avg60=0.00 avg300=0.00 total=3\nfull avg10=2.50 avg60=0.00 avg300=0.00 total=4\n"
    expected = Pressure(avg10=1.25, total_usec=3, full_avg10=2.5, full_total_usec=4)
    assert parse_pressure(usual) == expected
    assert parse_pressure(usual.replace(" total", " avg900=7.00 total")) == expected
    assert parse_pressure(usual + "most avg10=0.00 total=5\n") == expected
    with pytest.raises(FormatError):
        parse_pressure(usual + "most=5\n")


@pytest.mark.parametrize("text", ["", "full avg10=0 total=0\n", "some avg10=x total=1\n", "some total=1\n", "some\n"])
def test_what_is_no_pressure_is_an_error(text: str) -> None:
    with pytest.raises(FormatError):
        parse_pressure(text)


@pytest.mark.host
def test_a_removed_cgroup_has_no_counters(group: Cgroup) -> None:
    assert group.stats().cpu_usage_usec == 0
    group.remove()
    with pytest.raises(GoneError):
        group.stats()


@pytest.mark.host
def test_one_that_is_gone_is_none_and_the_others_are_read(group: Cgroup) -> None:
    with group.child("a.scope", create=True) as one, group.child("b.scope", create=True) as gone:
        gone.remove()
        # Its name is another's by now, which is not meant.
        with group.child("b.scope", create=True):
            found = read_all({1: one.fd, 2: gone.fd}, pressure=True)
    assert found[1] is not None
    assert found[1].cpu_usage_usec == 0
    assert found[2] is None


@pytest.mark.host
def test_a_second_hold_outlives_the_first(group: Cgroup) -> None:
    with group.child("a.scope", create=True) as one, one.dup() as other:
        one.close()
        assert other.path == group.path / "a.scope"
        assert other.stats().cpu_usage_usec == 0
        other.remove()
        with pytest.raises(GoneError):
            other.stats()
