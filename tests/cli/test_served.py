"""Commands that ask a running server: what they do, what they print, and what they say when there is none."""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import COMMAND, SECONDS, USER, Cli, Result, Start, ready, run_words
from tests.cli.terminals import Terminal, terminal

pytestmark = pytest.mark.host

PROGRAM = "trap 'echo got it' USR1; echo ready; echo oops >&2; while :; do sleep 0.01; done"
ODD = "x\x1b[31m\u202e\nps"
"""A user whose id would colour a terminal, turn what stands on it round, and begin a line of its own."""

Served = subprocess.Popen[bytes]


def start_words(*command: str, service: str = "api", user: str = USER, options: tuple[str, ...] = ()) -> list[str]:
    return ["start", "--user", user, "--service", service, *options, "--", *command]


def document(done: Result) -> Any:
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert done.stdout.count(b"\n") == 1
    return json.loads(done.stdout)


def error_of(done: Result) -> dict[str, str]:
    assert done.returncode == 1, (done.stdout, done.stderr)
    error: dict[str, str] = json.loads(done.stdout)["error"]
    return error


def test_a_service_from_its_start_to_its_end(serving: Served, cli: Cli) -> None:
    done = cli("ps")
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"pactown-runner start --user ID --service NAME -- COMMAND\n" in done.stderr

    done = cli(*start_words("sh", "-c", PROGRAM))
    assert (done.returncode, done.stdout) == (0, b"")
    first, advice = done.stderr.decode().splitlines()
    assert (found := re.fullmatch(r"started auth0\|demo/api: running, pid (\d+)", first))
    assert advice == "to see what it prints: pactown-runner logs -f 'auth0|demo' api"

    done = cli(*start_words("true"))
    assert done.returncode == 1
    assert done.stderr.endswith(b"runs already\ntry: see what runs: pactown-runner ps\n")

    heading, line = cli("ps").stdout.decode().splitlines()
    assert heading.split() == ["USER", "SERVICE", "STATE", "AGE", "PID", "RESTARTS", "COMMAND"]
    assert re.match(rf"auth0\|demo  api +running  \d+s +{found[1]} +0 +sh -c ", line)

    assert cli("freeze", USER, "api").stderr == f"auth0|demo/api: frozen, pid {found[1]}\n".encode()
    assert b" frozen " in cli("ps", "--user", USER).stdout
    assert cli("thaw", USER, "api").stderr == f"auth0|demo/api: running, pid {found[1]}\n".encode()
    assert re.fullmatch(rb"sent to \d+ process(es)?\n", cli("signal", USER, "api", "usr1").stderr)

    done = cli("restart", USER, "api")
    assert re.fullmatch(rb"auth0\|demo/api: running, pid \d+\n", done.stderr)
    assert found[1].encode() not in done.stderr

    done = cli("stop", USER, "api", "--grace", "0")
    assert done.stderr.startswith(b"stopped auth0|demo/api: stopped: ")
    done = cli("stop", USER, "api")
    assert (done.returncode, done.stderr.endswith(b"try: see what runs: pactown-runner ps\n")) == (1, True)
    assert cli("logs", USER, "api").stdout.startswith(b"ready\n")


def test_every_command_has_one_json_document(serving: Served, cli: Cli) -> None:
    started = document(cli(*start_words("sh", "-c", PROGRAM, options=("--json", "--restart", "on-failure"))))
    assert (started["state"], started["restart"]["mode"], started["limits"]) == ("running", "on-failure", None)
    found = document(cli("ps", "--json"))
    assert (found["count"], found["sandboxes"][0]["pid"]) == (1, started["pid"])
    assert document(cli("ps", "--user", "nobody", "--json")) == {"sandboxes": [], "count": 0}
    used = document(cli("stats", USER, "api", "--json"))
    assert (used["user_id"], used["service_id"], "memory_current" in used) == (USER, "api", True)
    found = document(cli("stats", "--json"))
    assert (found["count"], found["stats"][0].keys()) == (1, used.keys())
    assert document(cli("limits", USER, "api", "--json"))["asked"] is None
    assert document(cli("freeze", USER, "api", "--json"))["state"] == "frozen"
    assert document(cli("thaw", USER, "api", "--json"))["state"] == "running"
    assert document(cli("signal", USER, "api", "USR1", "--json"))["signalled"] >= 1
    assert document(cli("restart", USER, "api", "--json"))["pid"] != started["pid"]
    found = document(cli("tiers", "--json"))
    assert [tier["name"] for tier in found["tiers"]] == ["free", "basic", "pro", "enterprise"]
    assert document(cli("stop", USER, "api", "--json"))["outcome"]["reason"] == "stopped"
    error = error_of(cli("stop", USER, "api", "--json"))
    assert (error["code"], error["remedy"]) == ("not-found", "see what runs: pactown-runner ps")


