"""What is told and what is answered, as bytes."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pactown_runner import launcher
from pactown_runner.errors import LauncherError, StartError
from pactown_runner.launcher import STEPS, Call, Failure, LaunchSpec, StatusReader, start_error

SPEC = LaunchSpec(argv=["prog"], uid=1000, gid=1000)
PID = struct.pack("<IIiI", 1, 16, 42, 1)
REPORT = struct.pack("<IIiI8I5Q2Ii2I4x", 2, 114, 42, 1, *[1000] * 8, *[0] * 5, 3, 4, 0, 0, 2) + b"/a"
FAILED = struct.pack("<IIiIiI", 3, 24, 42, STEPS.index("execve"), 2, 0)


def test_steps_are_those_of_the_program() -> None:
    source = (Path(launcher.__file__).parent / "launch.c").read_text()
    body = source.partition("enum step {")[2].partition("}")[0]
    assert tuple(name.lower() for name in re.findall(r"STEP_(\w+),", body)) == STEPS


@pytest.mark.parametrize("records", [(PID, REPORT), (REPORT, PID), (REPORT,)])
def test_records_in_any_order_and_end_mean_started(records: tuple[bytes, ...]) -> None:
    reader = StatusReader(SPEC)
    for record in records:
        assert not reader.feed(record)
        assert reader.pid == 42
    assert reader.feed(b"")
    launched = reader.result()
    assert launched.pid == 42
    assert (launched.report.cgroup, launched.report.namespaces) == ("/a", ("net",))


@given(st.lists(st.integers(1, 30)))
def test_records_may_come_in_pieces(sizes: list[int]) -> None:
    reader = StatusReader(SPEC)
    rest = PID + REPORT
    for size in sizes:
        if rest:
            reader.feed(rest[:size])
            rest = rest[size:]
    if rest:
        reader.feed(rest)
    reader.feed(b"")
    assert reader.result().pid == 42


@pytest.mark.parametrize("records", [b"", PID, REPORT[:60], PID + REPORT[:113]])
def test_an_end_without_a_report_is_no_success(records: bytes) -> None:
    reader = StatusReader(SPEC)
    if records:
        reader.feed(records)
    reader.feed(b"")
    with pytest.raises(StartError) as caught:
        reader.result()
    assert (caught.value.step, caught.value.errno) == ("launcher", 0)


def test_a_failure_after_the_report_is_a_failure() -> None:
    reader = StatusReader(SPEC)
    reader.feed(PID + REPORT + FAILED)
    reader.feed(b"")
    with pytest.raises(StartError) as caught:
        reader.result()
    assert (caught.value.step, caught.value.errno) == ("execve", 2)


@pytest.mark.parametrize(
    "record", [struct.pack("<IIQ", 9, 16, 0), struct.pack("<II", 1, 7), struct.pack("<II", 2, 4097)]
)
def test_what_is_no_record_is_refused(record: bytes) -> None:
    with pytest.raises(LauncherError):
        StatusReader(SPEC).feed(record)


@pytest.mark.parametrize("step", [*STEPS, "launcher"])
@pytest.mark.parametrize("number", [0, 1, 2, 7, 11, 13])
def test_each_failure_has_a_message(step: str, number: int) -> None:
    error = start_error(Failure(step, number), SPEC)
    assert (error.step, error.errno) == (step, number)
    assert error.message


def test_how_to_compile_another_is_told() -> None:
    remedy = start_error(Failure("spec", 22), SPEC).remedy
    assert remedy == f"it may be of another version: run `{sys.executable} -m pactown_runner.launcher.build`"


def damaged(packed: bytes, at: int, value: int) -> bytes:
    return packed[:at] + struct.pack("<I", value) + packed[at + 4 :]


@pytest.mark.host
@pytest.mark.parametrize(
    "spec",
    [
        b"",
        SPEC.pack()[:-1],
        SPEC.pack() + b"x",
        SPEC.pack()[:-1] + b"x",
        damaged(SPEC.pack(), 0, 1),
        damaged(SPEC.pack(), 4, 2),
        damaged(SPEC.pack(), 8, 1 << 30),
        damaged(SPEC.pack(), 16, 0),
        damaged(SPEC.pack(), 20, 0),
        damaged(SPEC.pack(), 16, 0xFFFFFFFF),
        damaged(SPEC.pack(), 20, 0xFFFFFFFF),
        damaged(SPEC.pack(), 32, 0xFFFFFFFF),
        damaged(SPEC.pack(), 36, 0xFFFFFFFF),
        damaged(SPEC.pack(), 40, 0),
        damaged(SPEC.pack(), 40, 0xFFFFFFFF),
        damaged(SPEC.pack(), 40, 2),
        damaged(SPEC.pack(), 44, 0xFFFFFFFF),
        damaged(SPEC.pack(), 44, 1),
    ],
)
def test_a_spec_that_is_not_whole_starts_nothing(spec: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LaunchSpec, "pack", lambda _: spec)
    call = Call(SPEC, None)
    try:
        done = subprocess.run(call.argv, pass_fds=call.pass_fds, env={}, check=False)
        call.started()
        assert done.returncode == 127
        assert call.read()
        assert call.status.failure is not None
        assert call.status.failure.step == "spec"
        assert call.status.pid == 0
    finally:
        call.close()


@pytest.mark.parametrize(
    "words", [[], ["3"], ["3", "4", "-1", "x"], ["0", "4", "-1"], ["3", "2", "-1"], ["3", "4", "x"]]
)
def test_other_words_than_its_own_do_nothing(words: list[str]) -> None:
    call = [os.fspath(launcher.launcher_path()), *words]
    assert subprocess.run(call, env={}, check=False).returncode == 126
