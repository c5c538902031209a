"""What a tenant takes of the disk where only the tenant itself can count it: walks, and that they are remembered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pactown_runner import Supervisor, usage
from pactown_runner.errors import FilesError, NotFoundError
from pactown_runner.host import Host
from pactown_runner.jobs import Stop
from pactown_runner.models import IsolatedUser
from pactown_runner.quotas import quotas_at
from pactown_runner.usage import UsageMeter, home_usage
from tests import hostsweep
from tests.supervising import ROOT, USER, processes_of, spec

if TYPE_CHECKING:
    from tests.hostguard import Run

pytestmark = pytest.mark.host

FILL = """
mkdir -p sandboxes/one sandboxes/two/no-sandbox deep/er
head -c 300000 /dev/zero > deep/er/file
ln deep/er/file deep/again
ln -s / link
truncate -s 1G hole
touch "sandboxes/a
file"
"""


@pytest.fixture
def host(supervisor: Supervisor) -> Host:
    assert supervisor._host is not None
    return supervisor._host


@pytest.fixture
def meter(host: Host) -> UsageMeter:
    return UsageMeter(host)


@pytest.fixture
async def user(supervisor: Supervisor) -> IsolatedUser:
    user = await supervisor.users.get_or_create(USER)
    with quotas_at(user.home_dir) as quotas:
        if quotas.state != "off":
            pytest.skip("the kernel counts here")
    return user


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Walks are not remembered."""
    monkeypatch.setattr(usage, "KEPT_SECONDS", 0.0)
    monkeypatch.setattr(usage, "KEPT_SHARE", 0)


async def fill(supervisor: Supervisor, script: str = FILL) -> None:
    outcome = await supervisor.run(spec(f"cd ~ && {script.strip()}", service="fill"))
    assert outcome.ok


def by_root(home: Path) -> tuple[int, int]:
    """Bytes and entries, counted by whoever may look everywhere."""
    seen = {}
    for directory, folders, files in os.walk(home):
        for path in (directory, *(os.path.join(directory, name) for name in (*folders, *files))):
            found = os.lstat(path)
            seen[found.st_ino] = found.st_blocks * 512
    return sum(seen.values()), len(seen)


async def test_a_walk_counts_what_there_is(supervisor: Supervisor, user: IsolatedUser) -> None:
    await fill(supervisor)
    before = time.time()
    stats = await supervisor.users.stats(USER)
    assert (stats.bytes, stats.entries) == by_root(user.home_dir)
    assert 300_000 < stats.bytes < 500_000
    assert stats.usage.sandboxes == 3  # that of the run as well
    assert (stats.usage.counted, stats.enforced) == ("walk", False)
    assert before <= stats.usage.walked_at <= time.time()
    shown = stats.to_dict()
    assert shown.keys() == {"user", "sandbox_count", "total_size_mb"}
    assert stats.to_dict(detail=True) == shown | {
        "usage": {
            "bytes": stats.bytes,
            "entries": stats.entries,
            "sandboxes": 3,
            "counted": "walk",
            "enforced": False,
            "disk_max": None,
            "inodes_max": None,
            "walked_at": stats.usage.walked_at,
        }
    }
    with pytest.raises(NotFoundError):
        await supervisor.users.stats("nobody")


async def test_a_walk_is_remembered_for_a_while(
    supervisor: Supervisor, user: IsolatedUser, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await supervisor.users.stats(USER)
    await fill(supervisor)
    assert await supervisor.users.stats(USER) == first
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + usage.KEPT_SECONDS)
    assert (await supervisor.users.stats(USER)).entries > first.entries


def test_whoever_asks_meanwhile_waits_for_the_same_walk(meter: UsageMeter, user: IsolatedUser) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: meter.usage(user), range(8)))
    assert len(set(found)) == 1


