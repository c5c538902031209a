"""Accounts and homes against the host's real account files and tools."""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import pwd
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pactown_runner import accounts as accounts_module
from pactown_runner.accounts import Accounts
from pactown_runner.errors import AccountError
from pactown_runner.home_dirs import make_home
from pactown_runner.registry import UserRow
from tests import hostguard, hostsweep

STATE_ID = "0123456789abcdef0123456789abcdef"

RowMaker = Callable[..., UserRow]


@pytest.fixture
def cleanup(test_run: hostguard.Run) -> Iterator[None]:
    """Every account of this run's block of uids goes, ours and those that play foreign ones."""
    yield
    for leak in list(hostsweep.accounts(test_run.claim)):
        leak.remove()


@pytest.fixture
def accounts(users_base: Path, test_run: hostguard.Run, cleanup: None) -> Accounts:
    return Accounts(users_base, [test_run.uids], STATE_ID)


def not_in(*used: int) -> Callable[[int, int], Iterator[range]]:
    """As `UserTable.unused_uids` of a registry that has these."""

    def unused(first: int, last: int) -> Iterator[range]:
        above = max((uid + 1 for uid in used if first <= uid <= last), default=first)
        yield range(above, last + 1)
        yield from (range(uid, uid + 1) for uid in range(first, above) if uid not in used)

    return unused


@pytest.fixture
def row(users_base: Path, accounts: Accounts) -> UserRow:
    uid = accounts.free_uid(not_in())
    name = f"pactown_{uid:08x}"
    return UserRow(
        saas_id="auth0|1", key=name[8:], username=name, uid=uid, gid=uid, home=users_base / name, created_at=1.0
    )


def useradd(name: str, uid: int) -> None:
    group = ["groupadd", "--gid", str(uid), name]
    login = ["useradd", "--uid", str(uid), "--gid", str(uid), "--no-create-home", "-K", "SUB_UID_COUNT=0", name]
    for command in (group, login):
        subprocess.run(command, check=True, capture_output=True, timeout=60)


def lines_about(name: str) -> dict[str, list[str]]:
    files = ("passwd", "shadow", "group", "gshadow", "subuid", "subgid")
    return {
        file: [line for line in Path("/etc", file).read_text().splitlines() if line.startswith(f"{name}:")]
        for file in files
    }


# ---- Logins


@pytest.mark.host
def test_login_has_what_was_asked_for_and_nothing_else(accounts: Accounts, row: UserRow) -> None:
    with accounts.lock():
        accounts.create(row)
        accounts.create(row)  # again, and nothing happens
    name, number = row.username, row.uid
    lines = lines_about(name)
    assert lines["passwd"] == [f"{name}:x:{number}:{number}:pactown 0123456789abcdef:{row.home}:/usr/sbin/nologin"]
    assert lines["group"] == [f"{name}:x:{number}:"]
    assert [line.split(":")[1] for line in lines["shadow"]] == ["!"]
    assert [line.split(":")[1] for line in lines["gshadow"]] == ["!"]
    assert lines["subuid"] == lines["subgid"] == []
    assert os.getgrouplist(name, number) == [number]
    assert not row.home.exists()
    assert not Path("/var/mail", name).exists()
    accounts.verify(row.user())


@pytest.mark.host
def test_delete_leaves_nothing_and_can_be_repeated(accounts: Accounts, row: UserRow) -> None:
    with accounts.lock():
        accounts.create(row)
        accounts.delete(row)
        assert not any(lines_about(row.username).values())
        accounts.delete(row)
    with pytest.raises(AccountError, match="gone"):
        accounts.verify(row.user())


@pytest.mark.host
@pytest.mark.parametrize("left", ["group", "login"])
def test_delete_finishes_what_was_begun(accounts: Accounts, row: UserRow, left: str) -> None:
    with accounts.lock():
        accounts.create(row)
        subprocess.run(["userdel", row.username], check=True, capture_output=True)
        if left == "group":
            subprocess.run(["groupadd", "--gid", str(row.gid), row.username], check=True)
        accounts.delete(row)
    assert not accounts.knows(row.username)


