"""Ports: is it a sandbox's own socket that answers on 127.0.0.1?

Nothing is worked out here from tables of sockets and descriptors, which tenants change faster than anyone reads them.
The kernel is asked (sock_diag(7)): it looks the socket up as it does for a packet that comes in, and names the cgroup
of the process that made it. That name stays: neither the end of the process nor the passing on of descriptors changes
it, a connection has its listener's, and no cgroup id is used twice. A question is two system calls, whatever the number
of processes, descriptors and sockets.

What holds when `connect` has returned: the other end of this very connection was made in the sandbox. It does not
matter who listened before or afterwards, on which of the addresses that 127.0.0.1 reaches, or whether several share the
port (SO_REUSEPORT, which the kernel grants to one uid alone, hence to one tenant). Whoever would be reached is asked
for beforehand, so that nobody else's process is connected to unless it took the port in between; and then nothing is
sent to it.

What does not: who serves the connection is up to the sandbox, which may pass its socket on. And a connection that was
closed again before it could be looked at counts if the sandbox's is the socket that would be reached next.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import sys
from typing import NamedTuple

from cgroups import Cgroup

from .errors import SpecError

__all__ = ["HOST", "PortError", "check_ports", "connect", "owner"]

HOST = "127.0.0.1"
_ADDRESS = socket.inet_aton(HOST).ljust(16, b"\0")
_LOOPBACK = 1
"""The index of `lo` in every network namespace: a listener that is bound to the device is found too."""

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_ERROR = 2
_NLM_F_REQUEST = 1
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI 4s16s16sIII")
_PORTS = struct.Struct(">HH")
_ATTRIBUTE = struct.Struct("=HH")
_ATTRIBUTES_AT = _HEADER.size + 72  # struct inet_diag_msg
_CGROUP_ID = 21  # INET_DIAG_CGROUP_ID, from Linux 5.8 on
_ALL_STATES = _NO_COOKIE = 0xFFFFFFFF
_FIN_WAIT2 = 5


class PortError(ConnectionError):
    """It is not the sandbox that answers on this port; the message says what is there."""


class _Found(NamedTuple):
    """A socket: its state, and the id of the cgroup that it was made in, unless it is just coming or has gone."""

    state: int
    cgroup: int | None


def owner(port: int, peer_port: int = 0) -> int | None:
    """The id of the cgroup whose socket a connection to 127.0.0.1 reaches on `port`, or None if none does.

    Args:
        peer_port: the other end's port, of a connection that there is or might be.

    Raises:
        OSError: the kernel could not be asked.
    """
    with _kernel() as kernel:
        found = _ask(kernel, port, peer_port)
    return found.cgroup if found else None


def check_ports() -> None:
    """See whether this kernel tells whose a port is.

    Raises:
        SpecError: it does not.
        OSError: it could not be tried.
    """
    # Without the module tcp_diag it answers as if there were no socket.
    with socket.create_server((HOST, 0)) as server:
        if owner(server.getsockname()[1]) is None:
            raise SpecError(
                "this kernel does not tell which sandbox listens on a port",
                remedy="load the module tcp_diag (CONFIG_INET_DIAG), or probe by a command",
            )


async def connect(port: int, scope: Cgroup) -> socket.socket:
    """A connection to a port of a sandbox, whose other end was made in the sandbox. It does not block; close it.

    Raises:
        PortError: nothing listens there, or what does is not the sandbox's.
        ConnectionError: it was refused.
        OSError: it could not be tried.
    """
    with _kernel() as kernel:
        _check_owner(scope, port, _ask(kernel, port))
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await asyncio.get_running_loop().sock_connect(connection, (HOST, port))
            found = _ask(kernel, port, connection.getsockname()[1])
            if found == (_FIN_WAIT2, None):
                # Closed by the other end already: the kernel keeps no more than its addresses.
                found = _ask(kernel, port)
            _check_owner(scope, port, found)
        except BaseException:
            connection.close()
            raise
    return connection


def _check_owner(scope: Cgroup, port: int, found: _Found | None) -> None:
    if found is None:
        raise PortError(f"nothing listens on port {port}")
    if found.cgroup is None:
        raise PortError(f"what listens on port {port} accepts no connections")
    if not _is_within(scope, found.cgroup):
        raise PortError(f"port {port} belongs to somebody outside the sandbox")


def _is_within(scope: Cgroup, cgroup_id: int) -> bool:
    """Whether a cgroup is the scope or lies below it, as only the runner's own user can make one."""
    if os.fstat(scope.fd).st_ino == cgroup_id:
        return True
    for child in scope.children():
        with child:
            if _is_within(child, cgroup_id):
                return True
    return False


def _kernel() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_SOCK_DIAG)


def _ask(kernel: socket.socket, port: int, peer_port: int = 0) -> _Found | None:
    """Have the kernel look up the socket that a segment from 127.0.0.1, `peer_port`, to `port` comes to."""
    request = _REQUEST.pack(
        socket.AF_INET,
        socket.IPPROTO_TCP,
        0,
        _ALL_STATES,
        _PORTS.pack(port, peer_port),
        _ADDRESS,
        _ADDRESS,
        _LOOPBACK,
        _NO_COOKIE,
        _NO_COOKIE,
    )
    header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0)
    kernel.send(header + request)
    # The answer is there before `send` returns.
    answer = kernel.recv(8192)
    length, kind, *_ = _HEADER.unpack_from(answer)
    if kind == _NLMSG_ERROR:
        (error,) = struct.unpack_from("=i", answer, _HEADER.size)
        if -error == errno.ENOENT:
            return None
        raise OSError(-error, os.strerror(-error))
    return _Found(answer[_HEADER.size + 1], _cgroup_of(answer[_ATTRIBUTES_AT:length]))


def _cgroup_of(attributes: bytes) -> int | None:
    at = 0
    while at + _ATTRIBUTE.size <= len(attributes):
        length, kind = _ATTRIBUTE.unpack_from(attributes, at)
        if kind == _CGROUP_ID:
            return int.from_bytes(attributes[at + _ATTRIBUTE.size : at + length], sys.byteorder)
        at += (length + 3) & ~3
    return None
