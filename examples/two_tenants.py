"""Two tenants, each with a small web service, side by side on one machine.

Run it as root with `make run`. Everything it makes is removed at the end: accounts, homes, cgroups and logs.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import tempfile
import urllib.request
from contextlib import AsyncExitStack
from pathlib import Path

from rich.console import Console

from cgroups import Limits, find_mount, format_bytes
from pactown_runner import Sandbox, SandboxSpec, Settings, Supervisor
from pactown_runner.errors import LimitsError
from pactown_runner.purge import Purge

SERVICE = """\
import http.server, os, pathlib, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = pathlib.Path("greeting.txt").read_bytes()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        print(format % args, flush=True)

server = http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler)
print(f"listening on {os.environ['PORT']} as uid {os.getuid()} in {os.getcwd()}", flush=True)
server.serve_forever()
"""

ATTACK = """\
import os, pathlib

def attempt(what, action):
    try:
        print(f"{what}: GOT THROUGH: {action()!r}")
    except OSError as error:
        print(f"{what}: refused ({error.strerror})")

home, pid = os.environ["VICTIM_HOME"], int(os.environ["VICTIM_PID"])
attempt("read its file        ", lambda: pathlib.Path(home, "sandboxes/web/greeting.txt").read_text())
attempt("list its home        ", lambda: os.listdir(home))
attempt("see its environment  ", lambda: pathlib.Path(f"/proc/{pid}/environ").read_bytes())
attempt("signal its process   ", lambda: os.kill(pid, 9))
attempt("become root          ", lambda: os.setuid(0))
attempt("leave its own cgroup ", lambda: pathlib.Path(os.environ["CGROUP_TOP"], "cgroup.procs").write_text("0"))
"""

console = Console(highlight=False, soft_wrap=True)  # so that paths and commands can be copied whole
COLOURS = {"alice": "cyan", "bob": "magenta"}


def step(text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
        return str(answer.read().decode())


async def show_log(sandbox: Sandbox, logged: asyncio.Event) -> None:
    colour = COLOURS.get(sandbox.user_id, "white")
    try:
        async for record in sandbox.logs(follow=True):
            console.print(f"  [{colour}]{sandbox.user_id}/{sandbox.service_id} {record.stream}[/{colour}] │ ", end="")
            console.print(record.line, markup=False)
            logged.set()
    finally:
        logged.set()  # nobody waits for a line of what has ended


async def start_web(supervisor: Supervisor, name: str, limits: Limits) -> tuple[Sandbox, int]:
    """Put a tenant's files into its sandbox, and start its service."""
    await supervisor.files.put(name, "web", SERVICE.encode(), "main.py")
    await supervisor.files.put(name, "web", f"Hello, this is {name}'s.\n".encode(), "greeting.txt")
    port = free_port()
    spec = SandboxSpec(
        user_id=name,
        service_id="web",
        command=["/usr/bin/python3", "-I", "main.py"],
        env={"PORT": str(port), "SECRET": f"{name}'s secret"},
        limits=limits,
    )
    return await supervisor.start(spec), port


async def start_both(supervisor: Supervisor) -> dict[str, tuple[Sandbox, int]]:
    limits = Limits(memory_max="128M", cpu_max=0.5, pids_max=32)
    try:
        return {name: await start_web(supervisor, name, limits) for name in COLOURS}
    except LimitsError as error:
        console.print(f"  [yellow]This host cannot enforce limits:[/yellow] {error.args[0]}")
        console.print(f"  [yellow]To have them:[/yellow] {error.remedy}")
        console.print("  Asked for, they are an error. So now they are not asked for.")
        return {name: await start_web(supervisor, name, Limits()) for name in COLOURS}


async def attack(supervisor: Supervisor, victim: Sandbox) -> None:
    spec = SandboxSpec(
        user_id="bob",
        service_id="attack",
        command=["/usr/bin/python3", "-I", "-c", ATTACK],
        env={
            "VICTIM_HOME": str(victim.user.home_dir),
            "VICTIM_PID": str(victim.pid),
            "CGROUP_TOP": str(find_mount().path),
        },
    )
    sandbox = await supervisor.start(spec)
    await show_log(sandbox, asyncio.Event())


