"""A pytest plugin: a test run leaves nothing on the host, also when it is interrupted or killed.

Each run takes one of a few slots, and holds a lock on it while it lives. The slot gives the run a block of
uids and gids, and with a few random digits its name; by these alone its things are known. So

- at the end, and after SIGINT, SIGTERM and SIGHUP, what tests left is named, removed, and fails the run;
- what a run left that was killed outright is removed by the next one: nobody holds its slot any more;
- runs that live side by side do not touch each other's things.

What appears meanwhile and looks like ours, but bears no run's mark, is named and left alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import signal
import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests import hostsweep
from tests.systemd_slices import stop_slices

FIRST_UID = 64100
SLOTS = 9
UIDS_A_SLOT = 100
NAME = "pactown-test-"
OTHERS = ("pactown-guest-", "pactown-bench-", "pactown-example")
"""How the things of this project's other commands are called, which remove them on their own."""


@dataclass
class Run:
    """One test run: its slot, and what it found.

    Attributes:
        name: begins the names of its cgroups and of its directory.
        directory: mode 0711, removed at the end; everything temporary belongs below it.
        first_seen: leaks that a look between two tests could see, and the test after which they were there.
    """

    slot: int
    name: str
    claim: hostsweep.Claim
    directory: Path
    lock: int
    swept: list[str] = field(default_factory=list)
    before: set[str] = field(default_factory=set)
    first_seen: dict[str, str] = field(default_factory=dict)
    leaks: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    interrupted: bool = False
    asked_to_end: str = ""
    finished: bool = False

    @property
    def uids(self) -> tuple[int, int]:
        """The first and the last uid that this run's accounts may have."""
        return self.claim.first_uid, self.claim.last_uid


RUN = pytest.StashKey[Run]()
_RESTORE = pytest.StashKey[ExitStack]()


# ---- Slots


def _claim(slot: int) -> hostsweep.Claim:
    first = FIRST_UID + slot * UIDS_A_SLOT
    return hostsweep.Claim(f"{NAME}{slot}x", first, first + UIDS_A_SLOT - 1)


def _lock_dir() -> Path:
    return Path("/run/pactown-test" if os.geteuid() == 0 else f"/tmp/pactown-test-locks-{os.geteuid()}")


def _try_lock(slot: int) -> int | None:
    """Lock a slot: a descriptor, or None if it is taken.

    The lock is fcntl(2)'s, which no child inherits: a test's stray child must not keep a dead run's slot.
    """
    path = _lock_dir() / str(slot)
    for _ in range(1000):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            continue
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno in {errno.EAGAIN, errno.EACCES}:
                return None
            raise
        # Whoever held it before may have removed the file between our opening and our locking.
        if os.path.exists(path) and os.path.samestat(os.fstat(fd), path.stat()):
            return fd
        os.close(fd)
    raise pytest.UsageError(f"{path} vanishes each time it is made: is {path.parent} a mount of what was removed?")


def _unlock(slot: int, fd: int) -> None:
    path = _lock_dir() / str(slot)
    path.unlink(missing_ok=True)
    os.close(fd)
    with suppress(OSError):  # other runs' locks are in it
        path.parent.rmdir()


def begin() -> Run:
    """Take the first free slot, and remove what dead runs left in this one and in the other free ones."""
    run = None
    swept = []
    for slot in range(SLOTS):
        fd = _try_lock(slot)
        if fd is None:
            continue
        removed, failed = hostsweep.sweep(partial(hostsweep.find, _claim(slot)))
        swept += removed + [f"COULD NOT REMOVE {what}" for what in failed]
        if run is None:
            name = f"{_claim(slot).prefix}{secrets.token_hex(3)}"
            run = Run(slot, name, _claim(slot), Path("/var/tmp", name), fd)
        else:
            _unlock(slot, fd)
    if run is None:
        raise pytest.UsageError(f"{SLOTS} test runs live on this host already: wait for one to end")
    run.swept = swept
    run.directory.mkdir(mode=0o700)
    run.directory.chmod(0o711)
    run.before = strangers()
    return run


def others_live(run: Run) -> bool:
    """Whether other test runs are under way, so that what bears no mark may be theirs."""
    for slot in range(SLOTS):
        if slot == run.slot:
            continue
        fd = _try_lock(slot)
        if fd is None:
            return True
        _unlock(slot, fd)
    return False


# ---- What is left


