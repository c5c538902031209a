"""Settings: where they come from, in which order, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cgroups import Limits
from pactown_runner.config import DEFAULT_UID_RANGES, DEFAULT_USERS_BASE, Settings
from pactown_runner.errors import ConfigError

TOML = """
stop_grace = 3
on_crash = "kill"
state_dir = "/srv/state"
uid_ranges = [[70000, 70010], [80000, 80000]]
[default_limits]
memory_max = "256M"
cpu_max = 0.5
[tenant_limits]
pids_max = 100
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "pactown.toml"
    path.write_text(TOML)
    return path


@pytest.fixture(autouse=True)
def no_file_of_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pactown_runner.config.DEFAULT_CONFIG", tmp_path / "of-the-host.toml")


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)


@pytest.fixture
def as_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)


@pytest.mark.usefixtures("as_root")
def test_the_defaults_are_the_constructors() -> None:
    settings = Settings.load(environ={})
    assert settings == Settings()
    assert settings.users_base == Path("/home/pactown_users")
    assert (settings.state_dir, settings.run_dir) == (Path("/var/lib/pactown"), Path("/run/pactown"))
    assert settings.uid_ranges == DEFAULT_UID_RANGES == ((60001, 61183), (65536, 99999))
    assert settings.root_mode


def test_a_file_says_everything(toml: Path) -> None:
    settings = Settings.load(config=toml, environ={})
    assert (settings.stop_grace, settings.on_crash, settings.state_dir) == (3.0, "kill", Path("/srv/state"))
    assert settings.uid_ranges == ((70000, 70010), (80000, 80000))
    assert settings.default_limits == Limits(memory_max=256 << 20, cpu_max=0.5)
    assert settings.tenant_limits == Limits(pids_max=100)


def test_the_environment_comes_before_the_file_and_arguments_before_both(toml: Path) -> None:
    environ = {
        "PACTOWN_CONFIG": str(toml),
        "PACTOWN_STOP_GRACE": "4.5",
        "PACTOWN_UID_RANGES": "70000-70001,90000-90009",
        "PACTOWN_DEFAULT_LIMITS": 'memory_max = "1G", pids_max = 5',
        "PACTOWN_SOMETHING_ELSE": "not ours to judge",
        "STOP_GRACE": "99",
    }
    settings = Settings.load(environ=environ)
    assert (settings.stop_grace, settings.on_crash) == (4.5, "kill")
    assert settings.uid_ranges == ((70000, 70001), (90000, 90009))
    assert settings.default_limits == Limits(memory_max="1G", pids_max=5)
    settings = Settings.load(environ=environ, stop_grace=1.0, on_crash=None)
    assert (settings.stop_grace, settings.on_crash) == (1.0, "kill")


