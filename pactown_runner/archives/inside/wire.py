"""What a child says to whoever started it, on its standard output: frames of a kind, a length, and so many bytes.

A child's last frame is `DONE`; one that ends without it has failed, and says why on its standard error.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

DATA, SKIPPED, DONE = b"D", b"S", b"."
"""A piece of the archive; what was left out, as a reason, a NUL and a path; JSON that sums up."""

HEAD = struct.Struct(">cI")
MAX_FRAME_BYTES = 1 << 20
MAX_SKIPPED = 10_000
"""So many of the things left out are named; more are only counted."""

_STDOUT = 1


class Refused(Exception):  # noqa: N818 - nothing went wrong: it is an answer
    """The child will not go on; the message is for people."""


class Skips:
    """What was left out: the first of it by name, all of it counted."""

    def __init__(self) -> None:
        self.count = 0
        self._named: list[bytes] = []

    def add(self, reason: str, path: bytes) -> None:
        """Take note of one."""
        self.count += 1
        if self.count <= MAX_SKIPPED:
            self._named.append(reason.encode() + b"\0" + path)

    def send(self) -> None:
        """Tell the host of them."""
        for payload in self._named:
            send(SKIPPED, payload)


def send(kind: bytes, payload: bytes | memoryview) -> None:
    """Write one frame."""
    view = memoryview(HEAD.pack(kind, len(payload)) + payload)
    while view:
        view = view[os.write(_STDOUT, view) :]


def receive(read: Callable[[int], bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The frames of a stream, of which every byte may be forged.

    Args:
        read: gives as many bytes as it is asked for, less only at the end.

    Raises:
        ValueError: they are no frames, or end in the middle of one.
    """
    while head := read(HEAD.size):
        if len(head) < HEAD.size:
            raise ValueError("it ends in the middle of a frame")
        kind, length = HEAD.unpack(head)
        if kind not in (DATA, SKIPPED, DONE) or length > MAX_FRAME_BYTES:
            raise ValueError("it holds what is no frame")
        payload = read(length)
        if len(payload) < length:
            raise ValueError("it ends in the middle of a frame")
        yield kind, payload


def serve(work: Callable[[Any], dict[str, Any]], arguments: Any) -> None:
    """Do a child's work, send what it returns, and end the process: with 0, or with a reason and 1."""
    # Each folder on the way to where it works is a descriptor.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    reason: str | None
    try:
        send(DONE, json.dumps(work(arguments)).encode())
    except Refused as error:
        reason = str(error)
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error.filename, (bytes, str)):
            reason = f"{show(os.fsencode(error.filename))}: {reason}"
    except MemoryError:
        reason = "there is not enough memory for it"
    else:
        reason = None
    sys.exit(reason)


def show(path: bytes) -> str:
    """A path for people."""
    return path[:200].decode("utf-8", "backslashreplace")
