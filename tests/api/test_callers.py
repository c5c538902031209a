"""Each kind of caller over all routes of the table: who may not, changes nothing and learns nothing."""

from __future__ import annotations

import asyncio
import grp
import json
import pwd
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from pactown_runner import Settings, Supervisor
from pactown_runner.api.app import openapi
from pactown_runner.api.table import ROWS, Row
from tests.api.conftest import USER, Api, serving
from tests.supervising import soon, spec

pytestmark = [pytest.mark.host]

DOCUMENT = openapi()


def request_of(row: Row, user_id: str = USER) -> dict[str, Any]:
    """A request that would do something: what the document gives as an example, for the sandbox that is there."""
    path = row.path.replace(":path", "").format(user_id=quote(user_id, safe=""), service_id="api", path="new.txt")
    request: dict[str, Any] = {"method": row.method, "url": path}
    operation = DOCUMENT["paths"][row.path.replace(":path", "")][row.method.lower()]
    content = operation.get("requestBody", {}).get("content", {})
    if (json := content.get("application/json")) is not None:
        schema = DOCUMENT["components"]["schemas"][json["schema"]["$ref"].rpartition("/")[2]]
        request["json"] = dict(schema["examples"][0])
        if "user_id" in request["json"]:
            request["json"]["user_id"] = user_id
    elif content:
        request["content"] = b"hello"
    return request


async def ask(client: httpx.AsyncClient, row: Row, user_id: str = USER, **more: Any) -> httpx.Response:
    """Ask, and read the answer, but of a stream its head only."""
    request = client.build_request(**request_of(row, user_id), **more)
    answer = await soon(client.send(request, stream=True))
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        await answer.aclose()
    else:
        await answer.aread()
    return answer


async def state(api: Api) -> Any:
    """All that a request could change."""
    supervisor = api.supervisor
    users = [user.to_dict() for user in await supervisor.users.list()]
    alive = [
        (box.user_id, box.service_id, box.run_id, box.state, box.pid, box.restarts, box.spec.to_json())
        for box in supervisor.list()
    ]
    return users, alive, _files(api.settings), _rows(supervisor), _accounts(api.settings)


def _files(settings: Settings) -> Any:
    """All of the homes and of the logs, down to who owns what."""
    found = {}
    for top in (*settings.users_base.glob("pactown_*"), settings.log_dir):
        for path in (top, *top.rglob("*")):
            status = path.lstat()
            found[path] = (status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_mtime_ns)
    return found


def _rows(supervisor: Supervisor) -> Any:
    with supervisor._host.registry._database as db:  # type: ignore[union-attr]
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()]
        return {table: db.execute(f"SELECT * FROM {table}").fetchall() for table in tables}


def _accounts(settings: Settings) -> Any:
    first, last = settings.uid_ranges[0]
    return [login for login in pwd.getpwall() if first <= login.pw_uid <= last]


@asynccontextmanager
async def nothing_changes(api: Api) -> AsyncIterator[None]:
    before = await state(api)
    async with serving_events(api) as heard:
        yield
    assert await state(api) == before
    assert heard == []


@asynccontextmanager
async def serving_events(api: Api) -> AsyncIterator[list[Any]]:
    heard: list[Any] = []
    reader = api.supervisor.events()

    async def hear() -> None:
        heard.extend([event async for event in reader])

    hearing = asyncio.create_task(hear())
    yield heard
    await asyncio.sleep(0)
    reader.close()
    await soon(hearing)


@pytest.mark.parametrize("name", ["delete", "start", "stop", "freeze", "restart", "put"])
async def test_what_changes_something_would_be_seen(victim: Api, name: str) -> None:
    row = next(row for row in ROWS if row.handler.__name__ == name)
    client = await victim.client()
    before = await state(victim)
    answer = await ask(client, row)
    assert answer.status_code == row.status, answer.text
    assert await state(victim) != before


@pytest.fixture
async def victim(api: Api) -> Api:
    """A server under which something runs that could be harmed."""
    await api.supervisor.files.put(USER, "api", b"precious", "main.txt")
    await api.supervisor.start(spec(["sleep", "600"]))
    await api.supervisor.users.get_or_create("other")
    return api


