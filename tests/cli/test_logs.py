"""`logs`: what a service printed."""

from __future__ import annotations

import base64
import json
import os
import pty
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from pactown_runner import Settings
from pactown_runner.logs.records import record_logger
from tests.cli.conftest import COMMAND, SECONDS, USER, Cli, Start, run_words

pytestmark = pytest.mark.host

Line = tuple[float, bytes]
WriteLog = Callable[..., Path]


@pytest.fixture
def write_log(cli: Cli, settings: Settings) -> WriteLog:
    """Writes a log as a pump does: records of these times with these lines, from a number on."""

    def write(*lines: Line, first: int = 1, dropped: int = 0, partial: bool = False) -> Path:
        if not settings.log_dir.exists():
            cli(*run_words("echo", "there is a user now"))
        [directory] = settings.log_dir.glob("pactown_*")
        log = directory / "written.jsonl"
        logger, ends = record_logger(USER, "written", "r1"), [0, 0]
        with log.open("ab") as file:
            for seq, (ts, raw) in enumerate(lines, first):
                piece = (raw, len(raw) + 1, partial)
                file.writelines(logger.render([piece], ts=ts, seq=seq - 1, stream="stdout", ends=ends, index=0))
            if dropped:
                seq, length = first + len(lines), 2 * dropped
                file.write(logger.count_dropped(dropped, length, ts=9, seq=seq, stream="stdout", ends=ends, index=0))
        return log

    return write


def test_log_of_all_runs_comes_out_apart(cli: Cli) -> None:
    cli(*run_words("sh", "-c", "echo one; echo two; echo oops >&2"))
    cli(*run_words("printf", "three"))
    done = cli("logs", USER, "probe")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"one\ntwo\nthree", b"oops\n")
    assert cli("logs", USER, "probe", "-n", "1").stdout == b"three"
    assert cli("logs", USER, "probe", "--tail", "0").stdout == b""


def test_what_is_not_there_is_told_and_not_made(cli: Cli, settings: Settings) -> None:
    done = cli("logs", USER, "probe")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(f"error: there is no user {USER!r}".encode())
    assert done.stderr.endswith(b"try: look for it: pactown-runner users list\n")
    assert not settings.state_dir.exists()
    cli(*run_words("true"))
    done = cli("logs", USER, "other")
    assert done.stderr.startswith(b"error: service 'other' of user ")
    assert done.stderr.endswith(b"try: see what runs of it: pactown-runner users show 'auth0|demo'\n")
    assert cli("logs", USER, "other", "--follow").returncode == 1
    assert cli("logs", USER, "../x").stderr.startswith(b"error: service id '../x' is not allowed")


# ---- Where it begins


def test_since_a_number_or_a_time(cli: Cli, write_log: WriteLog) -> None:
    now = time.time()
    hour = 3600
    write_log((now - 3 * hour, b"a"), (now - 2 * hour, b"b"), (now - hour, b"c"), (now, b"d"))

    def shown(since: str, *more: str) -> bytes:
        done = cli("logs", USER, "written", "--since", since, *more)
        assert (done.returncode, done.stderr) == (0, b"")
        return b"".join(done.stdout.split())

    def when(hours: float, form: str) -> str:
        return time.strftime(form, time.localtime(now - hours * hour))

    assert [shown(since) for since in ("0", "2", "4", "9")] == [b"abcd", b"cd", b"", b""]
    assert [shown(since) for since in ("150m", "1h30m", "5400s", "2d", "1w")] == [
        b"bcd",
        b"cd",
        b"cd",
        b"abcd",
        b"abcd",
    ]
    assert shown(when(2.5, "%Y-%m-%dT%H:%M:%S")) == shown(when(2.5, "%Y-%m-%d %H:%M:%S%z")) == b"bcd"
    assert shown(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now - 1.5 * hour))) == b"cd"
    assert shown(when(100, "%Y-%m-%d")) == b"abcd"
    assert shown("1", "-n", "2") == b"cd"
    assert shown("3", "-n", "2") == b"d"