def test_numbers_for_people(serving: Served, cli: Cli) -> None:
    assert b"nothing runs" in cli("stats").stderr
    cli(*start_words("sleep", "1000"))
    heading, line = cli("stats", USER).stdout.decode().splitlines()
    assert re.split(r"  +", heading)[:4] == ["USER", "SERVICE", "CPU TIME", "MEMORY"]
    assert line.startswith("auth0|demo  api ")
    pairs = dict(re.split(r"  +", line, maxsplit=1) for line in cli("stats", USER, "api").stdout.decode().splitlines())
    assert (pairs["service"], pairs["state"]) == ("api", "running")
    assert "in the kernel" in pairs["CPU time"]
    assert b"has no limit of its own; to give it one: pactown-runner limits" in cli("limits", USER, "api").stderr
    tiers = cli("tiers").stdout.decode()
    assert re.search(r"^free +\d+ +\d+ +- +memory_max 256.0 MiB, ", tiers, re.MULTILINE)


def test_a_tier_is_given_and_a_tenant_is_blocked(serving: Served, cli: Cli) -> None:
    cli(*start_words("sleep", "1000"))
    assert document(cli("users", "tier", USER, "--json")) == {"user_id": USER, "tier": None, "blocked": False}
    assert cli("users", "tier", USER, "--block").stdout == b"user     auth0|demo\ntier     -\nblocked  yes\n"
    assert b" frozen " in cli("ps").stdout
    assert error_of(cli(*start_words("true", service="other", options=("--json",))))["code"] == "blocked"
    assert document(cli("users", "tier", USER, "--unblock", "--json"))["blocked"] is False
    assert b" running " in cli("ps").stdout
    error = error_of(cli("users", "tier", USER, "golden", "--json"))
    assert "golden" in error["message"]
    assert error_of(cli("users", "tier", "nobody", "--json"))["code"] == "not-found"


def test_limits_that_the_host_cannot_hold_are_an_error(serving: Served, cli: Cli) -> None:
    cli(*start_words("sleep", "1000"))
    done = cli("limits", USER, "api", "--memory", "64M", "--pids", "max")
    if done.returncode == 0:  # a host that can
        assert b"memory.max  64.0 MiB" in done.stdout
        return
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"lacks controllers" in done.stderr
    assert b"\ntry: " in done.stderr


def test_the_log_is_the_same_from_the_server(serving: Served, cli: Cli, environ: dict[str, str]) -> None:
    cli(*run_words("sh", "-c", "echo one; printf '\\033[31m\\377\\n'; echo three >&2", service="api"))
    here, there = ["logs", USER, "api"], ["logs", USER, "api", "--server", socket_of(environ)]
    for options in ([], ["-n", "1"], ["--json"], ["--since", "1"], ["--since", "1h"], ["--raw"]):
        done, served = cli(*here, *options), cli(*there, *options)
        assert (served.returncode, served.stdout, served.stderr) == (0, done.stdout, done.stderr), options
        assert done.stdout or done.stderr
    assert cli(*there, "--since", "2100-01-01").stdout == b""
    # What does not run is not waited for.
    assert cli(*there, "-f", "-n", "2").returncode == 0
    done = cli("logs", USER, "other", "--server", socket_of(environ))
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"has printed nothing yet, or never ran" in done.stderr
    assert error_of(cli("logs", "nobody", "api", "--server", socket_of(environ), "--json"))["code"] == "not-found"


def test_following_from_the_server_ends_with_the_service(
    serving: Served, cli: Cli, start: Start, environ: dict[str, str]
) -> None:
    cli(*start_words("sh", "-c", PROGRAM))
    process = start("logs", "-f", USER, "api", "--server", socket_of(environ))
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    cli("signal", USER, "api", "USR1")
    assert process.stdout.readline() == b"got it\n"
    cli("stop", USER, "api", "--grace", "0")
    assert process.wait(SECONDS) == 0


