"""The call: on each event loop, synchronous, cancelled, and from many threads."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pactown_runner import launcher
from pactown_runner.errors import LauncherError, StartError
from pactown_runner.launcher import Directory, LaunchSpec, Started, launch_async, launch_popen, launcher_path

from .conftest import Leaf, MakeSpec

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("leaves_nothing")]


async def end_of(started: Started) -> tuple[int, int]:
    """Wait for the end, reap, close; the code of waitid(2) and its status."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(started.pidfd, ended.set)
    await ended.wait()
    loop.remove_reader(started.pidfd)
    result = os.waitid(os.P_PIDFD, started.pidfd, os.WEXITED)
    os.close(started.pidfd)
    assert result is not None
    assert result.si_pid == started.pid
    return result.si_code, result.si_status


@pytest.mark.each_loop
async def test_a_program_is_our_child_and_in_its_leaf(spec: MakeSpec, leaf: Leaf, tenant: int) -> None:
    read_end, write_end = os.pipe()
    started = await launch_async(spec("sh", "-c", "read line; exit 7"), leaf.fd, stdin=read_end)
    os.close(read_end)
    assert leaf.pids() == [started.pid]
    assert os.stat(f"/proc/{started.pid}").st_uid == tenant
    assert f"PPid:\t{os.getpid()}\n" in Path(f"/proc/{started.pid}/status").read_text()
    assert started.report.placement == "born"
    assert started.report.cgroup == leaf.path
    os.close(write_end)
    assert await end_of(started) == (os.CLD_EXITED, 7)


@pytest.mark.each_loop
async def test_output_goes_where_it_was_sent(spec: MakeSpec) -> None:
    read_end, write_end = os.pipe()
    started = await launch_async(spec("echo", "hello"), None, stdout=write_end)
    os.close(write_end)
    await end_of(started)
    with open(read_end, "rb") as pipe:
        assert pipe.read() == b"hello\n"


@pytest.mark.each_loop
async def test_one_that_ends_at_once_can_be_waited_for(spec: MakeSpec, leaf: Leaf) -> None:
    for _ in range(50):
        assert await end_of(await launch_async(spec("true"), leaf.fd)) == (os.CLD_EXITED, 0)


@pytest.mark.each_loop
async def test_many_at_once(spec: MakeSpec, leaf: Leaf) -> None:
    started = await asyncio.gather(*(launch_async(spec("sleep", "1000"), leaf.fd) for _ in range(40)))
    assert sorted(leaf.pids()) == sorted(one.pid for one in started)
    (leaf.directory / "cgroup.kill").write_text("1")
    for one in started:
        assert await end_of(one) == (os.CLD_KILLED, signal.SIGKILL)


@pytest.mark.each_loop
@pytest.mark.parametrize(
    ("argv", "directories", "step", "number"),
    [
        (("no-such-program",), [], "execve", errno.ENOENT),
        (("true",), [Directory("/no/such")], "directories", errno.ENOENT),
    ],
)
async def test_a_failure_is_named(
    spec: MakeSpec, leaf: Leaf, argv: tuple[str, ...], directories: list[Directory], step: str, number: int
) -> None:
    with pytest.raises(StartError) as caught:
        await launch_async(spec(*argv, directories=directories), leaf.fd)
    assert (caught.value.step, caught.value.errno) == (step, number)
    assert leaf.pids() == []


@pytest.mark.each_loop
async def test_a_failure_before_there_is_a_child(spec: MakeSpec, leaf: Leaf) -> None:
    leaf.directory.rmdir()
    with pytest.raises(StartError) as caught:
        await launch_async(spec("true"), leaf.fd)
    assert caught.value.step == "clone3"


@pytest.mark.each_loop
async def test_cancelled_at_any_turn_of_the_loop_nothing_is_left(spec: MakeSpec, leaf: Leaf) -> None:
    finished = 0
    for turns in [*range(12), *range(12, 400, 20)]:
        task = asyncio.ensure_future(launch_async(spec("sleep", "1000"), leaf.fd))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        try:
            started = await task
        except asyncio.CancelledError:
            assert leaf.pids() == []
        else:
            finished += 1
            signal.pidfd_send_signal(started.pidfd, signal.SIGKILL)
            await end_of(started)
    assert finished < 32


@pytest.mark.each_loop
async def test_a_start_that_is_held_up_can_be_cancelled(spec: MakeSpec, leaf: Leaf) -> None:
    # Frozen, the child stands still before it has reported anything. It is killed all the same.
    (leaf.directory / "cgroup.freeze").write_text("1")
    task = asyncio.ensure_future(launch_async(spec("true"), leaf.fd))
    await until(lambda: bool(leaf.pids()))
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert leaf.pids() == []


@pytest.mark.each_loop
async def test_killed_before_execve_is_no_success(spec: MakeSpec, leaf: Leaf) -> None:
    (leaf.directory / "cgroup.freeze").write_text("1")
    task = asyncio.ensure_future(launch_async(spec("true"), leaf.fd))
    await until(lambda: bool(leaf.pids()))
    (leaf.directory / "cgroup.kill").write_text("1")
    with pytest.raises(StartError, match="killed") as caught:
        await task
    assert (caught.value.step, caught.value.errno) == ("launcher", 0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


@pytest.mark.each_loop
async def test_out_of_descriptors_nothing_is_left(spec: MakeSpec, leaf: Leaf) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reached: set[str] = set()
    for room in range(14):
        used = max(int(name) for name in os.listdir("/proc/self/fd"))
        fill = [os.dup(leaf.fd) for _ in range(used + 1 - len(os.listdir("/proc/self/fd")))]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(fill, default=used) + 1 + room, hard))
        try:
            outcome = (await asyncio.gather(launch_async(spec("sleep", "1000"), leaf.fd), return_exceptions=True))[0]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in fill:
                os.close(fd)
        if isinstance(outcome, Started):
            reached.add("started")
            signal.pidfd_send_signal(outcome.pidfd, signal.SIGKILL)
            await end_of(outcome)
        else:
            assert isinstance(outcome, StartError), outcome
            assert outcome.errno == errno.EMFILE
            reached.add(outcome.step)
            assert leaf.pids() == []
    assert reached >= {"launcher", "started"}


