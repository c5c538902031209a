"""`run`: what goes in, what comes out, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pactown_runner import Settings
from tests.cli.conftest import SECONDS, USER, Cli, Start, run_words
from tests.lanes import lacks_for_kernel

pytestmark = pytest.mark.host

NothingRuns = Callable[[], None]
LOOP = "trap 'echo termed' TERM; echo ready; while :; do sleep 100; done"


def test_program_has_an_identity_of_its_own_and_no_privilege(cli: Cli, settings: Settings) -> None:
    done = cli(*run_words("sh", "-c", "id; cat /proc/self/status /proc/self/cgroup; ls -l /proc/self/fd"))

    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode()
    uid = settings.uid_ranges[0][0]
    assert f"uid={uid}(pactown_" in text.splitlines()[0]
    assert f"groups={uid}(" in text.splitlines()[0]
    assert f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}" in text
    for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb"):
        assert f"Cap{kind}:\t0000000000000000" in text
    assert "NoNewPrivs:\t1" in text
    assert f"0::/{settings.cgroup_slice}/pactown-" in text
    assert "/probe.scope" in text
    descriptors = {line.split()[8] for line in text.splitlines() if " -> " in line}
    assert descriptors == {"0", "1", "2", "3"}  # 3 is the directory that ls reads


def test_streams_are_apart_and_whole(cli: Cli, nothing_runs: NothingRuns) -> None:
    source = r"printf '\000\377out\n\r\033[31m'; printf 'err\001\n\nlast' >&2"
    done = cli(*run_words("sh", "-c", source))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\x00\xffout\n\r\x1b[31m", b"err\x01\n\nlast")
    nothing_runs()


def test_only_this_runs_output_comes_out(cli: Cli) -> None:
    assert cli(*run_words("echo", "first")).stdout == b"first\n"
    assert cli(*run_words("echo", "second")).stdout == b"second\n"


@pytest.mark.parametrize(
    ("command", "status"),
    [("exit 0", 0), ("exit 2", 2), ("exit 125", 125), ("kill -9 $$", 137), ("kill -TERM $$", 143)],
)
def test_exit_code_is_the_programs(cli: Cli, command: str, status: int) -> None:
    assert cli(*run_words("sh", "-c", command)).returncode == status


def test_words_are_executed_as_they_are(cli: Cli) -> None:
    done = cli("run", "--user", USER, "--", "printf", "%s|", "--user", "a b", "$HOME", "--", "-h")
    assert (done.returncode, done.stdout) == (0, b"--user|a b|$HOME|--|-h|")
    # The dashes are for programs whose name looks like an option; else the first word begins the command.
    assert cli("run", "--user", USER, "echo", "--json").stdout == b"--json\n"


def test_environment_and_directory(cli: Cli) -> None:
    words = ["run", "--user", USER, "--env", "A=b=c", "--env", "E=", "--cwd", "/usr", "--", "sh", "-c", "env; pwd"]
    done = cli(*words)
    lines = done.stdout.decode().splitlines()
    assert {"A=b=c", "E=", "/usr"} <= set(lines)
    assert b"SECRET" not in done.stdout


def test_timeout_kills(cli: Cli, nothing_runs: NothingRuns) -> None:
    done = cli("run", "--user", USER, "--timeout", "0.2", "--", "sh", "-c", "sleep 1000 & sleep 1000")
    assert (done.returncode, done.stdout) == (124, b"")
    assert b"time is up" in done.stderr
    nothing_runs()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "--user", USER, "--", "/no/such"], "error: cannot execute '/no/such'"),
        (["run", "--user", USER, "--cwd", "nowhere", "--", "id"], "error: cannot enter directory 'nowhere'"),
        (["run", "--user", USER, "--memory", "lots", "--", "id"], "error: memory_max cannot be 'lots'\ntry: give "),
        (["run", "--user", USER, "--env", "PATH", "--", "id"], "error: --env PATH has no value\ntry: --env PATH=VALUE"),
        (["run", "--user", USER, "--timeout", "0", "--", "id"], "error: --timeout must be more than 0"),
        (["run", "--user", "", "--", "id"], "error: a user id has 1 to 1024 bytes"),
        (["run", "--user", USER, "--service", "_x", "--", "id"], "error: service id '_x' is not allowed\ntry: use "),
        (["run", "--user", USER, "--config", "/no/such", "--", "id"], "error: configuration file /no/such does not"),
        (["run", "--user", USER], "Missing argument"),
        (["run", "--", "id"], "Missing option"),
        (["run", "--user", USER, "--frobnicate", "--", "id"], "No such option"),
    ],
)
def test_what_was_not_started_is_told_with_125(cli: Cli, words: list[str], told: str) -> None:
    done = cli(*words)
    assert (done.returncode, done.stdout) == (125, b"")
    assert told in done.stderr.decode()
    assert b"Traceback" not in done.stderr


@pytest.mark.skipif(lacks_for_kernel() is None, reason="needs a host without the controllers")
def test_limit_that_cannot_be_enforced_is_an_error(cli: Cli, nothing_runs: NothingRuns) -> None:
    done = cli("run", "--user", USER, "--memory", "64M", "--cpu", "50%", "--pids", "9", "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (125, b"")
    error, remedy = done.stderr.decode().splitlines()
    assert error.startswith("error: ")
    assert all(name in error for name in ("cpu", "memory", "pids"))
    assert remedy.startswith("try: ")
    assert "cgroup_no_v1=all" in remedy
    nothing_runs()


def test_five_megabytes_go_round(cli: Cli) -> None:
    data = os.urandom(5_000_000)
    done = cli("run", "--user", USER, "-i", "--", "cat", input=data)
    assert done.returncode == 0
    assert done.stderr == b""
    assert done.stdout == data


def test_program_that_reads_nothing_ends_all_the_same(cli: Cli, start: Start) -> None:
    assert cli("run", "--user", USER, "-i", "--", "true", input=bytes(1_000_000)).returncode == 0
    process = start("run", "--user", USER, "-i", "--", "true", stdin=subprocess.PIPE)
    assert process.wait(SECONDS) == 0  # while its standard input is still open


def test_standard_input_is_not_ours_unless_asked_for(cli: Cli) -> None:
    assert cli(*run_words("cat"), input=b"secret").stdout == b""


def test_json_is_one_document(cli: Cli) -> None:
    words = ["run", "--user", USER, "--service", "probe", "--json", "--", "sh", "-c", "echo out; echo err >&2; exit 3"]
    done = cli(*words)
    assert done.returncode == 3
    assert sorted(done.stderr.splitlines()) == [b"err", b"out"]
    document = json.loads(done.stdout)
    assert document["service"] == "probe"
    assert document["outcome"]["reason"] == "exited"
    assert document["outcome"]["exit_code"] == 3
    assert document["isolation"]["root_regainable"] is False
    assert document["isolation"]["placement"] in ("born", "joined")


def test_errors_as_json(cli: Cli) -> None:
    done = cli("run", "--user", USER, "--json", "--", "/no/such")
    assert (done.returncode, done.stderr) == (125, b"")
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "failed-to-start"
    assert "/no/such" in error["message"]
    assert error.keys() == {"code", "message", "remedy"}


# ---- Interrupted


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_stops_in_order(start: Start, nothing_runs: NothingRuns, number: int, status: int) -> None:
    process = start(*run_words("sh", "-c", "trap 'echo bye; exit 0' TERM; echo ready; sleep 1000 & wait"))
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.wait(SECONDS) == status
    assert process.stdout.read() == b"bye\n"
    nothing_runs()


def test_ignored_signal_stays_ignored(start: Start, nothing_runs: NothingRuns) -> None:
    words = run_words("sh", "-c", "echo ready; read line; echo $line")
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731  # as nohup does
    process = start(words[0], "-i", *words[1:], stdin=subprocess.PIPE, preexec_fn=ignore)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGHUP)
    process.stdin.write(b"alive\n")
    process.stdin.close()
    assert process.stdout.readline() == b"alive\n"
    assert process.wait(SECONDS) == 0
    nothing_runs()


def test_second_signal_kills_at_once(start: Start, nothing_runs: NothingRuns) -> None:
    process = start("run", "--user", USER, "--grace", "1000", "--", "sh", "-c", LOOP)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == b"termed\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == 130
    nothing_runs()


def test_grace_has_an_end(start: Start, nothing_runs: NothingRuns) -> None:
    process = start("run", "--user", USER, "--grace", "0.1", "--", "sh", "-c", LOOP)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 143
    nothing_runs()


def test_interrupt_does_not_wait_for_a_reader_who_never_reads(start: Start, nothing_runs: NothingRuns) -> None:
    process = start(*run_words("sh", "-c", "echo ready >&2; exec yes"))
    assert process.stderr is not None
    assert process.stderr.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == 130
    nothing_runs()


def test_reader_who_went_away_ends_it_quietly(start: Start, nothing_runs: NothingRuns) -> None:
    process = start(*run_words("yes"))
    assert process.stdout is not None
    assert process.stdout.readline() == b"y\n"
    process.stdout.close()
    assert process.wait(SECONDS) == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""
    nothing_runs()


def test_full_disk_is_told(start: Start, nothing_runs: NothingRuns) -> None:
    with open("/dev/full", "wb") as full:
        process = start(*run_words("yes"), stdout=full)
    assert process.wait(SECONDS) == 125
    assert process.stderr is not None
    assert process.stderr.read() == b"error: No space left on device\n"
    nothing_runs()


def test_slow_reader_does_not_hold_up_the_program(start: Start, settings: Settings) -> None:
    count = 40_000
    process = start(*run_words("/usr/bin/python3", "-c", f"for n in range({count}): print(n, '-' * 100)"))
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"0 ")
    log = next(settings.log_dir.glob("*/probe.jsonl"))
    deadline = time.monotonic() + SECONDS
    # Nothing is read meanwhile, and a pipe holds 64 KiB.
    while _last_line(log).find(f'"{count - 1} ') < 0:
        assert time.monotonic() < deadline, "the program waits for the reader"
    rest = process.stdout.read().splitlines()
    assert len(rest) == count - 1
    assert rest[-1].startswith(f"{count - 1} ".encode())
    assert process.wait(SECONDS) == 0


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1000))
        return file.read().decode(errors="replace")


# ---- On a terminal


def _on_terminal(start: Start, *words: str) -> bytes:
    ours, theirs = pty.openpty()
    try:
        process = start(*words, stdout=theirs)
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 4096)
            except OSError:  # EIO: nobody has the other side open any more
                break
        assert process.wait(SECONDS) == 0
        return shown
    finally:
        os.close(ours)


def test_terminal_gets_no_control_characters(start: Start) -> None:
    source = r"printf '\033]0;owned\007\033[2Jred\rX\302\233\377\n\tok \303\251\n'; printf '\033[1m' >&2"
    shown = _on_terminal(start, *run_words("sh", "-c", source))
    # The terminal itself turns a newline into two characters.
    assert shown == rb"\x1b]0;owned\x07\x1b[2Jred\rX\x9b\xff" + b"\r\n\tok \xc3\xa9\r\n"


def test_raw_is_raw(start: Start) -> None:
    words = run_words("printf", r"\033[31mred")
    shown = _on_terminal(start, words[0], "--raw", *words[1:])
    assert shown == b"\x1b[31mred"
