"""Right and wrong requests, made of the server's own OpenAPI document: no answer but those that it foresees."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pactown_runner import RunnerError, Settings, Supervisor
from pactown_runner.api.table import ROWS
from pactown_runner.errors import NotFoundError
from pactown_runner.registry import Standing
from tests.api import fuzz
from tests.api.conftest import serving
from tests.supervising import ROOT, leftovers, soon, spec

pytestmark = [pytest.mark.host]

EXAMPLES = int(os.environ.get("PACTOWN_FUZZ_EXAMPLES", "430"))
"""How many requests each client makes up for each route, besides some 1,300 that the document alone gives: 20,000 in
all. Each takes 8 ms of one core, those of both clients and of the server counted."""
SEED = int(os.environ.get("PACTOWN_FUZZ_SEED", "1"))
SEEDS = (SEED, SEED + 1)
"""Of two clients. One after another they would take as long again; and each sees what the other does."""
RESULTS = os.environ.get("PACTOWN_FUZZ_RESULTS")
"""A directory for what was answered."""


@pytest.fixture
def api_settings(api_settings: Settings) -> Settings:
    """Few accounts and few sandboxes: what is asked for must not be what fills this host."""
    first, _ = api_settings.uid_ranges[0]
    return replace(
        api_settings,
        uid_ranges=((first, first + len(fuzz.USERS) + len(SEEDS) + 2),),
        max_sandboxes=8,
        max_sandboxes_per_user=4,
        starts_per_minute=3000,
        archive_max_bytes=1 << 20,
        # Nobody is there, should an environment be made after all.
        venv_index="http://127.0.0.1:9/simple",
    )


@asynccontextmanager
async def busy(supervisor: Supervisor) -> AsyncIterator[None]:
    """Have services run for as long as the block lasts, whatever becomes of them."""

    async def restart() -> None:
        while True:
            for user in fuzz.USERS:
                with contextlib.suppress(RunnerError):
                    await supervisor.users.set_standing(user, Standing(None, blocked=False))
                for service in fuzz.SERVICES:
                    with contextlib.suppress(RunnerError):
                        await supervisor.start(spec(["sleep", "600"], user=user, service=service))
            await asyncio.sleep(0.1)

    restarting = asyncio.create_task(restart())
    yield
    assert not restarting.done(), restarting.exception()
    restarting.cancel()
    await asyncio.wait([restarting])


async def fuzzed(url: str, seed: int) -> dict[str, Any]:
    """What a client was answered."""
    options = ["--token", "admin", "--examples", str(EXAMPLES), "--seed", str(seed)]
    command = [sys.executable, "-m", "tests.api.fuzz", url, *options]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    if RESULTS is not None:
        await asyncio.to_thread(Path(RESULTS, f"fuzz-{seed}.json").write_bytes, out)
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.mark.deadline(3600)
async def test_every_answer_is_one_that_the_document_foresees(api_settings: Settings) -> None:
    async with Supervisor(settings=api_settings) as supervisor:
        for user in fuzz.USERS:
            await supervisor.users.get_or_create(user)
        async with serving(supervisor, api_settings, longest_stream=0.02) as api, busy(supervisor):
            found = await asyncio.gather(*(fuzzed(api.url, seed) for seed in SEEDS))
            assert (await (await api.client()).get("/readyz")).json() == {"status": "ready"}
        assert [failure for client in found for failure in client["failures"]] == []
        answers: dict[str, Counter[str]] = defaultdict(Counter)
        for client in found:
            for route, each in client["answers"].items():
                answers[route].update(each)
        wrong = {route: each for route, each in answers.items() if any(status >= "500" for status in each)}
        assert wrong == {}
        # Each route was asked, and did what it is for.
        routes = {f"{row.method} {row.path.replace(':path', '')}": str(row.status) for row in ROWS}
        # Schemathesis asks for the document itself, once.
        del routes["GET /openapi.json"]
        assert {route for route, good in routes.items() if not answers[route][good]} == set()
        assert sum(client["requests"] for client in found) > 20 * len(SEEDS) * EXAMPLES
        for user in (*fuzz.USERS, *map(fuzz.mover, SEEDS)):
            with contextlib.suppress(NotFoundError):
                await soon(supervisor.users.delete(user))
    assert leftovers(api_settings) == []