@pytest.mark.parametrize("since", ["", "yesterday", "-1", "10", "1x", "m", "2026-13-01", "1h 30m", "٣"])
def test_since_what_is_no_point_in_time(cli: Cli, since: str) -> None:
    done = cli("logs", USER, "written", "--since", since)
    assert (done.returncode, done.stdout) == (1 if since == "10" else 2, b"")
    assert (b"is no time" in done.stderr) == (since != "10")


def test_numbers_go_on_over_files_and_tell_what_is_missing(cli: Cli, write_log: WriteLog) -> None:
    log = write_log((1.0, b"a"), (2.0, b"b"), first=5)
    (log.parent / ".aside").mkdir()
    log.rename(log.parent / ".aside" / "written.jsonl.2")
    log = write_log((3.0, b"c"), (4.0, b"d"), first=10)
    done = cli("logs", USER, "written")
    assert done.stdout == b"a\nb\nc\nd\n"
    gap = "pactown-runner: {} records that were here have made room for newer ones\n"
    assert done.stderr.decode() == gap.format(4) + gap.format(3)
    assert cli("logs", USER, "written", "--since", "5").stderr.decode() == gap.format(3)
    assert cli("logs", USER, "written", "--since", "9").stderr == b""
    assert cli("logs", USER, "written", "-n", "2").stderr == b""
    found = [json.loads(line) for line in cli("logs", USER, "written", "--json").stdout.splitlines()]
    assert [(f["seq"], f["line"]) for f in found] == [(5, "a"), (6, "b"), (10, "c"), (11, "d")]


def test_what_was_dropped_is_a_line_of_its_own(cli: Cli, start: Start, write_log: WriteLog) -> None:
    write_log((1.0, b"a"), (2.0, b"pactown-runner: 3 lines of stdout (6 bytes) were dropped here"))
    write_log((3.0, b"unfinished"), first=3, partial=True, dropped=1000)
    write_log((4.0, b"b"), first=5)
    done = cli("logs", USER, "written")
    told = b"pactown-runner: 1000 lines of stdout (2000 bytes) were dropped here: more than log_rate_bytes allows\n"
    assert done.stderr == told
    assert done.stdout.endswith(b"dropped here\nunfinishedb\n")
    together, _ = start("logs", USER, "written", "-n", "3", stderr=subprocess.STDOUT).communicate(timeout=SECONDS)
    assert together == b"unfinished\n" + told + b"b\n"
    found = [json.loads(line) for line in cli("logs", USER, "written", "--json").stdout.splitlines()]
    assert [f.get("dropped") for f in found] == [None, None, None, {"lines": 1000, "bytes": 2000}, None]
    assert found[2] == {"ts": 3.0, "seq": 3, "stream": "stdout", "line": "unfinished", "partial": True}


# ---- Following


def interactive(script: str) -> list[str]:
    """The words that run a script which reads what the command is given."""
    run, *words = run_words("sh", "-c", script)
    return [run, "-i", *words]


def test_a_log_is_followed_from_another_process(cli: Cli, start: Start) -> None:
    cli(*run_words("echo", "before"))
    following = start("logs", USER, "probe", "-f", "-n", "1")
    assert following.stdout is not None
    assert following.stdout.readline() == b"before\n"
    running = start(*interactive("echo one; read x; echo two"), stdin=subprocess.PIPE)
    assert following.stdout.readline() == b"one\n"
    running.communicate(b"\n", timeout=SECONDS)
    assert following.stdout.readline() == b"two\n"
    # It goes on over runs, until it is told to end.
    cli(*run_words("echo", "after"))
    assert following.stdout.readline() == b"after\n"
    following.send_signal(signal.SIGINT)
    out, err = following.communicate(timeout=SECONDS)
    assert (following.returncode, out, err) == (130, b"", b"")


