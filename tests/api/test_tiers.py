"""Tiers and blocks over HTTP: the operator gives them, and what runs keeps to them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from urllib.parse import quote

import pytest

from cgroups import Limits
from pactown_runner import RestartPolicy, Settings, Supervisor
from pactown_runner.api.table import ROWS
from pactown_runner.errors import BlockedError, LimitsError
from pactown_runner.registry import Standing
from pactown_runner.tiers import Tier
from tests.api.conftest import USER, Api, serving
from tests.supervising import eventually, processes_of, soon, spec

pytestmark = [pytest.mark.host]

TIERS = (Tier(name="free", max_sandboxes=1, starts_per_hour=2), Tier(name="pro", max_sandboxes=3))
TIER = f"/runner/isolation/user/{quote(USER, safe='')}/tier"
BOX = f"/runner/sandboxes/{quote(USER, safe='')}/api"


@pytest.fixture
async def api(settings: Settings, api_settings: Settings) -> AsyncIterator[Api]:
    """A server with tiers that this host can enforce."""
    settings, api_settings = (replace(given, tiers=TIERS) for given in (settings, api_settings))
    async with Supervisor(settings=settings) as supervisor, serving(supervisor, api_settings) as api:
        yield api


async def test_a_tier_is_given_and_kept_to(api: Api) -> None:
    client = await api.client()
    assert [tier["name"] for tier in (await client.get("/runner/tiers")).json()["tiers"]] == ["free", "pro"]
    assert (await client.get(TIER)).status_code == 404
    assert (await client.put(TIER, json={"tier": "free"})).status_code == 404
    await api.supervisor.users.get_or_create(USER)
    assert (await client.get(TIER)).json() == {"user_id": USER, "tier": None, "blocked": False}
    given = await client.put(TIER, json={"tier": "free"})
    assert given.json() == (await client.get(TIER)).json() == {"user_id": USER, "tier": "free", "blocked": False}
    body = {"user_id": USER, "service_id": "api", "command": "sleep 600"}
    assert (await client.post("/runner/sandboxes", json=body)).status_code == 201
    refused = await client.post("/runner/sandboxes", json={**body, "service_id": "b"})
    assert (refused.status_code, refused.json()["limit"]) == (429, "max_sandboxes_per_user")
    await client.put(TIER, json={"tier": "pro"})
    assert (await client.post("/runner/sandboxes", json={**body, "service_id": "b"})).status_code == 201
    detail = (await client.get(TIER.replace("/tier", "/stats?detail=true"))).json()["detail"]
    assert (detail["tier"], detail["blocked"], detail["running"]) == ("pro", False, 2)
    answer = await client.put(TIER, json={"tier": "gold"})
    assert (answer.status_code, answer.json()["remedy"]) == (422, "choose from free, pro")
    assert (await client.get(TIER)).json()["tier"] == "pro"


async def test_starts_per_hour_are_the_tiers(api: Api) -> None:
    client = await api.client()
    await api.supervisor.users.get_or_create(USER)
    await client.put(TIER, json={"tier": "free"})
    body = {"user_id": USER, "service_id": "api", "command": "true", "kind": "run"}
    for _ in range(2):
        assert (await client.post("/runner/sandboxes", json=body)).status_code == 201
    refused = await client.post("/runner/sandboxes", json=body)
    assert (refused.status_code, refused.json()["limit"]) == (429, "starts_per_hour")
    assert 1700 < int(refused.headers["retry-after"]) <= 1800


async def test_a_tier_is_nothing_that_its_tenant_could_give_itself(api: Api) -> None:
    await api.supervisor.users.get_or_create(USER)
    for bearer in ("shop", "shop-read", "read"):
        answer = await (await api.client(bearer)).put(TIER, json={"tier": "pro"})
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert next(row for row in ROWS if row.name == "users-assign").access.whole_host


async def test_who_is_blocked_stands_still_and_starts_nothing(api: Api) -> None:
    client, supervisor = await api.client(), api.supervisor
    one = await supervisor.start(spec("sleep 600", restart=RestartPolicy("always", backoff=0.01)))
    two = await supervisor.start(spec("sleep 600", service="two"))
    other = await supervisor.start(spec("sleep 600", user="other"))
    await client.put(TIER, json={"tier": "pro", "blocked": True})
    assert [box.state for box in (one, two, other)] == ["frozen", "frozen", "running"]
    for method, where, body in (
        ("POST", "/runner/sandboxes", {"user_id": USER, "service_id": "new", "command": "true"}),
        ("POST", BOX + "/thaw", None),
        ("POST", BOX + "/restart", None),
    ):
        answer = await client.request(method, where, json=body)
        assert (answer.status_code, answer.json()["code"]) == (403, "blocked"), where
    assert (await client.post(BOX + "/exec", json={"command": "true"})).status_code == 409
    assert one.state == "frozen"
    # It is the operator's to look after, all the same.
    assert (await client.post(TIER.replace("/tier", "/export"))).status_code == 200
    assert (await client.put(BOX + "/files/note", content=b"x")).status_code == 200
    assert (await client.delete(BOX.replace("/api", "/two") + "?grace=0")).json()["outcome"]["reason"] == "stopped"
    await client.put(TIER, json={"tier": "pro"})
    assert one.state == "running"
    assert (await client.post(BOX + "/restart?grace=0")).status_code == 200


async def test_what_ends_while_its_tenant_is_blocked_comes_back_afterwards(api: Api) -> None:
    client, supervisor = await api.client(), api.supervisor
    policy = RestartPolicy("always", backoff=0.01, backoff_max=0.01, max_restarts=1)
    sandbox = await supervisor.start(spec("sleep 600", restart=policy))
    uid = sandbox.user.linux_uid
    await client.put(TIER, json={"blocked": True})
    await sandbox._holdings.on_cgroup(lambda cgroup: cgroup.kill())
    await eventually(lambda: sandbox.state == "backing-off" and isinstance(sandbox.course.failure, BlockedError))
    assert processes_of(uid) == {}
    await client.put(TIER, json={})
    await eventually(lambda: sandbox.state == "running")
    assert (await soon(sandbox.stop(0))).reason == "stopped"


async def test_limits_of_a_tier_are_those_of_a_start_that_gives_none(settings: Settings) -> None:
    tiers = (Tier(name="small", default_limits=Limits(pids_max=7)),)
    async with Supervisor(settings=replace(settings, tiers=tiers)) as supervisor:
        await supervisor.start(spec("sleep 600", service="before"))
        await supervisor.users.set_standing(USER, Standing("small"))
        if "pids" in supervisor._host.tree.root.enabled():  # type: ignore[union-attr]
            sandbox = await supervisor.start(spec("sleep 600"))
            assert sandbox.isolation.limits["pids.max"] == "7"
        else:
            # It says so, which tells that they were asked for.
            with pytest.raises(LimitsError, match="pids"):
                await supervisor.start(spec("sleep 600"))


async def test_a_signal_reaches_all_processes(api: Api) -> None:
    client = await api.client()
    sandbox = await api.supervisor.start(spec("trap 'exit 5' USR1; sleep 600 & sleep 600 & wait"))
    for bad in ("SIGNONE", 0, 65, "9", True, None):
        assert (await client.post(BOX + "/signal", json={"signal": bad})).status_code == 422
    await eventually(lambda: len(processes_of(sandbox.user.linux_uid)) >= 3)
    answer = await client.post(BOX + "/signal", json={"signal": "SIGUSR1"})
    assert answer.json()["signalled"] >= 3
    assert (await soon(sandbox.wait())).exit_code == 5
    assert (await client.post(BOX + "/signal", json={"signal": 15})).status_code == 404
