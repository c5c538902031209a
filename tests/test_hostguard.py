"""The guard against leftovers: each promise on a real run of pytest, interrupted or killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from tests import hostguard

ROOT = Path(__file__).parent.parent

LEAKER = """
    import json, os, subprocess, sys
    from pathlib import Path
    import pytest
    from tests import hostguard, hostsweep

    def test_makes_one_of_each_and_is_cut_short(pytestconfig):
        run = pytestconfig.stash[hostguard.RUN]
        uid = run.uids[0]
        mark = run.name[-6:]  # slots are handed on: by their uids one could take another run's things for these
        login = f"pactown_guard{mark}"
        subprocess.run(
            ["useradd", "--system", "--no-create-home", "--user-group", "--uid", str(uid),
             "-K", f"SYS_UID_MIN={uid}", "-K", f"SYS_GID_MIN={uid}", "-K", f"SYS_GID_MAX={uid + 9}", login],
            check=True, capture_output=True,
        )
        cgroup = hostsweep.cgroup2_mounts()[0] / f"{run.name}-guard.slice" / "a.scope"
        cgroup.mkdir(parents=True)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        sleep = ["sleep", "1000"]
        procs = {
            "tenant": subprocess.Popen(sleep, user=uid, group=uid, extra_groups=[], env={}, **quiet),
            "helper": subprocess.Popen(sleep, start_new_session=True, **quiet),
            "in a cgroup": subprocess.Popen(sleep, env={}, **quiet),
        }
        (cgroup / "cgroup.procs").write_text(str(procs["in a cgroup"].pid))
        mount = run.directory / "mount"
        mount.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", mount], check=True)
        files = [Path("/dev/shm") / f"{run.name}-guard", Path("/tmp", f"guard-{mark}")]
        for path in files:
            path.write_text("left")
        os.chown(files[1], uid, uid)
        made = subprocess.run(["ipcmk", "-M", "4096"], user=uid, extra_groups=[], capture_output=True, check=True)
        print(json.dumps({
            "run": run.name, "uid": uid, "login": login, "cgroup": str(cgroup.parent), "mount": str(mount),
            "shmid": int(made.stdout.split()[-1]),
            "pids": [proc.pid for proc in procs.values()], "files": [*map(str, files), str(run.directory)],
        }), file=sys.__stderr__, flush=True)
        HOW_IT_ENDS