def socket_of(environ: dict[str, str]) -> str:
    return str(Path(environ["PACTOWN_USERS_BASE"], ".state/run/api.sock"))


def test_a_service_is_waited_for_until_it_is_ready(serving: Served, cli: Cli) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    source = f"import http.server as h; h.HTTPServer(('127.0.0.1', {port}), h.SimpleHTTPRequestHandler).serve_forever()"
    options = ("--ready-port", port, "--ready-path", "/", "--wait", "--json")
    started = document(cli(*start_words("/usr/bin/python3", "-I", "-c", source, options=options)))
    assert started["ready"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (start_words("true", options=("--ready-path", "/")), b"try: add --ready-port PORT"),
        (start_words("true", options=("--restart", "perhaps")), b"restart mode must be one of no, on-failure, always"),
        (start_words("true", options=("--memory", "much")), b"error: memory_max"),
        (start_words("true", options=("--env", "A")), b"error: --env A has no value"),
        (start_words("true", user=""), b"error: a user id has 1 to 1024 bytes"),
    ],
)
def test_a_start_that_cannot_be_right_needs_no_server_to_say_so(cli: Cli, words: list[str], message: bytes) -> None:
    done = cli(*words)
    assert (done.returncode, done.stdout) == (1, b"")
    assert message in done.stderr


def test_an_unknown_signal_is_misuse(cli: Cli) -> None:
    for word in ("nonsense", "0", "65", "SIG"):
        done = cli("signal", USER, "api", word)
        assert (done.returncode, done.stdout) == (2, b"")
        assert f"there is no signal {word!r}".encode() in done.stderr


# ---- Without a server, and with one that does not want us

ASKING = [
    ["ps"],
    ["ps", "--watch"],
    ["stats"],
    ["stats", USER, "api"],
    ["limits", USER, "api"],
    ["tiers"],
    ["events"],
    ["stop", USER, "api"],
    ["restart", USER, "api"],
    ["freeze", USER, "api"],
    ["thaw", USER, "api"],
    ["signal", USER, "api", "HUP"],
]


@pytest.mark.parametrize("words", [*ASKING, ["start", "--user", USER, "--service", "api"]], ids=" ".join)
def test_without_a_server_it_is_said_how_to_start_one(cli: Cli, environ: dict[str, str], words: list[str]) -> None:
    command = ["--", "true"] if words[0] == "start" else []
    done = cli(*words, *command)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode() == (
        f"error: no server answers on {socket_of(environ)}: No such file or directory\n"
        "try: start one: pactown-runner serve\n"
    )
    error = error_of(cli(*words, "--json", *command))
    assert (error["code"], error["remedy"]) == ("unreachable", "start one: pactown-runner serve")
    assert not Path(environ["PACTOWN_USERS_BASE"], ".state").exists()