@pytest.mark.host
def test_delete_waits_for_nobody_that_still_runs(accounts: Accounts, row: UserRow) -> None:
    with accounts.lock():
        accounts.create(row)
        process = subprocess.Popen(["sleep", "60"], user=row.uid, group=row.gid, extra_groups=[])
        try:
            with pytest.raises(AccountError, match="currently used") as caught:
                accounts.delete(row)
            assert caught.value.remedy is not None
        finally:
            process.kill()
            process.wait()
        accounts.delete(row)
    assert not accounts.knows(row.username)


@pytest.mark.host
def test_foreign_logins_are_neither_taken_nor_deleted(accounts: Accounts, row: UserRow) -> None:
    useradd(row.username, row.uid)  # same name and uid, and not our comment
    before = lines_about(row.username)
    assert accounts.knows(row.username)
    assert accounts.clashes(row)
    with accounts.lock():
        for action in (accounts.create, accounts.delete):
            with pytest.raises(AccountError, match="should be") as caught:
                action(row)
            assert caught.value.remedy is not None
    assert lines_about(row.username) == before


@pytest.mark.host
def test_login_of_another_state_is_foreign(accounts: Accounts, row: UserRow, users_base: Path) -> None:
    other = Accounts(users_base, [(row.uid, row.uid)], "f" * 32)
    with accounts.lock():
        accounts.create(row)
        assert not accounts.clashes(row)
        assert other.clashes(row)
        with pytest.raises(AccountError):
            other.delete(row)
    accounts.verify(row.user())


@pytest.mark.host
def test_uid_of_another_login_is_refused(accounts: Accounts, row: UserRow, foreign: str) -> None:
    useradd(foreign, row.uid)
    with accounts.lock():
        assert accounts.clashes(row)
        with pytest.raises(AccountError, match="already exists"):
            accounts.create(row)
    assert not accounts.knows(row.username)


@pytest.mark.host
def test_verify_sees_every_change(accounts: Accounts, row: UserRow) -> None:
    with accounts.lock():
        accounts.create(row)
    user = row.user()
    accounts.verify(user)
    subprocess.run(["usermod", "--home", "/nonexistent", row.username], check=True)
    with pytest.raises(AccountError, match="/nonexistent") as caught:
        accounts.verify(user)
    assert caught.value.remedy is not None
    subprocess.run(["usermod", "--home", str(row.home), row.username], check=True)
    accounts.verify(user)
    for changed in (
        replace(user, linux_uid=user.linux_uid + 1),
        replace(user, linux_gid=user.linux_gid + 1),
        replace(user, home_dir=user.home_dir / "x"),
        replace(user, linux_username=user.linux_username + "x"),
    ):
        with pytest.raises(AccountError):
            accounts.verify(changed)
    accounts.verify(user)
    subprocess.run(["userdel", row.username], check=True, capture_output=True)
    with pytest.raises(AccountError, match="gone"):
        accounts.verify(user)


@pytest.mark.host
def test_verify_sees_a_second_login_with_the_same_uid(accounts: Accounts, row: UserRow, foreign: str) -> None:
    useradd(foreign, row.uid)
    command = ["useradd", "--non-unique", "--uid", str(row.uid), "--gid", str(row.gid), "--no-create-home"]
    subprocess.run(
        [*command, "--home-dir", str(row.home), "-K", "SUB_UID_COUNT=0", row.username],
        check=True,
        capture_output=True,
    )
    with pytest.raises(AccountError, match=f"also that of login {foreign}"):
        accounts.verify(row.user())