def test_the_hosts_file_is_read_if_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "of-the-host.toml").write_text("stop_grace = 7")
    assert Settings.load(environ={}).stop_grace == 7


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("colour = 'red'", "unknown settings: colour"),
        ("stop_grace = 'soon'", "stop_grace"),
        ("stop_grace = -1", "stop_grace"),
        ("takeover_interval = 0", "takeover_interval"),
        ("takeover_interval = nan", "takeover_interval"),
        ("throttled_interval = 0", "throttled_interval"),
        ("throttled_share = 1.5", "throttled_share"),
        ("cpu_pressure_share = 0", "cpu_pressure_share"),
        ("memory_pressure_share = nan", "memory_pressure_share"),
        ("memory_pressure_share = 'much'", "memory_pressure_share"),
        ("max_sandboxes = 2.5", "max_sandboxes"),
        ("max_sandboxes = true", "max_sandboxes"),
        ("stop_grace = true", "stop_grace"),
        ("on_crash = 'panic'", "on_crash"),
        ("state_dir = 'relative'", "state_dir"),
        ("state_dir = 5", "state_dir"),
        ("cgroup_slice = 'pactown'", "cgroup_slice"),
        ("cgroup_slice = '../x.slice'", "cgroup_slice"),
        ("uid_ranges = [[0, 5]]", "uid range"),
        ("uid_ranges = [[5, 4]]", "uid range"),
        ("uid_ranges = [[1, 4294967295]]", "uid range"),
        ("uid_ranges = []", "uid_ranges"),
        ("uid_ranges = 5", "uid_ranges"),
        ("uid_ranges = [['a', 'b']]", "uid_ranges"),
        ("default_limits = {memory_max = 'lots'}", "default_limits"),
        ("default_limits = {colour = 5}", "default_limits"),
        ("default_limits = 5", "default_limits"),
        ("tenant_limits = {memory_oom_group = true}", "memory_oom_group"),
        ("tenant_disk_max = 4095", "tenant_disk_max must be a whole number, 4096 or more"),
        ("tenant_disk_max = 'lots'", "tenant_disk_max"),
        ("tenant_disk_max = true", "tenant_disk_max"),
        ("tenant_inodes_max = 0", "tenant_inodes_max must be a whole number, 1 or more"),
        ("tenant_inodes_max = '1K'", "tenant_inodes_max"),
        ("archive_max_bytes = '-1'", "archive_max_bytes"),
        ("archive_max_entries = 0", "archive_max_entries"),
        ("archive_max_depth = 0", "archive_max_depth"),
        ("archive_max_ratio = 0", "archive_max_ratio"),
        ("max_sandboxes = -1", "max_sandboxes must be a whole number, 0 or more"),
        ("max_sandboxes = 'many'", "max_sandboxes"),
        ("max_sandboxes_per_user = -1", "max_sandboxes_per_user"),
        ("max_sandboxes_per_user = []", "max_sandboxes_per_user"),
        ("starts_per_minute = 0", "starts_per_minute must be a number above 0"),
        ("starts_per_minute = -1", "starts_per_minute"),
        ("starts_per_minute = inf", "starts_per_minute"),
        ("starts_per_minute = nan", "starts_per_minute"),
        ("starts_per_minute = 'often'", "starts_per_minute"),
        ("memory_reserve = -1", "memory_reserve"),
        ("memory_reserve = 1.5", "memory_reserve"),
        ("memory_reserve = 'max'", "memory_reserve"),
        ("memory_reserve = 'none'", "memory_reserve"),  # 0 says that
        ("not toml", "cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_by_name(toml: Path, text: str, says: str) -> None:
    toml.write_text(text)
    with pytest.raises(ConfigError, match=says):
        Settings.load(config=toml, environ={})


def admission_of(settings: Settings) -> tuple[int | None, int | None, float | None, int]:
    return (
        settings.max_sandboxes,
        settings.max_sandboxes_per_user,
        settings.starts_per_minute,
        settings.memory_reserve,
    )


def test_nothing_but_some_memory_for_the_host_is_kept_from_tenants_by_default() -> None:
    assert admission_of(Settings.load(environ={})) == (None, None, None, 64 << 20)


def test_how_much_may_run_is_said_by_file_and_environment(toml: Path) -> None:
    toml.write_text(
        'max_sandboxes = 1000\nmax_sandboxes_per_user = 0\nstarts_per_minute = 7.5\nmemory_reserve = "1.5G"'
    )
    assert admission_of(Settings.load(config=toml, environ={})) == (1000, 0, 7.5, 3 << 29)
    environ = {
        "PACTOWN_MAX_SANDBOXES": "none",
        "PACTOWN_MAX_SANDBOXES_PER_USER": "20",
        "PACTOWN_STARTS_PER_MINUTE": "none",
        "PACTOWN_MEMORY_RESERVE": "0",
    }
    assert admission_of(Settings.load(config=toml, environ=environ)) == (None, 20, None, 0)
    toml.write_text('max_sandboxes = "none"\nstarts_per_minute = "none"\nmemory_reserve = 4096')
    assert admission_of(Settings.load(config=toml, environ={})) == (None, None, None, 4096)
    assert admission_of(Settings.load(config=toml, environ={}, max_sandboxes=3))[0] == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("STOP_GRACE", "x"),
        ("MAX_SANDBOXES", "x"),
        ("MAX_SANDBOXES_PER_USER", "2.5"),
        ("STARTS_PER_MINUTE", "one"),
        ("MEMORY_RESERVE", "none"),
        ("UID_RANGES", "5"),
        ("UID_RANGES", "a-b"),
        ("DEFAULT_LIMITS", "memory_max"),
    ],
)
def test_the_environment_is_named_when_it_is_wrong(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"PACTOWN_{name}"):
        Settings.load(environ={f"PACTOWN_{name}": value})


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("PACTOWN_MAX_SANDBOXS", "PACTOWN_MAX_SANDBOXES"),
        ("PACTOWN_max_sandboxes", "PACTOWN_MAX_SANDBOXES"),
        ("PACTOWN_USER_BASE", "PACTOWN_USERS_BASE"),
        ("PACTOWN_DEFAULT_LIMIT", "PACTOWN_DEFAULT_LIMITS"),
        ("PACTOWN_TIER", "PACTOWN_TIERS"),
    ],
)
def test_a_variable_that_is_misspelled_is_refused(variable: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"{variable} is no setting") as caught:
        Settings.load(environ={variable: "0"})
    assert f"{meant} is one" in (caught.value.remedy or "")


