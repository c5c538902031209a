"""The command as a whole: help, version, and life without its extra."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.cli.conftest import COMMAND, ROOT

WITHOUT_TYPER = (
    "import sys; sys.modules['typer'] = None; from pactown_runner.cli import main; sys.exit(main(['doctor']))"
)


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    return subprocess.run(words, env=environ, capture_output=True, text=True, check=False, timeout=60)


def test_without_typer_it_says_what_to_install() -> None:
    done = _run(sys.executable, "-c", WITHOUT_TYPER)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: the command line needs typer, which is not installed",
        "try: pip install 'pactown-runner[cli]'",
    ]


def test_version() -> None:
    done = _run(*COMMAND, "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("pactown-runner ")


COMMANDS = [
    *("run", "serve", "start", "ps", "stop", "restart", "freeze", "thaw", "signal", "exec", "logs", "stats", "limits"),
    *("tiers", "events", "put", "get", "doctor", "purge"),
]


def test_help_lists_the_commands() -> None:
    done = _run(*COMMAND, "--help")
    assert done.returncode == 0
    for name in (*COMMANDS, "users"):
        assert f" {name} " in done.stdout


ASKING = [
    "start",
    "ps",
    "stop",
    "restart",
    "freeze",
    "thaw",
    "signal",
    "stats",
    "limits",
    "tiers",
    "events",
    "users tier",
]
"""Those that ask a server. Their help ends with an example."""
USERS = ["list", "create", "show", "stats", "export", "import", "tier", "delete"]


@pytest.mark.parametrize(
    "command",
    [*COMMANDS, *(f"users {command}" for command in USERS)],
)
def test_each_command_has_help(command: str) -> None:
    done = _run(*COMMAND, *command.split(), "-h")
    assert done.returncode == 0
    assert f"pactown-runner {command}" in done.stdout
    assert "--users-base" in done.stdout
    if command in ASKING:
        assert "--server" in done.stdout
        assert f"pactown-runner {command} " in done.stdout.partition("Exit code: 0; 1 if")[2] + " "


def test_help_of_users_lists_their_commands_and_says_what_json_is() -> None:
    text = _run(*COMMAND, "users", "--help").stdout
    assert all(f" {name} " in text for name in USERS)
    text = _run(*COMMAND, "users", "list", "--help").stdout
    assert "saas_user_id, linux_username" in text


def test_lines_of_help_end_where_the_terminal_does() -> None:
    done = subprocess.run(
        [*COMMAND, "run", "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "400"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert any(line.startswith("Its output comes out here") and line.endswith("is an error.") for line in lines)
    assert any(line.startswith("Exit code: the program's own") and line.endswith("any more.") for line in lines)


def test_help_of_run_has_examples_and_exit_codes() -> None:
    text = _run(*COMMAND, "run", "--help").stdout
    assert "pactown-runner run --user alice -- id" in text
    assert "124 if --timeout did" in text


def test_misuse_is_2() -> None:
    done = _run(*COMMAND, "doctor", "--nonsense")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_importing_doctor_needs_no_typer() -> None:
    source = "import sys; sys.modules['typer'] = None; import pactown_runner.doctor"
    assert _run(sys.executable, "-c", source).returncode == 0
