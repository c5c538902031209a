"""What this process and the service manager that started it tell each other: `sd_notify(3)`, `sd_listen_fds(3)`.

A message is one datagram of a few words. Sending one takes microseconds and never waits: when the manager is behind
with reading, a thread waits in the loop's place, and ends when all is sent.

The manager also keeps descriptors for us, beyond the end of this process. That is what saves the output of a sandbox
that ends while no supervisor lives: what sits in a FIFO is lost with the last descriptor of it.
"""

from __future__ import annotations

import array
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Self

__all__ = ["DescriptorStore", "Notifier", "received", "watchdog_seconds"]

_log = logging.getLogger(__name__)

WAITING_MESSAGES = 4096
"""So many may wait for a manager that does not read, each with copies of its descriptors. What is more is not sent."""

FIRST_FD = 3
"""Where passed descriptors begin, `SD_LISTEN_FDS_START`."""

NAME_PREFIX = "pactown-"
"""Tells ours from what else the manager keeps or listens on for this process."""

NAME_LENGTH = 16
"""The most characters of a name that are the caller's: a run's id has so many."""

NAMES_BYTES = 120_000
"""The most that the names of all descriptors take. At a restart they come in one environment variable, with a colon
after each, and the kernel executes nothing that has one of 128 KiB (`MAX_ARG_STRLEN`): we would never start again."""