@pytest.mark.host
def test_verify_sees_a_login_with_the_same_uid_that_came_later(accounts: Accounts, row: UserRow, foreign: str) -> None:
    with accounts.lock():
        accounts.create(row)
    accounts.verify(row.user())
    command = ["useradd", "--non-unique", "--uid", str(row.uid), "--gid", str(row.gid), "--no-create-home"]
    subprocess.run([*command, "-K", "SUB_UID_COUNT=0", foreign], check=True, capture_output=True)
    assert pwd.getpwuid(row.uid).pw_name == row.username
    with pytest.raises(AccountError, match=f"also that of login {foreign}"):
        accounts.verify(row.user())


@pytest.fixture
def let_passwd_go() -> Iterator[Callable[[], None]]:
    """The lock that other programs which add users hold: a file with a live process's pid. This lets it go."""
    path = Path("/etc/passwd.lock")
    while True:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            os.sched_yield()  # somebody else's, for some milliseconds
            continue
        break
    held = ExitStack()
    held.callback(path.unlink)
    with held:
        os.write(fd, f"{os.getpid()}\0".encode())
        os.close(fd)
        yield held.close


@pytest.mark.host
def test_a_held_passwd_lock_is_waited_for(
    accounts: Accounts, row: UserRow, let_passwd_go: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    real = subprocess.run

    def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = real(*arguments, **options)
        codes.append(done.returncode)
        if codes.count(1) == 2:
            let_passwd_go()
        return done

    monkeypatch.setattr(subprocess, "run", run)
    accounts.create(row)
    assert codes == [0, 1, 1, 0]  # the group, then the login's three tries
    accounts.verify(row.user())


@pytest.mark.host
def test_patience_ends(
    accounts: Accounts, row: UserRow, let_passwd_go: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts_module, "LOCK_PATIENCE", 0.0)
    with pytest.raises(AccountError, match="cannot lock /etc/passwd"):
        accounts.create(row)
    let_passwd_go()
    accounts.create(row)


@pytest.mark.host
def test_what_a_dead_processs_useradd_made_meanwhile_is_taken(
    accounts: Accounts, row: UserRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = accounts_module._run
    codes: list[int] = []

    def run_after_another_did(command: list[str]) -> subprocess.CompletedProcess[str]:
        real(command)
        done = real(command)
        codes.append(done.returncode)
        return done

    monkeypatch.setattr(accounts_module, "_run", run_after_another_did)
    with accounts.lock():
        accounts.create(row)
    assert codes == [9, 9]  # the name is in use, groupadd(8) and useradd(8)
    accounts.verify(row.user())


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accounts_module, "_TOOL_PATH", str(tmp_path))
    with pytest.raises(AccountError, match="cannot find useradd") as caught:
        accounts_module._run(["useradd"])
    assert caught.value.remedy is not None


# ---- Uids


@pytest.mark.host
def test_next_uid_that_nobody_has(accounts: Accounts, foreign: str, test_run: hostguard.Run) -> None:
    first, _ = test_run.uids
    assert accounts.free_uid(not_in()) == first
    assert accounts.free_uid(not_in(first, first + 2)) == first + 3
    useradd(foreign, first)
    subprocess.run(["groupadd", "--gid", str(first + 1), f"{foreign}group"], check=True)
    assert accounts.free_uid(not_in()) == first + 2
    assert accounts.free_uid(not_in(first + 2)) == first + 3


@pytest.mark.host
def test_gaps_are_filled_when_nothing_is_left_above_them(
    users_base: Path, foreign: str, test_run: hostguard.Run, cleanup: None
) -> None:
    first, _ = test_run.uids
    accounts = Accounts(users_base, [(first, first + 4), (first + 5, first + 6)], STATE_ID)
    assert accounts.free_uid(not_in(first + 4)) == first + 5
    assert accounts.free_uid(not_in(first + 4, first + 5)) == first + 6
    assert accounts.free_uid(not_in(first, first + 4, first + 6)) == first + 1
    useradd(foreign, first + 1)
    assert accounts.free_uid(not_in(first, first + 4, first + 6)) == first + 2


@pytest.mark.host
def test_a_gid_that_has_no_group_and_is_a_logins_is_left_alone(
    accounts: Accounts, foreign: str, test_run: hostguard.Run
) -> None:
    first, last = test_run.uids
    useradd(foreign, last)
    subprocess.run(["groupadd", "--gid", str(first), f"{foreign}group"], check=True)
    subprocess.run(["usermod", "--gid", str(first), foreign], check=True)
    subprocess.run(["groupdel", "--force", f"{foreign}group"], check=True)
    assert accounts.free_uid(not_in()) == first + 1


@pytest.mark.host
def test_exhausted_ranges_are_a_typed_error(users_base: Path, test_run: hostguard.Run) -> None:
    first, _ = test_run.uids
    accounts = Accounts(users_base, [(first, first + 1), (first + 5, first + 5)], STATE_ID)
    assert accounts.free_uid(not_in(first, first + 1)) == first + 5
    with pytest.raises(AccountError, match=f"{first}-{first + 1}, {first + 5}-{first + 5}") as caught:
        accounts.free_uid(not_in(first, first + 1, first + 5))
    assert caught.value.remedy is not None


def test_subordinate_ids_are_left_alone(users_base: Path, tmp_path: Path) -> None:
    (tmp_path / "subuid").write_text("somebody:64990:4\nbroken line\nx:y:z\n")
    (tmp_path / "subgid").write_text("somebody:64995:1\n")
    accounts = Accounts(users_base, [(64990, 64999)], STATE_ID, etc=tmp_path)
    assert accounts.free_uid(not_in()) == 64994
    assert accounts.free_uid(not_in(64994)) == 64996


def test_ids_that_a_name_service_does_not_list_are_left_alone(
    users_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pwd, "getpwall", list)
    monkeypatch.setattr(grp, "getgrall", list)
    accounts = Accounts(users_base, [(0, 3), (64990, 64990)], STATE_ID)
    assert accounts.free_uid(not_in()) == 64990  # Debian's base-passwd has 0 to 3


def test_ranges_that_touch_systemd_homed_are_dropped(users_base: Path, tmp_path: Path) -> None:
    ranges = [(60001, 61183), (65536, 99999)]
    without = Accounts(users_base, ranges, STATE_ID, homed_dir=tmp_path / "missing")
    beside = Accounts(users_base, ranges, STATE_ID, homed_dir=tmp_path)
    assert without._ranges() == ranges
    assert beside._ranges() == [(65536, 99999)]


# ---- The lock


@pytest.mark.host
def test_one_at_a_time_on_the_whole_host(users_base: Path) -> None:
    one, other = (Accounts(users_base, [], state_id) for state_id in ("a" * 32, "b" * 32))
    inside = 0
    start = threading.Barrier(4, timeout=20)

    def work(accounts: Accounts) -> int:
        nonlocal inside
        start.wait()
        most = 0
        for _ in range(50):
            with accounts.lock():
                inside += 1
                most = max(most, inside)
                os.sched_yield()
                inside -= 1
        return most

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(work, [one, other, one, other])) == {1}


