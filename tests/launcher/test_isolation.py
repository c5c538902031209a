"""What a program has, seen by itself and from outside: the second of the security contract's invariants."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pactown_runner.launcher import Call, Directory, LaunchSpec, launch_popen

from .conftest import Leaf, MakeSpec

PR_SET_CHILD_SUBREAPER = 36

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("leaves_nothing")]


def output(spec: LaunchSpec, leaf: Leaf | None = None) -> str:
    popen, _ = launch_popen(spec, leaf.fd if leaf else None, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    text = popen.communicate()[0].decode("utf-8", "surrogateescape")
    assert popen.returncode == 0, text
    return text


def status_of(spec: LaunchSpec, leaf: Leaf | None = None) -> dict[str, str]:
    lines = (line.partition(":") for line in output(spec, leaf).splitlines())
    return {name: value.strip() for name, _, value in lines}


STATUS = ("cat", "/proc/self/status")


def test_it_has_its_own_ids_and_no_privilege(spec: MakeSpec, leaf: Leaf, tenant: int) -> None:
    status = status_of(spec(*STATUS), leaf)
    assert status["Uid"].split() == [str(tenant)] * 4
    assert status["Gid"].split() == [str(tenant)] * 4
    assert status["Groups"] == ""
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"
    assert status["Umask"] == "0077"


def test_the_report_says_what_holds(spec: MakeSpec, leaf: Leaf, tenant: int) -> None:
    popen, report = launch_popen(spec("true"), leaf.fd)
    assert popen.wait() == 0
    assert (report.mode, report.placement, report.cgroup) == ("root", "born", leaf.path)
    assert report.uid == (tenant,) * 3
    assert report.gid == (tenant,) * 3
    assert report.groups == ()
    assert set(report.capabilities) == {"inheritable", "permitted", "effective", "bounding", "ambient"}
    assert not any(report.capabilities.values())
    assert report.no_new_privs
    assert report.root_regainable is False
    assert report.namespaces == ()


def test_without_a_cgroup_it_is_placed_nowhere(spec: MakeSpec) -> None:
    popen, report = launch_popen(spec("true"), None)
    assert popen.wait() == 0
    assert report.placement == "none"


def test_signals_are_as_if_nobody_had_touched_them(spec: MakeSpec) -> None:
    ours = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGUSR1, signal.SIGRTMIN, signal.SIGHUP)
    }
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGRTMAX})
    try:
        before = Path("/proc/self/status").read_text()
        status = status_of(spec(*STATUS))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in ours.items():
            signal.signal(number, handler)
    nothing = "0" * 16
    assert f"SigIgn:\t{nothing}" not in before
    assert f"SigBlk:\t{nothing}" not in before
    assert {status[name] for name in ("SigIgn", "SigBlk", "SigPnd", "ShdPnd")} == {nothing}


def test_descriptors_session_and_priority(spec: MakeSpec, leaf: Leaf) -> None:
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, nice + 5)
    try:
        popen, _ = launch_popen(spec("cat"), leaf.fd, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, nice)
        os.close(read_end)
        os.close(write_end)
    try:
        echo(popen)
        assert sorted(os.listdir(f"/proc/{popen.pid}/fd")) == ["0", "1", "2"]
        assert os.getsid(popen.pid) == popen.pid
        assert os.getpgid(popen.pid) == popen.pid
        assert os.getpriority(os.PRIO_PROCESS, popen.pid) == 0
        assert leaf.pids() == [popen.pid]
    finally:
        popen.communicate()
    assert popen.returncode == 0


def echo(cat: subprocess.Popen[bytes]) -> None:
    """Return once the program runs: its loader, which opens files, has done its work."""
    assert cat.stdin is not None
    assert cat.stdout is not None
    cat.stdin.write(b"x\n")
    cat.stdin.flush()
    assert cat.stdout.readline() == b"x\n"


def test_the_launcher_itself_closes_what_it_inherits(spec: MakeSpec) -> None:
    call = Call(spec("cat"), None)
    extra = os.open("/", os.O_RDONLY)
    for fd in (extra, *call.pass_fds):
        os.set_inheritable(fd, True)
    launcher = subprocess.Popen(call.argv, close_fds=False, env={}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    call.started()
    assert launcher.wait() == 0
    os.set_blocking(call.status_fd, True)
    assert call.read()
    pid = call.status.result().pid
    echo(launcher)
    assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2"]
    launcher.communicate()
    assert os.waitpid(pid, 0) == (pid, 0)
    call.close()
    os.close(extra)


def test_its_environment_is_what_was_given(spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "of the supervisor")
    text = output(spec("env", env={"PATH": "/usr/bin:/bin", "A": "1", "ODD": "a=b\nc \udcff"}))
    assert text == "PATH=/usr/bin:/bin\nA=1\nODD=a=b\nc \udcff\n"


def test_an_environment_can_be_empty(spec: MakeSpec) -> None:
    assert output(spec("/usr/bin/env", env={})) == ""


def test_arguments_arrive_byte_for_byte(spec: MakeSpec) -> None:
    popen, _ = launch_popen(
        spec("printf", "%s|", "", "two words", "äöü", "\udcff", "new\nline"), None, stdout=subprocess.PIPE
    )
    assert popen.communicate()[0] == "|two words|äöü|".encode() + b"\xff|new\nline|"


def test_limits_are_the_defaults_or_lower(spec: MakeSpec) -> None:
    text = output(spec("sh", "-c", "ulimit -Sn; ulimit -Sc; ulimit -Hc"))
    assert text.split() == ["1024", "0", "0"]


def test_a_badness_score_can_be_given(spec: MakeSpec) -> None:
    assert output(spec("cat", "/proc/self/oom_score_adj", oom_score_adj=777)) == "777\n"


def test_directories_are_made_and_entered_as_the_tenant(spec: MakeSpec, users_base: Path, tenant: int) -> None:
    home = users_base / "home"
    home.mkdir(mode=0o700)
    os.chown(home, tenant, tenant)
    steps = [Directory(home), Directory("sandboxes", make=True), Directory("api", make=True)]
    for _ in range(2):  # the second time they are there already
        assert output(spec("pwd", directories=steps)) == f"{home}/sandboxes/api\n"
    made = (home / "sandboxes" / "api").stat()
    assert (made.st_uid, made.st_gid, made.st_mode & 0o7777) == (tenant, tenant, 0o700)


def test_without_directories_it_stands_at_the_root(spec: MakeSpec) -> None:
    assert output(spec("pwd")) == "/\n"


def test_a_setuid_program_gains_nothing(spec: MakeSpec, users_base: Path, tenant: int) -> None:
    program = users_base / "id"
    shutil.copy("/usr/bin/id", program)
    program.chmod(0o4755)
    # What it would gain without the launcher: else this test proves nothing.
    bare = subprocess.run([program], user=tenant, group=tenant, extra_groups=[], capture_output=True, check=True)
    if b"euid=0" not in bare.stdout:
        pytest.skip(f"needs a file system without nosuid at {users_base}")
    assert "euid" not in output(spec(str(program)))


@pytest.mark.parametrize(("namespaces", "names"), [({"net"}, ["net"]), ({"ipc", "uts"}, ["ipc", "uts"])])
def test_namespaces_are_its_own(spec: MakeSpec, namespaces: set[str], names: list[str]) -> None:
    popen, report = launch_popen(
        spec(
            "readlink", *(f"/proc/self/ns/{name}" for name in ("ipc", "net", "uts")), namespaces=frozenset(namespaces)
        ),
        None,
        stdout=subprocess.PIPE,
    )
    theirs = popen.communicate()[0].decode().split()
    ours = [os.readlink(f"/proc/self/ns/{name}") for name in ("ipc", "net", "uts")]
    different = [name for name, a, b in zip(("ipc", "net", "uts"), theirs, ours, strict=True) if a != b]
    assert different == names == list(report.namespaces)


def test_a_network_of_its_own_has_a_loopback_device_that_is_up(spec: MakeSpec) -> None:
    text = output(spec("cat", "/proc/net/if_inet6", "/proc/net/fib_trie", namespaces=frozenset({"net"})))
    assert "127.0.0.1" in text


@pytest.fixture
def adopts_orphans(leaves_nothing: None) -> Iterator[None]:
    """Orphans come to this process and are reaped, so that none lies about until the host's init looks."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


@pytest.mark.usefixtures("adopts_orphans")
def test_200_that_fork_twice_at_once_are_all_in_the_leaf(spec: MakeSpec, leaf: Leaf, tenant: int) -> None:
    starter = spec("sh", "-c", "(setsid sleep 1000 &) & exit 0")
    try:
        for _ in range(200):
            popen, _ = launch_popen(starter, leaf.fd)
            popen.wait()
        places = cgroups_of(tenant)
    finally:
        (leaf.directory / "cgroup.kill").write_text("1")
    assert len(places) >= 200
    assert set(places) == {leaf.path}


def cgroups_of(uid: int) -> list[str]:
    """The cgroup of each process of that uid, also of one that has ended and is not reaped."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            process = Path("/proc", name)
            if process.stat().st_uid == uid:
                lines = (process / "cgroup").read_text().splitlines()
                path = next(line for line in lines if line.startswith("0::"))[3:]
                # One that an earlier test left, which the host's init has not reaped yet, is not what is asked for.
                if not path.endswith(" (deleted)"):
                    found.append(path)
    return found
