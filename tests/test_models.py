"""Values: what is refused, and what survives a detour through JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgroups import Limits, Stats
from pactown_runner.client.answers import record_of
from pactown_runner.errors import RunnerError, SpecError
from pactown_runner.models import IsolatedUser, IsolationReport, LogRecord, Outcome, State
from pactown_runner.specs import SandboxSpec, check_service_id, check_user_id

SERVICE_ALPHABET = "ABCXYZabcxyz0189._-"


def spec(**options: Any) -> SandboxSpec:
    return SandboxSpec(**{"user_id": "auth0|1", "service_id": "api", "command": ["true"], **options})


# ---- Ids


@settings(deadline=None)  # other tests may keep the machine busy
@given(st.text(min_size=1, max_size=200).filter(lambda text: "\0" not in text))
def test_a_user_id_is_kept_as_it_is(user_id: str) -> None:
    try:
        raw = user_id.encode()
    except UnicodeEncodeError:
        with pytest.raises(SpecError):
            check_user_id(user_id)
    else:
        assert check_user_id(user_id).encode() == raw


@pytest.mark.parametrize("user_id", ["", "a\0", "x" * 1025, "ü" * 513, "\ud800", None, 5, b"auth0"])
def test_no_user_id(user_id: Any) -> None:
    with pytest.raises(SpecError):
        check_user_id(user_id)


def test_the_longest_user_id() -> None:
    assert check_user_id("ü" * 512) == "ü" * 512


@settings(deadline=None)
@given(
    st.text(SERVICE_ALPHABET, min_size=1, max_size=63).filter(lambda text: text[0] not in "._-"),
)
def test_service_ids_of_the_alphabet(service_id: str) -> None:
    assert check_service_id(service_id) == service_id


@settings(deadline=None)
@given(st.text())
def test_service_ids_never_lead_elsewhere(text: str) -> None:
    try:
        check_service_id(text)
    except SpecError:
        return
    assert PurePosixPath(text).name == text
    assert not set(text) & set("/\0\n \\")
    assert text[0] not in "._-"


@pytest.mark.parametrize(
    "service_id",
    ["", ".", "..", "_job", "-x", ".x", "a/b", "a b", "a\n", "é", "x" * 64, "\N{ARABIC-INDIC DIGIT THREE}", None, 5],
)
def test_no_service_id(service_id: Any) -> None:
    with pytest.raises(SpecError):
        check_service_id(service_id)


# ---- Specs


@pytest.mark.parametrize(
    "options",
    [
        {"command": ""},
        {"command": []},
        {"command": [""]},
        {"command": ["a\0b"]},
        {"command": "a\0b"},
        {"command": b"true"},
        {"command": [b"true"]},
        {"command": ["true", 5]},
        {"command": None},
        {"command": {"true"}},
        {"env": {"": "x"}},
        {"env": {"A=": "x"}},
        {"env": {"A\0": "x"}},
        {"env": {"A": "\0"}},
        {"env": {"A": 5}},
        {"env": {5: "A"}},
        {"cwd": "a\0"},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
        {"timeout": "5"},
        {"stop_grace": -0.1},
        {"stop_grace": "x"},
        {"namespaces": {"pid"}},
        {"namespaces": "net"},
        {"user_id": None},
        {"service_id": None},
    ],
    ids=repr,
)
def test_what_can_never_be_right_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError) as caught:
        spec(**options)
    assert isinstance(caught.value, RunnerError | ValueError)
    assert caught.value.code == "bad-spec"


def test_a_string_is_a_shell_command_and_a_list_is_not() -> None:
    assert spec(command="a && b").argv == ("/bin/sh", "-c", "a && b")
    assert spec(command=["a", "&&", "b"]).argv == ("a", "&&", "b")
    assert spec(command=("a", "")).argv == ("a", "")


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=()), max_size=20)


@settings(deadline=None)
@given(
    st.builds(
        SandboxSpec,
        user_id=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=50),
        service_id=st.just("api"),
        command=texts.filter(bool) | st.lists(texts, min_size=1).filter(lambda words: bool(words[0])),
        env=st.dictionaries(st.text("ABC", min_size=1), texts),
        cwd=st.none() | texts,
        limits=st.none() | st.builds(Limits, memory_max=st.integers(1, 1 << 40), cpu_max=st.sampled_from([0.5, "50%"])),
        timeout=st.none() | st.floats(0, 1e6),
        stdin=st.booleans(),
        stop_grace=st.none() | st.floats(0, 1e6),
        namespaces=st.frozensets(st.sampled_from(["net", "ipc", "uts"])),
    )
)
def test_a_spec_survives_being_written_down(before: SandboxSpec) -> None:
    after = SandboxSpec.from_json(before.to_json())
    assert after == before
    assert after.argv == before.argv


def test_paths_are_written_down_as_text() -> None:
    assert SandboxSpec.from_json(spec(cwd=PurePosixPath("a/b"), namespaces=["net"]).to_json()) == spec(
        cwd="a/b", namespaces=frozenset({"net"})
    )


@pytest.mark.parametrize(
    "text",
    ["", "5", "null", "[]", "{}", '{"of": "another version"}', '{"limits": {"colour": 5}, "namespaces": []}', "{"],
)
def test_what_is_no_spec_says_so(text: str) -> None:
    with pytest.raises(SpecError):
        SandboxSpec.from_json(text)


def test_a_spec_with_a_foreign_field_or_type_is_refused() -> None:
    values = json.loads(spec().to_json())
    for change in ({"colour": "red"}, {"user_id": 5}, {"command": None}, {"timeout": "x"}):
        with pytest.raises(SpecError):
            SandboxSpec.from_json(json.dumps(values | change))


def test_values_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec().user_id = "other"  # type: ignore[misc]  # that is the point


# ---- Users, reports, outcomes, records


def test_a_user_as_a_dictionary() -> None:
    user = IsolatedUser("auth0|1", "pactown_0123abcd", 60001, 60001, Path("/home/pactown_users/pactown_0123abcd"), 1.5)
    assert user.key == "0123abcd"
    assert json.loads(json.dumps(user.to_dict())) == {
        "saas_user_id": "auth0|1",
        "linux_username": "pactown_0123abcd",
        "linux_uid": 60001,
        "linux_gid": 60001,
        "home_dir": "/home/pactown_users/pactown_0123abcd",
        "created_at": 1.5,
    }


def test_a_report_survives_json() -> None:
    report = IsolationReport(
        mode="root",
        uid=(1, 1, 1),
        gid=(1, 1, 1),
        groups=(),
        capabilities={"bounding": 0},
        no_new_privs=True,
        root_regainable=False,
        cgroup="/a/b",
        placement="born",
        keyring=True,
        namespaces=("net",),
        limits={"memory.max": "4096"},
    )
    assert IsolationReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@pytest.mark.parametrize(("reason", "code", "ok"), [("exited", 0, True), ("exited", 1, False), ("stopped", 0, False)])
def test_what_is_fine(reason: Any, code: int, ok: bool) -> None:
    outcome = Outcome(reason=reason, exit_code=code, stats=Stats(oom_kill=1))
    assert outcome.ok is ok
    assert json.loads(json.dumps(outcome.to_dict()))["stats"]["oom_kill"] == 1


def test_a_record_is_bytes_and_text() -> None:
    record = LogRecord(1.0, 1, "stdout", b"caf\xe9")
    assert (record.line, record.data) == ("caf\N{REPLACEMENT CHARACTER}", b"caf\xe9\n")
    assert LogRecord(1.0, 1, "stdout", b"x", partial=True).data == b"x"


@pytest.mark.parametrize("raw", [b"caf\xc3\xa9", b"caf\xe9", b""])
def test_a_record_as_a_dictionary(raw: bytes) -> None:
    record = LogRecord(1.5, 7, "stderr", raw, partial=True, dropped_lines=2, dropped_bytes=3)
    values = json.loads(json.dumps(record.to_dict()))
    assert record_of(values) == record  # as a client has it
    assert values["line"] == record.line
    assert ("line_b64" in values) is (raw == b"caf\xe9")


def test_states_are_words() -> None:
    assert [f"{state}" for state in State] == [
        "starting",
        "running",
        "frozen",
        "stopping",
        "backing-off",
        "crash-looping",
        "ended",
    ]
