"""Deleting users: real accounts, processes and files, and others who would have it delete what is not theirs."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cgroups import find_mount
from pactown_runner import Settings, Supervisor
from pactown_runner.deletion import delete_user, finish_removals, removal, traces
from pactown_runner.deletion.kernel_objects import remove_ipc, remove_keys, remove_queues
from pactown_runner.deletion.processes import end_processes
from pactown_runner.deletion.removal import REMOVAL
from pactown_runner.deletion.spools import remove_mail, remove_schedules
from pactown_runner.errors import AccountError, AlreadyRunningError, FilesError, NotFoundError, StateError
from pactown_runner.home_dirs import FreshHome
from pactown_runner.host import Host
from pactown_runner.logs import LogPaths
from pactown_runner.models import IsolatedUser
from pactown_runner.registry import Registry, SandboxRow
from tests import hostsweep
from tests.supervising import ROOT, Start, eventually, leftovers, lines, processes_of, python, soon, spec

if TYPE_CHECKING:
    from tests.hostguard import Run

pytestmark = pytest.mark.host

WAIT = "print('ready', flush=True); time.sleep(1000)"
# What is imported is imported first: the interpreter may lie where only root can read it.
DROP = """
import ctypes, os, threading, time
os.setgroups([]); os.setresgid(UID, UID, UID); os.setresuid(UID, UID, UID)
"""
PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/run/lock")
libc = ctypes.CDLL(None, use_errno=True)

# All that a tenant can leave behind; told are the name of what it makes, and a file that is not its own.
MESS = """
import ctypes, os, socket, sys
name, victim = sys.argv[1:]
for place in ("/tmp", "/var/tmp", "/dev/shm", "/run/lock"):
    top = f"{place}/{name}-tree"
    os.makedirs(f"{top}/shut/deep")
    open(f"{top}/shut/deep/file", "w").close()
    open(os.fsencode(top) + b"/odd\\xff\\nname", "w").close()
    open(f"{top}/-delete", "w").close()
    os.symlink(victim, f"{top}/link")
    os.symlink(os.path.dirname(victim), f"{place}/{name}-link")
    os.mkfifo(f"{top}/fifo")
    socket.socket(socket.AF_UNIX).bind(f"{top}/socket")
    os.chmod(f"{top}/shut", 0)
    os.chmod(top, 0o555)
libc = ctypes.CDLL(None, use_errno=True)
assert libc.shmget(0, 4096, 0o1600) >= 0 and libc.semget(0, 1, 0o1600) >= 0 and libc.msgget(0, 0o1600) >= 0
assert libc.mq_open(f"/{name}".encode(), os.O_CREAT | os.O_RDWR, 0o600, None) >= 0
assert libc.syscall(248, b"user", b"secret", b"value", ctypes.c_long(5), ctypes.c_long(-4)) > 0
assert libc.syscall(250, 22, ctypes.c_long(-1), ctypes.c_long(-4)) > 0
os.makedirs("home/shut/deep")
os.chmod("home/shut", 0)
print("ready", flush=True)
"""


@pytest.fixture
def host(supervisor: Supervisor) -> Host:
    assert supervisor._host is not None
    return supervisor._host


@pytest.fixture
def own(test_run: Run) -> str:
    """An id that no other test run has, which could take its login meanwhile."""
    return f"{test_run.name}|123456"


@pytest.fixture
def other_id(test_run: Run) -> str:
    return f"{test_run.name}|other"


@pytest.fixture
def canary(test_run: Run) -> Iterator[Path]:
    """A file of root's."""
    top = Path("/tmp", f"{test_run.name}-canary")
    top.mkdir()
    (top / "file").write_text("not yours")
    yield top / "file"
    assert (top / "file").read_text() == "not yours"
    hostsweep.remove_file(top)


async def delete(host: Host, user_id: str, *, delete_home: bool = True, delete_logs: bool = True) -> IsolatedUser:
    work = partial(delete_user, host, user_id, delete_home=delete_home, delete_logs=delete_logs)
    return await soon(asyncio.to_thread(work))


async def make(supervisor: Supervisor, user_id: str, command: str | list[str] = "true") -> IsolatedUser:
    """A user who has run something."""
    sandbox = await supervisor.start_run(spec(command, user=user_id))
    outcome = await soon(sandbox.wait())
    assert outcome.ok, (outcome, await lines(sandbox, "stderr"))
    return sandbox.user