async def show_usage(running: dict[str, tuple[Sandbox, int]]) -> None:
    for name, (sandbox, _) in running.items():
        stats = await sandbox.stats()
        memory = "not counted here" if stats.memory_current is None else format_bytes(stats.memory_current)
        cpu = "not counted here" if stats.cpu_usage_usec is None else f"{stats.cpu_usage_usec / 1000:.0f} ms"
        console.print(f"  [{COLOURS[name]}]{name}/web[/] pid {sandbox.pid}, memory {memory}, CPU {cpu}")


async def show(supervisor: Supervisor) -> None:
    step("1. Two tenants, two Linux users, two services")
    running = await start_both(supervisor)
    async with AsyncExitStack() as stack:
        followers = await stack.enter_async_context(asyncio.TaskGroup())
        logged = {name: asyncio.Event() for name in running}
        for name, (sandbox, _) in running.items():
            followers.create_task(show_log(sandbox, logged[name]))
            await logged[name].wait()
        for name, (sandbox, _) in running.items():
            held = sandbox.isolation
            console.print(
                f"  [{COLOURS[name]}]{name}[/] is {sandbox.user.linux_username}, uid {held.uid[0]}, "
                f"{held.placement} in {held.cgroup}, no_new_privs {held.no_new_privs}, "
                f"capabilities {sum(held.capabilities.values())}, root regainable: {held.root_regainable}"
            )
            for file, value in held.limits.items():
                console.print(f"    {file} = {value}")

        step("2. Both answer over HTTP")
        for name, (_, port) in running.items():
            logged[name].clear()
            answer = await asyncio.to_thread(ask, port)
            await logged[name].wait()
            console.print(f"  [{COLOURS[name]}]{name}[/] http://127.0.0.1:{port}/ says: {answer.strip()}")

        step("3. What bob can do to alice")
        await attack(supervisor, running["alice"][0])

        step("4. What they use")
        await show_usage(running)

        step("5. Stopped: SIGTERM to every process, SIGKILL after the grace time, and gone when it returns")
        for name, (sandbox, _) in running.items():
            outcome = await sandbox.stop(grace=5)
            console.print(f"  [{COLOURS[name]}]{name}/web[/] {outcome.message}")


def remove_all(settings: Settings) -> None:
    with Purge(settings) as purge:
        purge.carry_out(purge.plan())
        for what, why in purge.failed.items():
            console.print(f"  [red]{what} could not be removed: {why}[/red]")


def show_what_next() -> None:
    # Whoever became root for this has to do so for these as well.
    command = f"{'sudo ' * ('SUDO_USER' in os.environ)}.venv/bin/pactown-runner"
    step("Everything is removed again. Now try it yourself. In one terminal, start the server:")
    console.print(f"  {command} serve")
    step("In another one, start a service, see what runs, and follow its log until control-C:")
    console.print(f"  {command} start --user demo --service clock -- sh -c 'while date; do sleep 1; done'")
    console.print(f"  {command} ps")
    console.print(f"  {command} logs -f demo clock")
    step("When you have seen enough: control-C ends the server and what it runs, and this removes all that was made:")
    console.print(f"  {command} purge")


async def main() -> int:
    if os.geteuid() != 0:
        console.print("This example makes Linux users, which takes root: [bold]sudo make run[/bold]")
        return 1
    with tempfile.TemporaryDirectory(prefix="pactown-example-", dir="/var/tmp") as directory:
        os.chmod(directory, 0o711)  # so that tenants can pass through to their homes
        settings = Settings.load(users_base=Path(directory, "users"), cgroup_slice="pactown-example.slice")
        try:
            async with Supervisor(settings=settings) as supervisor:
                await show(supervisor)
        finally:
            await asyncio.to_thread(remove_all, settings)
    show_what_next()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