class Notifier:
    """Tells the service manager how we are. Without one each call does nothing. Thread-safe.

    Args:
        address: of the manager's socket, as in `NOTIFY_SOCKET`: a path, or an abstract name that begins with `@`.
    """

    def __init__(self, address: str | None = None) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[tuple[bytes, list[int]]] = deque()
        self._waiter: threading.Thread | None = None
        self._complained = False
        self._socket: socket.socket | None = None
        self._address = ""
        if address is not None and address.startswith(("/", "@")):
            self._address = f"\0{address[1:]}" if address.startswith("@") else address
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        elif address is not None:
            _log.warning("the service manager is told nothing: %r is not the address of a Unix socket", address)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """For the manager that started this process, if one did."""
        return cls(environ.get("NOTIFY_SOCKET") or None)

    @property
    def active(self) -> bool:
        """Whether there is somebody to tell."""
        return self._socket is not None

    def ready(self, status: str) -> None:
        """We have started, and do what `status` says."""
        self.send(f"READY=1\nSTATUS={_one_line(status)}")

    def stopping(self, status: str) -> None:
        """The end has begun."""
        self.send(f"STOPPING=1\nSTATUS={_one_line(status)}")

    def status(self, status: str) -> None:
        """What `systemctl status` shows."""
        self.send(f"STATUS={_one_line(status)}")

    def alive(self) -> None:
        """The event loop turns; to be said at least as often as `watchdog_seconds` asks for."""
        self.send("WATCHDOG=1")

    def patience(self, seconds: float) -> None:
        """Starting, or stopping, goes on. Only when this has not been said again for so many seconds it has failed."""
        self.send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def send(self, message: str, fds: Sequence[int] = ()) -> None:
        """Send lines `NAME=value`, and copies of descriptors. What cannot be sent is logged.

        Args:
            fds: they may be closed as soon as this returns.
        """
        with self._lock:
            if (sock := self._socket) is None:
                return
            data = message.encode()
            # Behind what waits already: nothing overtakes.
            if self._waiter is None and self._send(sock, data, fds, socket.MSG_DONTWAIT):
                return
            if len(self._waiting) >= WAITING_MESSAGES:
                self._complain(f"it has not read for {WAITING_MESSAGES} messages")
                return
            self._waiting.append((data, [os.dup(fd) for fd in fds]))
            if self._waiter is None:
                self._waiter = threading.Thread(target=self._wait, args=(sock,), name="pactown-notify", daemon=True)
                self._waiter.start()

    def close(self) -> None:
        """Tell nobody anything from now on, not what waits to be sent either. Harmless when called twice."""
        with self._lock:
            sock, self._socket = self._socket, None
            for _, fds in self._waiting:
                _close_all(fds)
            self._waiting.clear()
            if sock is not None and self._waiter is None:
                sock.close()

    def _wait(self, sock: socket.socket) -> None:
        """Send what waits, as fast as the manager reads."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._waiter = None
                    if self._socket is None:
                        sock.close()
                    return
                data, fds = self._waiting.popleft()
            self._send(sock, data, fds)
            _close_all(fds)

    def _send(self, sock: socket.socket, data: bytes, fds: Sequence[int], flags: int = 0) -> bool:
        """Send one datagram; False if it would have to wait."""
        # Not `socket.send_fds`: before Python 3.13 it ignores flags and address.
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sock.sendmsg([data], rights, flags, self._address)
        except BlockingIOError:
            return False
        except OSError as error:
            self._complain(error)
        else:
            self._complained = False
        return True

    def _complain(self, reason: object) -> None:
        # Once, until it works again: each start of a sandbox tries.
        if not self._complained:
            self._complained = True
            _log.warning("cannot tell the service manager anything: %s", reason)


class DescriptorStore:
    """What the service manager keeps open for us, and for whoever it starts in our place. Thread-safe.

    Made without arguments it keeps nothing, and costs nothing.

    Args:
        notifier: to whom to give descriptors.
        capacity: how many the manager keeps.
        held: what it keeps already: names, and how many descriptors of each.
    """

    def __init__(
        self, notifier: Notifier | None = None, capacity: int = 0, held: Mapping[str, int] | None = None
    ) -> None:
        self._notifier = notifier
        self._capacity = min(capacity, NAMES_BYTES // (len(NAME_PREFIX) + NAME_LENGTH + 1))
        self._lock = threading.Lock()
        self._held = dict(held or {})
        self._count = sum(self._held.values())
        self._full = False

    @classmethod
    def inherited(
        cls, notifier: Notifier, passed: MutableMapping[str, list[int]], environ: Mapping[str, str] = os.environ
    ) -> Self:
        """The store that the manager keeps for this process, with what a predecessor left in it.

        Whether there is one says the variable `FDSTORE`: systemd sets it from version 254 on; before, the unit has to.

        Args:
            passed: what was `received`. What is the store's is taken out and closed: the manager goes on to hold it.
        """
        held = {}
        for name in [name for name in passed if name.startswith(NAME_PREFIX)]:
            fds = passed.pop(name)
            held[name.removeprefix(NAME_PREFIX)] = len(fds)
            _close_all(fds)
        size = environ.get("FDSTORE", "")
        return cls(notifier, int(size) if notifier.active and size.isdecimal() else 0, held)

    def names(self) -> frozenset[str]:
        """The names under which something is kept."""
        with self._lock:
            return frozenset(self._held)

    def keep(self, name: str, *fds: int) -> None:
        """Have copies of descriptors kept until `drop`, unless some are kept under this name already.

        Costs some 10 microseconds. When the store is full, which is logged, they are not kept.

        Args:
            name: at most `NAME_LENGTH` letters and digits.
        """
        if not self._capacity or self._notifier is None:
            return
        with self._lock:
            if name in self._held:
                return
            if self._count + len(fds) > self._capacity:
                self._tell_full()
                return
            self._held[name] = len(fds)
            self._count += len(fds)
            # Not watched for hang-ups, at which the manager would let go: it is to keep what nobody writes to any more.
            self._notifier.send(f"FDSTORE=1\nFDNAME={NAME_PREFIX}{name}\nFDPOLL=0", fds)

    def drop(self, name: str) -> None:
        """Have what is kept under this name closed, if anything is."""
        if not self._held or self._notifier is None:
            return
        with self._lock:
            if (count := self._held.pop(name, None)) is not None:
                self._count -= count
                self._notifier.send(f"FDSTOREREMOVE=1\nFDNAME={NAME_PREFIX}{name}")

    def _tell_full(self) -> None:
        if not self._full:
            self._full = True
            _log.warning(
                "the service manager keeps %d descriptors for us, and no more: what further sandboxes have printed is "
                "lost if they end while no supervisor runs; raise FileDescriptorStoreMax= of the unit",
                self._count,
            )


def received(environ: MutableMapping[str, str] = os.environ) -> dict[str, list[int]]:
    """Take the descriptors that the service manager passed to this process, by name. They are the caller's to close.

    They are made close-on-exec, and the variables that tell of them are removed, so that no child takes them for its
    own. To be called once, before anything is opened or started.
    """
    told = {name: environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")}
    environ.pop("LISTEN_PIDFDID", None)
    # Whoever started us may have left its own in the environment.
    if told["LISTEN_PID"] != str(os.getpid()) or not told["LISTEN_FDS"].isdecimal():
        return {}
    fds = range(FIRST_FD, FIRST_FD + int(told["LISTEN_FDS"]))
    names = told["LISTEN_FDNAMES"].split(":")
    found: dict[str, list[int]] = {}
    for number, fd in enumerate(fds):
        os.set_inheritable(fd, False)
        found.setdefault(names[number] if number < len(names) else "unknown", []).append(fd)
    return found


def watchdog_seconds(environ: Mapping[str, str] = os.environ) -> float | None:
    """How often the manager wants to hear that we are alive before it kills us; None if it does not."""
    microseconds = environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or int(microseconds) == 0:
        return None
    return int(microseconds) / 1e6 if environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()) else None


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