def as_uid(uid: int, source: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python with this uid, and no other rights, outside all that is ours."""
    words = (sys.executable, "-I", "-S", "-c", DROP.replace("UID", str(uid)) + source, *words)
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)


@contextlib.contextmanager
def running_as(uid: int, source: str) -> Iterator[subprocess.Popen[str]]:
    """The same, in the background: from its first line on, and until the end of the block at the latest."""
    words = [sys.executable, "-I", "-S", "-c", DROP.replace("UID", str(uid)) + source]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def files_of(uid: int) -> set[str]:
    """Its files in public places, without those in its home, which may lie in one of them in a test."""
    words = ["find", *PLACES, "-xdev", "-name", "pactown_*", "-prune", "-o", "-user", str(uid), "-print0"]
    found = subprocess.run(words, check=False, capture_output=True)
    return set(map(os.fsdecode, found.stdout.split(b"\0")[:-1]))


def keys_of(uid: int) -> list[str]:
    look = f"print(*[line[:8] for line in open('/proc/keys') if line.split()[5] == '{uid}'])"
    return as_uid(uid, look).stdout.split()


def queue_exists(name: str) -> bool:
    fd = libc.mq_open(f"/{name}".encode(), os.O_RDONLY)
    if fd >= 0:
        os.close(fd)
        return True
    assert ctypes.get_errno() == errno.ENOENT
    return False


def carried(uid: int, claim: hostsweep.Claim) -> list[str]:
    """What there is of a uid on this host, but for message queues, which cannot be listed everywhere."""
    ipc = [leak.what for leak in hostsweep.ipc_objects(hostsweep.Claim(claim.prefix, uid, uid))]
    logins = [login.pw_name for login in pwd.getpwall() if login.pw_uid == uid]
    return [*map(str, processes_of(uid)), *files_of(uid), *ipc, *keys_of(uid), *logins]


# ---- All of it


async def test_nothing_that_carries_the_uid_is_left(
    supervisor: Supervisor, host: Host, canary: Path, test_run: Run, own: str, other_id: str
) -> None:
    user = await make(supervisor, own, [*python(MESS), f"{test_run.name}-a", str(canary)])
    other = await make(supervisor, other_id, [*python(MESS), f"{test_run.name}-b", str(canary)])
    mail = Path("/var/mail", user.linux_username)
    mail.touch()
    os.chown(mail, user.linux_uid, user.linux_gid)
    before = carried(other.linux_uid, test_run.claim)
    assert len(files_of(user.linux_uid)) >= 9 * len(PLACES)
    assert len(carried(user.linux_uid, test_run.claim)) > 9 * len(PLACES) + 8
    assert queue_exists(f"{test_run.name}-a")

    with running_as(user.linux_uid, WAIT) as outside, running_as(other.linux_uid, WAIT) as others:
        assert await delete(host, own) == user
        assert outside.wait(0) == -signal.SIGKILL
        assert others.poll() is None

    # The kernel takes its time to let go of keys that are invalid.
    await eventually(lambda: keys_of(user.linux_uid) == [])
    assert carried(user.linux_uid, test_run.claim) == []
    assert not queue_exists(f"{test_run.name}-a")
    assert not mail.exists()
    assert not user.home_dir.exists()
    assert not Path(LogPaths(host.settings.log_dir, host.settings.run_dir, user.key).tenant_dir).exists()
    assert carried(other.linux_uid, test_run.claim) == before
    assert queue_exists(f"{test_run.name}-b")
    assert (await supervisor.users.get(own), await supervisor.users.get(other_id)) == (None, other)
    assert host.registry.sandboxes.rows() == []

    assert await delete(host, other_id) == other
    await eventually(lambda: keys_of(other.linux_uid) == [])
    assert carried(other.linux_uid, test_run.claim) == []


async def test_who_comes_back_gets_key_and_uid_and_nothing_else(supervisor: Supervisor, host: Host, own: str) -> None:
    user = await make(supervisor, own, "touch ../../mine")
    await delete(host, own)
    with pytest.raises(NotFoundError):
        await delete(host, own)
    with pytest.raises(NotFoundError):
        await delete(host, "never there")
    again = await make(supervisor, own, "test -z $(ls ../..  | grep -v sandboxes)")
    assert (again.linux_uid, again.key) == (user.linux_uid, user.key)
    assert [record.line async for record in supervisor.logs(own, "api")] == []


async def test_a_kept_home_is_nobodys_until_its_user_comes_back(
    supervisor: Supervisor, host: Host, own: str, other_id: str
) -> None:
    user = await make(supervisor, own, "echo data >../../mine; chmod 750 ../..; echo hello")
    await delete(host, own, delete_home=False, delete_logs=False)
    found = user.home_dir.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 0, 0o700)
    assert (user.home_dir / "mine").stat().st_uid == user.linux_uid
    other = await make(supervisor, other_id)
    assert other.linux_uid != user.linux_uid

    again = await make(supervisor, own, "cat ../../mine && touch ../../mine")
    assert (again.linux_uid, again.home_dir) == (user.linux_uid, user.home_dir)
    assert stat.S_IMODE(user.home_dir.stat().st_mode) == 0o700
    assert [record.line async for record in supervisor.logs(own, "api")] == ["hello", "data"]
    # What was kept once is not for ever: the last word counts.
    await delete(host, own)
    assert not user.home_dir.exists()


async def test_a_home_in_a_public_place_is_kept_all_the_same(
    supervisor: Supervisor, host: Host, own: str, test_run: Run
) -> None:
    user = await make(supervisor, own, "touch ../../mine")
    way = (test_run.directory, host.settings.users_base)
    for directory in way:
        directory.chmod(0o755)
    try:
        await delete(host, own, delete_home=False)
        assert (user.home_dir / "mine").exists()
    finally:
        for directory in way:
            directory.chmod(0o711)


async def test_a_home_that_its_owner_shut_is_emptied(supervisor: Supervisor, host: Host, own: str) -> None:
    # Deeper than any path may be long.
    deep = f"for i in $(seq 30); do mkdir {'d' * 200}; cd -P {'d' * 200}; done; touch file; chmod 0 ."
    user = await make(supervisor, own, f"{deep}; chmod 0 ~")
    await delete(host, own)
    assert not user.home_dir.exists()


async def test_what_others_have_in_a_home_is_left_and_named(supervisor: Supervisor, host: Host, own: str) -> None:
    user = await make(supervisor, own)
    (user.home_dir / "roots").mkdir()
    (user.home_dir / "roots/file").touch()
    with pytest.raises(FilesError, match="not empty"):
        await delete(host, own)
    assert (user.home_dir / "roots/file").exists()
    assert pwd.getpwnam(user.linux_username).pw_uid == user.linux_uid
    assert host.registry.sandboxes.rows() == []
    with pytest.raises(StateError, match="being removed"):
        await supervisor.start(spec("true", user=own))
    hostsweep.remove_file(user.home_dir / "roots")
    assert await asyncio.to_thread(finish_removals, host) == [user]
    assert not user.home_dir.exists()


STOP = """
print("ready", flush=True)
while True:
    try:
        os.kill(-1, 19)
    except ProcessLookupError:
        pass
"""
"""Stops all else of its uid, as fast as it can."""


async def test_who_stops_what_removes_it_is_removed(
    supervisor: Supervisor, host: Host, own: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(traces, "END_PATIENCE", 0.2)
    # Sooner or later one is stopped before it has been executed.
    while "not executed after 0.2 s" not in caplog.text:
        user = await make(supervisor, own)
        with running_as(user.linux_uid, STOP) as outside:
            assert await delete(host, own) == user
            assert outside.wait(0) == -signal.SIGKILL


async def test_what_runs_keeps_its_user(supervisor: Supervisor, host: Host, own: str) -> None:
    sandbox = await supervisor.start(spec("echo ready; exec sleep 1000", user=own))
    with pytest.raises(StateError, match="something runs"):
        await delete(host, own)
    assert sandbox.state == "running"
    await soon(sandbox.stop(grace=0))
    await delete(host, own)


async def test_a_removal_can_be_given_up_and_is_finished_later(
    supervisor: Supervisor, host: Host, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = await make(supervisor, own)
    monkeypatch.setattr(traces, "_EMPTY_HOME", "touch emptying; exec sleep 1000")
    give_up = threading.Event()
    work = asyncio.create_task(asyncio.to_thread(lambda: delete_user(host, own, give_up=give_up)))
    await eventually((user.home_dir / "emptying").exists)
    give_up.set()
    with pytest.raises(StateError, match="given up"):
        await soon(work)
    assert processes_of(user.linux_uid) == {}
    assert host.registry.sandboxes.rows() == []
    assert await asyncio.to_thread(lambda: finish_removals(host, give_up=give_up)) == []
    monkeypatch.undo()
    assert await asyncio.to_thread(finish_removals, host) == [user]


async def test_a_supervisor_that_ends_gives_a_removal_up(
    settings: Settings, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Supervisor(settings=settings) as supervisor:
        user = await make(supervisor, own)
        monkeypatch.setattr(traces, "_EMPTY_HOME", "touch emptying; exec sleep 1000")
        for cancelled in (True, False):
            work = asyncio.create_task(supervisor.users.delete(own))
            await eventually((user.home_dir / "emptying").exists)
            if cancelled:
                work.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await soon(work)
                (user.home_dir / "emptying").unlink()
    with pytest.raises(StateError, match="given up"):
        await soon(work)
    assert processes_of(user.linux_uid) == {}
    assert leftovers(settings) == []
    monkeypatch.undo()
    async with Supervisor(settings=settings) as supervisor:
        await eventually(lambda: not user.home_dir.exists())


@pytest.mark.parametrize("delete_home", [True, False])
async def test_what_an_import_left_goes_with_its_user(
    supervisor: Supervisor, host: Host, own: str, other_id: str, *, delete_home: bool
) -> None:
    user, other = await make(supervisor, own), await make(supervisor, other_id)
    left, others = (FreshHome(one.home_dir.parent, one.key, "0123456789abcdef").path for one in (user, other))
    for path, one in ((left, user), (others, other)):
        (path / "shut/deep").mkdir(parents=True)
        (path / "shut/deep/file").write_text("")
        subprocess.run(["chown", "-R", f"{one.linux_uid}:{one.linux_uid}", path], check=True)
        (path / "shut").chmod(0)
    await delete(host, own, delete_home=delete_home)
    assert (left.exists(), others.exists(), user.home_dir.exists()) == (False, True, not delete_home)
    await delete(host, other_id)
    assert not others.exists()


async def test_two_removals_of_one_user_do_not_meet(
    supervisor: Supervisor, host: Host, own: str, caplog: pytest.LogCaptureFixture
) -> None:
    user = await make(supervisor, own)
    host.users.begin_removal(own)
    row = SandboxRow(user.key, REMOVAL, "r", host.owner.owner_id, "run", "{}", "/", 1.0)
    host.registry.sandboxes.claim_removal(row)
    with pytest.raises((StateError, AlreadyRunningError)):
        await delete(host, own)
    assert await asyncio.to_thread(finish_removals, host) == []
    assert caplog.text == ""
    assert user.home_dir.exists()
    host.registry.sandboxes.release(user.key, REMOVAL, "r")
    assert await asyncio.to_thread(finish_removals, host) == [user]


# ---- Accounts that are not ours


def _tool(*words: str) -> None:
    """One of the host's own tools, which gives up when somebody else has the lock of its files just now."""
    for _ in range(1000):
        done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60, env={"LC_ALL": "C"})
        if "lock" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr


def _usermod(*words: str) -> None:
    _tool("/usr/sbin/usermod", *words)


def _useradd(name: str, uid: int) -> None:
    options = ["--no-create-home", "--no-user-group", "--gid", "65534", "-K", "SUB_UID_COUNT=0", "--non-unique"]
    _tool("/usr/sbin/useradd", "--uid", str(uid), *options, name)


CHANGES: dict[str, Callable[[IsolatedUser, str, int], None]] = {
    "home": lambda user, foreign, free: _usermod("--home", "/nonexistent", user.linux_username),
    "uid": lambda user, foreign, free: _usermod("--uid", str(free), user.linux_username),
    "comment": lambda user, foreign, free: _usermod("--comment", "somebody", user.linux_username),
    "login": lambda user, foreign, free: _usermod("--login", foreign, user.linux_username),
    "second": lambda user, foreign, free: _useradd(foreign, user.linux_uid),
}


def _logins(*names: str) -> list[str]:
    lines = Path("/etc/passwd").read_text().splitlines()
    return [line for line in lines if line.partition(":")[0] in names]


@pytest.mark.parametrize("change", CHANGES)
async def test_an_account_that_is_not_what_we_made_is_left_alone(
    supervisor: Supervisor, host: Host, test_run: Run, foreign: str, change: str, own: str
) -> None:
    theirs = Path("/tmp", f"{test_run.name}-theirs")
    user = await make(supervisor, own, f"touch ../../mine {theirs}")
    CHANGES[change](user, foreign, test_run.uids[1])
    try:
        logins = _logins(user.linux_username, foreign)
        with running_as(user.linux_uid, WAIT) as process:
            with pytest.raises(AccountError) as caught:
                await delete(host, own)
            assert caught.value.remedy
            assert process.poll() is None
        assert _logins(user.linux_username, foreign) == logins
        assert await supervisor.users.get(own) == user
        assert (user.home_dir / "mine").exists()
        assert theirs.exists()
    finally:
        theirs.unlink(missing_ok=True)
        if change in ("login", "second"):
            _tool("/usr/sbin/userdel", foreign)


