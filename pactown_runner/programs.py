"""From what a sandbox is to run to what the launcher has to be told."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from .launcher import DEFAULT_PATH, Directory, LaunchSpec
from .models import IsolatedUser
from .specs import SandboxSpec
from .venv_layout import Venv

__all__ = ["launch_spec", "tenant_environment"]


def launch_spec(spec: SandboxSpec, user: IsolatedUser, venv: Venv | None = None) -> LaunchSpec:
    """What the launcher has to be told to run `spec` as `user`.

    Args:
        venv: the environment of its requirements, if it has any. Where it is not complete nothing is executed.
    """
    environment = {**tenant_environment(user), **spec.env}
    path = None
    directories = [
        Directory(user.home_dir),
        Directory("sandboxes", make=True),
        Directory(spec.service_id, make=True),
    ]
    if spec.cwd is not None:
        directories.append(Directory(spec.cwd))
    if venv is not None:
        environment |= venv.variables(environment["PATH"])
        path = venv.search_path(spec.argv[0], environment["PATH"])
        directories.insert(0, Directory(venv.ready))
    return LaunchSpec(
        argv=spec.argv,
        mode="root" if os.geteuid() == 0 else "user",
        uid=user.linux_uid,
        gid=user.linux_gid,
        env=environment,
        path=path,
        directories=directories,
        oom_score_adj=_oom_score_adj(),
        namespaces=spec.namespaces,
    )


def tenant_environment(user: IsolatedUser) -> dict[str, str]:
    """The environment that every program of a tenant begins with."""
    return {
        "PATH": DEFAULT_PATH,
        "HOME": str(user.home_dir),
        "USER": user.linux_username,
        "LOGNAME": user.linux_username,
        "SHELL": "/bin/sh",
        "LANG": "C.UTF-8",
    }


@functools.cache
def _oom_score_adj() -> int | None:
    """0 for programs of a supervisor that is spared by the kernel's OOM killer: they are not to be; else as it is.

    Looked at once: who spares a supervisor does so before it starts anything.
    """
    own = int(Path("/proc/self/oom_score_adj").read_bytes())
    return 0 if own < 0 else None
