"""Where the Python environment of a service is, and what tells it from others.

    <home>/.cache/venvs/<name>/                     made by the tenant, see `venvs`
    <home>/.cache/venvs/<name>/.ready-<name>/       an empty folder: made last, when all the rest is on the disk
    <home>/sandboxes/<service>/.venv                a link to the first

**A start looks whether it is there by entering one folder more**, `.venv/.ready-<name>`, in the launcher, before the
directory that it works in. That is one `chdir` of the tenant's own process, under the tenant's own uid and after all
privileges are gone, and it says all at once: that the service has a link, that it leads to the environment of just
these requirements, and that this one is complete. Root opens nothing, neither by a path nor by a link of the tenant's,
and remembers nothing that might no longer be so. It costs the kernel two microseconds, and this process 25, mostly to
name the environment. When it cannot be entered the program is not executed: the environment is made (`ensure_venv`),
and the program started once more.

What the tenant puts there itself under that name is used, and is the tenant's own harm: it could as well have changed
what the environment holds.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from .config import Settings
from .models import IsolatedUser
from .pythons import find_python

__all__ = ["Venv", "ready_name", "venv_of"]

_FORM = "1"
"""To be changed when environments are made in another way, so that those of before are made anew."""

_NAME_DIGITS = 32
"""The path of an environment's Python stands in the first line of its programs, for which the kernel has 255 bytes."""

_TELLS_VERSION = re.compile(r"\d+\.\d+\Z")


class Venv(NamedTuple):
    """The environment of one service.

    Attributes:
        name: what names it among all of its tenant's: it differs with the interpreter, the platform, the package index,
            the requirements, and the place, which its programs hold.
        cache: the folder of all of the tenant's environments.
        link: what the service knows it by.
        python: the interpreter that it is made with.
    """

    name: str
    cache: str
    link: str
    python: str

    @property
    def ready(self) -> str:
        """The folder that can be entered if, and only if, the environment is complete, and the service's."""
        return f"{self.link}/{ready_name(self.name)}"

    def variables(self, path: str) -> dict[str, str]:
        """What a program that is to run in it needs in its environment, where its PATH would be `path`."""
        return {"PATH": f"{self.link}/bin:{path}", "VIRTUAL_ENV": self.link}

    def search_path(self, argv0: str, path: str) -> str:
        """Where a program is to be sought, given the `path` of its environment.

        The interpreter is sought in the environment alone: if it is missing there, another one would run without the
        requirements.
        """
        return f"{self.link}/bin" if argv0 in ("python", "python3") else path


def ready_name(name: str) -> str:
    """What the folder is called that says that an environment is complete."""
    return f".ready-{name}"


def venv_of(settings: Settings, user: IsolatedUser, service_id: str, requirements: Sequence[str]) -> Venv:
    """The environment of a service that has these requirements. It need not be there.

    Raises:
        ConfigError: there is no Python that tenants can execute.
    """
    python = os.path.realpath(settings.venv_python or find_python())
    home = str(user.home_dir)
    cache = f"{home}/.cache/venvs"
    name = _name((cache, _identity(python), os.uname().machine, settings.venv_index or ""), tuple(requirements))
    return Venv(name, cache, f"{home}/sandboxes/{service_id}/.venv", python)


def _identity(python: str) -> str:
    """What tells an interpreter from one of another version: it is not executed for that, since we may be root.

    As a rule its name holds the version that matters (`python3.11`): it stays the same over updates that environments
    outlast.
    """
    if _TELLS_VERSION.search(python):
        return python
    try:
        found = os.stat(python)
    except OSError:
        return python  # who executes it is told what is wrong
    return f"{python} {found.st_size} {found.st_mtime_ns}"


@functools.lru_cache(4096)
def _name(where: tuple[str, ...], requirements: tuple[str, ...]) -> str:
    texts = (_FORM, *where, *sorted(set(requirements)))
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:_NAME_DIGITS]
