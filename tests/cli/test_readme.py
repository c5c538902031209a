"""What the README shows is what happens when it is typed or pasted."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import ROOT, SECONDS, Cli

pytestmark = pytest.mark.host

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[list[str]]:
    """The words of each `pactown-runner` in a block of shell, without the program's own name."""
    lines = shlex.split(block, comments=True)
    starts = [index for index, word in enumerate(lines) if word == "pactown-runner"]
    ends = [*starts[1:], len(lines)]
    return [[word for word in lines[start + 1 : end] if word != "&&"] for start, end in zip(starts, ends, strict=True)]


def test_the_first_screen_shows_what_the_command_prints(cli: Cli) -> None:
    shown, *expected = blocks("console")[0].splitlines()
    done = cli(*commands(shown.removeprefix("# "))[0])
    assert done.returncode == 0, done.stderr
    printed = done.stdout.decode().splitlines()
    # The key is longer where another run of these tests has alice's.
    own = re.compile(r"\b\d{5}\b|(?<=pactown_)[0-9a-f]{8,}")
    assert [own.sub("#", line) for line in printed] == [own.sub("#", line) for line in expected]


def test_python_works_when_pasted(environ: dict[str, str], tmp_path: Path) -> None:
    program, limits, _ = blocks("python")
    script = tmp_path / "pasted.py"
    script.write_text(f"{program}\nfrom pactown_runner import Limits\n{limits}\n")
    done = subprocess.run(
        [sys.executable, script], check=False, env=environ, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"stdout hello from pactown_\w+\nexited with code 0 after \S+ s\n", done.stdout)


def test_the_service_gets_ready(environ: dict[str, str], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = tmp_path / "pasted.py"
    script.write_text(f"{_SETTING}\n{blocks('python')[2].replace('8001', port)}\n{_START}")
    done = subprocess.run(
        [sys.executable, script], check=False, env=environ, capture_output=True, text=True, timeout=SECONDS
    )
    assert (done.returncode, done.stdout) == (0, "ready\n"), done.stderr


_SETTING = "from pactown_runner import SandboxSpec, Supervisor"
_START = """
import asyncio

async def main():
    async with Supervisor() as supervisor:
        sandbox = await supervisor.start(spec)
        await sandbox.until_ready()
        print("ready")
        await sandbox.stop()

asyncio.run(main())
"""


def test_commands_work_when_typed(cli: Cli, tmp_path: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "result.txt").write_text("42\n")
    words = commands(blocks("sh")[1])
    assert [line[0] for line in words] == ["doctor", "run", "put", "get", "users", "users", "purge"]
    for line in words:
        done = cli(*line, cwd=tmp_path, input=b"y\n")
        # The doctor's verdict is the host's.
        assert done.returncode == 0 or line[0] == "doctor", (line, done.stdout, done.stderr)
        if line[0] == "run":
            assert done.stdout == b"hi\n"
    assert (tmp_path / "result.txt").read_text() == "42\n"