def test_a_walk_that_takes_too_long_is_not_tried_again_at_once(
    host: Host, meter: UsageMeter, user: IsolatedUser, forgetful: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as remembering:
        remembering.setattr(usage, "KEPT_SECONDS", 600.0)
        with pytest.raises(FilesError, match=r"it took longer than 0\.001 s"):
            meter.usage(user, timeout=0.001)
    with pytest.raises(FilesError, match=r"it took longer than 0\.001 s"):
        meter.usage(user)
    assert home_usage(host, user).entries > 0


def test_one_who_gives_up_keeps_nobody_else_from_it(meter: UsageMeter, user: IsolatedUser) -> None:
    stop = Stop()
    stop.now("enough")
    with pytest.raises(FilesError, match="enough"):
        meter.usage(user, stop=stop)
    with meter._alone(user.key, Stop()), pytest.raises(FilesError, match="enough"):
        meter.usage(user, stop=stop)
    assert meter.usage(user).entries > 0


async def test_walks_of_so_many_users_are_remembered(
    supervisor: Supervisor, meter: UsageMeter, user: IsolatedUser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "KEPT_USERS", 2)
    others = [await supervisor.users.get_or_create(f"{USER}{number}") for number in range(2)]
    first = [meter.usage(each) for each in (user, *others)]
    assert [meter.usage(each) for each in others] == first[1:]
    assert meter.usage(user) != first[0]


async def test_a_user_who_comes_back_is_counted_anew(supervisor: Supervisor, user: IsolatedUser) -> None:
    await fill(supervisor)
    before = await supervisor.users.stats(USER)
    await supervisor.users.delete(USER)
    await supervisor.users.get_or_create(USER)
    assert (await supervisor.users.stats(USER)).entries == 1 < before.entries


PLAIN_USER = """
import asyncio, json, os, sys
# While the interpreter can still read all of itself.
import anyio._backends._asyncio, concurrent.futures.thread, encodings.idna, structlog
import pactown_runner.supervisor
from pathlib import Path
from pactown_runner import Supervisor, UserIsolationManager
from pactown_runner.errors import FilesError, NotFoundError, StateError, TreeError
from pactown_runner.jobs import Stop
from pactown_runner.usage import UsageMeter, _by_ourselves
base, uid = Path(sys.argv[1]), int(sys.argv[2])
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
os.environ["HOME"] = os.environ["XDG_RUNTIME_DIR"] = str(base)
def told(call, *arguments, **options):
    try:
        return call(*arguments, **options)
    except (FilesError, NotFoundError, StateError, TreeError) as error:
        return [error.code, error.message]
stop = Stop()
stop.now("enough")
with UserIsolationManager(base / "users") as manager:
    path = manager.get_sandbox_path("a", "api")
    (path / "file").write_bytes(b"x" * 1000000)
    user = manager.get_user("a")
    (user.home_dir / "sandboxes/linked").symlink_to("/")
    said = [manager.get_user_stats("a"), told(manager.get_user_stats, "nobody")]
    said += [told(UsageMeter(None).usage, user, timeout=1e-6), told(UsageMeter(None).usage, user, stop=stop)]
    said += [told(_by_ourselves, user, "sleep 1000 & sleep 1000", 0.01, Stop())]
    # The rest takes a place: nothing else knows what runs of a user, to hold it still, or to end it.
    said += [told(manager.export_user_data, "a", base / "x")[0], told(manager.delete_user, "a")[0]]
    os.rename(user.home_dir, base / "away")
    said += [told(UsageMeter(None).usage, user)]
    os.rename(base / "away", user.home_dir)
async def main():
    supervisor = Supervisor(base / "users")
    async with supervisor:
        stats = await supervisor.users.stats("a")
        said.append([stats.entries, stats.usage.counted, stats.enforced])
asyncio.run(main())
try:
    said.append(os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    said.append("no children")
print(json.dumps(said))
"""


def test_a_plain_user_without_a_place_counts_its_own_homes(test_run: Run) -> None:
    uid = test_run.uids[0]
    base = test_run.directory / "plain"
    base.mkdir()
    os.chown(base, uid, uid)
    command = [sys.executable, "-c", PLAIN_USER, str(base), str(uid)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stats, nobody, late, given_up, endless, export, delete, away, counted, children = json.loads(done.stdout)
    assert stats["user"]["saas_user_id"] == "a"
    assert stats["sandbox_count"] == 1
    assert 0.95 < stats["total_size_mb"] < 1
    assert nobody == ["not-found", "there is no user 'nobody'"]
    assert late == ["files", "given up: it took longer than 1e-06 s"]
    assert given_up == ["files", "given up: enough"]
    assert endless == ["files", "given up: it took longer than 0.01 s"]
    assert export == delete == "no-cgroup-tree"
    assert away[0] == "files"
    assert away[1].endswith("could not be counted: No such file or directory")
    assert counted == [5, "walk", False]
    assert children == "no children"
    assert processes_of(uid) == {}
    hostsweep.remove_file(base)