def test_a_service_that_runs_and_has_printed_nothing_yet_is_waited_for(
    cli: Cli, start: Start, settings: Settings
) -> None:
    cli(*run_words("true", service="other"))
    running = start(*interactive("touch here; read x; echo one"), stdin=subprocess.PIPE)
    while not list(settings.users_base.glob("*/sandboxes/probe/here")):
        assert running.poll() is None
    following = start("logs", USER, "probe", "-f", "--json")
    assert b"has printed nothing yet" in cli("logs", USER, "probe").stderr
    running.communicate(b"\n", timeout=SECONDS)
    assert following.stdout is not None
    assert json.loads(following.stdout.readline())["line"] == "one"


# ---- An operator's terminal

BIDI = [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C]
UNSEEN = [*range(0x200B, 0x200E), 0x2028, 0x2029, 0x2060, 0xFEFF, 0xFFF9, 0xE0001, 0xE007F, 0x00AD]
TEXT = "".join(map(chr, [*range(0x100), *BIDI, *UNSEEN])) + "\n" + "".join(f"<{chr(c)}>\n" for c in range(0x100))
BYTES = bytes(range(256)) + b"".join(b"<%c>\n" % c for c in range(256))
PRINT = f"import sys; sys.stdout.buffer.write({TEXT.encode() + BYTES!r}); sys.stderr.buffer.write({TEXT.encode()!r})"


def on_terminal(environ: dict[str, str], *words: str) -> bytes:
    """What a terminal gets that is both standard output and standard error of the command."""
    master, slave = pty.openpty()
    modes = termios.tcgetattr(slave)
    modes[1] &= ~termios.OPOST  # newlines as they are
    termios.tcsetattr(slave, termios.TCSANOW, modes)
    process = subprocess.Popen([*COMMAND, *words], env=environ, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    try:
        with suppress(OSError):  # when nobody has it open any more
            while block := os.read(master, 1 << 16):
                shown += block
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
    return shown


def test_no_control_character_of_a_tenant_reaches_a_terminal(cli: Cli, environ: dict[str, str]) -> None:
    cli(*run_words("/usr/bin/python3", "-S", "-E", "-c", PRINT))
    for shown in (
        on_terminal(environ, "logs", USER, "probe"),
        on_terminal(environ, "logs", USER, "probe", "-n", "1000", "--since", "1h"),
        cli("logs", USER, "probe").stdout,  # into a pager, as it were
        cli("logs", USER, "probe").stderr,
    ):
        text = shown.decode()
        assert {character for character in text if not character.isprintable()} == {"\n", "\t"}
        for code in range(0x100):
            character = chr(code)
            escaped = character if character.isprintable() or character in "\t\n" else f"\\x{code:02x}"
            assert f"<{escaped}>\n" in text.replace("\\r", "\\x0d")
    raw = cli("logs", USER, "probe", "--raw")
    assert (raw.stdout, raw.stderr) == (TEXT.encode() + BYTES, TEXT.encode())


def test_json_is_printable_and_tells_all(cli: Cli, environ: dict[str, str]) -> None:
    cli(*run_words("/usr/bin/python3", "-S", "-E", "-c", PRINT))
    shown = on_terminal(environ, "logs", USER, "probe", "--json")
    assert set(shown) <= {*range(0x20, 0x7F), 0x0A}
    assert shown == cli("logs", USER, "probe", "--json").stdout
    streams = {"stdout": b"", "stderr": b""}
    for number, line in enumerate(shown.splitlines(), 1):
        fields = json.loads(line)
        assert fields["seq"] == number
        raw = fields["line"].encode() if "line" in fields else base64.b64decode(fields["line_b64"])
        streams[fields["stream"]] += raw + (b"" if fields.get("partial") else b"\n")
    assert streams == {"stdout": TEXT.encode() + BYTES, "stderr": TEXT.encode()}


def test_errors_are_json_too(cli: Cli) -> None:
    done = cli("logs", USER, "probe", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "not-found"
