"""What is asked of a tenant's account in these tests, and looks at what became of files."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from pactown_runner.config import Settings
from pactown_runner.models import IsolatedUser
from tests import hostsweep

USER, OTHER, SERVICE = "auth0|files", "auth0|other", "api"


def start_as_tenant(user: IsolatedUser, command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, user=user.linux_uid, group=user.linux_gid, extra_groups=[], cwd=user.home_dir, start_new_session=True
    )


def as_tenant(user: IsolatedUser, script: str) -> None:
    assert start_as_tenant(user, ["/bin/sh", "-ec", script]).wait() == 0


def job_scopes(settings: Settings) -> list[Path]:
    """The cgroups of all jobs of this state."""
    top = hostsweep.cgroup2_mounts()[0] / settings.cgroup_slice
    return [path for path in top.rglob("_job-*") if path.is_dir()]


def contents(top: Path) -> dict[str, bytes | None]:
    """Content of all files below a folder, None for folders; links left out."""
    found: dict[str, bytes | None] = {}
    for folder, names, files in os.walk(top):
        for name in names + files:
            path = Path(folder, name)
            if not path.is_symlink():
                found[str(path.relative_to(top))] = path.read_bytes() if path.is_file() else None
    return found


def snapshot(top: Path) -> dict[str, tuple[object, ...]]:
    """All that writing could change."""
    return {
        str(path): (found.st_ino, found.st_mode, found.st_uid, found.st_size, found.st_mtime_ns)
        for path in [top, *top.rglob("*")]
        if (found := path.lstat())
    }


def until(condition: object, seconds: float = 10.0) -> None:
    """Wait for a condition that nothing tells of."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.005)