def test_variables_of_others_are_theirs() -> None:
    ours = ("PACTOWN_SERVER", "PACTOWN_TOKEN", "PACTOWN_KERNEL_LANE")
    injected = ("PACTOWN_PORT", "PACTOWN_SERVICE_HOST", "PACTOWN_PORT_8600_TCP_ADDR")  # by Kubernetes
    names = [*ours, *injected, "PACTOWN_", "PACTOWN_RUNNER_COMPLETE"]
    assert Settings.load(environ=dict.fromkeys(names, "x")) == Settings.load(environ={})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("uid_ranges", text) for text in ("[[70100,70999]]", "70100:70999", "70100")),
        *(("default_limits", text) for text in ('{"memory_max":"64M"}', "memory_max=64M", "64M")),
        *(("tenant_limits", text) for text in ("memory_max = 64M}", "memory = 5")),
        *(("tiers", text) for text in ("free", '{"free": {}}')),
        ("tokens", "read"),
    ],
)
def test_what_a_variable_has_to_look_like_is_told(name: str, value: str) -> None:
    variable = f"PACTOWN_{name.upper()}"
    with pytest.raises(ConfigError, match=f"^{variable}: {name} cannot be ") as caught:
        Settings.load(environ={variable: value})
    remedy = caught.value.remedy or ""
    assert remedy.startswith("write ")
    # And so it is right.
    Settings.load(environ={variable: remedy.removeprefix("write ").replace("HASH", 64 * "0")})


def test_a_table_may_have_its_braces() -> None:
    for text in ('memory_max = "64M", pids_max = 64', ' { memory_max = "64M", pids_max = 64 }'):
        assert Settings.load(environ={"PACTOWN_DEFAULT_LIMITS": text}).default_limits == Limits(
            memory_max="64M", pids_max=64
        )
    (tier,) = Settings.load(environ={"PACTOWN_TIERS": "{ free = { max_sandboxes = 7 } }"}).tiers[:1]
    assert (tier.name, tier.max_sandboxes) == ("free", 7)


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="colour") as caught:
        Settings.load(environ={}, colour="red")
    assert "stop_grace" in (caught.value.remedy or "")


def test_what_is_not_to_be_watched_is_said_by_a_word() -> None:
    settings = Settings.load(environ={"PACTOWN_CPU_PRESSURE_SHARE": "none", "PACTOWN_THROTTLED_SHARE": "0.25"})
    assert (settings.cpu_pressure_share, settings.throttled_share) == (None, 0.25)


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_file_that_is_named_has_to_be_there(tmp_path: Path, how: str) -> None:
    missing = tmp_path / "missing.toml"
    given: dict[str, Any] = {"config": missing} if how == "argument" else {}
    with pytest.raises(ConfigError, match="does not exist"):
        Settings.load(environ={} if given else {"PACTOWN_CONFIG": str(missing)}, **given)


