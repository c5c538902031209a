"""Whose a port is, asked while another tenant does all to be taken for its owner."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from cgroups import Cgroup, find_mount
from pactown_runner import Settings, Supervisor
from pactown_runner.ports import HOST, PortError, check_ports, connect, owner
from tests.puppets import Make, Puppet, free_port, puppets, scope_of
from tests.supervising import USER, eventually, line_of, python, soon, spec

pytestmark = pytest.mark.host

Connect = Callable[[int, Cgroup], Awaitable[socket.socket]]


@pytest.fixture
def puppet(supervisor: Supervisor, settings: Settings) -> Iterator[Make]:
    with puppets(supervisor, settings) as make:
        yield make


@pytest.fixture
def port() -> int:
    return free_port()


def identity(scope: Cgroup) -> int:
    return os.fstat(scope.fd).st_ino


async def nothing(*_: object) -> None: ...


def step_in(
    monkeypatch: pytest.MonkeyPatch,
    *,
    before: Callable[[], Awaitable[None]] = nothing,
    after: Callable[[socket.socket], Awaitable[None]] = nothing,
) -> None:
    """Do something between the first look and the connection, or between this and the second look."""
    loop = asyncio.get_running_loop()
    connect_now = loop.sock_connect

    async def sock_connect(connection: socket.socket, address: tuple[str, int]) -> None:
        await before()
        await connect_now(connection, address)
        await after(connection)

    monkeypatch.setattr(loop, "sock_connect", sock_connect)


async def is_reached(port: int, scope: Cgroup) -> bool:
    try:
        (await soon(connect(port, scope))).close()
    except PortError:
        return False
    return True


def test_this_kernel_tells() -> None:
    check_ports()


# ---- What is the sandbox's own


ONLY_V6 = "s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, {})"


@pytest.mark.parametrize(
    ("address", "options"),
    [
        (HOST, ""),
        ("0.0.0.0", ""),
        ("::", ONLY_V6.format(0)),
        ("::ffff:127.0.0.1", ONLY_V6.format(0)),
        (HOST, "s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)"),
        (HOST, "s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'lo')"),
        (HOST, "s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)"),
    ],
    ids=["exact", "any", "both families", "mapped", "shared", "of the device", "mptcp"],
)
@pytest.mark.each_loop
async def test_a_port_of_its_own(puppet: Make, port: int, address: str, options: str) -> None:
    honest = await puppet()
    assert not await is_reached(port, honest.scope)
    made = await honest.listen(port, address, options=options)
    if made == "Protocol not supported":
        pytest.skip("this kernel has no MPTCP")
    assert made == "well"
    with await soon(connect(port, honest.scope)) as connection:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(connection, b"hello")
        assert await honest.do("c = s.accept()[0]; c.sendall(c.recv(100).upper())") == "well"
        assert await soon(loop.sock_recv(connection, 100)) == b"HELLO"
    assert await honest.do("s.close(); c.close()") == "well"
    assert not await is_reached(port, honest.scope)


async def test_a_group_that_shares_a_port_within_the_sandbox(puppet: Make, port: int) -> None:
    honest = await puppet()
    shared = "{0}.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)"
    for name in "abcd":
        assert await honest.listen(port, options=shared.format(name), name=name) == "well"
    for _ in range(16):
        assert await is_reached(port, honest.scope)


async def test_a_socket_stays_its_own_when_its_maker_has_gone(puppet: Make, port: int) -> None:
    honest = await puppet()
    fork = """
import os
if pid := os.fork():
    os.waitpid(pid, 0)
    s.close()
elif os.fork():
    os._exit(0)
