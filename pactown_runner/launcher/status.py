"""What the launcher says about a start, and what it means.

Records come through a pipe, in the order and with the meaning that the head of `launch.c` states.
"""

from __future__ import annotations

import os
import struct
import sys
from dataclasses import dataclass
from errno import E2BIG, EACCES, EAGAIN, EBUSY, ENODEV, ENOENT, ENOEXEC, EOPNOTSUPP, EPERM
from typing import NamedTuple

from ..errors import LauncherError, StartError
from ..models import IsolationReport, Placement
from ..specs import Namespace
from .spec import NAMESPACE_FLAGS, Directory, LaunchSpec

__all__ = ["BUILD", "STEPS", "Failure", "Launched", "StatusReader", "start_error"]

STEPS = (
    *(
        "spec",
        "clone3",
        "join",
        "setsid",
        "keyring",
        "signals",
        "priority",
        "oom_score_adj",
        "rlimits",
        "namespaces",
    ),
    *(
        "bounding",
        "setgroups",
        "setresgid",
        "setresuid",
        "capabilities",
        "regain",
        "no_new_privs",
        "directories",
    ),
    *("close_range", "readback", "execve"),
)
"""The launcher's steps, in order; `enum step` in `launch.c`. One more, `launcher`, stands for its sudden end."""

BUILD = f"{sys.executable or 'python3'} -m pactown_runner.launcher.build"
"""What compiles the launcher: with this very Python, as another need not have this package."""

_PLACEMENTS: tuple[Placement, ...] = ("none", "born", "joined")
_HEAD = struct.Struct("<2I")
_PID = struct.Struct("<8xiI")
_REPORT = struct.Struct("<8xiI8I5Q2Ii2I4x")
_FAILED = struct.Struct("<8xiIiI")
_TYPE_PID, _TYPE_REPORT, _TYPE_FAILED = 1, 2, 3
_NO_NEW_PRIVS, _CGROUP_KNOWN = 1, 2
_MAX_RECORD = 4096


class Failure(NamedTuple):
    """A step that failed: its name, the kernel's error number, and which rlimit or directory it was."""

    step: str
    errno: int
    detail: int = 0


@dataclass(frozen=True)
class Launched:
    """The program was executed.

    Attributes:
        pid: the program's.
        report: what held just before `execve`; `limits` is for the caller to fill in.
    """

    pid: int
    report: IsolationReport


class StatusReader:
    """Takes what comes through the status pipe, and knows what it says so far.

    Attributes:
        pid: the child's, as soon as any record tells it; 0 until then. It may have ended, but is not yet reaped.
        failure: the step that failed, if one has.
        reported: whether the child has read back what holds, and `execve` is next.
        ended: whether the pipe has ended.
    """

    def __init__(self, spec: LaunchSpec) -> None:
        self._spec = spec
        self._bytes = b""
        self._report = b""
        self.pid = 0
        self.failure: Failure | None = None
        self.ended = False

    @property
    def reported(self) -> bool:
        """Whether the child has read back what holds, and `execve` is next."""
        return bool(self._report)

    def feed(self, data: bytes) -> bool:
        """Take what was read, b"" for end-of-file. Return whether the start is decided.

        Raises:
            LauncherError: that is no record of this version's launcher.
        """
        if not data:
            self.ended = True
            return True
        data = self._bytes + data
        at = 0
        while len(data) - at >= _HEAD.size:
            kind, size = _HEAD.unpack_from(data, at)
            if not _PID.size <= size <= _MAX_RECORD:
                raise LauncherError(f"the launcher wrote a record of {size} bytes", remedy="reinstall the package")
            if len(data) - at < size:
                break
            self._take(kind, data[at : at + size])
            at += size
        self._bytes = data[at:]
        return False

    def _take(self, kind: int, record: bytes) -> None:
        if kind == _TYPE_PID:
            self.pid = _PID.unpack(record)[0]
        elif kind == _TYPE_REPORT:
            self._report = record
            self.pid = _PID.unpack_from(record)[0]
        elif kind == _TYPE_FAILED:
            pid, step, errno, detail = _FAILED.unpack(record)
            self.pid = self.pid or pid
            self.failure = Failure(STEPS[step], errno, detail)
        else:
            raise LauncherError(f"the launcher wrote a record of kind {kind}", remedy="reinstall the package")

    def result(self) -> Launched:
        """Return what was started, once the pipe has ended.

        Raises:
            StartError: it was not.
        """
        if self.failure is not None:
            raise start_error(self.failure, self._spec)
        if not self._report:
            raise start_error(Failure("launcher", 0), self._spec)
        return Launched(self.pid, report_from(self._report, self._spec))