async def test_an_account_that_is_gone_is_no_hindrance(
    supervisor: Supervisor, host: Host, test_run: Run, own: str
) -> None:
    user = await make(supervisor, own, f"touch /tmp/{test_run.name}-mine")
    _tool("/usr/sbin/userdel", user.linux_username)
    await delete(host, own)
    assert carried(user.linux_uid, test_run.claim) == []


async def test_a_kept_home_is_not_given_to_somebody_else(
    supervisor: Supervisor, host: Host, foreign: str, own: str
) -> None:
    user = await make(supervisor, own, "touch ../../mine")
    await delete(host, own, delete_home=False)
    _useradd(foreign, user.linux_uid)
    try:
        with pytest.raises(AccountError, match=foreign):
            await supervisor.users.get_or_create(own)
        assert user.home_dir.stat().st_uid == 0
    finally:
        _tool("/usr/sbin/userdel", foreign)
    await make(supervisor, own, "rm ../../mine")


# ---- Crashes

POINTS = {
    "begun": "after(UserTable, 'begin_removal')",
    "claimed": "after(SandboxTable, 'claim_removal')",
    "slice": "after(removal._Work, 'end_slice')",
    "helper": "after(removal, 'launch_popen', lambda spec, *rest: 'find' in spec.argv[2])",
    "processes": "after(traces, '_end_processes')",
    "swept": "after(removal, 'sweep')",
    "emptying": "after(removal, 'launch_popen', lambda spec, *rest: 'mindepth 1 -delete' in spec.argv[2])",
    "emptied": "after(removal._Work, 'run', lambda work, script, *rest: 'mindepth 1 -delete' in script)",
    "home": "after(traces, 'remove_home')",
    "logs": "after(removal._Work, 'remove_logs')",
    "userdel": "after(accounts, '_run', lambda command: command[0] == 'userdel')",
    "tombstone": "after(UserTable, 'tombstone')",
}