STRANGERS: dict[str, tuple[dict[str, Any], int]] = {
    "without a token": ({"headers": {}}, 401),
    "with a wrong token": ({"bearer": "wrong"}, 401),
    "with a token's hash": ({"bearer": "8c6976e5b5410415bde908bd4dee15dfb167a9c873fc4bb8a81f6f2ab448a918"}, 401),
    "with an expired token": ({"bearer": "expired"}, 401),
    "with a password": ({"headers": {"Authorization": "Basic YWRtaW46YWRtaW4="}}, 401),
    "with an empty token": ({"headers": {"Authorization": "Bearer"}}, 401),
    "with a token in another scheme": ({"headers": {"Authorization": "Token admin"}}, 401),
    "with a token and more": ({"headers": {"Authorization": "Bearer admin, Bearer read"}}, 401),
    "with no text for a token": ({"headers": {b"Authorization": b"Bearer \xff\xfe"}}, 401),
    "with a token in the address": ({"headers": {}, "params": {"access_token": "admin", "token": "admin"}}, 401),
    "with two tokens": ({"headers": [("Authorization", "Bearer admin"), ("Authorization", "Bearer admin")]}, 401),
    "under a foreign name": ({"bearer": "admin", "headers": {"Host": "evil.example"}}, 421),
    "from a foreign page": ({"bearer": "admin", "headers": {"Origin": "https://evil.example"}}, 403),
    "from a page of nowhere": ({"bearer": "admin", "headers": {"Origin": "null"}}, 403),
    "from a page by its image": ({"bearer": "admin", "headers": {"Sec-Fetch-Site": "cross-site"}}, 403),
    "from a page on the socket": ({"socket": True, "headers": {"Origin": "http://localhost"}}, 403),
}


@pytest.mark.parametrize("kind", STRANGERS)
async def test_strangers_change_nothing_and_learn_nothing(victim: Api, kind: str) -> None:
    how, status = STRANGERS[kind]
    options = dict(how)
    bearer, socket = options.pop("bearer", None), options.pop("socket", False)
    if bearer is None and not socket:
        client = await victim.held.enter_async_context(httpx.AsyncClient(base_url=victim.url, **options))
    else:
        client = await victim.client(bearer, **options)
    async with nothing_changes(victim):
        for row in ROWS:
            answer = await ask(client, row)
            assert answer.status_code == status, (row.name, answer.text)
            assert answer.headers["content-type"] == "application/problem+json"
            assert "pactown_" not in answer.text
        answer = await client.get("/no/such/path")
        assert answer.status_code == status


async def test_who_may_read_changes_nothing(victim: Api) -> None:
    client = await victim.client("read")
    async with nothing_changes(victim):
        for row in ROWS:
            answer = await ask(client, row)
            if row.access.role == "admin":
                assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), row.name
            elif "{path" in row.path:
                assert answer.status_code == 404
            else:
                assert answer.status_code == 200, (row.name, answer.text)
        # This GET makes users, for others.
        answer = await client.get("/runner/isolation/user/new")
        assert (answer.status_code, answer.json()["code"]) == (404, "not-found")


async def test_who_is_bound_to_a_tenant_neither_sees_nor_changes_another(victim: Api) -> None:
    client = await victim.client("other")
    async with nothing_changes(victim):
        for row in ROWS:
            for user_id in (USER, "nobody"):
                answer = await ask(client, row, user_id)
                about = "{user_id}" in row.path or row.name == "sandboxes-start"
                if about or row.access.whole_host:
                    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), row.name
                    # It is the same whether there is such a user or not.
                    assert answer.json() == (await ask(client, row, "nobody")).json()
        assert (await client.get("/runner/sandboxes")).json() == {"sandboxes": [], "count": 0, "next": None}
        assert (await client.get(f"/runner/sandboxes?user_id={quote(USER)}")).json()["count"] == 0
        users = (await client.get("/runner/isolation/users")).json()["users"]
        assert [user["saas_user_id"] for user in users] == ["other"]


async def test_who_is_bound_to_a_tenant_gets_nothing_of_the_whole_host(victim: Api) -> None:
    client = await victim.client("shop")
    rows = [row for row in ROWS if row.access.whole_host]
    assert rows
    async with nothing_changes(victim):
        for row in rows:
            answer = await ask(client, row)
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), row.name


async def test_who_is_bound_to_a_tenant_and_may_read_changes_nothing_of_its_own(victim: Api) -> None:
    client = await victim.client("shop-read")
    async with nothing_changes(victim):
        for row in ROWS:
            answer = await ask(client, row)
            refused = row.access.role == "admin" or row.access.whole_host
            assert (answer.status_code == 403) is refused, (row.name, answer.text)


async def test_who_is_bound_to_a_tenant_has_to_do_with_that_one(victim: Api) -> None:
    shop, reader = await victim.client("shop"), await victim.client("shop-read")
    path = f"/runner/sandboxes/{quote(USER)}/api"
    assert (await reader.get(path)).json()["state"] == "running"
    assert (await reader.post(path + "/freeze")).status_code == 403
    assert (await shop.post(path + "/freeze")).json()["state"] == "frozen"
    assert (await shop.delete(path + "?grace=0")).json()["outcome"]["reason"] == "stopped"


