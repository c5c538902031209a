"""`GET /metrics` of a real server, read by the official parser."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pactown_runner import RestartPolicy, Supervisor
from tests.api.conftest import USER, Api
from tests.supervising import line_of, soon, spec

pytestmark = [pytest.mark.host]


def value(answer: httpx.Response, name: str, **labels: str) -> float | None:
    """The value of `pactown_<name>` with exactly these labels."""
    assert answer.status_code == 200, answer.text
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
    found = [one.value for one in samples if one.name == f"pactown_{name}" and one.labels == labels]
    assert len(found) <= 1
    return found[0] if found else None


async def test_a_scrape_tells_of_a_service_that_crashed_and_was_restarted(api: Api) -> None:
    policy = RestartPolicy("on-failure", backoff=0.01, jitter=0.0)
    # The first run fails, the second stays.
    command = "test -e again || { touch again; exit 3; }; echo ready; exec sleep 1000"
    await line_of(await api.supervisor.start(spec(command, restart=policy)))
    client = await api.client("read")
    answer = await soon(client.get("/metrics"))
    assert answer.headers["content-type"] == "text/plain; version=1.0.0; charset=utf-8"
    ours = {"user": USER, "service": "api"}
    assert value(answer, "sandbox_starts_total", **ours) == 2
    assert value(answer, "sandbox_restarts_total", **ours) == 1
    assert value(answer, "sandbox_ends_total", **ours, reason="exited") == 1
    assert value(answer, "sandbox_log_lines_total", **ours) == 1
    assert value(answer, "sandboxes", state="running") == 1
    assert value(answer, "spawn_seconds_count") == 2
    assert (value(answer, "sandbox_cpu_seconds_total", **ours) or 0) > 0
    await soon(client.get("/metrics"))


async def test_the_loop_is_watched_while_the_server_runs(api: Api) -> None:
    client = await api.client()
    while not value(answer := await soon(client.get("/metrics")), "event_loop_delay_seconds_count"):
        assert answer.status_code == 200


async def test_many_may_ask_at_once(api: Api) -> None:
    await api.supervisor.start(spec("sleep 1000"))
    client = await api.client()
    answers = await soon(asyncio.gather(*(client.get("/metrics") for _ in range(20))))
    assert {value(answer, "sandboxes", state="running") for answer in answers} == {1.0}


@pytest.mark.parametrize("bearer", ["shop", "shop-read", "other"])
async def test_who_is_bound_to_a_tenant_gets_nothing(api: Api, bearer: str) -> None:
    await api.supervisor.start(spec("sleep 1000"))
    answer = await soon((await api.client(bearer)).get("/metrics"))
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert "pactown_" not in answer.text


async def test_any_id_is_a_label(api: Api, supervisor: Supervisor) -> None:
    odd = 'a"b\\c\nd é {x="y"} _other'
    await supervisor.start(spec("sleep 1000", user=odd))
    answer = await soon((await api.client("read")).get("/metrics"))
    assert value(answer, "sandbox_starts_total", user=odd, service="api") == 1