KEEP_POINTS = {"kept": "after(removal, 'keep_home')", "chmod": "after(os, 'fchmod')", **POINTS}
for _point in ("emptying", "emptied", "home"):
    del KEEP_POINTS[_point]

CRASH = """
import signal
from pactown_runner import accounts, deletion
from pactown_runner.deletion import removal, traces
from pactown_runner.registry.sandboxes import SandboxTable
from pactown_runner.registry.users import UserTable

def after(place, name, when=lambda *arguments: True):
    real = getattr(place, name)
    def replacement(*arguments, **options):
        result = real(*arguments, **options)
        if when(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(place, name, replacement)

async def work(supervisor):
    what = json.loads(await told())
    sandbox = await supervisor.start_run(spec(what["mess"], user=what["user"]))
    await sandbox.wait()
    eval(what["point"])
    await asyncio.to_thread(lambda: deletion.delete_user(supervisor._host, what["user"], **what["options"]))
"""


async def crash(child: Start, point: str, user_id: str, run: Run, **options: bool) -> None:
    mess = f"mkdir -p ../../deep/er; for i in $(seq 200); do touch ../../deep/$i /tmp/{run.name}-$i; done"
    process = child(CRASH)
    process.tell(json.dumps({"user": user_id, "mess": mess, "point": point, "options": options}))
    assert await process.ended() == -signal.SIGKILL


def statuses(registry: Registry) -> list[str]:
    return [row.status for row in registry.users.rows()]