@pytest.fixture
def address(start: Start, environ: dict[str, str], tmp_path: Path) -> str:
    """Of a server that listens by TCP, to those who have one of several tokens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    tokens: dict[str, dict[str, object]] = {
        "admin": {},
        "reader": {"role": "read"},
        "shop": {"tenant": USER},
        "old": {"expires": "2020-01-01T00:00:00Z"},
    }
    text = [f'api_listen = "{where}"']
    for name, options in tokens.items():
        values = {"role": "admin", "expires": "never", "sha256": hashlib.sha256(name.encode()).hexdigest()}
        text.append(f"[tokens.{name}]")
        text += [f"{key} = {json.dumps(value)}" for key, value in {**values, **options}.items()]
    file = tmp_path / "pactown.toml"
    file.write_text("\n".join(text))
    file.chmod(0o600)
    ready(start("serve", "--config", str(file)))
    return f"http://{where}"


def test_a_token_is_needed_by_tcp_and_says_what_may_be_done(cli: Cli, environ: dict[str, str], address: str) -> None:
    environ["PACTOWN_SERVER"] = address
    assert error_of(cli("ps", "--json"))["code"] == "unauthorised"
    for token in ("wrong", "old"):
        environ["PACTOWN_TOKEN"] = token
        done = cli("ps")
        assert (done.returncode, done.stdout) == (1, b"")
        assert token.encode() not in done.stderr
        assert b"token" in done.stderr

    environ["PACTOWN_TOKEN"] = "admin"
    assert cli(*start_words("sleep", "1000")).returncode == 0
    assert cli(*start_words("sleep", "1000", user="other")).returncode == 0
    assert document(cli("ps", "--json"))["count"] == 2

    environ["PACTOWN_TOKEN"] = "shop"
    [own] = document(cli("ps", "--json"))["sandboxes"]
    assert own["user_id"] == USER
    assert error_of(cli("stop", "other", "api", "--json"))["code"] in ("not-found", "forbidden")
    assert document(cli("restart", USER, "api", "--json"))["state"] == "running"

    environ["PACTOWN_TOKEN"] = "reader"
    assert document(cli("stats", "--json"))["count"] == 2
    assert error_of(cli("stop", USER, "api", "--json"))["code"] in ("not-found", "forbidden")
    environ["PACTOWN_TOKEN"] = "admin"
    assert document(cli("ps", "--json"))["count"] == 2
    environ["PACTOWN_TOKEN"] = "admin\n"
    assert b"this is no token" in cli("ps").stderr


def test_an_address_that_is_none_is_told(cli: Cli) -> None:
    done = cli("ps", "--server", "gopher://here")
    assert (done.returncode, done.stderr) == (
        1,
        b"error: this is no address of a server\ntry: give a socket's path, or http://HOST:PORT\n",
    )


# ---- What happens


def test_events_come_as_they_happen(serving: Served, cli: Cli, start: Start) -> None:
    heard, told = start("events", "-f", "--json"), start("events", "--user", ODD)
    assert heard.stdout is not None
    assert told.stdout is not None
    # Both hear of it only once they are connected.
    while not _heard_of(cli, heard) or not _heard_of(cli, told):
        assert heard.poll() is None
        assert told.poll() is None
    cli(*start_words("true", user=ODD, service="odd"))
    for line in heard.stdout:
        event = json.loads(line)
        if (event["kind"], event["service_id"]) == ("started", "odd"):
            break
    assert event.keys() == {"kind", "ts", "user_id", "service_id", "run_id", "details"}
    assert event["user_id"] == ODD
    for line in told.stdout:
        assert b"\x1b" not in line
        if re.match(rb"\d\d:\d\d:\d\d  started +'x\\x1b\[31m\\u202e\\nps/odd'  pid \d+", line):
            break
    for process in (heard, told):
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130
        assert process.stderr is not None
        assert process.stderr.read() == b""


def _heard_of(cli: Cli, process: Served) -> bool:
    """Whether events come, of which we make one."""
    cli(*start_words("true", user=ODD, service="first"))
    assert process.stdout is not None
    return bool(select.select([process.stdout], [], [], 1)[0])


def test_nobody_who_reads_is_no_reason_to_complain(serving: Served, cli: Cli, start: Start) -> None:
    process = start("ps", "--watch", "--json")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline()) == {"sandboxes": [], "count": 0}
    process.stdout.close()
    assert process.wait(SECONDS) == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""


# ---- On a terminal


def on(screen: Terminal, start: Start, *words: str) -> Served:
    return start(*words, stdin=screen.theirs, stdout=screen.theirs, stderr=screen.theirs)


def shell_words(line: str) -> list[str]:
    """What bash makes of a line that is typed."""
    environ = {**os.environ, "LC_ALL": "C.UTF-8"}
    command = ["bash", "-c", f"printf '%s\\0' {line}"]
    done = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
    return done.stdout.split("\0")[:-1]


def test_a_terminal_shows_tables_in_colour_and_no_control_characters(
    serving: Served, cli: Cli, start: Start, environ: dict[str, str]
) -> None:
    done = cli(*start_words("sh", "-c", "sleep 1000", "\x1b]0;mine\x07", user=ODD))
    advice = done.stderr.decode().splitlines()[-1].partition(": ")[2]
    assert shell_words(advice) == ["pactown-runner", "logs", "-f", ODD, "api"]
    environ["TERM"] = "xterm-256color"
    environ.pop("NO_COLOR", None)
    for words in (["ps"], ["stats"], ["stats", ODD, "api"], ["limits", ODD, "api"]):
        with terminal() as screen:
            assert on(screen, start, *words).wait(SECONDS) == 0
            text = screen.rest()
        assert rb"\x1b[31m\u202e\nps" in text, words
        assert b"\x1b[31m\xe2" not in text
        assert b"\x1b]0;" not in text
        assert (b"\x1b[32mrunning" in text) == (words == ["ps"])
        assert len(text.splitlines()) == 2 or words[1:]


@pytest.mark.parametrize("command", ["ps", "stats"])
def test_watching_has_a_screen_of_its_own_and_gives_it_back(
    serving: Served, cli: Cli, start: Start, environ: dict[str, str], command: str
) -> None:
    environ["TERM"] = "xterm-256color"
    cli(*start_words("sh", "-c", "while :; do :; done"))
    with terminal() as screen:
        process = on(screen, start, command, "--watch")
        screen.until(b"\x1b[?1049h")
        screen.until(b"api")
        if command == "stats":
            screen.until(b" %")  # the share of a CPU is known from the second look on
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130
        text = screen.rest()
    assert text.rindex(b"\x1b[?1049l") > text.rindex(b"api")
    assert b"Traceback" not in text


# ---- In the shell


def completions(environ: dict[str, str], shell: str, *words: str) -> str:
    """What the command answers to a shell's question."""
    asked = {**environ, "_PACTOWN_RUNNER_COMPLETE": f"complete_{shell}"}
    if shell == "bash":
        asked |= {"COMP_WORDS": "\n".join(["pactown-runner", *words]), "COMP_CWORD": str(len(words))}
    else:
        asked |= {"_TYPER_COMPLETE_ARGS": " ".join(["pactown-runner", *words])}
        asked |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = subprocess.run(COMMAND, env=asked, check=False, capture_output=True, text=True, timeout=SECONDS)
    assert done.stderr == ""
    return done.stdout.strip()