"""
    assert await honest.listen(port) == "well"
    # The first process no longer has it, its parent is gone, and a grandchild goes on with it.
    assert await honest.do(fork) == "well"
    assert await is_reached(port, honest.scope)


@pytest.mark.parametrize("address", ["127.0.0.2", "::1", "::"])
async def test_an_address_that_127_0_0_1_does_not_reach(puppet: Make, port: int, address: str) -> None:
    honest = await puppet()
    assert await honest.listen(port, address, options=ONLY_V6.format(1) if ":" in address else "") == "well"
    with pytest.raises(PortError, match=f"nothing listens on port {port}"):
        await connect(port, honest.scope)


async def test_one_that_closes_at_once(puppet: Make, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = await puppet()
    assert await honest.listen(port) == "well"

    async def close(connection: socket.socket) -> None:
        assert await honest.do("s.accept()[0].close()") == "well"
        # Until the kernel has forgotten whose it was.
        await eventually(lambda: owner(port, connection.getsockname()[1]) is None)

    step_in(monkeypatch, after=close)
    assert await is_reached(port, honest.scope)


@pytest.mark.each_loop
async def test_one_that_accepts_nothing_more(puppet: Make, port: int) -> None:
    busy = await puppet()
    assert await busy.listen(port) == "well"
    assert await busy.do("s.listen(1)") == "well"
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            try:
                async with asyncio.timeout(1):
                    stack.enter_context(await connect(port, busy.scope))
            except (TimeoutError, PortError):
                break
        else:
            raise AssertionError("its queue has no end")
        assert await busy.do("for _ in range(2): s.accept()") == "well"
    assert await is_reached(port, busy.scope)


# ---- What is somebody else's


async def any_open_port(port: int, scope: Cgroup) -> socket.socket:
    """A bad stub: takes whoever answers."""
    connection = socket.create_connection((HOST, port))
    connection.setblocking(False)
    return connection


@pytest.mark.parametrize(("connect", "deceived"), [(any_open_port, True), (connect, False)], ids=["stub", "real"])
@pytest.mark.parametrize(
    ("address", "mine"),
    [(HOST, None), ("0.0.0.0", None), ("::", None), (HOST, "127.0.0.2"), (HOST, "::"), ("0.0.0.0", "::1")],
)
async def test_another_tenant_listens_first(
    puppet: Make, port: int, address: str, mine: str | None, connect: Connect, deceived: bool
) -> None:
    honest, attacker = await puppet(), await puppet(user="mallory")
    if mine is not None:
        # It listens, but where a connection to 127.0.0.1 does not come.
        assert await honest.listen(port, mine, options=ONLY_V6.format(1) if ":" in mine else "") == "well"
    assert await attacker.listen(port, address, options=ONLY_V6.format(0) if ":" in address else "") == "well"
    if deceived:
        (await connect(port, honest.scope)).close()
        return
    with pytest.raises(PortError, match="belongs to somebody outside the sandbox"):
        await connect(port, honest.scope)
    assert await is_reached(port, attacker.scope)


async def test_another_tenant_is_not_even_connected_to(puppet: Make, port: int) -> None:
    honest, other = await puppet(), await puppet(user="bystander")
    assert await other.listen(port) == "well"
    for _ in range(10):
        assert not await is_reached(port, honest.scope)
    with socket.create_connection((HOST, port)) as first:
        assert await other.do(f"assert s.accept()[1][1] == {first.getsockname()[1]}") == "well"


async def test_another_service_shares_the_port(puppet: Make, port: int) -> None:
    """Which the kernel lets the same tenant alone do: each answers for itself, and for the connections it gets."""
    one, two, attacker = await puppet(), await puppet("two"), await puppet(user="mallory")
    shared = "s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)"
    assert await one.listen(port, "0.0.0.0", options=shared) == "well"
    assert await is_reached(port, one.scope)
    assert await attacker.listen(port, options=shared) == "Address already in use"
    assert await two.listen(port, options=shared) == "well"
    for _ in range(16):
        assert not await is_reached(port, one.scope)
        assert await is_reached(port, two.scope)


async def test_a_socket_that_another_tenant_made_and_passed_on(puppet: Make, port: int) -> None:
    honest, attacker = await puppet(), await puppet(user="mallory")
    name = f"'\\x00{port}'"
    assert await attacker.listen(port) == "well"
    offer = f"u = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); u.bind({name}); u.listen()"
    assert await attacker.do(offer) == "well"
    assert await honest.do(f"u = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); u.connect({name})") == "well"
    assert await attacker.do("socket.send_fds(u.accept()[0], [b'x'], [s.fileno()]); s.close()") == "well"
    assert await honest.do("s = socket.socket(fileno=socket.recv_fds(u, 1, 1)[1][0])") == "well"
    assert not await is_reached(port, honest.scope)


async def test_who_listens_later_is_not_who_answered(puppet: Make, port: int) -> None:
    honest, attacker = await puppet(), await puppet(user="mallory")
    for first, second in ((attacker, honest), (honest, attacker)):
        assert await first.listen(port) == "well"
        with socket.create_connection((HOST, port)) as connection:
            assert await first.do("c = s.accept()[0]; s.close()") == "well"
            assert await second.listen(port) == "well"
            # What a look at the listeners alone would tell:
            assert owner(port) == identity(second.scope)
            assert owner(port, connection.getsockname()[1]) == identity(first.scope)
            assert await first.do("c.close()") == "well"
        assert await second.do("s.close()") == "well"


async def take_over(honest: Puppet, attacker: Puppet, port: int) -> None:
    assert await honest.do("s.close()") == "well"
    assert await attacker.listen(port) == "well"


@pytest.mark.parametrize("then", ["keeps it", "closes the connection", "gives it back"])
async def test_another_tenant_takes_the_port_in_between(
    puppet: Make, port: int, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    honest, attacker = await puppet(), await puppet(user="mallory")

    async def answer() -> None:
        if then == "closes the connection":
            assert await attacker.do("s.accept()[0].close()") == "well"
        elif then == "gives it back":
            assert await attacker.do("c = s.accept()[0]; s.close()") == "well"
            assert await honest.listen(port) == "well"

    assert await honest.listen(port) == "well"
    step_in(monkeypatch, before=lambda: take_over(honest, attacker, port), after=lambda _: answer())
    with pytest.raises(PortError, match="belongs to somebody outside the sandbox"):
        await connect(port, honest.scope)


async def test_a_connection_to_itself(port: int) -> None:
    """Without a listener, the kernel may give a connection the very port that it goes to."""
    with socket.socket() as connection:
        connection.bind((HOST, port))
        connection.connect((HOST, port))
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        place = next(line for line in lines if line.startswith("0::")).removeprefix("0::/")
        assert owner(port, port) == os.stat(find_mount().path / place).st_ino


_FLICKERING = """
import random, socket, time
print("ready", flush=True)
while True:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.settimeout(0.0005)
        try:
            s.bind(("127.0.0.1", {port}))
            s.listen()
            until = time.monotonic() + random.random() / 500
            while time.monotonic() < until:
                with s.accept()[0] as c:
                    c.sendall(b"{name}")
        except OSError:
            pass
    time.sleep(random.random() / 1000)
"""


async def answers(port: int, scope: Cgroup, connect: Connect, wanted: int) -> set[bytes]:
    """Who turns out to have answered, over so many answers."""
    found, count = set(), 0
    while count < wanted:
        with contextlib.suppress(ConnectionError), await connect(port, scope) as connection:
            if answer := await soon(asyncio.get_running_loop().sock_recv(connection, 100)):
                found.add(answer)
                count += 1
        await asyncio.sleep(0)
    return found


@pytest.mark.deadline(120)
async def test_another_tenant_takes_the_port_again_and_again(
    supervisor: Supervisor, settings: Settings, port: int
) -> None:
    for user in (USER, "mallory"):
        source = _FLICKERING.format(port=port, name=user)
        await line_of(await supervisor.start(spec(python(source), service="flicker", user=user)))
    with scope_of(supervisor.get(USER, "flicker"), settings) as scope:
        assert await answers(port, scope, any_open_port, 500) == {USER.encode(), b"mallory"}
        assert await answers(port, scope, connect, 5_000) == {USER.encode()}
