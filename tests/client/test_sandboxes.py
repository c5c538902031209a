"""Sandboxes through the client: what the server does, in the library's own words."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from pactown_runner import Client, Limits, Probe, RestartPolicy, Settings, State, Supervisor
from pactown_runner.client import ClientError, ExecStatus, SandboxView, StreamEnd
from pactown_runner.errors import (
    AdmissionError,
    AlreadyRunningError,
    BlockedError,
    FilesError,
    LimitsError,
    NotFoundError,
    SpecError,
    StartError,
    StateError,
)
from tests.api.conftest import USER, Api, serving
from tests.supervising import eventually, processes_of, python, soon, spec

pytestmark = [pytest.mark.host]


async def test_a_service_lives_through_a_client(api: Api, client: Client) -> None:
    assert (await client.health()).status == "ok"
    assert (await client.ready()).status == "ready"
    made = await client.start(
        spec(
            ["sleep", "600"],
            env={"SECRET": "s3cret"},
            cwd="/",
            limits=Limits(),
            stop_grace=1.0,
            namespaces=frozenset({"ipc"}),
            restart=RestartPolicy("on-failure", backoff=0.25),
            ready=Probe(command=["true"], interval=9.0),
        )
    )
    sandbox = api.supervisor.get(USER, "api")
    assert (made.state, made.pid, made.kind, made.command) == (State.RUNNING, sandbox.pid, "service", ("sleep", "600"))
    assert made.isolation == sandbox.isolation
    assert made.restart == sandbox.spec.restart
    assert sandbox.spec.ready == Probe(command=["true"], interval=9.0)
    assert (sandbox.spec.env, sandbox.spec.stop_grace, sandbox.spec.limits) == ({"SECRET": "s3cret"}, 1.0, Limits())
    assert replace(await client.get_sandbox(USER, "api"), ready=made.ready) == made
    assert (await client.freeze(USER, "api")).state == State.FROZEN
    assert (await client.thaw(USER, "api")).state == State.RUNNING
    again = await client.restart(USER, "api", grace=0)
    assert (again.restarts, again.last_outcome) == (1, sandbox.last_outcome)
    stats = await client.stats(USER, "api")
    assert stats.cpu_usage_usec is not None
    assert stats.cpu_pressure is None or stats.cpu_pressure.avg10 >= 0
    ended = await client.stop(USER, "api", grace=0)
    assert (ended.state, ended.outcome) == (State.ENDED, sandbox.outcome)
    assert json.loads(json.dumps(ended.to_dict()))["outcome"]["reason"] == "stopped"
    with pytest.raises(NotFoundError):
        await client.get_sandbox(USER, "api")


async def test_what_is_refused_is_the_librarys_own_error(api: Api, client: Client) -> None:
    await client.start(spec("sleep 600"))
    with pytest.raises(AlreadyRunningError):
        await client.start(spec("true"))
    with pytest.raises(StartError) as failed:
        await client.start(spec(["/no/such"], service="b"))
    assert (failed.value.step, failed.value.errno) == ("execve", 2)
    with pytest.raises(SpecError, match="NAME"):
        await client.start(spec("true", service="b", cwd="/", requirements=["--index-url=x"]))
    with pytest.raises(SpecError, match="standard input"):
        await client.start(spec("cat", service="b", stdin=True))
    with pytest.raises(NotFoundError):
        await client.stop(USER, "b")
    with pytest.raises(SpecError, match="1 to 63"):
        await client.stats(USER, "../b")
    with pytest.raises(ClientError) as malformed:
        await client.stop(USER, "api", grace=-1)
    assert (malformed.value.code, malformed.value.status) == ("bad-request", 422)
    assert [fault.where for fault in malformed.value.faults] == ["query.grace"]
    with pytest.raises(ClientError) as malformed:
        await client.start(spec("true", service="b", env={"A": "\udcff"}))
    assert malformed.value.faults[0].where.startswith("body.env")
    assert [view.service_id for view in await client.list_sandboxes()] == ["api"]


async def test_limits_hold_or_are_refused_as_in_the_process(api: Api, client: Client) -> None:
    await client.start(spec("sleep 600"))
    sandbox = api.supervisor.get(USER, "api")
    asked = Limits(memory_max="64M")
    refusals = [
        await refusal(lambda: sandbox.set_limits(asked)),
        await refusal(lambda: client.set_limits(USER, "api", asked)),
    ]
    assert refusals[0] == refusals[1]
    assert (await client.set_limits(USER, "api", Limits())).limits == sandbox.spec.limits


async def refusal(setting: Callable[[], Awaitable[object]]) -> tuple[str, str | None] | None:
    """Why limits cannot be enforced on this host, if so."""
    try:
        await setting()
    except LimitsError as error:
        return error.message, error.remedy
    return None


async def test_who_is_refused_now_is_told_when_to_come_again(supervisor: Supervisor, api_settings: Settings) -> None:
    async with serving(supervisor, api_settings) as api, Client(api.where.socket) as client:
        await client.start(spec("sleep 600"))
        await client.set_tier(USER, None, blocked=True)
        with pytest.raises(BlockedError, match="blocked"):
            await client.start(spec("true", service="b"))
        with pytest.raises(BlockedError):
            await client.thaw(USER, "api")
    settings = replace(api_settings, starts_per_minute=1)
    async with (
        Supervisor(settings=settings) as supervisor,
        serving(supervisor, settings) as api,
        Client(api.where.socket) as client,
    ):
        await client.start(spec("sleep 600", user="other"))
        with pytest.raises(AdmissionError) as refused:
            await client.start(spec("sleep 600", user="other", service="b"))
        assert refused.value.limit == "starts_per_minute"
        assert refused.value.retry_after is not None
        assert 1 <= refused.value.retry_after <= 60


async def test_a_run_ends_with_its_outcome_or_its_caller(api: Api, client: Client) -> None:
    outcome = await client.run(spec("exit 3"))
    assert (outcome.reason, outcome.exit_code) == ("exited", 3)
    running = asyncio.create_task(client.run(spec("sleep 600")))
    await eventually(lambda: [box for box in api.supervisor.list() if box.state == "running"])
    (sandbox,) = api.supervisor.list()
    running.cancel()
    assert (await soon(sandbox.wait())).reason == "stopped"


async def test_programs_are_executed_in_it_and_signals_sent(api: Api, client: Client) -> None:
    hears = "import signal; signal.signal(1, lambda *_: print('hup', flush=True)); print('ready', flush=True)"
    await client.start(spec(python(f"{hears}\nwhile True: signal.pause()")))
    raw = bytes(range(256))
    done = await client.exec(USER, "api", ["cat"], stdin=raw)
    assert (done.ok, done.stdout, done.stderr, done.dropped) == (True, raw, b"", 0)
    done = await client.exec(USER, "api", "cat; echo $A >&2; pwd; exit 4", env={"A": "b"}, cwd="/")
    assert (done.exit_code, done.stdout, done.stderr, done.ok) == (4, b"/\n", b"b\n", False)
    done = await client.exec(USER, "api", "sleep 600", timeout=0.2)
    assert (done.timed_out, done.signal, done.ok) == (True, signal.SIGKILL, False)
    with pytest.raises(StartError):
        await client.exec(USER, "api", ["/no/such"])
    async with client.logs(USER, "api", follow=True) as records:
        assert (await soon(anext(records))).line == "ready"
        assert await client.signal(USER, "api", signal.SIGHUP) >= 1
        assert (await soon(anext(records))).line == "hup"
    with pytest.raises(SpecError):
        await client.signal(USER, "api", 64 - 32)


async def test_what_is_executed_is_heard_as_it_prints(api: Api, client: Client) -> None:
    await client.start(spec(["sleep", "600"]))
    everything = bytes(range(256)) * 2000
    async with client.exec_stream(USER, "api", "cat; pwd >&2; exit 4", stdin=everything, cwd="/") as output:
        found = {"stdout": b"", "stderr": b""}
        async for stream, data in output:
            found[stream] += data
    assert found == {"stdout": everything, "stderr": b"/\n"}
    assert (output.end, output.status) == (StreamEnd("exited"), ExecStatus(exit_code=4, signal=None, timed_out=False))
    async with client.exec_stream(USER, "api", "yes", timeout=0.3) as output:
        async for _ in output:
            pass
    assert output.status == ExecStatus(exit_code=None, signal=signal.SIGKILL, timed_out=True)
    for command, error in (("x", NotFoundError), (["/no/such"], StartError)):
        with pytest.raises(error):
            await anext(client.exec_stream(USER, "other" if command == "x" else "api", command))


async def test_what_nobody_hears_any_more_is_killed(api: Api, client: Client) -> None:
    await client.start(spec(["sleep", "600"]))
    uid = api.supervisor.get(USER, "api").user.linux_uid
    for command in ("echo one; sleep 600 & wait", "yes", "yes & sleep 600"):
        async with client.exec_stream(USER, "api", command, timeout=600) as output:
            await soon(anext(output))
            assert len(processes_of(uid)) > 1
        await eventually(lambda: len(processes_of(uid)) == 1)
        assert output.status is None


async def test_an_execution_ends_with_its_caller(api: Api, client: Client) -> None:
    view = await client.start(spec(["sleep", "600"]))
    assert view.isolation is not None
    uid = view.isolation.uid[0]
    executing = asyncio.create_task(client.exec(USER, "api", ["sleep", "601"], timeout=600))
    await eventually(lambda: len(processes_of(uid)) == 2)
    executing.cancel()
    await eventually(lambda: len(processes_of(uid)) == 1)


async def test_files_go_in_and_out(api: Api, client: Client) -> None:
    content = os.urandom(1 << 20)
    for path in ("main.bin", "a/b c/d%2Fe.bin", "\u00e9?#&+", "..x/...", "-"):
        put = await client.put_file(USER, "api", path, content)
        assert (put.files, put.bytes) == (1, len(content))
        assert await client.get_file(USER, "api", path) == content
        assert await api.supervisor.files.read(USER, "api", path) == content
    assert (await client.put_file(USER, "api", "empty", b"")).bytes == 0
    assert await client.get_file(USER, "api", "empty") == b""
    with pytest.raises(NotFoundError):
        await client.get_file(USER, "api", "none")
    with pytest.raises(FilesError):
        await client.get_file(USER, "api", "a")
    for path in ("../../etc/passwd", "/etc/passwd", "a/../../x", "a/\udcff"):
        with pytest.raises(SpecError):
            await client.get_file(USER, "api", path)
        with pytest.raises(SpecError):
            await client.put_file(USER, "api", path, b"x")


@pytest.mark.usefixtures("small_pages")
async def test_lists_have_all_pages(api: Api, client: Client) -> None:
    users = ["a", "a/b", "b", "\u00e9"]
    for user in users:
        for service in ("x", "y"):
            await api.supervisor.start(spec("sleep 600", user=user, service=service))
    found = await client.list_sandboxes()
    assert [(view.user_id, view.service_id) for view in found] == [(u, s) for u in users for s in ("x", "y")]
    assert [view.service_id for view in await client.list_sandboxes("a/b")] == ["x", "y"]
    assert await client.list_sandboxes("nobody") == []
    assert [user.saas_user_id for user in await client.list_users()] == users


async def test_a_start_may_wait_until_it_is_ready(api: Api, client: Client) -> None:
    waits = "while [ ! -e go ]; do sleep 0.01; done"
    starting = asyncio.create_task(
        client.start(
            spec(f"{waits}; touch up; sleep 600", ready=Probe(command="test -e up", interval=0.05)), wait_ready=True
        )
    )
    await eventually(lambda: [box for box in api.supervisor.list() if box.state == "running"])
    assert not (await client.get_sandbox(USER, "api")).ready
    assert not starting.done()
    await client.put_file(USER, "api", "go", b"")
    assert (await soon(starting)).ready


async def test_who_waits_in_vain_is_told_how_it_ended(api: Api, client: Client) -> None:
    for service, restart, message in (
        ("b", RestartPolicy(), "b has ended before it was ready: exited with code 4"),
        # The one before it, which has to go, is another: how that one ended is not told.
        ("c", RestartPolicy("always", backoff=0.01, max_restarts=1), "c is crash-looping: exited with code 4"),
        ("c", RestartPolicy(), "c has ended before it was ready: exited with code 5"),
    ):
        code = message[-1]
        never = spec(f"exit {code}", user="a b", service=service, restart=restart, ready=Probe(command="false"))
        with pytest.raises(StateError, match=message) as caught:
            await soon(client.start(never, wait_ready=True))
        assert caught.value.remedy == f"see its log: pactown-runner logs 'a b' {service}"


async def test_what_a_newer_server_tells_besides_is_left_out(api: Api, client: Client) -> None:
    made = await client.start(spec("sleep 600"))
    await client.stop(USER, "api", grace=0)
    values: dict[str, Any] = json.loads(json.dumps(made.to_dict()))
    assert SandboxView.of(values) == made
    for part in (values, values["isolation"], values["restart"]):
        part["new"] = 1
    assert SandboxView.of(values) == made
