"""What the launcher is told, and how it is laid out for `launch.c`.

A launcher reads its spec from a memfd: a header, rlimits, room for the pointers of argv and env, then strings, each
ended by a NUL. The other side of this layout is `struct spec` in `launch.c`.
"""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal, NamedTuple

from ..errors import SpecError
from ..specs import Namespace

__all__ = ["DEFAULT_PATH", "DEFAULT_RLIMITS", "MAX_SPEC_BYTES", "Directory", "LaunchSpec", "Rlimit"]

DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"
MAX_SPEC_BYTES = 16 << 20
"""The kernel takes at most 6 MiB of argv and env together (execve(2)); that much is left to it to refuse."""

_MAGIC = 0x4E4C5450
_VERSION = 1
_HEADER = struct.Struct("<6I2i4I")
_ROOT = 1
_OOM_SCORE_ADJ = 2
NAMESPACE_FLAGS: dict[Namespace, int] = {"net": 4, "ipc": 8, "uts": 16}
_NO_ID = 0xFFFFFFFF


class Directory(NamedTuple):
    """A directory to enter on the way to the program's own, as the tenant.

    Attributes:
        path: absolute, or relative to the directory before it. Links are followed where the tenant may.
        make: make it first, mode 0700, if it is missing.
    """

    path: str | PurePath
    make: bool = False


class Rlimit(NamedTuple):
    """A resource limit (setrlimit(2)). Where raising the hard limit is not permitted, the lower one stays."""

    resource: int
    soft: int
    hard: int


DEFAULT_RLIMITS = (
    Rlimit(resource.RLIMIT_NOFILE, 1024, 524288),
    Rlimit(resource.RLIMIT_CORE, 0, 0),
)


@dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    """One program to execute, as whom and where.

    Attributes:
        argv: the program's words. A first word without a slash is sought in `path`.
        mode: `root` takes on `uid` and `gid`; `user` keeps the caller's own, which must not be root.
        uid, gid: in root mode, neither may be 0. Not used in user mode.
        env: the whole environment of the program.
        path: where the program is sought, as the tenant; None takes PATH from `env`, else `DEFAULT_PATH`.
        directories: entered one after the other, from `/` on; the last is the program's working directory.
        rlimits: set before privileges are dropped.
        oom_score_adj: -1000 to 1000; less than inherited needs CAP_SYS_RESOURCE. None leaves it as inherited: what is
            started by a supervisor that is protected is protected too.
        namespaces: to be unshared.
    """

    argv: Sequence[str]
    mode: Literal["root", "user"] = "root"
    uid: int = 0
    gid: int = 0
    env: Mapping[str, str] = field(default_factory=dict)
    path: str | None = None
    directories: Sequence[Directory] = ()
    rlimits: Sequence[Rlimit] = DEFAULT_RLIMITS
    oom_score_adj: int | None = None
    namespaces: frozenset[Namespace] = frozenset()

    def pack(self) -> bytes:
        """Return the spec as the launcher reads it.

        Raises:
            SpecError: a value holds a NUL byte, cannot be encoded, or is out of range, or the whole is over 16 MiB.
                Whether argv and env are too large to be executed is for the kernel to say.
        """
        argv, env = self.argv, self.env
        if not argv:
            raise SpecError("there is no program to execute: argv is empty")
        strings = [("+" if d.make else "=") + os.fspath(d.path) for d in self.directories]
        strings += argv
        strings += [f"{name}={value}" for name, value in env.items()]
        strings.append(env.get("PATH", DEFAULT_PATH) if self.path is None else self.path)
        try:
            # One for all: encoding each would be most of the time that this takes.
            text = "\0".join(strings).encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise SpecError(f"the program, its environment or a path cannot be encoded: {error}") from error
        if text.count(b"\0") != len(strings) - 1:
            raise SpecError("the program, its environment or a path holds a NUL byte, which no program can be given")
        limits = b"".join([_pack_rlimit(limit) for limit in self.rlimits])
        pointers = bytes(8 * (len(argv) + len(env) + 2))
        size = _HEADER.size + len(limits) + len(pointers) + len(text) + 1
        if size > MAX_SPEC_BYTES:
            raise SpecError(f"program and environment take {size} bytes, more than {MAX_SPEC_BYTES}")
        return b"".join((self._header(size), limits, pointers, text, b"\0"))

    def _header(self, size: int) -> bytes:
        flags = 0
        if self.mode == "root":
            flags |= _ROOT
            # The launcher refuses these too; here the message can say more.
            if not (0 < self.uid < _NO_ID and 0 < self.gid < _NO_ID):
                raise SpecError(f"no program is started as uid {self.uid}, gid {self.gid}")
        oom_score_adj = self.oom_score_adj
        if oom_score_adj is not None:
            flags |= _OOM_SCORE_ADJ
            if not -1000 <= oom_score_adj <= 1000:
                raise SpecError(f"oom_score_adj is -1000 to 1000, not {oom_score_adj}")
        for namespace in self.namespaces:
            flags |= NAMESPACE_FLAGS[namespace]
        return _HEADER.pack(
            *(_MAGIC, _VERSION, size, flags, self.uid, self.gid, 0, oom_score_adj or 0),
            *(len(self.rlimits), len(self.directories), len(self.argv), len(self.env)),
        )


def _pack_rlimit(limit: Rlimit) -> bytes:
    number, soft, hard = limit
    try:
        # RLIM_INFINITY is -1 in Python, all bits set in the kernel.
        return struct.pack("<3Q", number, soft & 0xFFFFFFFFFFFFFFFF, hard & 0xFFFFFFFFFFFFFFFF)
    except struct.error as error:
        raise SpecError(f"not a resource limit: {limit}") from error
