"""A service manager for tests: it hears what it is told, and keeps and passes on descriptors as systemd does."""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

_BEGIN = """
import fcntl, json, os, sys
fds, words = json.loads(sys.argv[1]), sys.argv[2:]
# Out of the way first, of each other and of where they go.
copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 1000) for fd in fds]
for fd in fds:
    os.close(fd)
for number, fd in enumerate(copies):
    os.dup2(fd, 3 + number, inheritable=True)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execvp(words[0], words)
"""
"""Becomes the process that is to have the descriptors, which only itself can know its pid."""


class ServiceManager:
    """Listens at an address, a path or an abstract name, from the beginning on.

    Attributes:
        address: for `NOTIFY_SOCKET`.
        said: all lines that were heard.
        store: the descriptors that are kept, by name.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.said: list[str] = []
        self.store: dict[str, list[int]] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        for name in list(self.store):
            self.let_go(name)

    def listen(self) -> list[str]:
        """Hear what has been said since, and do what was asked for; returns the lines."""
        heard = []
        with contextlib.suppress(BlockingIOError):
            while True:
                heard += self.hear(socket.MSG_DONTWAIT)
        return heard

    def hear(self, flags: int = 0) -> list[str]:
        """Wait for one message; returns its lines."""
        size = array.array("i").itemsize
        data, rights, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(16 * size), flags | socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for _, _, part in rights:
            fds.frombytes(part)
        lines = data.decode().splitlines()
        self.said += lines
        if "FDSTORE=1" in lines:
            self.store.setdefault(_name(lines), []).extend(fds)
        else:
            assert not fds
        if "FDSTOREREMOVE=1" in lines:
            self.let_go(_name(lines))
        return lines

    def let_go(self, name: str) -> None:
        """Close what is kept under a name."""
        for fd in self.store.pop(name, []):
            os.close(fd)

    def start(
        self, words: Sequence[str], environ: Mapping[str, str], *, capacity: int = 100, **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start a process as the unit's main one, which gets all that is kept."""
        kept = [(name, fd) for name, fds in self.store.items() for fd in fds]
        environ = {**environ, "NOTIFY_SOCKET": self.address, "FDSTORE": str(capacity)}
        if kept:
            environ |= {"LISTEN_FDS": str(len(kept)), "LISTEN_FDNAMES": ":".join(name for name, _ in kept)}
        fds = [fd for _, fd in kept]
        command = [sys.executable, "-S", "-E", "-c", _BEGIN, json.dumps(fds), *words]
        return subprocess.Popen(command, env=environ, pass_fds=fds, **options)


def _name(lines: list[str]) -> str:
    return next(line.removeprefix("FDNAME=") for line in lines if line.startswith("FDNAME="))