def strangers() -> set[str]:
    """What looks like ours and bears no run's mark: a real supervisor's, or a stray test's."""

    def marked(name: str) -> bool:
        claimed = any(_claim(slot).owns_name(name) for slot in range(SLOTS))
        return claimed or name == _lock_dir().name or name.startswith(OTHERS)

    block = range(FIRST_UID, FIRST_UID + SLOTS * UIDS_A_SLOT)
    found = {
        f"{kind} {name} ({number})"
        for kind, database in (("login", "passwd"), ("group", "group"))
        for name, number in hostsweep.names_and_ids(database).items()
        if number not in block
    }
    found |= {f"file {path}" for path in hostsweep.entries_named("pactown") if not marked(Path(path).name)}
    found |= {
        f"cgroup {path}"
        for path in hostsweep.cgroup_dirs(lambda name: name.startswith("pactown"))
        if not marked(path.name)
    }
    return found


def _look_between(run: Run, nodeid: str) -> None:
    # Few microseconds: accounts and the top of the tree. Processes are looked for at the end.
    leaks = [*hostsweep.accounts(run.claim), *hostsweep.top_cgroups(run.claim)]
    for leak in leaks:
        run.first_seen.setdefault(leak.what, nodeid)


def finish(run: Run) -> None:
    """Name and remove what is left, and give up the slot."""
    if run.finished:
        return
    run.finished = True
    try:
        stop_slices(run.name)
        removed, failed = hostsweep.sweep(lambda: [*hostsweep.find(run.claim), *hostsweep.children()])
        run.leaks = [f"{what}{_since(run, what)}" for what in removed if what != f"file {run.directory}"]
        run.leaks += [f"COULD NOT REMOVE {what}" for what in failed]
        run.strangers = sorted(strangers() - run.before)
    finally:
        _unlock(run.slot, run.lock)


def _since(run: Run, what: str) -> str:
    return f" (first seen after {run.first_seen[what]})" if what in run.first_seen else ""


# ---- Fixture and hooks


@pytest.fixture(scope="session")
def test_run(pytestconfig: pytest.Config) -> Run:
    """This run: its name, which begins all names that it makes on the host, and its block of uids."""
    return pytestconfig.stash[RUN]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    restore = config.stash[_RESTORE] = ExitStack()
    run = config.stash[RUN] = begin()
    restore.callback(finish, run)
    if config.option.basetemp is None:
        config.option.basetemp = str(run.directory / "pytest")
    temporary = run.directory / "tmp"
    temporary.mkdir()
    temporary.chmod(0o1777)
    for name, value in ((hostsweep.RUN_VARIABLE, run.name), ("TMPDIR", str(temporary))):
        _set_environ(restore, name, value)
    tempfile.tempdir = None
    # A shell starts what runs in the background with SIGINT ignored, and that would go on to all that tests start.
    restore.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
    for number in (signal.SIGTERM, signal.SIGHUP):
        previous = signal.signal(number, partial(_like_interrupt, run))
        restore.callback(signal.signal, number, previous)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _RESTORE in config.stash:
        config.stash[_RESTORE].close()


def pytest_report_header(config: pytest.Config) -> list[str]:
    run = config.stash[RUN]
    header = [f"hostguard: run {run.name}, uids {run.uids[0]}-{run.uids[1]}"]
    return header + [f"hostguard: a dead run left, removed now: {what}" for what in run.swept]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    try:
        return (yield)
    finally:
        run = item.config.stash[RUN]
        _look_between(run, item.nodeid)
        # asyncio turns an interrupt into a cancellation, and a test about those may have taken it for its own.
        if run.asked_to_end:
            item.session.shouldstop = run.asked_to_end


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int | pytest.ExitCode) -> None:
    # After the teardown of session fixtures, which pytest's own hook does. Nothing may cut this short.
    run = session.config.stash[RUN]
    run.interrupted = exitstatus == pytest.ExitCode.INTERRUPTED
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        finish(run)
        left = run.leaks or (run.strangers and not others_live(run))
        if left and exitstatus in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run = config.stash[RUN]
    if run.leaks:
        title = "removed after the interruption" if run.interrupted else "LEAKS: tests left these, now removed"
        terminalreporter.section(title, red=not run.interrupted, bold=True)
        for leak in run.leaks:
            terminalreporter.line(leak)
    if run.strangers:
        terminalreporter.section("appeared meanwhile, of no test run by its mark; left alone", red=True, bold=True)
        for stranger in run.strangers:
            terminalreporter.line(stranger)


def _like_interrupt(run: Run, number: int, frame: FrameType | None) -> None:
    """Take the road of control-C: fixtures are torn down, and the session's end comes about."""
    run.asked_to_end = signal.Signals(number).name
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(signal.SIGINT, frame)
    else:
        raise KeyboardInterrupt(run.asked_to_end)


def _set_environ(restore: ExitStack, name: str, value: str) -> None:
    before = os.environ.get(name)
    undo: Callable[[], object] = (
        (lambda: os.environ.pop(name, None)) if before is None else (lambda: os.environ.__setitem__(name, before))
    )
    restore.callback(undo)
    os.environ[name] = value
