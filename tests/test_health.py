"""What answers amount to, and services that are asked: honest ones, slow ones, and those that mean ill."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
import resource
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgroups import Cgroup, find_mount
from pactown_runner import SandboxSpec, Settings, Supervisor, health
from pactown_runner.errors import StartError, StateError
from pactown_runner.health import FIRST_PAUSE, Health, Turn, ask, look_after
from pactown_runner.specs import Probe
from tests.puppets import Make, Puppet, free_port, puppets
from tests.supervising import PATIENCE, eventually, leaves_nothing, soon, spec

host = pytest.mark.host
each_loop = pytest.mark.each_loop

# ---- What answers amount to


def turns(probe: Probe, answers: Sequence[tuple[float, bool]], *, age: float = 0) -> list[Turn | None]:
    state = Health.of_age(probe, age, 0)
    return [state.heard(good, at) for at, good in answers]


def every_second(pattern: str) -> list[tuple[float, bool]]:
    return [(float(at), letter == "+") for at, letter in enumerate(pattern)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("+", {0: Turn.WELL}),
        ("++++", {0: Turn.WELL}),
        ("----+", {4: Turn.WELL}),
        ("---------", {}),
        ("----------", {}),
        ("-----------", {10: Turn.LATE}),
        ("----------+", {10: Turn.WELL}),
        ("+--+--+", {0: Turn.WELL}),
        ("+---", {0: Turn.WELL, 3: Turn.UNWELL}),
        ("+--+---", {0: Turn.WELL, 6: Turn.UNWELL}),
        ("+--------------", {0: Turn.WELL, 3: Turn.UNWELL}),
        ("+----+---", {0: Turn.WELL, 3: Turn.UNWELL, 5: Turn.WELL, 8: Turn.UNWELL}),
    ],
)
def test_answers(pattern: str, expected: dict[int, Turn]) -> None:
    found = turns(Probe(port=1, failures=3, within=10), every_second(pattern))
    assert {at: turn for at, turn in enumerate(found) if turn} == expected


def test_one_failure_may_be_enough() -> None:
    found = turns(Probe(port=1, failures=1), every_second("-+-+-"))
    assert found == [None, Turn.WELL, Turn.UNWELL, Turn.WELL, Turn.UNWELL]


@pytest.mark.parametrize(
    ("age", "expected"),
    [
        (4, [None] * 6 + [Turn.LATE]),
        # Its predecessor would have killed it, had it not been well in time.
        (10, [None, None, Turn.UNWELL]),
        (1e6, [None, None, Turn.UNWELL]),
    ],
)
def test_one_that_was_taken_over(age: float, expected: list[Turn | None]) -> None:
    assert turns(Probe(port=1, failures=3, within=10), every_second("-" * len(expected)), age=age) == expected


def test_time_that_does_not_count() -> None:
    state = Health.of_age(Probe(port=1, within=10), 0, 0)
    state.unheard(5)
    assert state.heard(False, 14.9) is None
    assert state.pause(14.9, 0) == pytest.approx(0.1)
    assert state.heard(False, 15) is Turn.LATE


@settings(deadline=None)  # other tests may keep the machine busy
@given(
    st.integers(1, 5),
    st.floats(0.001, 100),
    st.lists(st.tuples(st.floats(0, 30), st.booleans()), max_size=60),
)
def test_any_answers(failures: int, within: float, steps: list[tuple[float, bool]]) -> None:
    """It is late only if it was never well, and unwell only after so many bad answers in a row, which is said once."""
    now, heard = 0.0, []
    state = Health.of_age(Probe(port=1, failures=failures, within=within), 0, 0)
    well = False
    for step, good in steps:
        now += step
        heard.append(good)
        turn = state.heard(good, now)
        if turn is Turn.WELL:
            assert good
            assert not well
            well = True
        elif turn is Turn.UNWELL:
            assert well
            assert heard[-failures:] == [False] * failures
            well = False
        elif turn is Turn.LATE:
            assert not any(heard)
            assert now >= within
        assert state.well == well
        assert not well or True in heard[-failures:]


def test_pauses_grow_up_to_the_interval() -> None:
    state = Health.of_age(Probe(port=1, interval=1, within=10**6), 0, 0)
    assert state.first_pause(1) == FIRST_PAUSE
    pauses = []
    for at in range(2000):
        state.heard(False, at)
        pauses.append(state.pause(at, 0))
    assert pauses[:5] == [pytest.approx(FIRST_PAUSE * 2**n) for n in range(1, 5)] + [1]
    assert set(pauses[5:]) == {1}
    assert 0.7 < state.pause(2000, 1) < 0.8
    state.heard(True, 2000)
    assert state.pause(2000, 0) == 1


def test_the_last_question_is_asked_when_time_is_up() -> None:
    state = Health.of_age(Probe(port=1, interval=60, within=10), 0, 0)
    now = state.first_pause(0.5)
    while state.heard(False, now) is None:
        now += state.pause(now, 0.5)
    assert now == 10


def test_those_that_are_adopted_together_are_not_asked_together() -> None:
    state = Health.of_age(Probe(port=1, interval=60, within=10), 1000, 0)
    assert [state.first_pause(chance) for chance in (0, 0.5, 1)] == [0, 30, 60]


# ---- Asking


async def never(command: object, timeout: float) -> bool:
    raise AssertionError(f"nobody asked for {command}")


@pytest.fixture
def own() -> Iterator[Cgroup]:
    """The scope of servers in this process."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    place = next(line for line in lines if line.startswith("0::")).removeprefix("0::/")
    with Cgroup.open(find_mount().path / place) as cgroup:
        yield cgroup