# ---- Popen


def test_popen_stands_for_the_program(spec: MakeSpec, leaf: Leaf) -> None:
    popen, report = launch_popen(
        spec("sh", "-c", "cat; echo oops >&2; exit 3"), leaf.fd, subprocess.PIPE, subprocess.PIPE, subprocess.PIPE
    )
    assert popen.pid in leaf.pids()
    assert popen.poll() is None
    assert popen.communicate(b"hello") == (b"hello", b"oops\n")
    assert popen.returncode == 3
    assert report.placement == "born"


def test_popen_can_be_signalled(spec: MakeSpec) -> None:
    with launch_popen(spec("sleep", "1000"), None)[0] as popen:
        with pytest.raises(subprocess.TimeoutExpired):
            popen.wait(timeout=0.01)
        popen.terminate()
        assert popen.wait() == -signal.SIGTERM


def test_popen_of_a_failure_leaves_no_pipe(spec: MakeSpec) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        with pytest.raises(StartError):
            launch_popen(spec("no-such-program"), None, subprocess.PIPE, subprocess.PIPE, subprocess.PIPE)


def test_popen_of_a_start_that_is_held_up_is_given_up(spec: MakeSpec, leaf: Leaf) -> None:
    # Frozen, the child stands still before it has reported anything.
    (leaf.directory / "cgroup.freeze").write_text("1")
    with pytest.raises(StartError, match=r"^not executed after 0\.05 s$") as caught:
        launch_popen(spec("true"), leaf.fd, subprocess.PIPE, subprocess.PIPE, subprocess.PIPE, timeout=0.05)
    assert (caught.value.step, caught.value.errno) == ("launcher", 0)
    assert leaf.pids() == []


def test_popen_from_many_threads(spec: MakeSpec, leaf: Leaf) -> None:
    def run(number: int) -> int:
        popen, _ = launch_popen(spec("sh", "-c", f"exit {number}"), leaf.fd)
        return popen.wait()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(100))) == list(range(100))


# ---- The process that it runs in


def test_with_sigchld_ignored_nothing_is_started(spec: MakeSpec) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(LauncherError, match="SIGCHLD"):
            launch_popen(spec("true"), None)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_without_the_program_the_remedy_is_named(
    spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launcher_path().name == "launch"
    monkeypatch.setattr("pactown_runner.launcher.call._BINARY", tmp_path / "launch")
    with pytest.raises(LauncherError, match="missing") as caught:
        launch_popen(spec("true"), None)
    # By a Python that is there and has the package, whatever `python` is here.
    assert f"`{sys.executable} -m pactown_runner.launcher.build`" in (caught.value.remedy or "")
    (tmp_path / "launch").touch(mode=0o644)
    with pytest.raises(LauncherError, match="not executable"):
        launch_popen(spec("true"), None)


def test_a_session_keyring_is_not_inherited(spec: MakeSpec) -> None:
    if not Path("/proc/keys").exists():
        pytest.skip("needs a kernel with keyrings (/proc/keys)")
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:  # the new keyring must not become that of the test run
        try:
            os.write(write_end, _with_a_secret(spec("cat", "/proc/keys")))
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        bare, launched = pipe.read().split(b"----")
    os.waitpid(pid, 0)
    assert b"pactown-secret" in bare
    assert launched
    assert b"pactown-secret" not in launched


def _with_a_secret(spec: LaunchSpec) -> bytes:
    libc = ctypes.CDLL(None, use_errno=True)
    add_key, keyctl = (217, 219) if os.uname().machine == "aarch64" else (248, 250)
    assert libc.syscall(keyctl, 1, None) >= 0  # KEYCTL_JOIN_SESSION_KEYRING
    secret = b"of the supervisor"
    assert libc.syscall(add_key, b"user", b"pactown-secret", secret, len(secret), -3) >= 0
    bare = subprocess.run(["cat", "/proc/keys"], user=spec.uid, group=spec.gid, extra_groups=[], stdout=-1, check=True)
    popen, _ = launch_popen(spec, None, stdout=subprocess.PIPE)
    return bare.stdout + b"----" + popen.communicate()[0]


def test_the_public_names_are_there() -> None:
    for name in launcher.__all__:
        assert getattr(launcher, name)


def test_a_host_with_a_closed_standard_stream_can_start(leaf: Leaf, tenant: int) -> None:
    """Then one of our own descriptors has its number."""
    source = """
import asyncio, os, sys
from pactown_runner.launcher import LaunchSpec, launch_async
async def main():
    os.close(0)
    os.close(1)
    read_end, write_end = os.pipe()
    assert (read_end, write_end) == (0, 1)
    out, into = os.pipe()
    uid = int(sys.argv[1])
    spec = LaunchSpec(argv=["/bin/echo", "said"], uid=uid, gid=uid)
    started = await launch_async(spec, int(sys.argv[2]), read_end, into, into)
    os.waitid(os.P_PIDFD, started.pidfd, os.WEXITED)
    os.write(2, os.read(out, 100))
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source, str(tenant), str(leaf.fd)],
        check=False,
        pass_fds=[leaf.fd],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert (done.returncode, done.stderr) == (0, b"said\n")
