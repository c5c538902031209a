"""Jobs: helper programs that run as a tenant, in a leaf `_job-<n>.scope` of the tenant's slice. Synchronous.

A job is claimed in the registry as a one-shot run, so that whatever a dead owner left of it is ended by the next one.
It is a tenant's process: the tenant's others have its uid, and may stop it, trace it, or take a copy of its end of a
pipe (pidfd_getfd(2)) and keep that open. So what it says is as much the tenant's word as the files are, and nothing
here waits for it without end: its pipes are watched together with the process itself, and a watchdog kills the whole
scope when its time is up.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import secrets
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cgroups import Cgroup, CgroupError, GoneError

from .errors import FilesError, RunnerError, StateError
from .host import Claim, Host
from .launcher import DEFAULT_PATH, Directory, LaunchSpec, launch_popen
from .models import IsolatedUser
from .registry import SandboxRow
from .trees import end_all, slice_name

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["JOB_TIMEOUT", "Job", "Stop", "job", "job_name"]

JOB_TIMEOUT = 600.0
"""Seconds of wall time for a job. A tenant can stop its own job, and would keep one of our threads for ever."""

STDERR_BYTES = 65536
"""What a job may write to its standard error."""

REAP_PATIENCE = 1.0
"""Seconds for a tenant's process that traces a job to let go of it when it has ended."""

_LOOK_AGAIN = 500
"""Milliseconds between two looks at whether a job was stopped: that it was killed need not mean that it ends."""
_PIPE_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 18
_ENVIRONMENT = {"PATH": DEFAULT_PATH, "LC_ALL": "C", "HOME": "/nonexistent"}
_SHOWN_LINES = 3


class Stop:
    """Ends a job from another thread. May be asked before there is one.

    Attributes:
        reason: why it was asked for, or None.
        asked: set when it was asked for.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.asked = threading.Event()
        self._scope: Cgroup | None = None
        self._lock = threading.Lock()

    def now(self, reason: str) -> None:
        """Kill the job. To be repeated until it is gone: a process that is just being born may escape one kill."""
        with self._lock:
            self.reason = self.reason or reason
            self.asked.set()
            if self._scope is not None:
                with contextlib.suppress(GoneError):
                    self._scope.kill()

    def check(self) -> None:
        """Raise `FilesError` if it was asked for."""
        if self.reason is not None:
            raise FilesError(f"given up: {self.reason}")

    @contextmanager
    def bound(self, scope: Cgroup, timeout: float) -> Iterator[None]:
        """Let it end what runs in `scope`, and ask for that itself after `timeout` seconds."""
        with self._lock:
            self._scope = scope
        over = threading.Event()
        watchdog = threading.Thread(target=self._watch, args=(over, timeout), name="pactown-watchdog", daemon=True)
        watchdog.start()
        try:
            self.check()
            yield
        finally:
            over.set()
            watchdog.join()
            with self._lock:
                self._scope = None

    def _watch(self, over: threading.Event, timeout: float) -> None:
        while not over.wait(timeout):
            self.now(f"it took longer than {timeout:g} s")
            timeout = min(timeout, 1.0)


class Job:
    """A running job.

    Attributes:
        output: its standard output, if that was asked for. It is at its end when the job has ended, no matter who else
            holds the pipe.
    """

    def __init__(self, popen: subprocess.Popen[bytes], stop: Stop, pipes: _Pipes) -> None:
        self._popen = popen
        self._stop = stop
        self._pipes = pipes
        self._pidfd = os.pidfd_open(popen.pid)
        self._ended = select.poll()
        self._ended.register(self._pidfd, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(self._pidfd, select.POLLIN)
        if pipes.ours_in >= 0:
            self._writable.register(pipes.ours_in, select.POLLOUT)
        self.output = io.BufferedReader(_Output(pipes.ours_out, self._pidfd, stop), _BUFFER_BYTES)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of it to the job's standard input.

        Raises:
            BrokenPipeError: it has ended, or reads no more.
            FilesError: it was stopped.
        """
        view = memoryview(data)
        while view:
            self._stop.check()
            try:
                view = view[os.write(self._pipes.ours_in, view) :]
            except BlockingIOError:
                # Both at once: somebody else who holds the reading end must not keep us when the job is gone.
                if {fd for fd, _ in self._writable.poll(_LOOK_AGAIN)} == {self._pidfd}:
                    raise BrokenPipeError from None

    def end_input(self) -> None:
        """Give it end-of-file on its standard input."""
        self._pipes.close_stdin()

    def wait(self) -> int:
        """Give it end-of-file, wait for its end, and return its exit code, or minus the signal that ended it.

        Raises:
            FilesError: it was stopped.
        """
        self.end_input()
        while not self._ended.poll(_LOOK_AGAIN):
            self._stop.check()
        self._stop.check()
        try:
            # Its end may have been shown to a tracer only, ptrace(2), who may keep it.
            return self._popen.wait(REAP_PATIENCE)
        except subprocess.TimeoutExpired:
            raise FilesError("another process of the tenant's traces the one that was started here") from None

    def message(self) -> str:
        """The first lines of what it wrote to its standard error. The tenant's word, made printable."""
        text = os.pread(self._pipes.stderr, STDERR_BYTES, 0).rstrip(b"\0").decode("utf-8", "replace")
        lines = ["".join(c if c.isprintable() else "?" for c in line) for line in text.splitlines()]
        more = len(lines) - _SHOWN_LINES
        return "; ".join(lines[:_SHOWN_LINES]) + (f"; and {more} more lines" if more > 0 else "")

    def close(self) -> None:
        """Let go of it; it goes on."""
        self.output.close()
        os.close(self._pidfd)


