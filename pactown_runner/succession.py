"""A supervisor as the successor of others: what a dead owner left is ended or gone on with, for as long as it lives."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time

import anyio

from .errors import SpecError
from .exits import reap_late
from .holdings import Run
from .host import LoopHost
from .live import LiveSandboxes
from .recovery import Found, claim_left_behind, end_left_behind, end_unfinished, forget_dead_owners
from .specs import SandboxSpec

__all__ = ["Succession"]

_log = logging.getLogger(__name__)


class Succession:
    """Takes over what dead owners left.

    Args:
        live: where that begins which goes on.
        services: take services too, and bring back registered ones that nobody runs. Who does not stay to look after
            them leaves them alone.
    """

    def __init__(self, host: LoopHost, live: LiveSandboxes, *, services: bool) -> None:
        self._host = host
        self._live = live
        self._services = services

    async def watch(self) -> None:
        """Take over again and again, and put away what could not be ended before; until cancelled."""
        host = self._host
        while True:
            await anyio.sleep(host.settings.takeover_interval)
            try:
                await self.take_over()
                await end_unfinished(host)
                await host.in_thread(forget_dead_owners, host)
                reap_late(host.unreaped)
                # The loop's own connection leaves this to us: it waits for the disk.
                await host.in_thread(host.registry.checkpoint)
            except Exception:
                # A look that failed, on a full disk perhaps, must not be the last one.
                _log.exception("cannot look for what other supervisors left")

    async def take_over(self) -> None:
        """End one-shot runs that were left, and go on with services or end them, as the settings say."""
        host = self._host
        for found in await host.in_thread(lambda: claim_left_behind(host, services=self._services)):
            keep = found.row.kind == "service" and host.settings.on_crash == "adopt"
            if not (keep and await self._go_on(found)):
                await end_left_behind(host, found.claim)
        if self._services:
            await self._bring_back()

    async def _go_on(self, found: Found) -> bool:
        """Go on with a service: with what runs of it, or else as its restart policy says. False if it has to end."""
        try:
            row = found.row
            run = Run(SandboxSpec.from_json(row.spec), "service", row.run_id, row.created_at)
            if (started := self._live.find(run.spec.user_id, run.spec.service_id)) is not None:
                # A start here that came too early: the claim is the other's, and it is about to be told so.
                await asyncio.gather(started.wait(), return_exceptions=True)
            if found.scope is not None and await self._adopt(run, found):
                return True
            if run.spec.restart.mode == "no" or not await end_left_behind(self._host, found.claim, keep=True):
                return False
        except Exception as error:
            _log.error("cannot go on with %s, which another supervisor left: %s", found.row.cgroup, error)
            return False
        self._live.begin(self._host, run, "lost", found.claim)
        return True

    async def _adopt(self, run: Run, found: Found) -> bool:
        try:
            await self._live.begin(self._host, run, "adopt", found.claim).started()
        except Exception as error:
            # Where nothing ran, because its start was cut short perhaps, nothing is lost.
            level = logging.ERROR if found.populated else logging.INFO
            _log.log(level, "cannot go on with %s, which another supervisor left: %s", found.row.cgroup, error)
            return False
        return True

    async def _bring_back(self) -> None:
        """Start registered services that nobody runs: after a restart of the supervisor, or of the host."""
        host = self._host
        for row in await host.in_thread(host.registry.services.absent):
            try:
                spec = SandboxSpec.from_json(row.spec)
            except SpecError as error:
                _log.error("cannot bring back service %s of user %s: %s", row.service_id, row.key, error)
                continue
            if self._live.find(spec.user_id, spec.service_id) is None:
                run = Run(spec, "service", secrets.token_hex(8), time.time())
                self._live.begin(host, run, "return")
