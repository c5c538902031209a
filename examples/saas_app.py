"""A small SaaS back end: tenants deploy Python web apps, and an ASGI application keeps them running.

    pip install 'pactown-runner[all]' fastapi uvicorn
    uvicorn --factory examples.saas_app:create_app

    curl -X PUT localhost:8000/apps/alice/hello --data-binary 'print("hello from alice")'
    curl localhost:8000/apps/alice/hello/logs

The application may be restarted at any time, also while it is busy: the tenants' apps go on meanwhile.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from cgroups import Limits
from pactown_runner import RestartPolicy, RunnerError, Sandbox, SandboxSpec, Settings, Supervisor
from pactown_runner.errors import AlreadyRunningError, NotFoundError

STATUS = {NotFoundError: 404, AlreadyRunningError: 409}


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application; its settings are the host's, but that what runs is left running when it ends."""
    settings = replace(settings or Settings.load(), on_exit="leave")
    supervisor = Supervisor(settings=settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with supervisor:
            yield

    app = FastAPI(title="apps", lifespan=lifespan)

    @app.exception_handler(RunnerError)
    async def refuse(request: Request, error: RunnerError) -> JSONResponse:
        body = {"code": error.code, "message": error.message, "remedy": error.remedy}
        return JSONResponse(body, status_code=STATUS.get(type(error), 400))

    @app.put("/apps/{tenant}/{name}")
    async def deploy(tenant: str, name: str, request: Request) -> dict[str, Any]:
        """Put a program in place, and start it; a running one is replaced."""
        await supervisor.files.put(tenant, name, await request.body(), "main.py")
        spec = SandboxSpec(
            user_id=tenant,
            service_id=name,
            command=["python3", "-u", "main.py"],
            limits=Limits(**app.state.limits),
            restart=RestartPolicy("always", max_restarts=5),
        )
        with suppress(NotFoundError):
            await supervisor.get(tenant, name).stop(grace=2)
        return _shown(await supervisor.start(spec))

    @app.get("/apps")
    async def show_all() -> list[dict[str, Any]]:
        return [_shown(sandbox) for sandbox in supervisor.list()]

    @app.get("/apps/{tenant}/{name}")
    async def show(tenant: str, name: str) -> dict[str, Any]:
        return _shown(supervisor.get(tenant, name))

    @app.get("/apps/{tenant}/{name}/logs")
    async def logs(tenant: str, name: str, follow: bool = False) -> StreamingResponse:
        sandbox = supervisor.get(tenant, name)

        async def lines() -> AsyncIterator[bytes]:
            async with aclosing(sandbox.logs(follow=follow)) as records:
                async for record in records:
                    yield record.data

        return StreamingResponse(lines(), media_type="text/plain; charset=utf-8")

    @app.delete("/apps/{tenant}/{name}")
    async def remove(tenant: str, name: str) -> dict[str, Any]:
        return (await supervisor.get(tenant, name).stop()).to_dict()

    # On a host whose cgroups have the memory, cpu and pids controllers: {"memory_max": "256M", "cpu_max": 0.5, ...}
    app.state.limits = {}
    return app


def _shown(sandbox: Sandbox) -> dict[str, Any]:
    return {
        "tenant": sandbox.user_id,
        "name": sandbox.service_id,
        "state": sandbox.state,
        "pid": sandbox.pid,
        "restarts": sandbox.restarts,
    }