def test_shells_are_offered_ids_and_names(serving: Served, cli: Cli, environ: dict[str, str]) -> None:
    hostile = 'x\\$(touch /tmp/pwned)"`'
    for user, service in ((USER, "api"), ("auth0|other", "web"), ("plain", "job"), (hostile, "odd")):
        assert cli(*start_words("sleep", "1000", user=user, service=service)).returncode == 0
    assert completions(environ, "bash", "stop", "").split() == [r"auth0\|demo", r"auth0\|other", "plain"]
    assert completions(environ, "bash", "stop", r"auth0\|d") == r"auth0\|demo"
    assert completions(environ, "bash", "stop", r"auth0\|demo", "") == "api"
    assert completions(environ, "bash", "ps", "--user", "pl") == "plain"
    assert completions(environ, "bash", "logs", "plain", "") == "job"
    assert completions(environ, "fish", "restart", "au").split() == ["auth0|demo", "auth0|other"]
    assert completions(environ, "zsh", "restart", "au") == '_arguments \'*: :(("auth0|demo"\n"auth0|other"))\''


def test_bash_puts_in_what_it_is_offered(serving: Served, cli: Cli, environ: dict[str, str]) -> None:
    cli(*start_words("sleep", "1000"))
    asked = {**environ, "_PACTOWN_RUNNER_COMPLETE": "source_bash"}
    shown = subprocess.run(COMMAND, env=asked, check=True, capture_output=True, text=True, timeout=SECONDS)
    program = f"""
{shown.stdout}
COMP_WORDS=(pactown-runner stop 'auth0\\|d') COMP_CWORD=2
_pactown_runner_completion {COMMAND[0]}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", program], env=environ, check=True, capture_output=True, timeout=SECONDS)
    assert done.stdout == b"auth0\\|demo\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_without_a_server_shells_are_offered_nothing(environ: dict[str, str], shell: str) -> None:
    assert completions(environ, shell, "stop", "") in ("", "_files")
    assert "freeze" in completions(environ, shell, "fr")


# ---- What is not needed is not loaded


@pytest.mark.parametrize("words", [["--help"], ["ps", "--help"], run_words("true")], ids=["help", "ps-help", "run"])
def test_http_is_imported_by_what_asks_a_server_only(environ: dict[str, str], words: list[str]) -> None:
    source = (
        "import sys; from pactown_runner.cli import main; status = main(sys.argv[1:]); "
        "print(*sys.modules, file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", source, *words], env=environ, check=True, capture_output=True, text=True, timeout=SECONDS
    )
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert loaded & {"httpx", "fastapi", "uvicorn"} == set()
    assert "typer" in loaded
