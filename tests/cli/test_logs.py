"""`logs`: what a service printed."""

from __future__ import annotations

import pytest

from pactown_runner import Settings
from tests.cli.conftest import USER, Cli, run_words

pytestmark = pytest.mark.host


def test_log_of_all_runs_comes_out_apart(cli: Cli) -> None:
    cli(*run_words("sh", "-c", "echo one; echo two; echo oops >&2"))
    cli(*run_words("printf", "three"))
    done = cli("logs", USER, "probe")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"one\ntwo\nthree", b"oops\n")
    assert cli("logs", USER, "probe", "-n", "1").stdout == b"three"
    assert cli("logs", USER, "probe", "-n", "0").stdout == b""


def test_what_is_not_there_is_told_and_not_made(cli: Cli, settings: Settings) -> None:
    done = cli("logs", USER, "probe")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(f"error: there is no user {USER!r}".encode())
    assert not settings.state_dir.exists()
    cli(*run_words("true"))
    assert cli("logs", USER, "other").stderr.startswith(b"error: service 'other' of user ")
    assert cli("logs", USER, "../x").stderr.startswith(b"error: service id '../x' is not allowed")