async def test_pages_that_are_allowed_and_names_that_are_known(supervisor: Supervisor, api_settings: Settings) -> None:
    settings = replace(api_settings, api_hosts=("runner.example",), api_origins=("https://admin.example",))
    async with serving(supervisor, settings) as api:
        client = await api.client("admin", headers={"Origin": "https://admin.example", "Host": "Runner.example:8600"})
        answer = await client.get("/healthz")
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://admin.example")
        asked = {"Access-Control-Request-Method": "DELETE", "Access-Control-Request-Headers": "authorization"}
        assert (await client.options("/healthz", headers=asked)).status_code == 200
        asked["Origin"] = "https://evil.example"
        assert (await client.options("/healthz", headers=asked)).status_code == 400
        assert (await client.get("/healthz", headers={"Origin": "https://evil.example"})).status_code == 403


# On the socket -----------------------------------------------------------------------------------------------------


STRANGER = 54321
"""A uid that is nobody's."""


def curl_as(api: Api, uid: int, gid: int, groups: list[int], *words: str) -> subprocess.CompletedProcess[bytes]:
    where = [] if "--connect-to" in words else ["--unix-socket", str(api.where.socket)]
    command = ["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", *where, *words]
    return subprocess.run(
        command, user=uid, group=gid, extra_groups=groups, capture_output=True, check=False, timeout=30, cwd="/"
    )


def let_everybody_in(api: Api) -> None:
    """Take the file system's word away, to have the kernel's about the peer."""
    path = api.where.socket
    assert path is not None
    path.chmod(0o666)
    path.parent.chmod(0o711)


async def everything_as(api: Api, uid: int, groups: list[int], *words: str) -> set[bytes]:
    """What this process is told for each row of the table, body and all."""
    answers = set()
    for row in ROWS:
        request = request_of(row)
        body = json.dumps(request["json"]) if "json" in request else request.get("content", b"").decode()
        given = ["-H", "Content-Type: application/json", "--data-raw", body] if body else []
        url = f"http://localhost{request['url']}"
        done = await asyncio.to_thread(
            curl_as, api, uid, uid, groups, "-X", row.method, "-m", "10", *given, *words, url
        )
        answers.add(done.stdout)
    return answers


@pytest.fixture
def api_settings(api_settings: Settings) -> Settings:
    """With a socket in a place of its own, whose way there can be opened."""
    return replace(api_settings, api_socket=str(api_settings.users_base / "api/api.sock"))


async def test_a_tenant_on_the_socket_gets_nothing(victim: Api) -> None:
    tenant = victim.supervisor.get(USER, "api").user
    async with nothing_changes(victim):
        done = await asyncio.to_thread(
            curl_as, victim, tenant.linux_uid, tenant.linux_gid, [], "http://localhost/healthz"
        )
        assert done.returncode == 7, "it could connect"
    let_everybody_in(victim)
    async with nothing_changes(victim):
        assert await everything_as(victim, tenant.linux_uid, []) == {b"403"}


async def test_a_tenant_on_the_loopback_interface_gets_nothing(victim: Api) -> None:
    tenant = victim.supervisor.get(USER, "api").user
    assert victim.where.address is not None
    # Who has no token is as good as not there, whatever it says of itself.
    to_port = ("--connect-to", f"localhost:80:127.0.0.1:{victim.where.address[1]}")
    said = ("-H", "X-Forwarded-For: 127.0.0.1", "-H", "X-Forwarded-User: root")
    async with nothing_changes(victim):
        assert await everything_as(victim, tenant.linux_uid, [], *to_port, *said) == {b"401"}
        assert await everything_as(victim, tenant.linux_uid, [], *to_port, "-H", "Authorization: Bearer x") == {b"401"}


async def test_a_uid_that_is_not_of_the_group_gets_nothing_on_the_socket(victim: Api) -> None:
    let_everybody_in(victim)
    async with nothing_changes(victim):
        assert await everything_as(victim, STRANGER, []) == {b"403"}
        # Of groups that mean something elsewhere.
        assert await everything_as(victim, STRANGER, [0, 4, 27]) == {b"403"}


async def test_only_the_group_may_use_the_socket_and_no_tenant_by_it(
    supervisor: Supervisor, api_settings: Settings
) -> None:
    name, gid = next((group.gr_name, group.gr_gid) for group in grp.getgrall() if group.gr_gid)
    settings = replace(api_settings, api_group=name)
    async with serving(supervisor, settings) as api:
        assert api.where.socket is not None
        status = api.where.socket.stat()
        assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o660, 0, gid)
        let_everybody_in(api)
        words = "http://localhost/healthz"
        for groups, answer in (([], b"403"), ([gid], b"200"), ([1, gid, 7], b"200"), ([gid + 1], b"403")):
            done = await asyncio.to_thread(curl_as, api, STRANGER, STRANGER, groups, words)
            assert done.stdout == answer, groups
        assert (await asyncio.to_thread(curl_as, api, STRANGER, gid, [], words)).stdout == b"200"
        uid = settings.uid_ranges[0][0]
        assert (await asyncio.to_thread(curl_as, api, uid, gid, [gid], words)).stdout == b"403"
