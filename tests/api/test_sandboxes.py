"""Sandboxes over HTTP: each row of the table once as it is meant, and what goes wrong as a problem."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from pactown_runner import Settings, Supervisor
from tests.api.conftest import USER, Api, serving
from tests.supervising import eventually, line_of, processes_of, python, soon, spec

pytestmark = [pytest.mark.host]

BOX = f"/runner/sandboxes/{quote(USER, safe='')}/api"


def asked(command: Any, /, **more: Any) -> dict[str, Any]:
    return {"user_id": USER, "service_id": "api", "command": command, **more}


async def started(client: httpx.AsyncClient, command: Any = ("sleep", "600"), **more: Any) -> dict[str, Any]:
    answer = await client.post("/runner/sandboxes", json=asked(command, **more))
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert (answer.status_code, problem["code"], problem["status"]) == (status, code, status), problem
    return problem


async def test_a_service_lives_over_http(api: Api) -> None:
    client = await api.client()
    made = await started(client, env={"SECRET": "s3cret"}, restart={"mode": "on-failure"})
    sandbox = api.supervisor.get(USER, "api")
    assert (made["state"], made["pid"], made["ready"]) == ("running", sandbox.pid, True)
    assert made["isolation"] == json.loads(json.dumps(sandbox.isolation.to_dict()))
    assert (made["restart"]["mode"], made["command"]) == ("on-failure", ["sleep", "600"])
    assert "s3cret" not in json.dumps(made)
    assert (await client.get(BOX)).json() == made
    assert (await client.get("/runner/sandboxes")).json() == {"sandboxes": [made], "count": 1, "next": None}
    assert (await client.post(BOX + "/freeze")).json()["state"] == "frozen"
    assert (await client.post(BOX + "/thaw")).json()["state"] == "running"
    again = (await client.post(BOX + "/restart?grace=0")).json()
    assert (again["state"], again["restarts"]) == ("running", 1)
    assert again["pid"] != made["pid"]
    assert again["last_outcome"]["reason"] == "stopped"
    stats = (await client.get(BOX + "/stats")).json()
    assert stats.keys() == (await sandbox.stats()).to_dict().keys()
    gone = (await client.delete(BOX + "?grace=0")).json()
    assert (gone["state"], gone["outcome"]["reason"], gone["pid"]) == ("ended", "stopped", again["pid"])
    refused(await client.get(BOX), 404, "not-found")
    refused(await client.delete(BOX), 404, "not-found")


async def test_what_goes_wrong_has_the_librarys_code_and_remedy(api: Api) -> None:
    client = await api.client()
    await started(client)
    refused(await client.post("/runner/sandboxes", json=asked("true")), 409, "already-running")
    problem = refused(
        await client.post("/runner/sandboxes", json=asked(["/no/such"], service_id="b")), 422, "failed-to-start"
    )
    assert (problem["step"], problem["errno"]) == ("execve", 2)
    problem = refused(await client.post("/runner/sandboxes", json=asked("x", service_id="../b")), 422, "bad-spec")
    assert "1 to 63" in problem["remedy"]
    limits = {"memory_max": "lots"}
    refused(await client.post("/runner/sandboxes", json=asked("x", service_id="b", limits=limits)), 422, "bad-limits")
    refused(await client.patch(BOX + "/limits", json={"memory_max": "64M"}), 422, "limit-not-enforceable")
    refused(await client.post(BOX + "/restart?grace=-1"), 422, "bad-request")
    assert (await client.patch(BOX + "/limits", json={})).status_code == 200


async def test_starts_beyond_a_rate_are_told_when_to_come_again(settings: Settings, api_settings: Settings) -> None:
    settings = replace(api_settings, starts_per_minute=2)
    async with Supervisor(settings=settings) as supervisor, serving(supervisor, settings) as api:
        client = await api.client()
        for name in ("a", "b"):
            await started(client, service_id=name)
        answer = await client.post("/runner/sandboxes", json=asked("x", service_id="c"))
        assert refused(answer, 429, "refused")["limit"] == "starts_per_minute"
        assert 1 <= int(answer.headers["retry-after"]) <= 30


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({}, "body.user_id"),
        ({"colour": "red"}, "body.colour"),
        ({"command": 5}, "body.command"),
        ({"command": ["a", 5]}, "body.command"),
        ({"command": "\ud800"}, "body.command"),
        ({"env": {"A": "\udcff"}}, "body.env"),
        ({"timeout": float("nan")}, "body.timeout"),
        ({"timeout": -1}, "body.timeout"),
        ({"limits": {"pids_max": 1.5}}, "body.limits"),
        ({"restart": {"mode": "never"}}, "body.restart.mode"),
        ({"ready": {"port": 70000}}, "body.ready.port"),
        ({"namespaces": ["pid"]}, "body.namespaces"),
    ],
)
async def test_a_malformed_request_is_told_what_is_wrong_with_it(api: Api, body: dict[str, Any], where: str) -> None:
    client = await api.client()
    content = json.dumps(asked("true", **body) if body else body)
    answer = await client.post("/runner/sandboxes", content=content, headers={"Content-Type": "application/json"})
    problem = refused(answer, 422, "bad-request")
    assert any(fault["where"].startswith(where) for fault in problem["errors"]), problem
    assert api.supervisor.list() == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"null", b'"x"', b"[" * 5000])
async def test_what_is_no_json_is_refused(api: Api, content: bytes) -> None:
    client = await api.client()
    headers = {"Content-Type": "application/json"}
    answer = await client.post("/runner/sandboxes", content=content, headers=headers)
    assert answer.status_code in (400, 422)
    assert answer.headers["content-type"] == "application/problem+json"
    answer = await client.post(
        "/runner/sandboxes", content=json.dumps(asked("x")), headers={"Content-Type": "text/plain"}
    )
    refused(answer, 422, "bad-request")


async def test_a_run_is_answered_when_it_has_ended(api: Api) -> None:
    client = await api.client()
    run = await started(client, "echo out; exit 3", kind="run")
    assert (run["state"], run["kind"], run["outcome"]["reason"], run["outcome"]["exit_code"]) == (
        "ended",
        "run",
        "exited",
        3,
    )
    problem = refused(
        await client.post("/runner/sandboxes", json=asked(["/no/such"], kind="run")), 422, "failed-to-start"
    )
    assert problem["step"] == "execve"
    refused(
        await client.post("/runner/sandboxes", json=asked("x", kind="run", restart={"mode": "always"})), 422, "bad-spec"
    )


async def test_a_run_ends_with_its_caller(api: Api) -> None:
    client = await api.client()
    asking = asyncio.create_task(client.post("/runner/sandboxes", json=asked("sleep 600", kind="run")))
    await eventually(lambda: [box for box in api.supervisor.list() if box.state == "running"])
    (sandbox,) = api.supervisor.list()
    uid = sandbox.user.linux_uid
    asking.cancel()
    assert (await soon(sandbox.wait())).reason == "stopped"
    assert processes_of(uid) == {}


async def test_a_program_is_executed_and_its_output_told(api: Api) -> None:
    client = await api.client()
    await started(client)
    answer = (await client.post(BOX + "/exec", json={"command": ["cat"], "stdin": "h\u00e9llo"})).json()
    assert (answer["exit_code"], answer["stdout"], answer["stderr"]) == (0, "h\u00e9llo", "")
    raw = base64.b64encode(b"\xff\0\n").decode()
    answer = (await client.post(BOX + "/exec", json={"command": "cat >&2; exit 4", "stdin_b64": raw})).json()
    assert (answer["exit_code"], answer["stderr"], answer["stderr_b64"]) == (4, "\ufffd\0\n", raw)
    answer = (
        await client.post(BOX + "/exec", json={"command": "echo $A; pwd; kill -9 $$", "env": {"A": "b"}, "cwd": "/"})
    ).json()
    assert (answer["exit_code"], answer["signal"], answer["stdout"]) == (None, 9, "b\n/\n")
    answer = (await client.post(BOX + "/exec", json={"command": "echo a; sleep 600 & wait", "timeout": 0.5})).json()
    assert (answer["timed_out"], answer["stdout"], answer["signal"]) == (True, "a\n", 9)
    uid = api.supervisor.get(USER, "api").user.linux_uid
    await eventually(lambda: len(processes_of(uid)) == 1)
    answer = (await client.post(BOX + "/exec", json={"command": "head -c 3000000 /dev/zero"})).json()
    assert (len(answer["stdout"]), answer["dropped"]) == (1 << 20, 3_000_000 - (1 << 20))


async def test_an_execution_ends_with_its_caller(api: Api) -> None:
    client = await api.client()
    await started(client)
    uid = api.supervisor.get(USER, "api").user.linux_uid
    asking = asyncio.create_task(client.post(BOX + "/exec", json={"command": "sleep 601 & wait", "timeout": 600}))
    await eventually(lambda: len(processes_of(uid)) == 3)
    asking.cancel()
    await eventually(lambda: len(processes_of(uid)) == 1)


async def test_what_a_program_prints_is_told_as_it_does(api: Api) -> None:
    client = await api.client()
    await started(client)
    # A character in two pieces, bytes that are none, and an end within one.
    command = r"printf 'h\303'; while [ ! -e go ]; do sleep 0.02; done; printf '\251'; printf '\377\303' >&2"
    async with client.stream("POST", BOX + "/exec/stream", json={"command": command}) as answer:
        events = answer.aiter_text()
        said = await soon(anext(events))
        while '"text": "h"' not in said:
            said += await soon(anext(events))
        await api.supervisor.files.put(USER, "api", b"", "go")
        async for piece in events:
            said += piece
    found = re.findall("event: (.*)\ndata: (.*)", said)
    assert (found[0], found[-1][0]) == (("started", "{}"), "end")
    told = [(event, json.loads(data)) for event, data in found]
    assert "".join(data["text"] for event, data in told if event == "stdout") == "h\u00e9"
    assert b"".join(base64.b64decode(data["b64"]) for event, data in told if event == "stderr") == b"\xff\xc3"
    assert told[-1][1] == {"reason": "exited", "exit_code": 0, "signal": None, "timed_out": False}
    refused(await client.post(BOX + "x/exec/stream", json={"command": "x"}), 404, "not-found")
    assert (await client.post(BOX + "/exec/stream", json={"command": ["/no/such"]})).json()["code"] == "failed-to-start"


@pytest.mark.parametrize(
    "body",
    [
        {"command": []},
        {"command": ["cat"], "stdin": "a", "stdin_b64": ""},
        {"command": ["cat"], "stdin_b64": "?"},
        {"command": ["cat"], "timeout": 0},
        {"command": ["a\0b"]},
        {"command": "x", "env": {"A=": "b"}},
    ],
)
async def test_what_cannot_be_executed_is_refused(api: Api, body: dict[str, Any]) -> None:
    client = await api.client()
    await started(client)
    answer = await client.post(BOX + "/exec", json=body)
    assert answer.status_code == 422
    refused(await client.post(BOX + "x/exec", json={"command": "x"}), 404, "not-found")


async def test_files_go_in_and_out(api: Api) -> None:
    client = await api.client()
    content = bytes(range(256)) * 5000
    for path in ("main.bin", "a/b%20c/d%2Fe.bin", "%C3%A9"):
        assert (await client.put(f"{BOX}/files/{path}", content=content)).json() == {"files": 1, "bytes": len(content)}
        answer = await client.get(f"{BOX}/files/{path}")
        assert answer.content == content
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert await api.supervisor.files.read(USER, "api", "a/b c/d/e.bin") == content
    refused(await client.get(BOX + "/files/none"), 404, "not-found")
    refused(await client.get(BOX + "/files/a"), 422, "files")
    for path in ("..%2F..%2Fetc%2Fpasswd", "%2Fetc%2Fpasswd"):
        refused(await client.get(f"{BOX}/files/{path}"), 422, "bad-spec")
        refused(await client.put(f"{BOX}/files/{path}", content=b"x"), 422, "bad-spec")
    refused(await client.put(BOX + "/files/", content=b"x"), 422, "bad-spec")


async def test_lists_come_in_pages_without_a_gap(api: Api) -> None:
    client = await api.client()
    users = ["a", "a/b", "b", "\u00e9"]
    for user in users:
        for service in ("x", "y"):
            await api.supervisor.start(spec("sleep 600", user=user, service=service))
    for what, path, names in (
        ("users", "/runner/isolation/users", [(user,) for user in users]),
        ("sandboxes", "/runner/sandboxes", [(user, service) for user in users for service in ("x", "y")]),
    ):
        found, after = [], None
        for _ in range(20):
            params = {"limit": "3"} | ({} if after is None else {"after": after})
            page = (await client.get(path, params=params)).json()
            assert page["count"] == len(page[what]) <= 3
            found += page[what]
            after = page.get("next")
            if after is None:
                break
        keys = ("saas_user_id",) if what == "users" else ("user_id", "service_id")
        assert [tuple(item[key] for key in keys) for item in found] == names
    only = (await client.get("/runner/sandboxes", params={"user_id": "a/b"})).json()
    assert [box["user_id"] for box in only["sandboxes"]] == ["a/b", "a/b"]
    for bad in ("0", "10001", "x", "-1"):
        refused(await client.get("/runner/sandboxes", params={"limit": bad}), 422, "bad-request")


async def test_it_says_how_it_is(api: Api) -> None:
    client = await api.client()
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    assert (await client.get("/readyz")).json() == {"status": "ready"}
    document = (await client.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.")
    sandbox = await api.supervisor.start(spec(python("print('ready', flush=True); input()"), stdin=True))
    await line_of(sandbox)


async def test_a_parameter_that_is_not_known_is_refused(api: Api) -> None:
    client = await api.client()
    await api.supervisor.users.get_or_create(USER)
    user = f"/runner/isolation/user/{quote(USER, safe='')}"
    for query, message in (
        ("delete-home=false", "there is no such parameter"),
        ("delete_home=true&delete_home=false", "it is there more than once"),
        ("Delete_home=false&", "there is no such parameter"),
    ):
        answer = await client.delete(f"{user}?{query}")
        assert (answer.status_code, answer.json()["code"]) == (422, "bad-request"), answer.text
        assert [fault["message"] for fault in answer.json()["errors"]] == [message]
    assert await api.supervisor.users.get(USER) is not None
