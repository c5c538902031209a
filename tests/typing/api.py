"""Typed usage of all that is public: never run, but `mypy --strict` has to agree with every line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, assert_type

from cgroups import Pressure
from pactown_runner import (
    IsolatedUser,
    IsolationReport,
    Limits,
    LogRecord,
    Outcome,
    RunnerError,
    Sandbox,
    SandboxSpec,
    Settings,
    State,
    Stats,
    Supervisor,
)


async def services() -> None:
    async with Supervisor(users_base=Path("/home/pactown_users")) as supervisor:
        assert_type(supervisor, Supervisor)
        assert_type(supervisor.settings, Settings)
        user = await supervisor.users.get_or_create("auth0|123456")
        assert_type(user, IsolatedUser)
        assert_type(await supervisor.users.get("auth0|123456"), IsolatedUser | None)
        assert_type(await supervisor.users.list(), list[IsolatedUser])
        assert_type((user.linux_uid, user.home_dir, user.created_at), tuple[int, Path, float])
        spec = SandboxSpec(
            user_id="auth0|123456",
            service_id="my-api",
            command=["python3", "main.py"],
            env={"PORT": "8001"},
            limits=Limits(memory_max="256M", cpu_max=0.5, pids_max=64),
        )
        sandbox = await supervisor.start(spec)
        assert_type(sandbox, Sandbox)
        assert_type(sandbox.pid, int)
        assert_type(sandbox.state, State)
        assert_type(sandbox.isolation, IsolationReport)
        assert_type(sandbox.isolation.limits, Mapping[str, str])
        assert_type(sandbox.outcome, Outcome | None)
        async for record in sandbox.logs(follow=True):
            assert_type(record, LogRecord)
            assert_type((record.ts, record.seq, record.line, record.raw), tuple[float, int, str, bytes])
            assert_type(record.stream, Literal["stdout", "stderr"])
        await sandbox.freeze()
        await sandbox.thaw()
        await sandbox.set_limits(Limits(memory_max="512M"))
        usage = await sandbox.stats()
        assert_type(usage, Stats)
        assert_type(usage.cpu_usage_usec, int | None)
        assert_type(usage.memory_pressure, Pressure | None)
        assert_type(supervisor.get("auth0|123456", "my-api"), Sandbox)
        assert_type(supervisor.list(), list[Sandbox])
        assert_type(supervisor.list("auth0|123456"), list[Sandbox])
        async for record in supervisor.logs("auth0|123456", "my-api", tail=10):
            assert_type(record, LogRecord)
        outcome = await sandbox.stop(grace=10)
        assert_type(outcome, Outcome)
        assert_type(await supervisor.stop("auth0|123456", "my-api"), Outcome)
        assert_type(await sandbox.kill(), Outcome)
        assert_type(await sandbox.wait(), Outcome)


async def runs() -> int:
    settings = Settings.load(stop_grace=2.0)
    async with Supervisor(settings=settings, role="one-shot") as supervisor:
        spec = SandboxSpec(user_id="user@example.com", service_id="job", command="make", timeout=60, stdin=True)
        outcome = await supervisor.run(spec)
        match outcome.reason:
            case "exited":
                return outcome.exit_code or 0
            case "signaled" | "stopped" | "timed-out":
                return 128 + (outcome.signal or 0)
            case "oom-killed":
                assert_type(outcome.oom_level, Literal["service", "tenant"] | None)
            case "failed-to-start":
                assert_type((outcome.failed_step, outcome.failed_errno), tuple[str | None, int | None])
            case "lost":
                pass
        sandbox = await supervisor.start_run(spec)
        await sandbox.send(b"input\n")
        sandbox.close_stdin()
        return 0 if (await sandbox.wait()).ok else 1


def errors(error: RunnerError) -> tuple[str, str, str | None]:
    return error.code, error.message, error.remedy


def what_is_refused() -> None:
    SandboxSpec(user_id="a", service_id="b", command=["c"], namespaces=frozenset({"net"}))
    SandboxSpec(user_id="a", service_id="b", command=["c"], namespaces=frozenset({"pid"}))  # type: ignore[arg-type]
    SandboxSpec("a", "b", ["c"])  # type: ignore[call-arg]
    Supervisor(role="master")  # type: ignore[arg-type]
    Settings(on_crash="panic")  # type: ignore[arg-type]
