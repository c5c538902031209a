"""Users against the host's real accounts, with real processes that race and are killed."""

from __future__ import annotations

import contextlib
import grp
import hashlib
import itertools
import json
import os
import pwd
import stat
import subprocess
import sys
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from pactown_runner.config import Settings
from pactown_runner.errors import AccountError, NotFoundError, SpecError, StateError
from pactown_runner.models import IsolatedUser
from pactown_runner.registry import Registry, SandboxRow, UserRow
from pactown_runner.users import Users, keys_of
from tests import hostguard, hostsweep

ROOT = Path(__file__).resolve().parent.parent

COLLISIONS = [("auth0|00080997", "auth0|00133143"), ("auth0|00166976", "auth0|00167012")]

IDS = [
    "auth0|123456",
    "user@example.com",
    "a/b",
    "a%2Fb",
    "../../etc/passwd",
    "🦀",
    unicodedata.normalize("NFC", "Zoë"),
    unicodedata.normalize("NFD", "Zoë"),
    " a",
    "a",
    "A",
]


@dataclass
class State:
    """One state directory, opened."""

    settings: Settings
    registry: Registry
    users: Users

    def reopen(self) -> None:
        self.registry.close()
        self.registry = Registry(self.settings.state_dir / "registry.db")
        self.users = Users(self.settings, self.registry)

    def run(self, source: str, *arguments: str, stderr: int | None = None) -> subprocess.Popen[str]:
        """A process of its own that has `users` of the same state, and waits for a line before it goes on."""
        (first, last) = self.settings.uid_ranges[0]
        return subprocess.Popen(
            [sys.executable, "-c", CHILD + source, str(self.settings.users_base), f"{first}", f"{last}", *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )


CHILD = """
import json, os, signal, sys
from pathlib import Path
from pactown_runner import accounts
from pactown_runner.config import Settings
from pactown_runner.registry import Registry
from pactown_runner.registry.users import UserTable
from pactown_runner.users import Users

# Dropped in here: the interpreter may lie where only root can run it.
if identity := os.environ.pop("DROP_TO", None):
    os.setgroups([])
    os.setresgid(*[int(identity)] * 3)
    os.setresuid(*[int(identity)] * 3)
base = Path(sys.argv[1])
settings = Settings(users_base=base, state_dir=base / ".state", uid_ranges=((int(sys.argv[2]), int(sys.argv[3])),))
registry = Registry(settings.state_dir / "registry.db")
users = Users(settings, registry)
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def own(test_run: hostguard.Run) -> str:
    """An id that no other test run has: logins are the whole host's, and another's would make a key longer."""
    return f"{test_run.name}|123456"


@pytest.fixture(scope="module")
def colliding(test_run: hostguard.Run) -> tuple[str, str]:
    """Two ids of this run alone whose first keys are one."""
    seen: dict[str, str] = {}
    for number in itertools.count():
        saas_user_id = f"{test_run.name}|{number}"
        other = seen.setdefault(next(keys_of(saas_user_id)), saas_user_id)
        if other != saas_user_id:
            return other, saas_user_id
    raise AssertionError("unreachable")


@pytest.fixture
def state(users_base: Path, test_run: hostguard.Run) -> Iterator[State]:
    settings = Settings(users_base=users_base, state_dir=users_base / ".state", uid_ranges=(test_run.uids,))
    registry = Registry(settings.state_dir / "registry.db")
    state = State(settings, registry, Users(settings, registry))
    yield state
    state.registry.close()
    for leak in list(hostsweep.accounts(test_run.claim)):
        leak.remove()


def useradd(name: str, uid: int) -> int:
    options = ["--no-create-home", "--no-user-group", "--gid", "65534", "-K", "SUB_UID_COUNT=0"]
    return subprocess.run(
        ["useradd", "--uid", str(uid), *options, name], check=False, capture_output=True, timeout=60
    ).returncode


def remove(users: Users, saas_user_id: str) -> None:
    users.remove_account(users.begin_removal(saas_user_id))


# ---- Keys


def test_keys_are_a_prefix_of_sha256_from_8_to_24_digits() -> None:
    digits = hashlib.sha256(b"auth0|123456").hexdigest()
    keys = list(keys_of("auth0|123456"))
    assert keys == [digits[:length] for length in range(8, 25)]
    assert len("pactown_" + keys[-1]) == 32


@pytest.mark.parametrize(("one", "other"), COLLISIONS)
def test_the_collisions_are_real(one: str, other: str) -> None:
    assert next(keys_of(one)) == next(keys_of(other))
    assert one != other


@pytest.mark.host
def test_colliding_ids_never_share_an_account(state: State, colliding: tuple[str, str]) -> None:
    one, other = colliding
    first, second = state.users.get_or_create(one), state.users.get_or_create(other)
    assert len(first.key) == 8
    assert second.key.startswith(first.key)
    assert len(second.key) == 9
    assert first.linux_uid != second.linux_uid
    state.reopen()
    assert (state.users.get(one), state.users.get(other)) == (first, second)


@pytest.mark.host
def test_key_of_a_removed_user_is_not_handed_on(state: State, colliding: tuple[str, str]) -> None:
    one, other = colliding
    first = state.users.get_or_create(one)
    remove(state.users, one)
    second = state.users.get_or_create(other)
    assert len(second.key) == 9
    assert second.linux_uid != first.linux_uid
    again = state.users.get_or_create(one)
    assert (again.key, again.linux_uid) == (first.key, first.linux_uid)  # its own, which nobody else had


@pytest.mark.host
def test_foreign_login_of_that_name_makes_the_key_longer(state: State, own: str, test_run: hostguard.Run) -> None:
    key = next(keys_of(own))
    assert useradd(f"pactown_{key}", test_run.uids[1]) == 0
    user = state.users.get_or_create(own)
    assert user.key.startswith(key)
    assert len(user.key) == 9
    assert pwd.getpwnam(f"pactown_{key}").pw_uid == test_run.uids[1]


@pytest.mark.host
def test_no_key_is_left(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state.users._accounts, "knows", lambda name: True)
    with pytest.raises(AccountError, match="taken") as caught:
        state.users.get_or_create("auth0|123456")
    assert caught.value.remedy is not None
    assert state.registry.users.rows() == []


# ---- Users


@pytest.mark.host
def test_ids_come_back_byte_for_byte_with_an_account_each(state: State) -> None:
    made = [state.users.get_or_create(saas_user_id) for saas_user_id in IDS]
    state.reopen()
    assert state.users.list() == made
    assert [user.saas_user_id for user in made] == IDS
    assert [state.users.get(saas_user_id) for saas_user_id in IDS] == made
    assert [state.users.get_or_create(saas_user_id) for saas_user_id in IDS] == made
    assert len({user.linux_uid for user in made}) == len({user.key for user in made}) == len(IDS)


@pytest.mark.host
def test_account_and_home_are_as_promised(state: State, own: str, test_run: hostguard.Run) -> None:
    assert state.users.root_mode
    assert state.users.get(own) is None
    user = state.users.get_or_create(own)
    assert user.linux_username == f"pactown_{next(keys_of(own))}"
    assert user.linux_uid == user.linux_gid == test_run.uids[0]
    assert user.home_dir == state.settings.users_base / user.linux_username
    login = pwd.getpwnam(user.linux_username)
    assert (login.pw_uid, login.pw_gid, login.pw_dir) == (user.linux_uid, user.linux_gid, str(user.home_dir))
    home = user.home_dir.stat()
    assert (home.st_uid, home.st_gid, stat.S_IMODE(home.st_mode)) == (user.linux_uid, user.linux_gid, 0o700)
    done = subprocess.run(
        ["sh", "-c", 'cd "$0" && touch file', str(user.home_dir)],
        user=user.linux_uid,
        group=user.linux_gid,
        extra_groups=[],
        check=False,
    )
    assert done.returncode == 0


@pytest.mark.parametrize("bad", ["", "a\0b", "\ud800", "x" * 1025])
def test_malformed_ids_are_refused(state: State, bad: str) -> None:
    for method in (state.users.get, state.users.get_or_create, state.users.begin_removal):
        with pytest.raises(SpecError):
            method(bad)
    assert state.registry.users.rows() == []


@pytest.mark.host
def test_exhausted_range_leaves_nothing_behind(state: State, users_base: Path, test_run: hostguard.Run) -> None:
    first, _ = test_run.uids
    settings = Settings(users_base=users_base, uid_ranges=((first, first),))
    users = Users(settings, state.registry)
    user = users.get_or_create("a")
    with pytest.raises(AccountError, match="no uid is free"):
        users.get_or_create("b")
    assert users.list() == [user]
    assert state.registry.users.row("b") is None
    remove(users, "a")
    with pytest.raises(AccountError, match="no uid is free"):
        users.get_or_create("b")  # a uid is not handed on
    assert state.users.get_or_create("b").linux_uid == first + 1


@pytest.mark.host
def test_account_that_was_changed_is_found_at_the_next_use(state: State) -> None:
    user = state.users.get_or_create("a")
    subprocess.run(["usermod", "--home", "/nonexistent", user.linux_username], check=True)
    with pytest.raises(AccountError):
        state.users.get_or_create("a")
    assert state.users.get("a") == user


@pytest.mark.host
def test_removal(state: State) -> None:
    user = state.users.get_or_create("a")
    with pytest.raises(StateError, match="has not begun"):
        state.users.remove_account(user)
    assert state.users.begin_removal("a") == state.users.begin_removal("a") == user
    assert state.users.unfinished_removals() == [user]
    assert state.users.get("a") is None
    with pytest.raises(StateError, match="being removed"):
        state.users.get_or_create("a")
    state.users.remove_account(user)
    with pytest.raises(KeyError):
        pwd.getpwnam(user.linux_username)
    assert state.users.list() == state.users.unfinished_removals() == []
    for unknown in ("a", "never there"):
        with pytest.raises(NotFoundError):
            state.users.begin_removal(unknown)
    with pytest.raises(StateError):
        state.users.remove_account(user)


@pytest.mark.host
def test_what_runs_keeps_its_user(state: State) -> None:
    user = state.users.get_or_create("a")
    state.registry.sandboxes.claim(
        SandboxRow(
            key=user.key,
            service_id="s",
            run_id="r",
            owner="o",
            kind="run",
            spec="{}",
            cgroup="/",
            created_at=1.0,
        )
    )
    with pytest.raises(StateError, match="something runs"):
        state.users.begin_removal("a")
    assert state.users.get_or_create("a") == user
    state.registry.sandboxes.release(user.key, "s", "r")
    remove(state.users, "a")


@pytest.mark.host
def test_removed_user_that_comes_back_finds_its_home(state: State) -> None:
    user = state.users.get_or_create("a")
    (user.home_dir / "file").touch()
    remove(state.users, "a")
    assert (user.home_dir / "file").exists()
    again = state.users.get_or_create("a")
    assert (again.linux_uid, again.home_dir) == (user.linux_uid, user.home_dir)
    assert again.created_at > user.created_at


# ---- Crashes

POINTS = {
    "row": "after(UserTable, 'add')",
    "group": "after(accounts, '_run', lambda command: command[0] == 'groupadd')",
    "login": "after(accounts, '_run', lambda command: command[0] == 'useradd')",
    "home": "after(os, 'mkdir', lambda name, *rest: str(name).startswith('pactown_'))",
    "chown": "after(os, 'fchown')",
    "chmod": "after(os, 'fchmod')",
    "ready": "after(UserTable, 'mark_ready')",
    "begun": "after(UserTable, 'begin_removal')",
    "userdel": "after(accounts, '_run', lambda command: command[0] == 'userdel')",
    "tombstone": "after(UserTable, 'tombstone')",
}

CRASH = """
def after(place, name, when=lambda *arguments: True):
    real = getattr(place, name)
    def replacement(*arguments, **options):
        result = real(*arguments, **options)
        if when(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(place, name, replacement)

eval(sys.argv[4])
users.get_or_create(sys.argv[5])
users.remove_account(users.begin_removal(sys.argv[5]))
"""


def crash(state: State, point: str, saas_user_id: str) -> None:
    with state.run(CRASH, POINTS[point], saas_user_id) as child:
        child.communicate("\n", timeout=60)
    assert child.returncode == -9


def assert_whole(state: State, user: IsolatedUser) -> None:
    login = pwd.getpwnam(user.linux_username)
    assert (login.pw_uid, login.pw_gid) == (user.linux_uid, user.linux_gid)
    home = user.home_dir.stat()
    assert (home.st_uid, home.st_gid, stat.S_IMODE(home.st_mode)) == (user.linux_uid, user.linux_gid, 0o700)
    assert state.users.list() == [user]


@pytest.mark.host
@pytest.mark.parametrize("point", ["row", "group", "login", "home", "chown", "chmod", "ready"])
def test_killed_while_making_is_finished_by_the_next(
    state: State, own: str, point: str, test_run: hostguard.Run
) -> None:
    crash(state, point, own)
    user = state.users.get_or_create(own)
    assert_whole(state, user)
    assert user.linux_uid == test_run.uids[0]
    assert len(list(hostsweep.accounts(test_run.claim))) == 2  # one login, one group
    assert len(user.key) == 8


@pytest.mark.host
@pytest.mark.parametrize("point", ["begun", "userdel", "tombstone"])
def test_killed_while_removing_is_finished_by_the_next(
    state: State, own: str, point: str, test_run: hostguard.Run
) -> None:
    crash(state, point, own)
    for user in state.users.unfinished_removals():
        assert state.users.begin_removal(user.saas_user_id) == user
        state.users.remove_account(user)
    assert list(hostsweep.accounts(test_run.claim)) == []
    assert [row.status for row in state.registry.users.rows()] == ["deleted"]
    assert_whole(state, state.users.get_or_create(own))


@pytest.mark.host
@pytest.mark.parametrize("point", ["row", "group", "login"])
def test_uid_that_was_taken_after_a_crash_is_given_up(
    state: State, own: str, foreign: str, point: str, test_run: hostguard.Run
) -> None:
    crash(state, point, own)
    first, last = test_run.uids
    key = next(keys_of(own))
    subprocess.run(["userdel", f"pactown_{key}"], check=False, capture_output=True)
    assert useradd(foreign, first) == 0
    user = state.users.get_or_create(own)
    assert_whole(state, user)
    assert first < user.linux_uid <= last
    assert pwd.getpwuid(first).pw_name == foreign


@pytest.mark.host
def test_name_that_was_taken_after_a_crash_is_given_up(state: State, own: str, test_run: hostguard.Run) -> None:
    crash(state, "row", own)
    key = next(keys_of(own))
    assert useradd(f"pactown_{key}", test_run.uids[1]) == 0
    user = state.users.get_or_create(own)
    assert_whole(state, user)
    assert len(user.key) == 9


# ---- Races

RACE = """
made = {}
for number in range(25):
    for saas_user_id in ("everybody's", f"shared {number % 8}", f"{sys.argv[4]} {number % 4}"):
        user = users.get_or_create(saas_user_id)
        made[saas_user_id] = [user.linux_username, user.linux_uid]
print(json.dumps(made))
registry.close()
"""


CREATES = int(os.environ.get("PACTOWN_CREATES", "300"))
"""So many users are made without accounts."""

PRETEND = """
from itertools import count
from pactown_runner import users as module
from pactown_runner.errors import AccountError

class Pretended(accounts.Accounts):
    def create(self, row): pass
    def clashes(self, row): return False
    def verify(self, user): pass

module.make_home = lambda *arguments, **options: None
users._accounts = Pretended(base, settings.uid_ranges, registry.state_id, etc=base)  # with a lock of its own
made = {}
try:
    for number in count():
        for saas_user_id in (f"{sys.argv[4]} {number}", f"shared {number}"):
            user = users.get_or_create(saas_user_id)
            made[saas_user_id] = [user.linux_username, user.linux_uid]
except AccountError as error:
    print(error, file=sys.stderr)
print(json.dumps(made))
registry.close()
"""
"""Users without accounts, until there is no uid left."""


@pytest.mark.host
@pytest.mark.deadline(120 + CREATES // 50)
def test_a_range_is_used_up_to_the_last_uid_and_none_twice(users_base: Path) -> None:
    first, last = 1_000_000, 1_000_000 + CREATES - 1  # nobody has these, nor gets them
    settings = Settings(users_base=users_base, state_dir=users_base / ".state", uid_ranges=((first, last),))
    with Registry(settings.state_dir / "registry.db") as registry:
        state = State(settings, registry, Users(settings, registry))
        reaped = UserRow(
            saas_id="reaped",
            key="x",
            username="pactown_x",
            uid=first + 100,
            gid=first + 100,
            home=Path("/x"),
            created_at=0,
        )
        registry.users.add(reaped)  # what is below it is a gap
        children = [state.run(PRETEND, name, stderr=subprocess.PIPE) for name in ("one", "two")]
        with ThreadPoolExecutor(2) as pool:
            outputs = list(pool.map(lambda child: child.communicate("\n", timeout=100 + CREATES // 50), children))
        assert [child.returncode for child in children] == [0, 0]
        assert [error.startswith(f"no uid is free in {first}-{last} (widen") for _, error in outputs] == [True, True]
        one, two = (json.loads(output.splitlines()[-1]) for output, _ in outputs)
        shared = one.keys() & two.keys()
        assert {name: one[name] for name in shared} == {name: two[name] for name in shared}
        made = {**one, **two}
        assert sorted(uid for _, uid in made.values()) == [uid for uid in range(first, last + 1) if uid != reaped.uid]
        assert len({name for name, _ in made.values()}) == len(made) == CREATES - 1
        assert len(registry.users.rows()) == CREATES


@contextlib.contextmanager
def coming_and_going(login: str, uid: int) -> Iterator[Counter[int]]:
    """Meanwhile somebody else makes and removes a login, again and again; how often useradd ended with which code."""
    stop = threading.Event()
    codes: Counter[int] = Counter()

    def add_and_remove() -> None:
        while not stop.is_set():
            codes[useradd(login, uid)] += 1
            subprocess.run(["userdel", login], check=False, capture_output=True, timeout=60)

    thread = threading.Thread(target=add_and_remove)
    thread.start()
    try:
        yield codes
    finally:
        stop.set()
        thread.join()


def complaints(names: list[str]) -> list[str]:
    """What pwck and grpck say about these names."""
    said = ""
    for command in ("pwck", "grpck"):
        said += subprocess.run([command, "-r"], check=False, capture_output=True, text=True, timeout=60).stdout
    return [line for line in said.splitlines() if any(name in line for name in names)]


@pytest.mark.host
def test_two_processes_beside_a_foreign_useradd(state: State, foreign: str, test_run: hostguard.Run) -> None:
    children = [state.run(RACE, name) for name in ("one", "two")]
    with coming_and_going(foreign, test_run.uids[1]) as came, ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda child: child.communicate("\n", timeout=120)[0], children))
    assert [child.returncode for child in children] == [0, 0]
    assert came[0] > 0
    one, two = (json.loads(output.splitlines()[-1]) for output in outputs)
    shared = one.keys() & two.keys()
    assert len(shared) == 9
    assert {name: one[name] for name in shared} == {name: two[name] for name in shared}
    made = {**one, **two}
    assert len(made) == 9 + 8
    assert len({uid for _, uid in made.values()}) == len(made)
    listed = {user.saas_user_id: [user.linux_username, user.linux_uid] for user in state.users.list()}
    assert listed == made
    for name, uid in made.values():
        assert pwd.getpwnam(name).pw_uid == uid
    assert complaints([name for name, _ in made.values()]) == []


CROWD = """
from concurrent.futures import ThreadPoolExecutor

ids = [sys.argv[4]] * 25 + [f"{sys.argv[4]} {sys.argv[5]} {number}" for number in range(25)]
with ThreadPoolExecutor(len(ids)) as pool:
    made = list(pool.map(users.get_or_create, ids))
print(json.dumps([[user.saas_user_id, user.linux_username, user.linux_uid] for user in made]))
registry.close()
"""


@pytest.mark.host
def test_a_crowd_from_two_processes_beside_a_foreign_useradd(
    state: State, own: str, foreign: str, test_run: hostguard.Run
) -> None:
    """50 at once ask for one id, and 50 for others."""
    children = [state.run(CROWD, own, name) for name in ("one", "two")]
    with coming_and_going(foreign, test_run.uids[1]) as came, ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda child: child.communicate("\n", timeout=100)[0], children))
    assert [child.returncode for child in children] == [0, 0]
    assert came[0] > 0
    made = [tuple(user) for output in outputs for user in json.loads(output.splitlines()[-1])]
    assert len(made) == 100
    accounts = set(made)
    assert len({saas_user_id for saas_user_id, _, _ in accounts}) == len(accounts) == 51
    assert len({name for _, name, _ in accounts}) == len({uid for _, _, uid in accounts}) == 51
    assert {(user.saas_user_id, user.linux_username, user.linux_uid) for user in state.users.list()} == accounts
    for _, name, uid in accounts:
        assert pwd.getpwnam(name).pw_uid == grp.getgrnam(name).gr_gid == uid
    assert complaints([name for _, name, _ in accounts]) == []


@pytest.mark.host
def test_complaints_are_seen(state: State) -> None:
    user = state.users.get_or_create("a")
    user.home_dir.rmdir()
    assert len(complaints([user.linux_username])) == 1


@pytest.mark.host
def test_threads_that_ask_at_once_get_one_account(state: State, test_run: hostguard.Run) -> None:
    start = threading.Barrier(8, timeout=20)

    def ask(number: int) -> IsolatedUser:
        start.wait()
        return state.users.get_or_create(f"id {number % 2}")

    with ThreadPoolExecutor(8) as pool:
        users = list(pool.map(ask, range(8)))
    assert users[0::2] == [users[0]] * 4
    assert users[1::2] == [users[1]] * 4
    assert len(list(hostsweep.accounts(test_run.claim))) == 4  # two logins, two groups


@pytest.mark.host
def test_two_states_on_one_host_never_share_a_uid(state: State, users_base: Path) -> None:
    base = users_base / "other"
    other = Settings(users_base=base, state_dir=base / ".state", uid_ranges=state.settings.uid_ranges)
    with Registry(other.state_dir / "registry.db") as registry:
        both = (state.users, Users(other, registry))
        with ThreadPoolExecutor(2) as pool:
            made = list(pool.map(lambda users: [users.get_or_create(f"id {number}") for number in range(5)], both))
    assert len({user.linux_uid for users in made for user in users}) == 10
    assert len({user.linux_username for users in made for user in users}) == 10


# ---- Without root

VIRTUAL = """
user = users.get_or_create(sys.argv[4])
other = users.get_or_create("other")
assert users.get_or_create(sys.argv[4]) == user != other
users.remove_account(users.begin_removal("other"))
home = user.home_dir.stat()
print(json.dumps([users.root_mode, user.to_dict(), oct(home.st_mode), home.st_uid, len(users.list())]))
registry.close()
"""


def test_without_root_users_are_names(users_base: Path, own: str, test_run: hostguard.Run) -> None:
    uid, gid = os.geteuid(), os.getegid()
    environ = dict(os.environ)
    if uid == 0:
        uid = gid = test_run.uids[0]
        environ["DROP_TO"] = str(uid)
    base = users_base / "mine"
    base.mkdir()
    os.chown(base, uid, gid)
    done = subprocess.run(
        [sys.executable, "-c", CHILD + VIRTUAL, str(base), "64990", "64999", own],
        cwd=ROOT,
        env=environ,
        input="\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    root_mode, user, mode, owner, count = json.loads(done.stdout.splitlines()[-1])
    assert root_mode is False
    assert (user["linux_uid"], user["linux_gid"]) == (uid, gid)
    assert user["home_dir"] == str(base / f"pactown_{next(keys_of(own))}")
    assert (mode, owner) == ("0o40700", uid)
    assert count == 1
    with pytest.raises(KeyError):
        pwd.getpwnam(user["linux_username"])


@pytest.mark.host
def test_root_does_not_take_names_for_accounts(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state.users, "root_mode", False)
    state.users.get_or_create("a")
    monkeypatch.undo()
    with pytest.raises(AccountError, match="gone"):
        state.users.get_or_create("a")