def test_a_users_base_of_its_own_keeps_its_state() -> None:
    settings = Settings.load(environ={}, users_base=Path("/srv/users"))
    assert settings.state_dir == Path("/srv/users/.state")
    assert (settings.log_dir, settings.run_dir) == (Path("/srv/users/.state/log"), Path("/srv/users/.state/run"))
    assert Settings.load(environ={}, users_base=Path("/srv/users"), log_dir=Path("/l")).log_dir == Path("/l")


def test_of_another_state_nothing_lies_where_the_configured_one_does() -> None:
    environ = {f"PACTOWN_{name}_DIR": f"/srv/{name}" for name in ("STATE", "LOG", "RUN")}
    environ["PACTOWN_STOP_GRACE"] = "3"
    settings = Settings.load(environ=environ, users_base=Path("/srv/other"))
    below = Path("/srv/other/.state")
    assert (settings.state_dir, settings.log_dir, settings.run_dir) == (below, below / "log", below / "run")
    assert settings.stop_grace == 3
    # Given once more it is the same one.
    for environ["PACTOWN_USERS_BASE"] in ("/srv/users", "/srv/users/"):
        settings = Settings.load(environ=environ, users_base=Path("/srv/users"))
        assert (settings.state_dir, settings.log_dir) == (Path("/srv/STATE"), Path("/srv/LOG"))
    assert Settings.load(environ=environ, users_base=DEFAULT_USERS_BASE).state_dir == Path("/var/lib/pactown")


@pytest.mark.usefixtures("as_user")
def test_without_root_what_cannot_be_written_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pactown_runner.config._writable", lambda path: path == Path("/var/log/pactown"))
    settings = Settings.load(environ={"HOME": "/home/me", "XDG_RUNTIME_DIR": "/run/user/1000"})
    assert not settings.root_mode
    assert settings.users_base == Path("/home/me/.local/share/pactown/users")
    assert settings.state_dir == Path("/home/me/.local/state/pactown")
    assert settings.run_dir == Path("/run/user/1000/pactown")
    assert settings.log_dir == Path("/var/log/pactown")
    settings = Settings.load(environ={"HOME": "/home/me", "XDG_STATE_HOME": "/s", "XDG_DATA_HOME": "/d"})
    assert (settings.users_base, settings.state_dir) == (Path("/d/pactown/users"), Path("/s/pactown"))
    assert settings.run_dir == Path("/s/pactown/pactown")


@pytest.mark.usefixtures("as_user")
def test_a_directory_that_cannot_be_looked_into_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    assert Settings.load(environ={"HOME": "/home/me"}).stop_grace == 10


def test_how_much_of_the_disk_is_a_tenants(toml: Path) -> None:
    settings = Settings.load(environ={})
    assert (settings.tenant_disk_max, settings.tenant_inodes_max) == (None, None)
    toml.write_text('tenant_disk_max = "10G"\ntenant_inodes_max = 100000')
    settings = Settings.load(config=toml, environ={})
    assert (settings.tenant_disk_max, settings.tenant_inodes_max) == (10 << 30, 100_000)
    environ = {"PACTOWN_TENANT_DISK_MAX": "max", "PACTOWN_TENANT_INODES_MAX": "50"}
    settings = Settings.load(config=toml, environ=environ)
    assert (settings.tenant_disk_max, settings.tenant_inodes_max) == ("max", 50)
    settings = Settings.load(config=toml, environ={"PACTOWN_TENANT_DISK_MAX": "none"}, tenant_inodes_max="max")
    assert (settings.tenant_disk_max, settings.tenant_inodes_max) == (None, "max")
    toml.write_text(
        '[tiers.pro]\ntenant_disk_max = "10G"\n[tiers.free]\ntenant_disk_max = "max"\ntenant_inodes_max = 50'
    )
    found = Settings.load(config=toml, environ={}).tiers
    tiers = {tier.name: (tier.tenant_disk_max, tier.tenant_inodes_max) for tier in found}
    assert (tiers["pro"], tiers["free"], tiers["basic"]) == ((10 << 30, None), ("max", 50), (None, None))
