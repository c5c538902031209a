"""Restart policies and probes: what is refused, and what survives a detour through JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pactown_runner.errors import SpecError
from pactown_runner.specs import Probe, RestartMode, RestartPolicy, SandboxSpec

SECONDS = st.floats(0, 1e9, exclude_min=True) | st.integers(1, 10**9)
NO_SECONDS = [-1, -0.1, float("nan"), float("inf"), "1", None]
MODES: list[RestartMode] = ["no", "on-failure", "always"]


def spec(**options: Any) -> SandboxSpec:
    return SandboxSpec(**{"user_id": "auth0|1", "service_id": "api", "command": ["true"], **options})


def policies() -> st.SearchStrategy[RestartPolicy]:
    return st.builds(
        RestartPolicy,
        st.sampled_from(MODES),
        backoff=SECONDS,
        backoff_max=SECONDS,
        jitter=st.floats(0, 1),
        healthy_after=SECONDS,
        max_restarts=st.none() | st.integers(0, 10**6),
    )


def probes() -> st.SearchStrategy[Probe]:
    common = {"interval": SECONDS, "timeout": SECONDS, "failures": st.integers(1, 10**6), "within": SECONDS}
    paths = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E)).map("/".__add__)
    words = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1)
    return st.one_of(
        st.builds(Probe, port=st.integers(1, 65535), path=st.none() | paths, **common),
        st.builds(Probe, command=words | st.lists(words, min_size=1), **common),
    )


@settings(deadline=None)  # other tests may keep the machine busy
@given(policies(), st.none() | probes(), st.none() | probes())
def test_they_come_back_from_json(restart: RestartPolicy, ready: Probe | None, alive: Probe | None) -> None:
    written = spec(restart=restart, ready=ready, alive=alive)
    assert SandboxSpec.from_json(written.to_json()) == written


def test_a_spec_of_an_earlier_version() -> None:
    values = json.loads(spec().to_json())
    for name in ("restart", "ready", "alive"):
        del values[name]
    assert SandboxSpec.from_json(json.dumps(values)) == spec()


@pytest.mark.parametrize(
    "changed",
    [
        {"restart": {"mode": "sometimes"}},
        {"restart": {"mode": "no", "unknown": 1}},
        {"restart": "always"},
        {"restart": [1]},
        {"ready": {}},
        {"ready": "x"},
        {"ready": 5},
        {"alive": {"port": 1, "unknown": 1}},
        {"alive": {"port": "1"}},
    ],
    ids=repr,
)
def test_what_is_no_spec(changed: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        SandboxSpec.from_json(json.dumps(json.loads(spec().to_json()) | changed))


@pytest.mark.parametrize(
    "changed",
    [
        *({"restart": "always"}, {"restart": None}, {"ready": 8001}, {"alive": {"port": 8001}}),
        *({"limits": {"memory_max": "1M"}}, {"limits": "1M"}, {"env": None}, {"env": [("A", "b")]}),
    ],
    ids=repr,
)
def test_what_is_of_another_type(changed: dict[str, Any]) -> None:
    with pytest.raises(
        SpecError, match=f"{next(iter(changed))} must be (Limits|a (RestartPolicy|Probe|mapping)), not "
    ):
        spec(**changed)


@pytest.mark.parametrize("mode", ["", "never", "ALWAYS", None, True])
def test_no_restart_mode(mode: Any) -> None:
    with pytest.raises(SpecError, match="restart mode must be one of no, on-failure, always"):
        RestartPolicy(mode)


@pytest.mark.parametrize(
    "options",
    [
        *({name: value} for name in ("backoff", "backoff_max", "healthy_after") for value in NO_SECONDS),
        *({"jitter": value} for value in (-0.1, 1.1, float("nan"), "1", None)),
        *({"max_restarts": value} for value in (-1, 1.5, "1", True)),
    ],
    ids=repr,
)
def test_no_restart_policy(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=f"^{next(iter(options))} must be "):
        RestartPolicy("always", **options)


@pytest.mark.parametrize(
    "options",
    [{"backoff": 0, "backoff_max": 0, "healthy_after": 0, "jitter": 0, "max_restarts": 0}, {"jitter": 1}],
    ids=repr,
)
def test_policies_at_their_limits(options: dict[str, Any]) -> None:
    assert dataclasses.asdict(RestartPolicy("always", **options)).items() >= options.items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either a port or a command"),
        ({"port": 1, "command": "x"}, "either a port or a command"),
        ({"path": "/"}, "either a port or a command"),
        ({"path": "/", "command": "x"}, "a probe by path needs a port"),
        *(({"port": value}, "port must be") for value in (0, -1, 8001.0, "8001", True)),
        ({"port": 65536}, "from 1 to 65535"),
        *(({"port": 1, "path": value}, "begins with a slash") for value in ("", "x", "/ ", "/ä", "/x\r\nX: y", "/\0")),
        ({"port": 1, "path": b"/"}, "path must be a string"),
        *(({"command": value}, "command") for value in ("", [], [""], "a\0", ["a\0"], b"x", [1])),
        *(
            ({"port": 1, name: value}, f"{name} must be")
            for name in ("interval", "timeout", "within")
            for value in (0, *NO_SECONDS)
        ),
        *(({"port": 1, "failures": value}, "failures must be") for value in (0, -1, 1.5, "1", True, None)),
    ],
    ids=repr,
)
def test_no_probe(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Probe(**options)


@pytest.mark.parametrize(
    "options",
    [{"port": 1}, {"port": 65535, "path": "/"}, {"command": "x", "failures": 1, "within": 0.001}],
    ids=repr,
)
def test_probes_at_their_limits(options: dict[str, Any]) -> None:
    assert dataclasses.asdict(Probe(**options)).items() >= options.items()


@pytest.mark.parametrize("name", ["ready", "alive"])
def test_a_port_in_a_network_of_its_own_cannot_be_asked(name: str) -> None:
    with pytest.raises(SpecError, match="probe by a command"):
        spec(namespaces={"net"}, **{name: Probe(port=8001)})
    spec(namespaces={"net"}, **{name: Probe(command="true")})
    spec(namespaces={"ipc", "uts"}, **{name: Probe(port=8001)})
