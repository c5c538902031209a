"""What `make run` prints at its end works as printed, typed from the clone."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.cli.conftest import COMMAND, ROOT, SECONDS, ready

pytestmark = pytest.mark.host

PRINTED = ".venv/bin/pactown-runner"


def printed(environ: dict[str, str]) -> list[str]:
    source = "from examples.two_tenants import show_what_next; show_what_next()"
    done = subprocess.run(
        [sys.executable, "-c", source], env=environ, check=True, capture_output=True, text=True, timeout=SECONDS
    )
    return [line.strip() for line in done.stdout.splitlines() if PRINTED in line]


class Shell:
    """Where commands are typed: the clone."""

    def __init__(self, environ: dict[str, str]) -> None:
        self._environ = environ
        self._started: list[subprocess.Popen[bytes]] = []

    def type(self, line: str) -> subprocess.Popen[bytes]:
        if not (ROOT / PRINTED).exists():  # a guest's clone has no environment of its own
            line = line.replace(PRINTED, shlex.join(COMMAND))
        pipe = subprocess.PIPE
        command = ["bash", "-c", f"exec {line}"]
        process = subprocess.Popen(command, cwd=ROOT, env=self._environ, stdin=pipe, stdout=pipe, stderr=pipe)
        self._started.append(process)
        return process

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def shell(environ: dict[str, str]) -> Iterator[Shell]:
    """A shell; what was started in it ends with the test."""
    shell = Shell(environ)
    yield shell
    shell.close()


def test_what_the_example_prints_works_as_printed(shell: Shell, environ: dict[str, str]) -> None:
    environ.pop("SUDO_USER", None)
    serve, *first_three, purge = printed(environ)
    assert [line.split()[1] for line in (serve, *first_three, purge)] == ["serve", "start", "ps", "logs", "purge"]
    start, ps, logs = first_three
    server = ready(shell.type(serve))

    done = shell.type(start)
    assert b"started demo/clock: running" in done.communicate(timeout=SECONDS)[1]
    assert done.returncode == 0

    done = shell.type(ps)
    assert re.search(rb"^demo +clock +running ", done.communicate(timeout=SECONDS)[0], re.MULTILINE)
    assert done.returncode == 0

    following = shell.type(logs)
    assert following.stdout is not None
    lines = [following.stdout.readline() for _ in range(2)]
    assert all(re.search(rb"\d\d:\d\d:\d\d", line) for line in lines)
    following.send_signal(signal.SIGINT)
    assert following.wait(SECONDS) == 130

    server.send_signal(signal.SIGINT)
    assert server.wait(SECONDS) == 0
    done = shell.type(purge)
    assert b"removed  user 'demo'" in done.communicate(b"y\n", timeout=SECONDS)[0]
    assert done.returncode == 0


def test_those_who_became_root_by_sudo_are_told_to_do_so_again(environ: dict[str, str]) -> None:
    lines = printed({**environ, "SUDO_USER": os.environ.get("USER", "somebody")})
    assert all(line.startswith(f"sudo {PRINTED} ") for line in lines)
