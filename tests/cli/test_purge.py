"""`purge`: nothing is left, and nothing is taken that is not ours."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pactown_runner import Settings
from pactown_runner.home_dirs import keep_home
from pactown_runner.registry import Registry, Removal
from pactown_runner.users import Users
from tests import hostsweep
from tests.cli.conftest import ROOT, USER, Cli, Start, run_words

if TYPE_CHECKING:
    from tests.hostguard import Run

pytestmark = pytest.mark.host

MESS = """
mkdir -p deep/er "odd
name" && touch deep/er/file .hidden -- -rf && ln -s / root && ln -s /etc/passwd passwd && mkfifo fifo
chmod 000 deep/er deep; touch /tmp/$1 /dev/shm/$1; ipcmk --shmem 4096 >&2"""


def _left(settings: Settings, run: Run) -> list[str]:
    cgroups = [str(path) for path in hostsweep.cgroup_dirs(settings.cgroup_slice.__eq__)]
    found = [*hostsweep.accounts(run.claim), *hostsweep.ipc_objects(run.claim), *hostsweep.processes(run.claim)]
    files = [leak.what for leak in hostsweep.files(run.claim) if leak.what != f"file {run.directory}"]
    return [*cgroups, *files, *(leak.what for leak in found)]


def test_nothing_is_left(cli: Cli, settings: Settings, test_run: Run) -> None:
    assert cli(*run_words("sh", "-c", MESS, "sh", f"{test_run.name}-public")).returncode == 0
    assert cli("run", "--user", "other", "--", "true").returncode == 0
    assert len(_left(settings, test_run)) >= 7  # two logins, two groups, two files, shared memory

    done = cli("purge", "--yes")
    assert (done.returncode, done.stderr) == (0, b"")
    assert USER.encode() in done.stdout
    assert not settings.users_base.exists()
    assert _left(settings, test_run) == []
    assert Path("/etc/passwd").stat().st_size > 0

    again = cli("purge", "--yes")
    assert (again.returncode, again.stdout) == (0, b"nothing to remove\n")
    assert not settings.users_base.exists()


def test_it_asks_first(cli: Cli, settings: Settings) -> None:
    cli(*run_words("true"))
    for words in (["purge"], ["purge", "--json"]):
        done = cli(*words)
        assert done.returncode == 1
        assert b"give --yes" in done.stdout + done.stderr
    refused = cli("purge", input=b"n\n")
    assert (refused.returncode, refused.stderr) == (1, b"nothing was removed\n")
    assert (settings.state_dir / "registry.db").exists()
    assert len(list(settings.users_base.glob("pactown_*"))) == 1
    assert cli("purge", input=b"y\n").returncode == 0
    assert not settings.users_base.exists()


def test_live_owner_is_respected(cli: Cli, start: Start, settings: Settings, test_run: Run) -> None:
    process = start(*run_words("sh", "-c", "echo ready; exec sleep 1000"))
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"

    refused = cli("purge", "--yes")
    assert refused.returncode == 1
    assert b"1 live process uses" in refused.stderr
    assert b"try: stop them first" in refused.stderr
    assert process.poll() is None

    forced = cli("purge", "--yes", "--force", "--json")
    assert forced.returncode == 0, forced
    document = json.loads(forced.stdout)
    assert document["failed"] == []
    assert any("probe.scope" in what for what in document["removed"])
    assert process.wait(60) in (125, 137)
    assert _left(settings, test_run) == []


def test_what_a_killed_runner_left_is_removed(cli: Cli, start: Start, settings: Settings, test_run: Run) -> None:
    process = start(*run_words("sh", "-c", "echo ready; exec sleep 1000"))
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait(60)

    done = cli("purge", "--yes")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"running sandbox  pactown-" in done.stdout
    assert _left(settings, test_run) == []


def test_what_cannot_be_removed_is_named_and_not_forgotten(cli: Cli, settings: Settings, test_run: Run) -> None:
    cli(*run_words("true"))
    home = next(settings.users_base.glob("pactown_*"))
    login = pwd.getpwnam(home.name)
    foreign = home / "roots"
    foreign.mkdir()
    (foreign / "file").touch()

    done = cli("purge", "--yes", "--json")
    assert done.returncode == 1
    failed = json.loads(done.stdout)["failed"]
    assert any(login.pw_name in entry["what"] and "not empty" in entry["why"] for entry in failed)
    assert foreign.is_dir()
    assert pwd.getpwnam(login.pw_name) == login

    hostsweep.remove_file(foreign)
    assert cli("purge", "--yes").returncode == 0
    assert _left(settings, test_run) == []


def test_a_home_that_was_kept_goes_as_well(cli: Cli, settings: Settings, test_run: Run) -> None:
    cli(*run_words("touch", "file"))
    with Registry(settings.state_dir / "registry.db") as registry:
        users = Users(settings, registry)
        user = users.begin_removal(USER, Removal(delete_home=False))
        keep_home(user.home_dir, user.linux_uid)
        users.remove_account(user)
    done = cli("purge", "--yes")
    assert (done.returncode, done.stderr) == (0, b"")
    assert not settings.users_base.exists()
    assert _left(settings, test_run) == []


def test_foreign_files_are_left_alone(cli: Cli, settings: Settings) -> None:
    cli(*run_words("true"))
    mine = settings.users_base / "operators-own"
    mine.touch()
    assert cli("purge", "--yes").returncode == 0
    assert os.listdir(settings.users_base) == ["operators-own"]


_WITHOUT_ROOT = """
import json, os, pathlib, sys
import pactown_runner.purge, encodings.idna
from pactown_runner import Settings
from pactown_runner.registry import Registry
from pactown_runner.users import Users
base, uid, kept = pathlib.Path(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
settings = Settings(users_base=base, state_dir=base / ".state", log_dir=base / ".log", run_dir=base / ".run")
with Registry(settings.state_dir / "registry.db") as registry:
    home = Users(settings, registry).get_or_create("demo").home_dir
(home / "file").touch()
kept.touch()
with pactown_runner.purge.Purge(settings) as work:
    work.carry_out(work.plan())
print(json.dumps([work.failed, home.exists(), base.exists(), kept.exists()]))
"""


def test_without_root_the_callers_own_files_stay(test_run: Run) -> None:
    uid = test_run.uids[1]
    place = test_run.directory / "plain"
    place.mkdir()
    for name in ("pactown_runner", "cgroups"):
        shutil.copytree(ROOT / name, place / "lib" / name, ignore=shutil.ignore_patterns("__pycache__"))
    os.chown(place, uid, uid)
    kept = Path("/tmp", f"{test_run.name}-kept")
    # The interpreter is started as root and becomes the user: its own files may lie where a user cannot go.
    source = f"import sys; sys.path[:0] = [{str(place / 'lib')!r}, {sysconfig.get_path('purelib')!r}]\n{_WITHOUT_ROOT}"
    words = [sys.executable, "-c", source, str(place / "users"), str(uid), str(kept)]
    try:
        done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [{}, False, False, True]
    finally:
        kept.unlink(missing_ok=True)
        hostsweep.remove_file(place)