def report_from(record: bytes, spec: LaunchSpec) -> IsolationReport:
    """Return the report that a REPORT record holds; its `limits` are left empty."""
    fields = _REPORT.unpack_from(record)
    uid, gid, masks = fields[2:6], fields[6:10], fields[10:15]
    flags, namespaces, keyring_error, groups, cgroup_size = fields[15:20]
    at = _REPORT.size + 4 * groups
    known = flags & _CGROUP_KNOWN
    unshared: list[Namespace] = [name for name, flag in NAMESPACE_FLAGS.items() if namespaces & flag]
    return IsolationReport(
        mode=spec.mode,
        uid=uid[:3],
        gid=gid[:3],
        groups=struct.unpack_from(f"<{groups}I", record, _REPORT.size),
        capabilities=dict(zip(_CAPABILITY_SETS, masks, strict=True)),
        no_new_privs=bool(flags & _NO_NEW_PRIVS),
        root_regainable=False if spec.mode == "root" else None,
        cgroup=os.fsdecode(record[at : at + cgroup_size]) if known else None,
        placement=_PLACEMENTS[fields[1]],
        keyring=keyring_error == 0,
        namespaces=tuple(sorted(unshared)),
    )


_CAPABILITY_SETS = ("inheritable", "permitted", "effective", "bounding", "ambient")


def start_error(failure: Failure, spec: LaunchSpec) -> StartError:
    """Return the error for people that stands for `failure`."""
    step, errno, _ = failure
    remedy = None
    if step == "launcher":
        message = "the launcher was killed before it could execute the program"
    elif step == "execve":
        message, remedy = _execve_message(errno, spec)
    elif step == "directories":
        message = _directory_message(failure, spec)
    elif step in ("clone3", "join") and errno in _PLACE_REASONS:
        message = f"cannot start a process in the sandbox's cgroup: {_PLACE_REASONS[errno]}"
    elif step == "spec":
        message = "the launcher refused what it was told"
        if errno == EPERM:
            message += ": no program is started as root"
        else:
            remedy = f"it may be of another version: run `{BUILD}`"
    elif step in ("regain", "readback") and errno == EPERM:
        message = f"the launcher's checks failed at step {step}: the program would have kept privileges"
    else:
        message = f"the launcher's step {step} failed: {os.strerror(errno)}"
    return StartError(message, step=step, errno=errno, remedy=remedy)


_PLACE_REASONS = {
    EAGAIN: "its limit on processes, or the host's, is reached",
    EBUSY: "it passes controllers on to children, so it takes no process itself",
    EOPNOTSUPP: "it is a threaded or invalid cgroup",
    ENODEV: "it was removed",
    ENOENT: "it was removed",
    EACCES: "permission denied",
}


def _execve_message(errno: int, spec: LaunchSpec) -> tuple[str, str | None]:
    name = spec.argv[0]
    if errno == E2BIG:
        return "program or environment too large (E2BIG)", "pass large data in files"
    if errno == ENOENT and "/" not in name:
        return (
            f"cannot execute {name!r}: no such file in PATH, or the interpreter that it names is missing",
            None,
        )
    if errno == ENOENT:
        return f"cannot execute {name!r}: no such file, or the interpreter that it names is missing", None
    if errno == ENOEXEC:
        return f"cannot execute {name!r}: not a program", "a script begins with #! and its interpreter"
    return f"cannot execute {name!r} as {_who(spec)}: {os.strerror(errno).lower()}", None


def _directory_message(failure: Failure, spec: LaunchSpec) -> str:
    directory = spec.directories[failure.detail] if failure.detail < len(spec.directories) else Directory("?")
    verb = "make or enter" if directory.make else "enter"
    reason = os.strerror(failure.errno).lower()
    return f"cannot {verb} directory {str(directory.path)!r} as {_who(spec)}: {reason}"


def _who(spec: LaunchSpec) -> str:
    return spec.env.get("USER") or (f"uid {spec.uid}" if spec.mode == "root" else "the calling user")
