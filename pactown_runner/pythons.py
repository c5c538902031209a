"""Which Python tenants can execute. The one that this process runs on may well not be, such as one below `/root`."""

from __future__ import annotations

import functools
import os
import stat
import sys
from pathlib import Path

from .errors import ConfigError
from .passage import way_to

__all__ = ["find_python"]

_USUAL_PYTHONS = ("/usr/bin/python3", "/usr/local/bin/python3")


@functools.cache
def find_python() -> str:
    """The first Python that everybody on this host can execute, with its library; without root, our own.

    Raises:
        ConfigError: there is none.
    """
    own = os.path.realpath(sys.executable)
    if os.geteuid() != 0 or (_open_to_all(own) and _open_to_all(os.__file__)):
        return own
    for path in _USUAL_PYTHONS:
        if _open_to_all(path):
            return path
    raise ConfigError(
        f"tenants can execute none of {', '.join((own, *_USUAL_PYTHONS))}", remedy="install the system's python3"
    )


def _open_to_all(path: str) -> bool:
    """Whether everybody can read and execute a file, or read it if it is no program."""
    try:
        found = os.stat(path)
        wanted = stat.S_IROTH | (stat.S_IXOTH & (found.st_mode >> 6))
        passable = all(directory.stat().st_mode & stat.S_IXOTH for directory in way_to(Path(path)))
    except OSError:
        return False
    return passable and found.st_mode & wanted == wanted