"""


@dataclass(frozen=True)
class Left:
    """What a run made, by the ways to look for it that do not go through the code under test."""

    uid: int
    login: str
    shmid: int
    cgroup: str
    mount: str
    pids: list[int]
    files: list[str]

    def still_there(self) -> list[str]:
        found = [path for path in [*self.files, self.cgroup] if os.path.lexists(path)]
        found += [f"pid {pid}" for pid in self.pids if _runs(pid)]
        found += [file for file in ("passwd", "group", "shadow") if self.login in Path("/etc", file).read_text()]
        if self.mount in Path("/proc/self/mountinfo").read_text():
            found.append(self.mount)
        shm = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
        return found + [f"shm {row[1]}" for row in shm if int(row[1]) == self.shmid]


def _runs(pid: int) -> bool:
    # An orphan is its new parent's to wait for, and in a container that one may never do it.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Inner:
    """One pytest inside this one, with the guard as its only plugin of ours."""

    def __init__(self, directory: Path, test: str) -> None:
        (directory / "test_inner.py").write_text(textwrap.dedent(test))
        (directory / "pytest.ini").write_text("[pytest]\nmarkers =\n  deadline\n")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-s",
            "-p",
            "tests.hostguard",
            "-p",
            "tests.deadline",
            "-p",
            "no:cacheprovider",
            ".",
        ]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        self.process = subprocess.Popen(
            command, cwd=directory, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def made(self) -> Left:
        """Wait until the test has made everything."""
        line = _stream(self.process.stderr).readline()
        if not line.startswith("{"):
            pytest.fail(f"the inner test could not make its things: {line}{self.end()[1]}")
        facts = json.loads(line)
        facts.pop("run")
        return Left(**facts)

    def end(self) -> tuple[int, str]:
        """Wait for the end: exit status and what it printed."""
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out + err


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


@contextmanager
def inner(directory: Path, test: str) -> Iterator[Inner]:
    directory.mkdir(exist_ok=True)
    run = Inner(directory, test)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            run.process.communicate(timeout=20)


@pytest.mark.host
def test_what_a_test_leaves_is_named_removed_and_fails_the_run(tmp_path: Path) -> None:
    with inner(tmp_path, LEAKER.replace("HOW_IT_ENDS", "pass")) as run:
        left = run.made()
        status, output = run.end()
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "1 passed" in output
    assert f"login {left.login} ({left.uid}) (first seen after test_inner.py::test_makes_one" in output
    for what in (
        f"cgroup {left.cgroup}",
        *(f"process {pid}" for pid in left.pids[:2]),
        *left.files[:2],
        "shm object",
    ):
        assert what in output
    assert left.still_there() == []


@pytest.mark.host
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_removes_what_it_made(tmp_path: Path, number: signal.Signals) -> None:
    with inner(tmp_path, LEAKER.replace("HOW_IT_ENDS", "procs['tenant'].wait()")) as run:
        left = run.made()
        assert len(left.still_there()) >= 9
        run.process.send_signal(number)
        status, output = run.end()
    assert status == pytest.ExitCode.INTERRUPTED
    assert "removed after the interruption" in output
    assert left.still_there() == []


@pytest.mark.host
def test_the_next_run_removes_what_a_killed_run_made_and_nothing_of_a_living_one(tmp_path: Path) -> None:
    leaker = LEAKER.replace("HOW_IT_ENDS", "procs['tenant'].wait()")
    with inner(tmp_path / "living", leaker) as living, inner(tmp_path / "killed", leaker) as killed:
        alive, dead = living.made(), killed.made()
        killed.process.kill()
        killed.end()
        before = alive.still_there()
        assert len(dead.still_there()) >= 9
        with inner(tmp_path / "next", "def test_nothing(): pass") as following:
            status, output = following.end()
        assert status == pytest.ExitCode.OK, output
        # Another run on this host may be at it just now instead of ours.
        deadline = time.monotonic() + 20
        while dead.still_there() and time.monotonic() < deadline:
            os.sched_yield()
        assert dead.still_there() == []
        assert alive.still_there() == before
        living.process.send_signal(signal.SIGINT)
        output = living.end()[1]
    assert alive.still_there() == [], output


def test_a_run_that_leaves_nothing_passes(tmp_path: Path) -> None:
    with inner(tmp_path, "def test_writes(tmp_path): (tmp_path / 'a').write_text('a')") as run:
        status, output = run.end()
    assert status == pytest.ExitCode.OK, output
    name = output.partition("hostguard: run ")[2].partition(",")[0]
    assert name.startswith(hostguard.NAME)
    assert not Path("/var/tmp", name).exists()


def test_a_test_that_swallows_the_interrupt_is_the_last(tmp_path: Path) -> None:
    swallows = """
        import asyncio, os, signal, sys
        def test_swallows():
            async def stubborn():
                print("READY", file=sys.__stderr__, flush=True)
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    pass
            asyncio.run(stubborn())
        def test_never_reached():
            pass
    """
    with inner(tmp_path, swallows) as run:
        assert _stream(run.process.stderr).readline() == "READY\n"
        run.process.terminate()
        status, output = run.end()
    assert status == pytest.ExitCode.INTERRUPTED
    assert "1 passed" in output


def test_a_test_that_hangs_fails_and_the_next_one_runs(tmp_path: Path) -> None:
    hangs = """
        import asyncio, pytest, signal
        @pytest.mark.deadline(0.2)
        def test_hangs():
            signal.pause()
        @pytest.mark.deadline(0.2)
        def test_hangs_in_a_loop():
            asyncio.run(asyncio.sleep(1000))
        def test_does_not():
            pass
    """
    with inner(tmp_path, hangs) as run:
        status, output = run.end()
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "Failed: took longer than 0.2 s" in output
    assert "2 failed, 1 passed" in output


def test_a_child_that_nobody_waited_for_fails_the_run(tmp_path: Path) -> None:
    forks = """
        import os, signal
        def test_forks():
            if os.fork() == 0:
                signal.pause()
    """
    with inner(tmp_path, forks) as run:
        status, output = run.end()
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "LEAKS" in output


def test_slots_are_exclusive_and_given_back(tmp_path: Path) -> None:
    with inner(tmp_path, "import signal\ndef test_waits(): print('READY', flush=True); signal.pause()") as run:
        lines = iter(_stream(run.process.stdout).readline, "")
        header = next(line for line in lines if line.startswith("hostguard: run "))
        slot = int(header.partition(hostguard.NAME)[2][0])
        assert hostguard._try_lock(slot) is None
        next(line for line in lines if "READY" in line)
        run.process.send_signal(signal.SIGTERM)
        run.end()
    fd = hostguard._try_lock(slot)
    if fd is not None:  # else another run took it in the meantime
        hostguard._unlock(slot, fd)
