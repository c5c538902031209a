"""Rows to write, and what tests of the registry do more than once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pactown_runner.errors import AdmissionError
from pactown_runner.registry import Quota, Quotas, Registry, SandboxRow, ServiceRow, UserRow

ROOT = Path(__file__).resolve().parent.parent.parent


def user_row(saas_id: str = "auth0|1", key: str = "aaaaaaaa", uid: int = 64100, virtual: bool = False) -> UserRow:
    return UserRow(
        saas_id=saas_id,
        key=key,
        username=f"pactown_{key}",
        uid=uid,
        gid=uid,
        home=Path("/srv/homes") / f"pactown_{key}",
        created_at=1700000000.25,
        virtual=virtual,
    )


def sandbox_row(service_id: str = "api", key: str = "aaaaaaaa", run_id: str = "r1", owner: str = "o1") -> SandboxRow:
    return SandboxRow(
        key=key,
        service_id=service_id,
        run_id=run_id,
        owner=owner,
        kind="service",
        spec='{"command": ["true"]}',
        cgroup=f"/pactown.slice/pactown-{key}.slice/{service_id}.scope",
        created_at=1700000001.5,
    )


def service_row(service_id: str = "api", created_at: float = 1700000001.5) -> ServiceRow:
    row = sandbox_row(service_id)
    return ServiceRow(row.key, service_id, row.spec, created_at)


class Clock:
    """A clock that stands still until it is set."""

    now = 1700000000.0

    def __call__(self) -> float:
        return self.now


def statements(registry: Registry) -> list[str]:
    """What is executed from now on."""
    seen: list[str] = []
    with registry._database as db:
        db.set_trace_callback(seen.append)
    return seen


def run_python(source: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout


def started(source: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process that is yet to be told to go on."""
    return subprocess.Popen(
        [sys.executable, "-c", source, *arguments], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def finished(child: subprocess.Popen[str]) -> str:
    """Tell it to go on; returns what it printed until its end."""
    output, _ = child.communicate("\n", timeout=60)
    assert child.returncode == 0
    return output


def start(registry: Registry, per_minute: float, key: str = "aaaaaaaa") -> float:
    """Start and end something; returns for how many seconds that is refused, or 0."""
    try:
        registry.sandboxes.claim(sandbox_row(key=key), Quotas(Quota(starts_per_minute=per_minute)))
    except AdmissionError as error:
        refused = error
    else:
        assert registry.sandboxes.release(key, "api", "r1")
        return 0.0
    assert refused.limit == "starts_per_minute"
    assert refused.retry_after is not None
    assert refused.retry_after > 0
    return refused.retry_after