@pytest.mark.parametrize("point", POINTS)
async def test_killed_at_any_step_it_is_finished_by_the_next(
    settings: Settings, child: Start, test_run: Run, point: str, own: str
) -> None:
    await crash(child, POINTS[point], own, test_run)
    async with Supervisor(settings=settings) as supervisor:
        assert supervisor._host is not None
        registry = supervisor._host.registry
        # Every supervisor does that when it starts.
        await eventually(lambda: statuses(registry) == ["deleted"])
        user = registry.users.rows()[0].user()
        assert carried(user.linux_uid, test_run.claim) == []
        assert not user.home_dir.exists()
        assert not Path(LogPaths(settings.log_dir, settings.run_dir, user.key).tenant_dir).exists()
        assert list(hostsweep.accounts(test_run.claim)) == []
        assert supervisor._host.registry.sandboxes.rows() == []
        again = await make(supervisor, own)
        assert again.linux_uid == user.linux_uid


@pytest.mark.parametrize("point", KEEP_POINTS)
async def test_killed_at_any_step_it_keeps_the_home_that_was_to_be_kept(
    settings: Settings, child: Start, test_run: Run, point: str, own: str
) -> None:
    await crash(child, KEEP_POINTS[point], own, test_run, delete_home=False)
    async with Supervisor(settings=settings) as supervisor:
        assert supervisor._host is not None
        registry = supervisor._host.registry
        await eventually(lambda: statuses(registry) == ["deleted"])
        (row,) = supervisor._host.registry.users.rows()
        assert carried(row.uid, test_run.claim) == []
        assert row.home.stat().st_uid == 0
        assert len(list((row.home / "deep").iterdir())) == 201
        await make(supervisor, own, "touch ../../deep/1 && ls ../../deep/er")


# ---- Others, who would have it delete what is not the tenant's

# As OTHER, who shares a directory with the tenant: what lies in it is now a directory of the tenant's file, and now a
# link to one in which somebody else has a file of that name.
SWAP = """
libc = ctypes.CDLL(None)
os.umask(0)
os.makedirs(TOP + b"/x")
os.symlink(VICTIM, TOP + b"/y")
print("ready", flush=True)
while True:
    libc.renameat2(-100, TOP + b"/x", -100, TOP + b"/y", 2)
"""

LURE = """\
for i in $(seq 300); do
    : >"$1/x/file"
    (set -- "$2" "$1"; eval "$sweep")
done 2>/dev/null"""


def _naive_sweep(top: Path, uid: int) -> None:
    """What must not be done: root looks, and then acts upon what is called so by then."""
    for name in os.listdir(top):
        with contextlib.suppress(OSError):
            path = top / name / "file"
            if path.stat().st_uid == uid:
                path.unlink()


async def test_a_directory_that_is_swapped_meanwhile_leads_nowhere(
    supervisor: Supervisor, host: Host, canary: Path, test_run: Run, own: str, other_id: str
) -> None:
    user, other = await make(supervisor, own), await make(supervisor, other_id)
    top = Path("/tmp", f"{test_run.name}-shared")
    top.mkdir()
    os.chown(top, other.linux_uid, other.linux_gid)
    source = SWAP.replace("TOP", repr(os.fsencode(top))).replace("VICTIM", repr(os.fsencode(canary.parent)))
    await asyncio.to_thread(host.users.begin_removal, own)

    def race() -> None:
        with running_as(other.linux_uid, source), removal._claimed(host, user) as claim:
            _caught(canary, top, user.linux_uid)
            script = f"sweep='{traces._CLEAR_PUBLIC}'\n{LURE}"
            removal._Work(host, user, claim, threading.Event()).run(script, "/", 120, str(top), str(user.linux_uid))

    try:
        await soon(asyncio.to_thread(race), 120)
        assert canary.read_text() == "not yours"
        # A name may have been away while it was looked for. Whoever played with it has ended.
        assert await asyncio.to_thread(finish_removals, host) == [user]
        assert files_of(user.linux_uid) == set()
        assert canary.read_text() == "not yours"
    finally:
        hostsweep.remove_file(top)