class _Output(io.RawIOBase):
    """The reading end of a job's standard output; the descriptor stays its owner's."""

    def __init__(self, fd: int, pidfd: int, stop: Stop) -> None:
        self._fd = fd
        self._stop = stop
        self._ready = select.poll()
        self._ready.register(pidfd, select.POLLIN)
        if fd >= 0:
            self._ready.register(fd, select.POLLIN)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        ended = False
        while True:
            self._stop.check()
            try:
                return os.readv(self._fd, [buffer])
            except BlockingIOError:
                # Look once more when its end has been seen: it may have written in between.
                if ended:
                    self._stop.check()
                    return 0
                if ready := self._ready.poll(_LOOK_AGAIN):
                    ended = self._fd not in {fd for fd, _ in ready}


class _Pipes:
    """A job's standard input, output and error, on both sides; -1 for what there is not, or not any more.

    Standard error is a file in memory that the kernel lets nobody grow: a flood of complaints costs nothing.
    """

    def __init__(self, *, stdin: bool, stdout: bool) -> None:
        self.theirs_in = self.ours_in = self.ours_out = self.theirs_out = self.stderr = -1
        try:
            self.stderr = os.memfd_create("pactown-stderr", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.fchmod(self.stderr, 0)
            os.ftruncate(self.stderr, STDERR_BYTES)
            fcntl.fcntl(self.stderr, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
            if stdin:
                self.theirs_in, self.ours_in = _pipe()
                os.set_blocking(self.ours_in, False)
            if stdout:
                self.ours_out, self.theirs_out = _pipe()
                os.set_blocking(self.ours_out, False)
        except BaseException:
            self.close()
            raise

    def close_theirs(self) -> None:
        _close(self.theirs_in, self.theirs_out)
        self.theirs_in = self.theirs_out = -1

    def close_stdin(self) -> None:
        _close(self.ours_in)
        self.ours_in = -1

    def close(self) -> None:
        self.close_theirs()
        self.close_stdin()
        _close(self.ours_out, self.stderr)
        self.ours_out = self.stderr = -1


def _pipe() -> tuple[int, int]:
    ends = os.pipe2(os.O_CLOEXEC)
    # Refused beyond /proc/sys/fs/pipe-user-pages-soft; it is only for speed.
    with contextlib.suppress(OSError):
        fcntl.fcntl(ends[0], fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return ends


def _close(*fds: int) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)


def job_name(run_id: str) -> str:
    """What a job is called where services have their ids."""
    return f"_job-{run_id}"


@contextmanager
def job(
    host: Host,
    user: IsolatedUser,
    argv: Sequence[str],
    *,
    directories: Sequence[Directory],
    stdin: bool = False,
    stdout: bool = False,
    timeout: float = JOB_TIMEOUT,
    stop: Stop | None = None,
    run_id: str | None = None,
) -> Iterator[Job]:
    """Run a program as `user`; when the block is left, however, nothing of it runs any more.

    It blocks: use it in a thread that others do not wait for. The sandboxes' default limits hold for it.

    Args:
        argv: the program; an absolute path, or sought in the standard PATH as the tenant.
        directories: entered as the tenant, see `LaunchSpec`.
        stdin, stdout: connect it to a pipe instead of `/dev/null`.
        timeout: seconds, after which it is killed.
        stop: lets another thread end it earlier.
        run_id: what it is to be known by, `_job-<run_id>`, for whoever has to tell it from others; by default random.

    Raises:
        StartError: the program was not executed.
        FilesError: it was stopped, or its time was up.
        StateError: something of it could not be killed in time; it stays claimed. Or the tenant's home is just being
            exported or imported, by others than this job.
        NotFoundError: there is no such user any more.
        LimitsError: the default limits cannot be enforced.
    """
    stop = Stop() if stop is None else stop
    with (
        _scope(host, user, run_id or secrets.token_hex(8)) as scope,
        stop.bound(scope, timeout),
        contextlib.ExitStack() as held,
    ):
        host.tree.limit(user.key, scope, host.standings.default_limits(user.key))
        pipes = _Pipes(stdin=stdin, stdout=stdout)
        held.callback(pipes.close)
        spec = LaunchSpec(
            argv=argv,
            mode="root" if host.users.root_mode else "user",
            uid=user.linux_uid,
            gid=user.linux_gid,
            env=_ENVIRONMENT,
            directories=directories,
        )
        try:
            theirs = (_or_null(pipes.theirs_in), _or_null(pipes.theirs_out), pipes.stderr)
            popen, _ = launch_popen(spec, scope.fd, *theirs, unreaped=host.unreaped)
        except RunnerError:
            # If it was stopped half-way, that is why it was not executed.
            stop.check()
            raise
        held.callback(_end, host, scope, popen)
        pipes.close_theirs()
        running = Job(popen, stop, pipes)
        held.callback(running.close)
        stop.check()
        yield running


def _or_null(fd: int) -> int:
    return fd if fd >= 0 else subprocess.DEVNULL


def _end(host: Host, scope: Cgroup, popen: subprocess.Popen[bytes]) -> None:
    """Kill and reap it. What cannot be killed now is told by `_empty`."""
    with contextlib.suppress(GoneError):
        scope.kill()
    try:
        popen.wait(REAP_PATIENCE)
    except subprocess.TimeoutExpired:
        host.unreaped.add(popen.pid)
        popen.returncode = -signal.SIGKILL  # not its destructor's business any more


@contextmanager
def _scope(host: Host, user: IsolatedUser, run_id: str) -> Iterator[Cgroup]:
    """A claimed scope; emptied, removed and released at the end."""
    name = job_name(run_id)
    claim = (user.key, name, run_id)
    host.registry.sandboxes.claim(
        SandboxRow(
            key=user.key,
            service_id=name,
            run_id=run_id,
            owner=host.owner.owner_id,
            kind="run",
            spec="{}",
            cgroup=f"{host.tree.root.path}/{slice_name(user.key)}/{name}.scope",
            created_at=time.time(),
        )
    )
    try:
        scope = host.tree.scope(user.key, name, run_id)
    except BaseException:
        host.release(claim)
        raise
    with scope:
        try:
            yield scope
        finally:
            _empty(host, scope, claim)
            # Not in a `finally`: while something may run, the row has to say so.
            host.release(claim)


def _empty(host: Host, scope: Cgroup, claim: Claim) -> None:
    try:
        with contextlib.suppress(GoneError):
            with host.tree.slice(claim[0]) as slice_:
                end_all(scope, slice_)
            scope.remove(recursive=True)
    except CgroupError as error:
        host.unfinished[claim] = None
        raise StateError(f"a job could not be ended: {error.message}", remedy=error.remedy) from error
