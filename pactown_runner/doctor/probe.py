"""The launcher, tried: a program of its own uid in a cgroup of its own, and what the kernel says of it."""

from __future__ import annotations

import os
import platform
import secrets
from collections.abc import Iterator

from cgroups import Cgroup, CgroupError, Mount

from ..config import Settings
from ..errors import RunnerError, StartError
from ..launcher import LaunchSpec, launch_popen, launcher_path
from ..launcher.build import BuildError, machine_of
from ..launcher.status import BUILD
from ..models import IsolationReport
from ..specs import Namespace
from .finding import Finding, fail, ok, warn
from .host import taken_ids

__all__ = ["check_launcher", "judge"]

_BUILD = f"install a C compiler and run: {BUILD}"
_SECCOMP = "allow {} in the container's seccomp profile"
_KILLED_ONCE = (
    "start the runner in a new cgroup, such as by systemd-run: what is cloned from a cgroup that was killed once "
    "(cgroup.kill) into another is killed by Linux 6.12 and later"
)
_NAMESPACES: tuple[Namespace, ...] = ("ipc", "net", "uts")
_WAIT_SECONDS = 10.0


def check_launcher(mount: Mount | None, settings: Settings) -> Iterator[Finding]:
    """Whether the launcher is there, is for this machine, and does its work."""
    try:
        path = launcher_path()
        machine = machine_of(path)
    except (RunnerError, BuildError, OSError) as error:
        yield fail("launcher", str(error), _BUILD)
        return
    if machine != platform.machine():
        yield fail("launcher", f"{path} is for {machine}, and this is {platform.machine()}", _BUILD)
        return
    yield ok("launcher", f"{path}, for {machine}")
    if os.geteuid() == 0 and mount is not None and mount.writable:
        yield from _try_out(mount, settings)
    else:
        yield warn("launcher.works", "not tried: that takes root and a writable cgroup tree", "run it with sudo")


def _try_out(mount: Mount, settings: Settings) -> Iterator[Finding]:
    uid = _unused_uid(settings)
    if uid is None:
        yield warn("launcher.works", "not tried: no uid is free", "widen uid_ranges in the settings")
        return
    # Beside our tree, not in it: what is in it belongs to a state, and there need be none yet.
    name = f"{settings.cgroup_slice.removesuffix('.slice')}-doctor-{secrets.token_hex(4)}.scope"
    try:
        with Cgroup.open(mount.path) as top, top.child(name, create=True) as scope:
            try:
                yield from _try_in(scope, uid)
            finally:
                # Whatever went wrong above, nothing of it may stay.
                _clear(scope)
    except CgroupError as error:
        yield fail("launcher.works", f"no program can be placed in a cgroup: {error.message}", error.remedy)


def _clear(scope: Cgroup) -> None:
    if scope.populated():
        scope.kill()
        scope.wait_empty(_WAIT_SECONDS)
    scope.remove()


def _try_in(scope: Cgroup, uid: int) -> Iterator[Finding]:
    try:
        report = _start(scope, uid)
    except RunnerError as error:
        was_killed = isinstance(error, StartError) and error.step == "launcher"
        remedy = _KILLED_ONCE if was_killed else error.remedy
        yield fail("launcher.works", f"it cannot start a program: {error.message}", remedy)
        return
    yield from judge(report, uid)
    for namespace in _NAMESPACES:
        try:
            _start(scope, uid, namespace)
        except RunnerError as error:
            yield warn(f"namespace.{namespace}", f"cannot be used: {error.message}", _SECCOMP.format("unshare"))
        else:
            yield ok(f"namespace.{namespace}", "can be asked for")
    # Last: for the same reason as in _KILLED_ONCE, nothing could be born in this cgroup afterwards.
    yield _kill_works(scope, uid)


def _start(scope: Cgroup, uid: int, *namespaces: Namespace) -> IsolationReport:
    spec = LaunchSpec(argv=["/bin/true"], uid=uid, gid=uid, namespaces=frozenset(namespaces))
    program, report = launch_popen(spec, scope.fd)
    with program:
        if (status := program.wait(_WAIT_SECONDS)) != 0:
            raise StartError(f"/bin/true ended with {status}", step="execve")
    return report


def judge(report: IsolationReport, uid: int) -> Iterator[Finding]:
    """What the launcher's report of a started program is worth."""
    if problems := list(_problems(report, uid)):
        yield fail(
            "launcher.works", f"a program started as a tenant has {', '.join(problems)}", "do not use it; report it"
        )
    else:
        yield ok("launcher.works", f"a program ran as uid {uid}, with no group, capability or way back to root")
    if report.placement == "born":
        yield ok("launcher.placement", "programs are born in their cgroup")
    else:
        message = "clone3 is refused: programs join their cgroup before they begin, which takes some 20 ms a start"
        yield warn("launcher.placement", message, _SECCOMP.format("clone3"))
    if report.keyring:
        yield ok("launcher.keyring", "each program has a session keyring of its own")
    else:
        message = "keyctl is refused: no program has a keyring of its own (nor can it reach another's)"
        yield warn("launcher.keyring", message, _SECCOMP.format("keyctl"))


def _problems(report: IsolationReport, uid: int) -> Iterator[str]:
    if set(report.uid) != {uid} or set(report.gid) != {uid}:
        yield f"uids {report.uid} and gids {report.gid}"
    if report.groups:
        yield f"groups {report.groups}"
    if held := [name for name, mask in report.capabilities.items() if mask]:
        yield f"capabilities ({', '.join(held)})"
    if not report.no_new_privs:
        yield "ways to gain privileges through execve"
    if report.root_regainable is not False:
        yield "a way back to root"
    if report.placement == "none":
        yield "no cgroup"


def _kill_works(scope: Cgroup, uid: int) -> Finding:
    """Kill a program that would sleep for long."""
    program, _ = launch_popen(LaunchSpec(argv=["/bin/sleep", "1000"], uid=uid, gid=uid), scope.fd)
    with program:
        try:
            scope.kill()
        except CgroupError as error:
            program.kill()
            return fail("cgroup.kill", f"a cgroup cannot be killed as a whole: {error.message}", "install Linux 5.14")
        program.wait(_WAIT_SECONDS)
        scope.wait_empty(_WAIT_SECONDS)
    return ok("cgroup.kill", "a cgroup can be killed as a whole")


def _unused_uid(settings: Settings) -> int | None:
    """A uid that is nobody's; the highest, since accounts are given the lowest."""
    taken = taken_ids(settings)
    for first, last in reversed(settings.uid_ranges):
        for uid in range(last, first - 1, -1):
            if uid not in taken:
                return uid
    return None
