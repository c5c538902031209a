"""What `deploy/` ships agrees with what it is for."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from pactown_runner import Settings
from pactown_runner.tiers import DEFAULT_TIERS, Tier
from tests.supervising import ROOT

DEPLOY = ROOT / "deploy"
TOML = DEPLOY / "pactown.toml"


# ---- pactown.toml


@pytest.fixture
def defaults(tmp_path: Path) -> Path:
    """The shipped file with all its settings in force: the lines that begin with `#` and no space."""
    path = tmp_path / "pactown.toml"
    path.write_text(re.sub(r"^#(?=[a-z\[])", "", TOML.read_text(), flags=re.MULTILINE))
    return path


def values(settings: Settings) -> dict[str, Any]:
    return {item.name: getattr(settings, item.name) for item in fields(settings)}


def test_as_shipped_it_changes_nothing() -> None:
    assert tomllib.loads(TOML.read_text()) == {}


def test_it_shows_every_setting_with_its_default(defaults: Path) -> None:
    shown = tomllib.loads(defaults.read_text())
    # Tokens have none.
    assert shown.keys() | {"tokens"} == {item.name for item in fields(Settings)}
    # Nothing falls to a user's own directories, whoever runs this: all four are given.
    assert values(Settings.load(config=defaults, environ={})) == values(Settings())


def test_it_shows_every_tier_as_a_whole(defaults: Path) -> None:
    tables = tomllib.loads(defaults.read_text())["tiers"]
    assert tuple(Tier(name=name).changed(table) for name, table in tables.items()) == DEFAULT_TIERS


def test_the_token_that_it_explains_is_one(tmp_path: Path) -> None:
    example = re.findall(r"^#     (.*)", TOML.read_text(), re.MULTILINE)
    (path := tmp_path / "pactown.toml").write_text("\n".join(example))
    (token,) = Settings.load(config=path, environ={}).tokens
    assert (token.name, token.role, token.tenant) == ("backend", "admin", "auth0|123456")


def test_each_setting_is_explained_above_it() -> None:
    settings, _, _ = TOML.read_text().partition("# ---- Tables")
    for above, line in itertools.pairwise(settings.splitlines()):
        assert above.startswith("# ") or not line.startswith("#") or line.startswith("# "), line


# ---- Capabilities

CAPABILITIES = re.findall(r"\w+", "".join(re.findall(r"cap_add: \[(.*)\]", (ROOT / "compose.yaml").read_text())))
UNIT = (DEPLOY / "pactown-runner.service").read_text()

LIFE = """
import asyncio, sys
from pathlib import Path
from pactown_runner import SandboxSpec, Settings, Supervisor

def spec(service, command, *namespaces):
    return SandboxSpec(user_id="demo", service_id=service, command=command, namespaces=frozenset(namespaces))

async def main(file):
    print("place")
    async with Supervisor(settings=Settings.load()) as supervisor:
        print("account")
        await supervisor.users.get_or_create("demo")
        print("program")
        outcome = await supervisor.run(spec("job", "true"))
        assert outcome.exit_code == 0, outcome
        print("SIGTERM")
        service = await supervisor.start(spec("service", "trap 'exit 7' TERM; echo; while :; do sleep 0.05; done"))
        async for _ in service.logs(follow=True):
            break
        outcome = await service.stop(grace=5)
        assert outcome.exit_code == 7, outcome
        print("network namespace")
        service = await supervisor.start(spec("alone", "exec sleep 1000", "net"))
        print("exec in it")
        done = await (await service.exec(["true"])).wait()
        assert done.exit_code == 0, done
        await service.stop()
        print("files")
        await supervisor.files.put("demo", "job", file, "file")
        await supervisor.users.export("demo", file.with_name("archive"))
        await supervisor.users.import_("demo", file.with_name("archive"))
        print("end of a user")
        await supervisor.users.delete("demo", delete_home=False)
        await supervisor.users.get_or_create("demo")
        await supervisor.users.delete("demo")
    print("all")

asyncio.run(main(Path(sys.argv[1])))
"""
"""Uses all that a capability is for, and says before each part what it is."""

NEEDED = {
    "CHOWN": "account",
    "DAC_OVERRIDE": "place or account",  # as the mode of the cgroup v2 mount is
    "FOWNER": "account",
    "KILL": "SIGTERM",
    "NET_ADMIN": "network namespace",
    "SETGID": "program",
    "SETPCAP": "program",
    "SETUID": "program",
    "SYS_ADMIN": "program",
    "SYS_PTRACE": "exec in it",
}
"""For each capability the part that fails without it."""


def reached(capabilities: list[str], settings: Settings, tmp_path: Path) -> str:
    """The last part of a life that root with these capabilities only begins."""
    (file := tmp_path / "file").touch()
    first, last = settings.uid_ranges[0]
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PACTOWN_USERS_BASE": str(settings.users_base),
        "PACTOWN_CGROUP_SLICE": settings.cgroup_slice,
        "PACTOWN_UID_RANGES": f"{first}-{last}",
    }
    bounding = ",".join(["-all", *(f"+{name.lower()}" for name in capabilities)])
    command = ["setpriv", f"--bounding-set={bounding}", "--no-new-privs", sys.executable, "-c", LIFE, str(file)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[-1]


@pytest.mark.host
def test_the_containers_capabilities_are_enough(settings: Settings, tmp_path: Path) -> None:
    assert reached(CAPABILITIES, settings, tmp_path) == "all"


@pytest.mark.host
@pytest.mark.parametrize("capability", NEEDED)
def test_each_of_them_is_needed(capability: str, settings: Settings, tmp_path: Path) -> None:
    rest = [name for name in CAPABILITIES if name != capability]
    assert reached(rest, settings, tmp_path) in NEEDED[capability].split(" or ")


def test_they_are_all_explained() -> None:
    assert sorted(CAPABILITIES) == sorted(NEEDED)
    explained = "".join(re.findall(r"^    #   ([A-Z_ ]+?)  ", (ROOT / "compose.yaml").read_text(), re.MULTILINE))
    assert all(name in explained for name in CAPABILITIES)


def test_the_unit_has_them_too_and_says_what_for() -> None:
    kept = re.findall(r"CAP_(\w+)", "\n".join(re.findall(r"^CapabilityBoundingSet=.*", UNIT, re.MULTILINE)))
    assert set(CAPABILITIES) <= set(kept)
    explained = " ".join(re.findall(r"^#   .*?((?: [A-Z_]{4,})+)$", UNIT, re.MULTILINE)).split()
    assert sorted(set(explained)) == sorted(kept)