@pytest.mark.host
def test_lock_that_others_can_hold_is_refused(users_base: Path, tmp_path: Path) -> None:
    accounts = Accounts(users_base, [], STATE_ID, etc=tmp_path)
    with accounts.lock():
        fd = os.open(tmp_path / ".pwd.lock", os.O_RDONLY)
        try:
            with pytest.raises(OSError) as caught:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            assert caught.value.errno == errno.EWOULDBLOCK
        finally:
            os.close(fd)
    (tmp_path / ".pwd.lock").chmod(0o644)
    with pytest.raises(AccountError, match="open to others"), accounts.lock():
        pytest.fail("it was taken")


# ---- Homes


def ids() -> tuple[int, int]:
    return (64999, 64999) if os.geteuid() == 0 else (os.geteuid(), os.getegid())


def test_home_is_made_private_and_given_away(users_base: Path) -> None:
    base = users_base / "new" / "base"
    before = os.umask(0o077)
    try:
        make_home(base, "pactown_a", *ids())
        make_home(base, "pactown_a", *ids())
    finally:
        os.umask(before)
    found = (base / "pactown_a").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (*ids(), 0o700)
    assert stat.S_IMODE(base.stat().st_mode) == 0o711
    assert stat.S_IMODE(base.parent.stat().st_mode) == 0o711


