"""What is told to a service manager, and what it keeps: over real sockets, to a manager of the test's own."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pactown_runner.notify import (
    NAME_LENGTH,
    NAME_PREFIX,
    NAMES_BYTES,
    WAITING_MESSAGES,
    DescriptorStore,
    Notifier,
    received,
    watchdog_seconds,
)
from tests.service_manager import ServiceManager
from tests.supervising import ROOT, eventually

if TYPE_CHECKING:
    from tests.hostguard import Run


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, test_run: Run) -> Iterator[ServiceManager]:
    # Not `tmp_path`: the path of a socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="notify-", dir=test_run.directory) as directory:
        name = f"@pactown-test-{uuid.uuid4().hex}" if request.param == "abstract" else f"{directory}/notify"
        with ServiceManager(name) as manager:
            yield manager
    # Nobody is there any more for whom to wait.
    for waiter in waiters():
        waiter.join(30)


@pytest.fixture
def notifier(manager: ServiceManager) -> Iterator[Notifier]:
    notifier = Notifier(manager.address)
    yield notifier
    notifier.close()


def waiters() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pactown-notify"]


# ---- Words


def test_each_message_has_the_words_of_sd_notify(manager: ServiceManager, notifier: Notifier) -> None:
    notifier.ready("serving")
    notifier.status("two\nlines\r\nREADY=1")
    notifier.alive()
    notifier.patience(1.5)
    notifier.stopping("so long")
    assert manager.hear() == ["READY=1", "STATUS=serving"]
    assert manager.hear() == ["STATUS=two lines READY=1"]
    assert manager.hear() == ["WATCHDOG=1"]
    assert manager.hear() == ["EXTEND_TIMEOUT_USEC=1500000"]
    assert manager.hear() == ["STOPPING=1", "STATUS=so long"]
    assert manager.listen() == []


def test_the_environment_says_where_the_manager_listens(manager: ServiceManager) -> None:
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": manager.address})
    assert notifier.active
    notifier.alive()
    assert manager.hear() == ["WATCHDOG=1"]
    notifier.close()
    notifier.close()
    notifier.alive()
    assert manager.listen() == []


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}])
def test_without_a_manager_nobody_is_told(environ: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    before = os.listdir("/proc/self/fd")
    notifier = Notifier.from_environment(environ)
    assert not notifier.active
    notifier.ready("")
    store = DescriptorStore.inherited(notifier, {}, {"FDSTORE": "100"})
    store.keep("name", 0)
    assert store.names() == frozenset()
    assert os.listdir("/proc/self/fd") == before
    assert not caplog.records


def test_an_address_of_another_kind_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier("vsock:2:1234")
    assert not notifier.active
    assert "'vsock:2:1234' is not the address of a Unix socket" in caplog.text


def test_a_manager_that_is_gone_is_told_of_once(
    manager: ServiceManager, notifier: Notifier, caplog: pytest.LogCaptureFixture
) -> None:
    with ServiceManager(f"{manager.address}2"):
        pass
    lost = Notifier(f"{manager.address}2")
    for _ in range(3):
        lost.alive()
    lost.close()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "Connection refused" in caplog.text


# ---- A manager that does not read


async def test_sending_never_waits_and_nothing_overtakes(manager: ServiceManager, notifier: Notifier) -> None:
    count = 2000  # a socket's queue holds a few hundred at most
    first, second = os.pipe()

    def send(number: int) -> None:
        notifier.send(f"FDSTORE=1\nFDNAME={number}", [second])

    for number in range(count):
        send(number)
    assert len(waiters()) == 1
    for number in range(2 * count):
        assert manager.hear() == ["FDSTORE=1", f"FDNAME={number}"]
        # There is room for one more, and others that wait for it.
        if number < count:
            send(number + count)
        if number == count:
            os.close(second)
        (copy,) = manager.store[str(number)]
        assert os.readlink(f"/proc/self/fd/{copy}") == os.readlink(f"/proc/self/fd/{first}")
        manager.let_go(str(number))
    await eventually(lambda: not waiters())
    # No copy is left: the pipe has no writer any more.
    assert os.read(first, 1) == b""
    os.close(first)
    notifier.alive()
    assert manager.hear() == ["WATCHDOG=1"]


def test_what_waits_has_an_end(manager: ServiceManager, notifier: Notifier, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(2 * WAITING_MESSAGES):
        notifier.send(f"X={number}")
    assert len(caplog.records) == 1
    assert f"has not read for {WAITING_MESSAGES} messages" in caplog.text
    numbers = [int(manager.hear()[0][2:]) for _ in range(WAITING_MESSAGES)]
    assert numbers == list(range(WAITING_MESSAGES))


async def test_closing_forgets_what_waits(manager: ServiceManager) -> None:
    notifier = Notifier(manager.address)
    first, second = os.pipe()
    for number in range(1000):
        notifier.send(f"FDSTORE=1\nFDNAME={number}", [second])
    os.close(second)
    (waiter,) = waiters()
    notifier.close()
    # Only the one message that it was about to send.
    while waiter.is_alive() or manager.listen():
        manager.listen()
    for name in list(manager.store):
        manager.let_go(name)
    assert os.read(first, 1) == b""
    os.close(first)


# ---- Descriptors


@pytest.fixture
def store(notifier: Notifier) -> DescriptorStore:
    return DescriptorStore(notifier, 6)


def test_what_sits_in_a_fifo_is_kept_with_it(manager: ServiceManager, store: DescriptorStore, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    store.keep("run", fd)
    os.write(fd, b"words")
    os.close(fd)
    assert manager.hear() == ["FDSTORE=1", f"FDNAME={NAME_PREFIX}run", "FDPOLL=0"]
    again = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    assert os.read(again, 100) == b"words"
    os.write(again, b"more")
    os.close(again)
    store.drop("run")
    assert manager.hear() == ["FDSTOREREMOVE=1", f"FDNAME={NAME_PREFIX}run"]
    again = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        os.read(again, 100)
    os.close(again)


def test_each_name_is_kept_and_dropped_once(manager: ServiceManager, store: DescriptorStore) -> None:
    store.keep("a", 0, 1)
    store.keep("a", 0, 1)
    store.keep("b", 0, 1)
    assert store.names() == {"a", "b"}
    store.drop("a")
    store.drop("a")
    store.drop("never kept")
    assert store.names() == {"b"}
    manager.listen()
    assert manager.said.count("FDSTORE=1") == 2
    assert manager.said.count("FDSTOREREMOVE=1") == 1
    assert list(manager.store) == [f"{NAME_PREFIX}b"]
    assert len(manager.store[f"{NAME_PREFIX}b"]) == 2


def test_a_full_store_is_told_of_once_and_takes_more_when_there_is_room(
    manager: ServiceManager, store: DescriptorStore, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "abcde":
        store.keep(name, 0, 1)
    assert store.names() == {"a", "b", "c"}
    assert len(caplog.records) == 1
    assert "FileDescriptorStoreMax=" in caplog.text
    store.drop("b")
    store.keep("d", 0, 1)
    assert store.names() == {"a", "c", "d"}
    manager.listen()
    assert list(manager.store) == [NAME_PREFIX + name for name in "acd"]


def test_names_never_outgrow_what_the_kernel_executes(manager: ServiceManager, notifier: Notifier) -> None:
    store = DescriptorStore(notifier, 1_000_000)
    for number in range(NAMES_BYTES // NAME_LENGTH):
        store.keep(f"{number:0{NAME_LENGTH}x}", 0, 1)
        if number % 100 == 0:
            for name in list(manager.store):
                manager.let_go(name)
            manager.listen()
    names = [NAME_PREFIX + name for name in store.names() for _ in range(2)]
    assert len(names) > 4096, "as many as the unit's FileDescriptorStoreMax="
    subprocess.run(["true"], env={"PATH": os.environ["PATH"], "LISTEN_FDNAMES": ":".join(names)}, check=True)


# ---- What a process is passed

PROGRAM = """
import json, os, subprocess, sys
from pactown_runner.notify import DescriptorStore, Notifier, received, watchdog_seconds
passed = received()
flags = [os.get_inheritable(fd) for fds in passed.values() for fd in fds]
notifier = Notifier.from_environment()
before = {name: list(fds) for name, fds in passed.items()}
store = DescriptorStore.inherited(notifier, passed)
print(json.dumps({
    "passed": before, "others": passed, "inheritable": flags, "names": sorted(store.names()), "again": received(),
    "environ": [name for name in os.environ if name.startswith("LISTEN_")],
    "open": [fd for fd in range(3, 7) if os.path.exists(f"/proc/self/fd/{fd}")],
}))
store.keep("new", 0, 2)
store.keep("beyond", 0, 2)
for name in store.names() - {"new"}:
    store.drop(name)
