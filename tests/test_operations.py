"""`docs/operations.md`: what needs no systemd is typed here as it stands there; the rest is in `tests/kernel`.

Directories, and how a second host is reached, are the test's.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pactown_runner import Settings
from tests.sections import commands
from tests.supervising import ROOT, eventually, listens

pytestmark = pytest.mark.host

PROGRAM = [sys.executable, "-m", "pactown_runner"]


def typed(text: str, environ: dict[str, str]) -> str:
    """Type commands into a shell that ends with the first that fails; what they print."""
    done = subprocess.run(["sh", "-e"], input=text, text=True, capture_output=True, check=False, env=environ)
    assert done.returncode == 0, (text, done.stdout, done.stderr)
    return done.stdout


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


# ---- Install


def test_what_is_installed_is_all_that_the_rest_needs(tmp_path: Path) -> None:
    """From a wheel of these sources, by its name; what it depends on is the test's own."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(
        build, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "PACTOWN_REQUIRE_LAUNCHER": "1"}
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "__pycache__" in name]
    (place := tmp_path / "bin").mkdir()
    _apt, *rest = commands("operations.md", "Install")[0].splitlines()
    *install, doctor = [
        line.replace("/opt/pactown", f"{tmp_path}/pactown").replace("/usr/local/bin", str(place)) for line in rest
    ]
    environ = {**os.environ, "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_FIND_LINKS": str(tmp_path)}
    upgrade = commands("operations.md", "Upgrade")[0].replace("/opt/pactown", f"{tmp_path}/pactown")
    typed("\n".join([*install, upgrade]), environ)
    shared = tmp_path / "pactown/share/pactown-runner"
    shipped = {path.name: path.read_text() for path in (ROOT / "deploy").iterdir()}
    assert {path.name: path.read_text() for path in shared.iterdir()} == shipped
    # It is the installed package that runs, not the one beside this test.
    (packages,) = [path for path in sys.path if path.endswith("site-packages")]
    environ = {"PATH": f"{place}:/usr/bin:/bin:/usr/sbin", "PYTHONPATH": packages}
    assert (
        "ok    launcher"
        in subprocess.run(
            doctor, shell=True, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False
        ).stdout
    )


# ---- Back up and move


Host = Callable[[str], str]


@pytest.fixture
def environ(settings: Settings, tmp_path: Path) -> dict[str, str]:
    """Leads `pactown-runner` to this test's state, and through `ssh new-host` to another."""
    first, last = settings.uid_ranges[0]
    new = settings.users_base / "new-host"
    new.mkdir(mode=0o711)
    (place := tmp_path / "bin").mkdir()
    run = f'PYTHONPATH={ROOT} exec {shlex.join(PROGRAM)} "$@"'
    script(place / "pactown-runner", run)
    script(
        place / "ssh",
        f'[ "$1 $2" = "new-host pactown-runner" ] || exit 255\nshift 2\nPACTOWN_USERS_BASE={new} {run}',
    )
    return {
        "PATH": f"{place}:{os.environ['PATH']}",
        "PACTOWN_USERS_BASE": str(settings.users_base),
        "PACTOWN_CGROUP_SLICE": settings.cgroup_slice,
        "PACTOWN_UID_RANGES": f"{first}-{last}",
    }


@pytest.fixture
def here(settings: Settings, environ: dict[str, str], tmp_path: Path) -> Iterator[Host]:
    """Types commands where a server looks after a state; their directories are the test's."""
    places = {
        "/run/pactown": settings.run_dir,
        "/var/lib/pactown": settings.state_dir,
        "/etc/pactown": ROOT / "deploy",
        "/var/backups/pactown": tmp_path / "backups",
    }

    def type_(text: str) -> str:
        for theirs, ours in places.items():
            text = text.replace(theirs, str(ours))
        return typed(text, environ)

    with subprocess.Popen(["pactown-runner", "serve"], env=environ, stderr=subprocess.DEVNULL) as server:
        yield type_
        server.terminate()


START = """
curl -fsS --unix-socket /run/pactown/api.sock http://localhost/runner/sandboxes --json '
  {"user_id": "demo", "service_id": "web", "command": "echo kept >file; exec sleep 1000"}'
"""


async def started(here: Host, settings: Settings) -> None:
    """A tenant with a service that has left a file."""
    await eventually(lambda: listens(settings.run_dir / "api.sock"))
    json.loads(here(START))
    await eventually(lambda: list(settings.users_base.glob("pactown_*/sandboxes/web/file")))


async def test_a_backup_has_homes_registry_and_settings(here: Host, settings: Settings, tmp_path: Path) -> None:
    await started(here, settings)
    (commands_,) = commands("operations.md", "Back up")
    here(commands_)
    # On the same day once more.
    here(commands_)
    (day,) = (tmp_path / "backups").iterdir()
    (archive,) = day.glob("*.tar.gz")
    assert {path.name for path in day.iterdir()} == {archive.name, "pactown.toml", "registry.db", "users.json"}
    assert {path.stat().st_mode & 0o077 for path in day.iterdir()} == {0}
    with tarfile.open(archive) as content:
        assert any(name.endswith("sandboxes/web/file") for name in content.getnames())
    # The copy is a registry: with it the tenant is known.
    copy = replace(settings, state_dir=tmp_path / "copy")
    copy.state_dir.mkdir(mode=0o700)
    (day / "registry.db").rename(copy.state_dir / "registry.db")
    listed = here(f"PACTOWN_STATE_DIR={copy.state_dir} pactown-runner users list --json")
    assert [user["saas_user_id"] for user in json.loads(listed)["users"]] == ["demo"]
    assert json.loads(here(f"curl -fsS --unix-socket {settings.run_dir}/api.sock http://localhost/runner/sandboxes"))[
        "count"
    ]


async def test_a_tenant_moves_to_another_host(here: Host, settings: Settings, tmp_path: Path) -> None:
    await started(here, settings)
    (tmp_path / "backups").mkdir()
    (commands_,) = commands("operations.md", "Move a tenant to another host")
    here(commands_)
    assert not list(settings.users_base.glob("pactown_*"))
    (moved,) = settings.users_base.glob("new-host/pactown_*/sandboxes/web/file")
    assert moved.read_text() == "kept\n"
    assert json.loads(here("pactown-runner users list --json"))["count"] == 0


# ---- Remove


async def test_nothing_of_a_server_is_left(settings: Settings, environ: dict[str, str]) -> None:
    with subprocess.Popen(["pactown-runner", "serve"], env=environ, stderr=subprocess.DEVNULL) as server:
        await eventually(lambda: listens(settings.run_dir / "api.sock"))
        server.terminate()
    typed("pactown-runner purge --yes", environ)
    assert not settings.state_dir.exists()