def test_own_empty_home_of_an_interrupted_call_is_finished(users_base: Path) -> None:
    (users_base / "pactown_a").mkdir(mode=0o755)
    make_home(users_base, "pactown_a", *ids())
    found = (users_base / "pactown_a").stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (ids()[0], 0o700)


@pytest.mark.host
def test_home_with_somebodys_files_is_refused(users_base: Path) -> None:
    (users_base / "pactown_a").mkdir()
    (users_base / "pactown_a" / "file").touch()
    (users_base / "pactown_b").mkdir()
    os.chown(users_base / "pactown_b", 64998, 64998)
    for name, owner in (("pactown_a", 0), ("pactown_b", 64998)):
        with pytest.raises(AccountError, match="is there already"):
            make_home(users_base, name, *ids())
        assert (users_base / name).stat().st_uid == owner
    os.chown(users_base / "pactown_a", *ids())
    make_home(users_base, "pactown_a", *ids())  # the tenant's own, files and all
    assert (users_base / "pactown_a" / "file").stat().st_uid == os.geteuid()  # nothing below is touched


@pytest.mark.parametrize("kind", ["link", "file"])
def test_home_through_a_link_is_refused(users_base: Path, kind: str) -> None:
    target = users_base / "target"
    target.mkdir(mode=0o755)
    if kind == "link":
        (users_base / "pactown_a").symlink_to(target)
    else:
        (users_base / "pactown_a").touch()
    with pytest.raises(AccountError, match="cannot make the home"):
        make_home(users_base, "pactown_a", *ids())
    assert (target.stat().st_uid, stat.S_IMODE(target.stat().st_mode)) == (os.geteuid(), 0o755)


@pytest.mark.parametrize("mode", [0o777, 0o731, 0o1777, 0o775])
def test_base_that_others_can_write_is_refused(users_base: Path, mode: int) -> None:
    users_base.chmod(mode)
    with pytest.raises(AccountError, match="others than uid") as caught:
        make_home(users_base, "pactown_a", *ids())
    assert caught.value.remedy is not None
    assert list(users_base.iterdir()) == []


def test_base_that_is_a_link_is_refused(users_base: Path) -> None:
    (users_base / "real").mkdir(mode=0o711)
    (users_base / "link").symlink_to("real")
    with pytest.raises(AccountError, match="cannot keep homes"):
        make_home(users_base / "link", "pactown_a", *ids())
    assert list((users_base / "real").iterdir()) == []


@pytest.mark.host
@pytest.mark.parametrize(("mode", "why"), [(0o700, "cannot pass"), (0o777, "can change")])
def test_parents_must_be_safe_and_passable(users_base: Path, mode: int, why: str) -> None:
    make_home(users_base / "base", "pactown_a", *ids())
    users_base.chmod(mode)
    with pytest.raises(AccountError, match=why) as caught:
        make_home(users_base / "base", "pactown_b", *ids())
    assert caught.value.remedy is not None
    users_base.chmod(0o711)
    (users_base / "base").chmod(0o700)
    with pytest.raises(AccountError, match="cannot pass"):
        make_home(users_base / "base", "pactown_b", *ids())


@pytest.mark.host
def test_links_on_the_way_must_lead_through_safe_places(users_base: Path) -> None:
    (users_base / "open" / "real").mkdir(parents=True)
    for name in ("open", "open/real"):
        (users_base / name).chmod(0o777 if name == "open" else 0o711)
    (users_base / "link").symlink_to("open/real")
    with pytest.raises(AccountError, match="can change"):
        make_home(users_base / "link" / "base", "pactown_a", *ids())
    (users_base / "open").chmod(0o711)
    make_home(users_base / "link" / "base", "pactown_a", *ids())