def _caught(canary: Path, top: Path, uid: int) -> None:
    """See that the race is one: somebody careless loses it."""
    while canary.exists():
        with contextlib.suppress(OSError):
            fd = os.open(top / "x", os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                file = os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
                try:
                    os.chown(file, uid, uid)
                finally:
                    os.close(file)
            finally:
                os.close(fd)
        _naive_sweep(top, uid)
    canary.write_text("not yours")


async def test_what_others_keep_in_the_tenants_directory_stays(
    supervisor: Supervisor, host: Host, test_run: Run, caplog: pytest.LogCaptureFixture, own: str, other_id: str
) -> None:
    top = Path("/tmp", f"{test_run.name}-open")
    user = await make(supervisor, own, f"umask 0; mkdir -p {top}/in; touch {top}/mine")
    other = await make(supervisor, other_id, f"touch {top}/in/theirs")
    try:
        await delete(host, own)
        assert (top / "in/theirs").stat().st_uid == other.linux_uid
        assert not (top / "mine").exists()
        assert f"files of uid {user.linux_uid} are left" in caplog.text
    finally:
        hostsweep.remove_file(top)


# ---- Without root

PLAIN = """
import sys
sys.path[:0] = [sys.argv[1] + "/lib", SITE]
import asyncio, anyio, anyio._backends._asyncio, concurrent.futures.thread, ctypes, encodings.idna, os, structlog
import pactown_runner.supervisor, pactown_runner.deletion
os.setgroups([]); os.setresgid(*[UID] * 3); os.setresuid(*[UID] * 3)
os.environ["HOME"] = os.environ["XDG_RUNTIME_DIR"] = sys.argv[1]
from pathlib import Path
from pactown_runner import Supervisor
from pactown_runner.deletion import delete_user
from pactown_runner.registry import Registry

async def main():
    async with Supervisor(Path(sys.argv[1], "users")) as supervisor:
        homes = [(await supervisor.users.get_or_create(name)).home_dir for name in ("a", "b")]
        for home in homes:
            Path(home, "deep").mkdir()
        await asyncio.to_thread(delete_user, supervisor._host, "a")
        await asyncio.to_thread(delete_user, supervisor._host, "b", delete_home=False)
        print(*[home.exists() for home in homes], Path(KEPT).exists(), await supervisor.users.list())

asyncio.run(main())
"""


def test_without_root_what_is_the_callers_stays(slice_name: str, test_run: Run) -> None:
    uid, place = test_run.uids[1], test_run.directory / "plain"
    kept = Path("/tmp", f"{test_run.name}-kept")
    delegated = find_mount().path / slice_name
    for path in (place, delegated):
        path.mkdir()
    for package in ("pactown_runner", "cgroups"):
        shutil.copytree(ROOT / package, place / "lib" / package, ignore=shutil.ignore_patterns("__pycache__"))
    kept.touch()
    for path in (place, kept, delegated, *(delegated / f"cgroup.{name}" for name in ("procs", "subtree_control"))):
        os.chown(path, uid, uid)
    values = {"UID": str(uid), "SITE": repr(sysconfig.get_path("purelib")), "KEPT": repr(str(kept))}
    source = PLAIN
    for name, value in values.items():
        source = source.replace(name, value)
    join = ["sh", "-c", 'echo 0 >"$0/cgroup.procs" && exec "$@"', str(delegated)]
    words = [*join, sys.executable, "-c", source, str(place)]
    try:
        done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
        assert (done.stdout, done.returncode) == ("False True True []\n", 0), done.stderr
    finally:
        kept.unlink()
        hostsweep.remove_file(place)


# ---- Processes

# Is never long enough under one number to be found by it. It gives up when nobody has stopped it in time.
HOPPER = """
print("ready", flush=True)
end = time.monotonic() + 20
while time.monotonic() < end:
    if os.fork():
        os._exit(0)
print("gave up", flush=True)
"""


async def test_what_forks_faster_than_one_can_look_ends(supervisor: Supervisor, host: Host, own: str) -> None:
    user = await make(supervisor, own)
    with running_as(user.linux_uid, HOPPER) as hopper:
        await delete(host, own)
        assert hopper.stdout is not None
        # All that came of it held this pipe open.
        assert await soon(asyncio.to_thread(hopper.stdout.read)) == ""


def test_a_uid_is_seen_wherever_a_process_has_it(test_run: Run) -> None:
    first, last = test_run.uids
    saved = f"os.setresuid({first}, {first}, {last})\n"
    # A raw exit(2) ends the first thread, which Python does not notice.
    half_dead = "threading.Thread(target=ctypes.CDLL(None).pause).start()\n"
    half_dead += "print('ready', flush=True); ctypes.PyDLL(None).syscall(60, 0)"
    become = f"os.setgroups([]); {saved}"
    with (
        running_as(0, become + WAIT) as saver,
        running_as(last, half_dead) as leaderless,
        running_as(first, WAIT) as other,
    ):
        assert end_processes(last) == 2
        assert saver.wait(10) == leaderless.wait(10) == -signal.SIGKILL
        assert other.poll() is None


def test_what_has_ended_and_was_not_reaped_does_not_run(test_run: Run) -> None:
    uid = test_run.uids[1]
    with running_as(uid, WAIT):
        assert end_processes(uid) == 1
        # Now it waits for us to reap it.
        assert end_processes(uid) == 0


@pytest.mark.parametrize("uid", [0, os.geteuid()])
def test_roots_processes_are_nobodys_to_end(uid: int) -> None:
    with pytest.raises(ValueError, match="not a tenant's"):
        end_processes(uid)


# ---- Cron, at, mail and linger


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("cron/crontabs", "cron/atjobs", "mail"):
        (tmp_path / "var/spool" / name).mkdir(parents=True)
    (tmp_path / "var/lib/systemd/linger").mkdir(parents=True)
    (tmp_path / "var/mail").symlink_to("spool/mail")
    return tmp_path


def test_what_would_start_later_is_removed(root: Path, canary: Path) -> None:
    def put(name: str, uid: int) -> Path:
        path = root / "var" / name
        path.touch()
        os.chown(path, uid, uid)
        return path

    login, uid = "pactown_0", 64999
    ours = {
        put(f"spool/cron/crontabs/{login}", uid),
        put("spool/cron/atjobs/a00001", uid),
        put("spool/cron/atjobs/a00002", uid),
        put(f"lib/systemd/linger/{login}", 0),
    }
    others = {
        put("spool/cron/crontabs/other", 64998),
        put("spool/cron/atjobs/a00003", 64998),
        put("spool/cron/atjobs/.SEQ", 0),
        put("lib/systemd/linger/other", 0),
        put("spool/mail/other", 64998),
    }
    mail = put(f"spool/mail/{login}", uid)
    assert {Path(path) for path in remove_schedules(login, uid, root)} == ours
    assert not any(path.exists() for path in ours)
    assert [Path(path).name for path in remove_mail(login, uid, root)] == [login]
    assert not mail.exists()
    assert all(path.exists() for path in others)
    assert remove_schedules(login, uid, root) == remove_mail(login, uid, root) == []


def test_a_link_is_removed_and_not_followed(root: Path, canary: Path) -> None:
    uid = 64999
    for place in ("spool/cron/crontabs/pactown_0", "spool/cron/atjobs/a00001"):
        (root / "var" / place).symlink_to(canary)
        os.lchown(root / "var" / place, uid, uid)
    (root / "var/mail/pactown_0").mkdir()
    os.link(canary, root / "var/spool/cron/atjobs/a00002")
    assert len(remove_schedules("pactown_0", uid, root)) == 2
    assert remove_mail("pactown_0", uid, root) == []
    assert canary.exists()


# ---- What lives in the kernel


async def test_nothing_of_others_is_removed_from_the_kernel(test_run: Run) -> None:
    uid, other = test_run.uids
    add_key = "ctypes.CDLL(None).syscall(248, b'user', b'k', b'v', ctypes.c_long(1), ctypes.c_long(-4))"
    make_ipc = "ctypes.CDLL(None).shmget(0, 4096, 0o1600)"
    try:
        for one in (uid, other):
            as_uid(one, f"{add_key}; {make_ipc}")
        assert (remove_ipc(uid), remove_queues(uid)) == (1, 0)
        assert remove_keys(uid) == 2
        # The kernel takes its time to let go of what is invalid.
        await eventually(lambda: keys_of(uid) == [])
        assert (remove_ipc(uid), remove_keys(uid)) == (0, 0)
        assert len(keys_of(other)) > 0
    finally:
        assert (remove_ipc(other), remove_keys(other)) == (1, 2)
    assert threading.active_count() == len(threading.enumerate())
    assert int(as_uid(uid, "print(os.getuid())").stdout) == uid