Handler = Callable[[socket.socket], object]


@contextlib.contextmanager
def serving(handler: Handler) -> Iterator[int]:
    """A server in a thread of this process, on the port that is given. Ends with its first connection."""

    def serve() -> None:
        # A broken connection, or none at all.
        with contextlib.suppress(OSError), server.accept()[0] as connection:
            connection.settimeout(PATIENCE)
            handler(connection)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def question(connection: socket.socket) -> bytes:
    asked = b""
    while not asked.endswith(b"\r\n\r\n") and (piece := connection.recv(1000)):
        asked += piece
    return asked


def answering(*pieces: bytes, hangs: bool = False) -> Handler:
    def handler(connection: socket.socket) -> None:
        question(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)
        if hangs:
            connection.recv(1)

    return handler


def endless(piece: bytes, first: bytes = b"") -> Handler:
    def handler(connection: socket.socket) -> None:
        question(connection)
        connection.sendall(first)
        while True:
            connection.sendall(piece * 100)

    return handler


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@host
@each_loop
@pytest.mark.parametrize(
    ("handler", "expected"),
    [
        (answering(OK), ""),
        (answering(b"HTTP/1.0 204 No Content\r\n\r\n"), ""),
        (answering(b"HTTP/1.1 399 \r\n\r\n"), ""),
        (answering(b"HTTP/1.1 200\r\n\r\n"), ""),
        (answering(*(OK[at : at + 1] for at in range(len(OK)))), ""),
        (answering(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK), ""),
        (answering(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 \r\n\r\n", OK), ""),
        (answering(OK[:15] + b"x" * 100_000), ""),
        (answering(OK, hangs=True), ""),
        (endless(b"x" * 65536, OK), ""),
        (answering(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "HTTP status 400"),
        (answering(b"HTTP/1.1 503 \x1b[31m\r\n\r\n"), "HTTP status 503"),
        (answering(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 500 \r\n\r\n"), "HTTP status 500"),
        (answering(), "closed without an answer"),
        (answering(b"HTTP/1.1 2"), "closed without an answer"),
        (answering(b"HTTP/1.1 100 Continue\r\n\r\n"), "closed without an answer"),
        (answering(b"SSH-2.0-OpenSSH_9.2\r\n"), "its answer is not HTTP"),
        (answering(b"HTTP/1.1 2000 OK\r\n\r\n"), "its answer is not HTTP"),
        (answering(b"HTTP/1.1 099 OK\r\n\r\n"), "its answer is not HTTP"),
        (answering(b"HTTP/1.1 -20 OK\r\n\r\n"), "its answer is not HTTP"),
        (answering(b"HTTP/2.0 200 OK\r\n\r\n"), "its answer is not HTTP"),
        (endless(b"HTTP/1.1 102 Processing\r\n\r\n"), "its answer is too long in coming to a status"),
        (endless(b"x" * 65536, b"HTTP/1.1 100 Continue\r\n"), "its answer is too long in coming to a status"),
        (answering(b"HTTP/1.1 ", hangs=True), "no answer within 0.3 s"),
    ],
)
async def test_an_answer_by_http(own: Cgroup, handler: Handler, expected: str) -> None:
    with serving(handler) as port:
        patience = 0.3 if expected.startswith("no answer") else 30
        assert await soon(ask(Probe(port=port, path="/", timeout=patience), own, never)) == expected


@host
async def test_the_question_by_http(own: Cgroup) -> None:
    asked: list[bytes] = []

    def handler(connection: socket.socket) -> None:
        asked.append(question(connection))
        connection.sendall(OK)

    with serving(handler) as port:
        assert await soon(ask(Probe(port=port, path="/health?a=b&c=%20"), own, never)) == ""
        first, *fields, end, rest = asked[0].decode().split("\r\n")
        assert first == "GET /health?a=b&c=%20 HTTP/1.1"
        assert {f"Host: 127.0.0.1:{port}", "Connection: close"} < set(fields)
        assert end == rest == ""


@host
async def test_a_redirection_is_an_answer_and_is_not_followed(own: Cgroup) -> None:
    followed: list[socket.socket] = []
    with serving(followed.append) as other:
        head = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:%d/\r\n\r\n" % other
        with serving(answering(head)) as port:
            assert await soon(ask(Probe(port=port, path="/"), own, never)) == ""
    assert not followed


@host
@each_loop
async def test_an_answer_is_read_to_its_end(own: Cgroup) -> None:
    """Else its server would be told of a broken connection, and write so in the tenant's log, each time."""
    ends: list[bytes] = []

    def handler(connection: socket.socket) -> None:
        question(connection)
        connection.sendall(OK[:15])
        for _ in range(20):
            connection.sendall(b"x" * 10_000)
        connection.shutdown(socket.SHUT_WR)
        ends.append(connection.recv(1))

    with serving(handler) as port:
        assert await soon(ask(Probe(port=port, path="/"), own, never)) == ""
    assert ends == [b""]


@host
async def test_the_rest_of_an_answer_has_bounds_of_its_own(own: Cgroup, monkeypatch: pytest.MonkeyPatch) -> None:
    # In time, ...
    monkeypatch.setattr(health, "DRAIN_TIMEOUT", 0.8)
    with serving(answering(OK, hangs=True)) as port:
        assert await soon(ask(Probe(port=port, path="/", timeout=0.5), own, never)) == ""
    # ... and in what is read.
    monkeypatch.setattr(health, "DRAIN_TIMEOUT", 2 * PATIENCE)
    with serving(endless(b"x" * 65536, OK)) as port:
        assert await soon(ask(Probe(port=port, path="/"), own, never)) == ""


@host
@each_loop
async def test_an_answer_by_tcp(own: Cgroup) -> None:
    with serving(answering()) as port:
        assert await soon(ask(Probe(port=port), own, never)) == ""
    assert await soon(ask(Probe(port=port), own, never)) == f"nothing listens on port {port}"


@host
async def test_a_connection_that_is_reset(own: Cgroup) -> None:
    def reset(connection: socket.socket) -> None:
        question(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with serving(reset) as port:
        assert await soon(ask(Probe(port=port, path="/"), own, never)) == "Connection reset by peer"


@host
async def test_an_answer_by_command(own: Cgroup) -> None:
    asked: list[tuple[object, float]] = []

    async def run(command: str | Sequence[str], timeout: float) -> bool:
        asked.append((command, timeout))
        return command == "true"

    async def missing(command: object, timeout: float) -> bool:
        raise StartError("cannot execute 'x'", step="execve", errno=2)

    assert await ask(Probe(command="true", timeout=7), own, run) == ""
    assert await ask(Probe(command=["x", "y"]), own, run) == "the command failed"
    assert asked == [("true", 7), (["x", "y"], 2.0)]
    assert await ask(Probe(command="x"), own, missing) == "cannot execute 'x'"


# ---- Looking after a service


def quick(**options: Any) -> Probe:
    return Probe(**{"interval": 0.02, "timeout": 5.0, **options})


class Cared:
    """A service that is looked after, and what is said of it."""

    def __init__(self, asked: SandboxSpec, scope: Cgroup, run: Any = never, age: float = 0.0) -> None:
        self.said: list[str] = []
        self.task = asyncio.create_task(
            look_after(
                asked,
                scope,
                run,
                on_ready=lambda: self.said.append("ready"),
                on_unready=self.said.append,
                age=age,
            )
        )

    async def has(self, *said: str) -> None:
        await eventually(lambda: len(self.said) >= len(said) or self.task.done())
        assert self.said == list(said), self.task

    async def failed(self) -> str:
        return await soon(self.task)

    async def cancelled(self) -> None:
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await soon(self.task)


@pytest.fixture
def scope(slice_name: str) -> Iterator[Cgroup]:
    """One in which nothing runs."""
    with Cgroup.open(find_mount().path) as top, top.child(slice_name, create=True) as cgroup:
        yield cgroup


@pytest.fixture
def puppet(supervisor: Supervisor, settings: Settings) -> Iterator[Make]:
    with puppets(supervisor, settings) as make:
        yield make


@pytest.fixture
def port() -> int:
    return free_port()


_SERVE = """
status, answers, asked, answered = 200, threading.Event(), 0, set()
answers.set()
def serve():
    global asked
    while True:
        with s.accept()[0] as c:
            path = c.recv(1000).split()[1]
            asked += 1
            answers.wait()
            c.sendall(b"HTTP/1.1 %d x\\r\\n\\r\\n" % status)
            answered.add(path)
threading.Thread(target=serve, daemon=True).start()
"""


async def serve(service: Puppet, port: int) -> None:
    assert await service.listen(port) == "well"
    assert await service.do(_SERVE) == "well"


@host
@each_loop
async def test_a_service_becomes_ready_and_is_so_until_it_is_no_more(
    puppet: Make, port: int, settings: Settings
) -> None:
    service = await puppet()
    with leaves_nothing(settings):
        cared = Cared(spec("x", ready=quick(port=port, path="/", failures=2)), service.scope)
        await serve(service, port)
        await cared.has("ready")
        assert await service.do("status = 503") == "well"
        await cared.has("ready", "no longer ready: HTTP status 503")
        assert await service.do("status = 200") == "well"
        await cared.has("ready", "no longer ready: HTTP status 503", "ready")
        assert not cared.task.done()
        await cared.cancelled()


@host
async def test_a_service_without_a_probe_for_it_is_ready_at_once(scope: Cgroup, port: int) -> None:
    cared = Cared(spec("x", alive=Probe(port=port, within=0.01)), scope)
    assert await cared.failed() == f"not alive within 0.01 s: nothing listens on port {port}"
    assert cared.said == ["ready"]


@host
@each_loop
async def test_a_service_that_is_late(puppet: Make, port: int) -> None:
    service = await puppet()
    cared = Cared(spec("x", ready=quick(port=port, within=0.2)), service.scope)
    assert await cared.failed() == f"not ready within 0.2 s: nothing listens on port {port}"
    assert cared.said == []


@host
async def test_a_service_whose_port_another_tenant_has(puppet: Make, port: int) -> None:
    service, other = await puppet(), await puppet(user="mallory")
    await serve(other, port)
    cared = Cared(spec("x", ready=quick(port=port, path="/", within=0.2)), service.scope)
    reason = f"not ready within 0.2 s: port {port} belongs to somebody outside the sandbox"
    assert await cared.failed() == reason
    assert cared.said == []
    # The other has heard nothing of it.
    assert await other.do("assert asked == 0") == "well"


@host
@each_loop
async def test_a_service_that_dies(puppet: Make, port: int, settings: Settings) -> None:
    service = await puppet()
    await serve(service, port)
    probe = quick(port=port, path="/", failures=2)
    with leaves_nothing(settings):
        cared = Cared(spec("x", ready=probe, alive=dataclasses.replace(probe, path="/alive")), service.scope)
        assert await service.do("while answered != {b'/', b'/alive'}: pass\nstatus = 500") == "well"
        assert await cared.failed() == "no longer alive: HTTP status 500"
        assert cared.said[0] == "ready"


@host
async def test_a_service_that_hangs(puppet: Make, port: int) -> None:
    service = await puppet()
    await serve(service, port)
    cared = Cared(spec("x", alive=Probe(port=port, path="/", failures=2, interval=0.02, timeout=0.2)), service.scope)
    await cared.has("ready")
    assert await service.do("import time\nwhile not asked: time.sleep(0.001)") == "well"
    assert await service.do("answers.clear()") == "well"
    assert await cared.failed() == "no longer alive: no answer within 0.2 s"


@host
async def test_one_that_was_taken_over_and_is_not_well(scope: Cgroup, port: int) -> None:
    asked = spec("x", ready=quick(port=port, failures=2), alive=quick(port=port, failures=9))
    cared = Cared(asked, scope, age=1000)
    assert await cared.failed() == f"no longer alive: nothing listens on port {port}"
    assert cared.said == [f"no longer ready: nothing listens on port {port}"]


class Counting(Cgroup):
    """Counts how often it was asked whether it is frozen."""

    looks = 0

    def frozen(self) -> bool:
        self.looks += 1
        return super().frozen()

    def looked(self, often: int) -> bool:
        return self.looks >= often


@host
async def test_a_frozen_service_is_not_asked_and_not_blamed(puppet: Make, port: int) -> None:
    service = await puppet()
    await serve(service, port)
    hasty = Probe(port=port, path="/", failures=1, within=2, interval=0.02, timeout=2)
    with Counting.open(service.scope.path) as scope:
        cared = Cared(spec("x", alive=hasty), scope)
        # In the middle of a question.
        assert await service.do("answers.clear()\nfirst = asked\nwhile asked == first: pass") == "well"
        await service.sandbox.freeze()
        for _ in range(2):
            seen = scope.looks
            await eventually(partial(scope.looked, seen + 20))
            assert not cared.task.done()
        await service.sandbox.thaw()
        assert await service.do("answers.set()\nfirst = asked") == "well"
        assert await service.do("while asked < first + 3: pass") == "well"
        await cared.cancelled()


@host
async def test_a_question_that_cannot_be_asked(own: Cgroup, port: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            await ask(Probe(port=port), own, never)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@host
async def test_a_question_that_cannot_be_asked_is_held_against_nobody(
    scope: Cgroup, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, ahead, answers = asyncio.get_running_loop(), 0, [False, True]
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + ahead)

    async def run(command: object, timeout: float) -> bool:
        nonlocal ahead
        if ahead < 2 * PATIENCE:
            ahead += 10  # so long it takes until that is known
            raise OSError(errno.EMFILE, "Too many open files")
        return answers.pop(0)

    cared = Cared(spec("x", ready=quick(command="check", within=PATIENCE)), scope, run)
    await cared.has("ready")
    await cared.cancelled()
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == ["cannot ask 'auth0|123456'/api how it is: [Errno 24] Too many open files"]


@host
async def test_a_command_is_asked_again_and_again(scope: Cgroup) -> None:
    trouble = StateError("it is just ending")
    answers: list[bool | Exception] = [False, True, trouble, True, False, False, trouble, False]

    async def run(command: object, timeout: float) -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    cared = Cared(spec("x", alive=quick(command="check", failures=3)), scope, run)
    assert await cared.failed() == "no longer alive: the command failed"
    assert answers == []
