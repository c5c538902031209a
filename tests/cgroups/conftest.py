"""Fixtures: a fake cgroup, a real one, and processes in it."""

from __future__ import annotations

import os
import subprocess
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cgroups import Cgroup, find_mount
from tests.cgroups.fake import make_fake

Start = Callable[..., "subprocess.Popen[bytes]"]

NOBODY = 65534

_JOIN = 'echo 0 > "$0/cgroup.procs" && exec "$@"'


def run_as(uid: int, act: Callable[[], bool]) -> bool:
    """What `act` returns in a child process of this uid, without root's rights; False if it raises."""
    child = os.fork()
    if child == 0:
        answer = False
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            answer = act()
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(0 if answer else 1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Cgroup]:
    """A fake cgroup with the cpu, memory and pids controllers."""
    with make_fake(tmp_path / "fake.slice") as group:
        yield group


@pytest.fixture
def group(slice_name: str) -> Iterator[Cgroup]:
    """A real, empty cgroup. `slice_name` removes it, and all that is in it."""
    with Cgroup.open(find_mount().path) as top, top.child(slice_name, create=True) as made:
        yield made


@pytest.fixture
def start(group: Cgroup) -> Iterator[Start]:
    """Start a shell script in a cgroup, and wait until it has written its first line, `ready`."""
    with ExitStack() as stack:

        def start(script: str, where: Cgroup = group) -> subprocess.Popen[bytes]:
            command = ["/bin/sh", "-c", _JOIN, str(where.path), "/bin/sh", "-c", script]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            return process

        yield start
        # Whoever else holds the pipes must go too, or nobody would see their end.
        group.kill()