notifier.close()
"""


def test_a_successor_takes_over_what_is_kept(manager: ServiceManager, notifier: Notifier) -> None:
    predecessor = DescriptorStore(notifier, 100)
    predecessor.keep("one", 0, 1)
    predecessor.keep("two", 1)
    # Whatever else the unit has kept, or listens on, is not ours.
    notifier.send("FDSTORE=1\nFDNAME=api.sock", [0])
    manager.listen()
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    process = manager.start(
        [sys.executable, "-c", PROGRAM], environ, capacity=6, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    said, _ = process.communicate()
    assert process.returncode == 0
    told = json.loads(said)
    assert told["passed"] == {"pactown-one": [3, 4], "pactown-two": [5], "api.sock": [6]}
    assert told["others"] == {"api.sock": [6]}
    assert told["inheritable"] == [False] * 4
    assert told["names"] == ["one", "two"]
    assert told["again"] == {}
    assert told["environ"] == []
    # The manager has them: none of ours has to be held open.
    assert told["open"] == [6]
    manager.listen()
    # For "beyond" there was no room before the others were dropped.
    assert list(manager.store) == ["api.sock", "pactown-new"]


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"},
        {"LISTEN_FDS": "2"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"},
        {"LISTEN_PID": str(os.getpid())},
    ],
)
def test_what_was_passed_to_others_is_not_taken(environ: dict[str, str]) -> None:
    environ["OTHER"] = "stays"
    assert received(environ) == {}
    assert environ == {"OTHER": "stays"}


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "2500000"}, 2.5),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": str(os.getpid())}, 2.5),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": "1"}, None),
    ],
)
def test_the_watchdog_waits_for_the_process_it_names(environ: dict[str, str], seconds: float | None) -> None:
    assert watchdog_seconds(environ) == seconds
