"""What `deploy/` ships agrees with what it is for."""

from __future__ import annotations

import itertools
import re
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
