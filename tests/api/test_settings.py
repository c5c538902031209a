"""What is set for the API: tokens, tiers, where it listens; and what is refused."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest

from cgroups import Limits
from pactown_runner import Settings
from pactown_runner.errors import ConfigError
from pactown_runner.tiers import DEFAULT_TIERS, Tier, parse_tiers
from pactown_runner.tokens import Token, parse_tokens, token_of

HASH = hashlib.sha256(b"secret").hexdigest()

TOML = f"""
api_listen = "127.0.0.1:8600"
api_group = "operators"
api_hosts = ["runner.example"]
api_body_bytes = "64K"

[tokens.ci]
sha256 = "{HASH}"
role = "admin"
expires = 2027-01-01T00:00:00Z

[tokens.shop]
sha256 = "{HASH[::-1]}"
role = "read"
expires = "never"
tenant = "auth0|1"

[tiers.free]
max_sandboxes = 3
starts_per_hour = "none"

[tiers.own]
default_limits = {{memory_max = "64M"}}
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "pactown.toml"
    path.write_text(TOML)
    return path


def test_a_file_says_where_and_who(toml: Path) -> None:
    settings = Settings.load(config=toml, environ={})
    assert (settings.api_listen, settings.api_group) == ("127.0.0.1:8600", "operators")
    assert (settings.api_hosts, settings.api_body_bytes) == (("runner.example",), 64 << 10)
    ci, shop = settings.tokens
    assert (ci.name, ci.role, ci.expires, ci.tenant) == ("ci", "admin", 1798761600.0, None)
    assert (shop.role, shop.expires, shop.tenant) == ("read", math.inf, "auth0|1")
    assert settings.api_socket_path == settings.run_dir / "api.sock"
    assert Settings(api_socket="").api_socket_path is None
    assert Settings(api_socket="/srv/a.sock").api_socket_path == Path("/srv/a.sock")


def test_the_environment_says_the_same() -> None:
    environ = {
        "PACTOWN_API_LISTEN": "[::1]:80",
        "PACTOWN_API_HOSTS": "a.example,b.example",
        "PACTOWN_TOKENS": f'ci = {{sha256 = "{HASH}", role = "read", expires = "2027-01-01T00:00:00+01:00"}}',
        "PACTOWN_API_GROUP": "none",
    }
    settings = Settings.load(environ=environ)
    assert (settings.api_listen, settings.api_hosts) == ("[::1]:80", ("a.example", "b.example"))
    assert settings.tokens == (Token(name="ci", sha256=HASH, role="read", expires=1798758000.0),)


def test_a_tier_that_is_named_changes_what_it_says_and_no_more(toml: Path) -> None:
    tiers = {tier.name: tier for tier in Settings.load(config=toml, environ={}).tiers}
    assert list(tiers) == ["free", "basic", "pro", "enterprise", "own"]
    assert (tiers["free"].max_sandboxes, tiers["free"].starts_per_hour) == (3, None)
    assert tiers["free"].tenant_limits == DEFAULT_TIERS[0].tenant_limits
    assert tiers["own"] == Tier(name="own", default_limits=Limits(memory_max="64M"))
    assert tiers["basic"].to_dict()["tenant_limits"]["memory_max"] == 1 << 30
    assert Settings().tiers == DEFAULT_TIERS


@pytest.mark.parametrize(
    "settings",
    [
        {"api_listen": "127.0.0.1"},
        {"api_listen": "127.0.0.1:port"},
        {"api_listen": 80},
        {"api_listen": "127.0.0.1:65536"},
        {"api_socket": 5},
        {"api_group": ""},
        {"api_hosts": ("a b",)},
        {"api_hosts": ("http://a",)},
        {"api_origins": ("*",)},
        {"api_origins": ("https://a/path",)},
        {"api_connections": 0},
        {"api_timeout": 0},
        {"api_head_bytes": 10},
        {"tokens": (Token(name="a", sha256=HASH, role="read", expires=1.0),) * 2},
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Settings(**settings)


GOOD = {"sha256": HASH, "role": "read", "expires": "never"}


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({**GOOD, "colour": 1}, "colour"),
        ({"sha256": HASH, "role": "read"}, "no expires"),
        ({**GOOD, "expires": "2027-01-01T00:00:00"}, "time with its zone"),
        ({**GOOD, "expires": "soon"}, "time with its zone"),
        ({**GOOD, "expires": 5}, "time with its zone"),
        ({**GOOD, "role": "root"}, "read or admin"),
        ({**GOOD, "sha256": "s3cret"}, "64 hex digits"),
        ({**GOOD, "sha256": 5}, "64 hex digits"),
        ({**GOOD, "tenant": ""}, "tenant of token ci"),
        ({**GOOD, "tenant": 5}, "tenant of token ci"),
        ("s3cret", "token ci must be a table"),
    ],
)
def test_a_malformed_token_is_refused_and_not_shown(table: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        parse_tokens({"ci": table})
    assert "s3cret" not in str(caught.value)


def test_what_is_in_the_file_in_place_of_a_hash_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "pactown.toml"
    path.write_text('[tokens.ci]\nsha256 = "s3cret"\nrole = "read"\nexpires = "never"')
    with pytest.raises(ConfigError, match="64 hex digits") as caught:
        Settings.load(config=path, environ={})
    assert "s3cret" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["s3cret", 'ci = "s3cret"', "ci = s3cret"])
def test_what_is_in_a_variable_in_place_of_tokens_is_not_shown(text: str) -> None:
    with pytest.raises(ConfigError, match="PACTOWN_TOKENS") as caught:
        Settings.load(environ={"PACTOWN_TOKENS": text})
    assert "s3cret" not in f"{caught.value} {caught.value.remedy}"


@pytest.mark.parametrize("text", ["tokens = 5", "tiers = 5", "tokens = [1]"])
def test_what_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "pactown.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="must be tables"):
        Settings.load(config=path, environ={})


@pytest.mark.parametrize(
    "table",
    [
        {"colour": 1},
        {"max_sandboxes": -1},
        {"max_sandboxes": True},
        {"starts_per_hour": 0},
        {"starts_per_hour": math.inf},
        {"starts_per_hour": "often"},
        {"default_limits": {"memory_max": "lots"}},
        {"default_limits": 5},
        {"tenant_limits": {"memory_oom_group": True}},
        {"tenant_disk_max": 4095},
        {"tenant_disk_max": "lots"},
        {"tenant_disk_max": True},
        {"tenant_inodes_max": 0},
        {"tenant_inodes_max": "1K"},
        {"max_sandboxes": "max"},
        5,
    ],
)
def test_a_malformed_tier_is_refused(table: Any) -> None:
    with pytest.raises(ConfigError, match=r"tier free|of tier"):
        parse_tiers({"free": table})
    with pytest.raises(ConfigError, match="name"):
        parse_tiers({"a/b": {}})


def test_a_token_is_found_by_its_bytes_and_its_time() -> None:
    tokens = parse_tokens({"a": {**GOOD, "expires": "1970-01-01T00:01:40Z"}, "b": {**GOOD, "sha256": HASH[::-1]}})
    found = token_of("secret", tokens, 99.9)
    assert found is not None
    assert found.name == "a"
    assert token_of("secret", tokens, 100.0) is None
    assert token_of("Secret", tokens, 0.0) is None
    assert token_of("", tokens, 0.0) is None
    assert token_of("s\udcffecret", tokens, 0.0) is None
    assert token_of(HASH, tokens, 0.0) is None
