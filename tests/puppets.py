"""Services that do what a test tells them, line by line."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from cgroups import Cgroup, find_mount
from pactown_runner import Sandbox, Settings, Supervisor
from tests.supervising import USER, line_of, python, spec

_PUPPET = """
import socket, sys, threading
print("ready", flush=True)
for number, line in enumerate(sys.stdin):
    try:
        exec(eval(line))
        print("done", number, "well", flush=True)
    except OSError as error:
        print("done", number, error.strerror, flush=True)
"""


class Puppet:
    """A service that does what it is told, in Python.

    Attributes:
        scope: where it runs.
    """

    def __init__(self, sandbox: Sandbox, scope: Cgroup) -> None:
        self.sandbox = sandbox
        self.scope = scope
        self._told = 0

    async def do(self, source: str) -> str:
        """Have it done. Returns `well`, or the system's error."""
        await self.sandbox.send(repr(source).encode() + b"\n")
        number, self._told = self._told, self._told + 1
        return (await line_of(self.sandbox, f"done {number} ")).split(" ", 2)[2]

    async def listen(self, port: int, address: str = "127.0.0.1", *, options: str = "", name: str = "s") -> str:
        """Have it listen with a socket of this name."""
        family = "AF_INET6" if ":" in address else "AF_INET"
        make = f"{name} = socket.socket(socket.{family})\n{name}.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)"
        return await self.do(f"{make}\n{options}\n{name}.bind(({address!r}, {port}))\n{name}.listen(1000)")


Make = Callable[..., Awaitable[Puppet]]


@contextlib.contextmanager
def puppets(supervisor: Supervisor, settings: Settings) -> Iterator[Make]:
    """What makes puppets, of one tenant or of several."""
    with contextlib.ExitStack() as stack:

        async def make(service: str = "api", user: str = USER) -> Puppet:
            sandbox = await supervisor.start(spec(python(_PUPPET), service=service, user=user, stdin=True))
            await line_of(sandbox)
            return Puppet(sandbox, stack.enter_context(scope_of(sandbox, settings)))

        yield make


def scope_of(sandbox: Sandbox, settings: Settings) -> Cgroup:
    """Where it runs."""
    slice_path = find_mount().path / settings.cgroup_slice / f"pactown-{sandbox.user.key}.slice"
    return Cgroup.open(slice_path / f"{sandbox.service_id}.scope")


def free_port() -> int:
    """A port that nobody has, from below those that the kernel gives to connections."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in range(lowest - 1, 1024, -1):
        with socket.socket(socket.AF_INET6) as free, contextlib.suppress(OSError):
            free.bind(("::", port))
            return port
    raise AssertionError("no free port")
