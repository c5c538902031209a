"""`exec`: a program in a service that another process looks after."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pactown_runner import Settings
from tests.cli.conftest import SECONDS, USER, Cli, Start
from tests.supervising import Child, eventually, leftovers, processes_of
from tests.supervising import Start as StartChild

pytestmark = pytest.mark.host

_SERVER = f"""
async def work(supervisor):
    options = dict(user={USER!r}, env={{"A": "of the service", "B": "b"}})
    api = await supervisor.start(spec("echo ready; exec sleep 1000", **options))
    apart = await supervisor.start(spec(["sleep", "1000"], service="apart", namespaces=frozenset(["net"]), **options))
    run = await supervisor.start_run(spec(["sleep", "1000"], service="run", **options))
    await say(str(api.pid))
    while word := await told():
        if word == "kill":
            await api.kill()
        else:
            await getattr(api, word)()
        await say(word)
"""


class Server:
    """A server in a process of its own, and the first process of its service."""

    def __init__(self, child: Child, pid: int) -> None:
        self.child = child
        self.pid = pid

    async def ask(self, word: str) -> None:
        self.child.tell(word)
        assert await self.child.line() == word

    @property
    def cgroup(self) -> str:
        return Path(f"/proc/{self.pid}/cgroup").read_text().splitlines()[-1]


@pytest.fixture
async def server(child: StartChild) -> AsyncIterator[Server]:
    process = child(_SERVER)
    yield Server(process, int(await process.line()))
    process.tell("")
    assert await process.ended() == 0


def words(*command: str, service: str = "api", user: str = USER, options: tuple[str, ...] = ()) -> list[str]:
    return ["exec", "--user", user, "--service", service, *options, "--", *command]


async def test_it_is_a_process_of_the_service(cli: Cli, server: Server, settings: Settings) -> None:
    done = cli(*words("sh", "-c", "cat /proc/self/status /proc/self/cgroup; pwd; ls -l /proc/self/fd"))
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode()
    uid = os.stat(f"/proc/{server.pid}").st_uid
    assert f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}" in text
    assert "CapBnd:\t0000000000000000" in text
    assert "NoNewPrivs:\t1" in text
    assert server.cgroup in text.splitlines()
    assert server.cgroup.endswith("/api.scope")
    assert "/sandboxes/api" in text
    descriptors = {line.split()[8] for line in text.splitlines() if " -> " in line}
    assert descriptors == {"0", "1", "2", "3"}  # 3 is the directory that ls reads
    # The service is none the worse for it, nor somebody else's.
    await server.ask("freeze")
    await server.ask("thaw")
    assert len(list((settings.state_dir / "owners").iterdir())) == 1


@pytest.mark.parametrize(
    ("command", "status"), [("exit 0", 0), ("exit 2", 2), ("exit 125", 125), ("kill -9 $$", 137), ("kill $$", 143)]
)
async def test_exit_code_is_the_programs(cli: Cli, server: Server, command: str, status: int) -> None:
    done = cli(*words("sh", "-c", command))
    assert (done.returncode, done.stderr) == (status, b"")


async def test_streams_are_apart_and_whole_and_not_in_the_log(cli: Cli, server: Server) -> None:
    source = r"printf '\000\377out\n\r\033[31m'; printf 'err\001\n\nlast' >&2"
    done = cli(*words("sh", "-c", source))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\x00\xffout\n\r\x1b[31m", b"err\x01\n\nlast")
    assert cli("logs", USER, "api").stdout == b"ready\n"


async def test_five_megabytes_go_round(cli: Cli, server: Server) -> None:
    data = os.urandom(5_000_000)
    done = cli(*words("cat", options=("-i",)), input=data)
    assert (done.returncode, done.stderr, done.stdout == data) == (0, b"", True)
    assert cli(*words("cat"), input=b"secret").stdout == b""


async def test_what_reads_nothing_ends_all_the_same(start: Start, server: Server) -> None:
    process = start(*words("true", options=("-i",)), stdin=subprocess.PIPE)
    assert process.wait(SECONDS) == 0  # while its standard input is still open


async def test_environment_and_directory(cli: Cli, server: Server) -> None:
    options = ("--env", "B=of the call", "--env", "C=", "--cwd", "/usr")
    lines = cli(*words("sh", "-c", "env; pwd", options=options)).stdout.decode().splitlines()
    assert {"A=of the service", "B=of the call", "C=", "/usr"} <= set(lines)
    assert not [line for line in lines if "SECRET" in line]


async def test_it_joins_the_services_namespaces(cli: Cli, server: Server) -> None:
    done = cli(*words("cat", "/proc/net/dev", service="apart"))
    assert (done.returncode, done.stderr) == (0, b"")
    assert [line.split(":")[0].strip() for line in done.stdout.decode().splitlines()[2:]] == ["lo"]


async def test_what_was_not_executed_is_told_with_125(cli: Cli, server: Server) -> None:
    for what, told in (
        (words("/no/such"), "error: cannot execute '/no/such'"),
        (words("id", options=("--cwd", "nowhere")), "error: cannot enter directory 'nowhere'"),
        (words("id", options=("--env", "PATH")), "error: --env PATH has no value\ntry: --env PATH=VALUE"),
        (words("id", user="nobody"), "error: there is no user 'nobody'"),
        (words("id", user=""), "error: a user id has 1 to 1024 bytes"),
        (words("id", service="other"), "error: no service 'other' of user 'auth0|demo' runs"),
        (words("id", service="_x"), "error: service id '_x' is not allowed"),
        (words("id", service="run"), "error: 'run' is a one-shot run"),
        (words(), "Missing argument"),
        (["exec", "--user", USER, "--", "id"], "Missing option"),
    ):
        done = cli(*what)
        assert (done.returncode, done.stdout) == (125, b""), what
        assert told in done.stderr.decode()
        assert b"Traceback" not in done.stderr


def test_looking_for_a_service_makes_nothing(cli: Cli, settings: Settings) -> None:
    done = cli(*words("id"))
    assert (done.returncode, done.stdout) == (125, b"")
    assert b"there is no user" in done.stderr
    assert not settings.state_dir.exists()


async def test_in_a_frozen_service(cli: Cli, server: Server) -> None:
    await server.ask("freeze")
    done = cli(*words("id"))
    assert (done.returncode, done.stdout) == (125, b"")
    assert done.stderr == b"error: 'api' is frozen\ntry: thaw it first\n"
    await server.ask("thaw")
    assert cli(*words("id")).returncode == 0


async def test_the_services_end_is_its_end(cli: Cli, start: Start, server: Server) -> None:
    process = start(*words("sh", "-c", "echo ready; exec sleep 1000"))
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    await server.ask("kill")
    assert process.wait(SECONDS) == 137
    assert process.stderr is not None
    assert process.stderr.read() == b"pactown-runner: service 'api' has ended\n"
    done = cli(*words("id"))
    assert done.returncode == 125
    assert done.stderr.splitlines() == [
        b"error: no service 'api' of user 'auth0|demo' runs",
        b"try: see what runs of it: pactown-runner users show 'auth0|demo'",
    ]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
async def test_interrupted_it_kills_the_program_alone(start: Start, server: Server, number: int, status: int) -> None:
    uid = os.stat(f"/proc/{server.pid}").st_uid
    before = processes_of(uid)
    process = start(*words("sh", "-c", "trap '' INT TERM HUP; echo ready; while :; do sleep 0.1; done"))
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.wait(SECONDS) == status
    # One last `sleep` may be there for a moment; what a program has started is the service's.
    await eventually(lambda: processes_of(uid) == before)


async def test_a_reader_who_went_away_ends_it_quietly(start: Start, server: Server) -> None:
    uid = os.stat(f"/proc/{server.pid}").st_uid
    before = processes_of(uid)
    process = start(*words("yes"))
    assert process.stdout is not None
    assert process.stdout.readline() == b"y\n"
    process.stdout.close()
    assert process.wait(SECONDS) == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert processes_of(uid) == before


async def test_a_full_disk_is_told(start: Start, server: Server) -> None:
    with open("/dev/full", "wb") as full:
        process = start(*words("yes"), stdout=full)
    assert process.wait(SECONDS) == 125
    assert process.stderr is not None
    assert process.stderr.read() == b"error: No space left on device\n"


@pytest.mark.parametrize("raw", [False, True])
async def test_a_terminal_gets_no_control_characters(start: Start, server: Server, raw: bool) -> None:
    # It stops within a character.
    source = r"printf '\033[2Jred\302'; read go; printf '\251\377\n'"
    options = ("-i", "--raw") if raw else ("-i",)
    ours, theirs = pty.openpty()
    process = start(*words("sh", "-c", source, options=options), stdin=subprocess.PIPE, stdout=theirs)
    os.close(theirs)
    seen = b""
    while b"red" not in seen:
        seen += os.read(ours, 4096)
    assert process.stdin is not None
    process.stdin.write(b"go\n")
    process.stdin.close()
    with contextlib.suppress(OSError):  # EIO: nobody has the other side open any more
        while True:
            seen += os.read(ours, 4096)
    os.close(ours)
    assert process.wait(SECONDS) == 0
    assert seen == (b"\x1b[2Jred\xc2\xa9\xff\r\n" if raw else b"\\x1b[2Jred\xc2\xa9\\xff\r\n")


async def test_nothing_is_left_of_it(cli: Cli, child: StartChild, settings: Settings) -> None:
    process = child(_SERVER)
    await process.line()
    assert cli(*words("sh", "-c", "sleep 1000 & exit 3")).returncode == 3
    process.tell("")
    assert await process.ended() == 0
    assert leftovers(settings) == []
