"""How much of the disk a tenant's home takes, counted as the tenant.

Root does not walk a tenant's tree. So what comes of it is as much the tenant's word as the files are, and enforces
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import FilesError
from .host import Host
from .jobs import Stop, job
from .launcher import Directory
from .models import IsolatedUser

__all__ = ["USAGE_TIMEOUT", "Usage", "home_usage", "make_sandbox_directory"]

USAGE_TIMEOUT = 60.0
"""Seconds for one count: a million files take about ten."""

_ANSWER_BYTES = 128

# One walk each for blocks and for entries; what cannot be entered is its owner's own doing, and not counted.
_COUNT = """
du -s -B1 . 2>/dev/null | cut -f1
find . -printf x 2>/dev/null | wc -c
find sandboxes -mindepth 1 -maxdepth 1 -type d -printf x 2>/dev/null | wc -c
"""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a home takes.

    Attributes:
        bytes: on the disk; a file with several names counts once, a hole not at all.
        entries: files, folders, links and all else, the home itself among them.
        sandboxes: directories in `sandboxes`.
    """

    bytes: int
    entries: int
    sandboxes: int


def home_usage(host: Host, user: IsolatedUser, *, timeout: float = USAGE_TIMEOUT, stop: Stop | None = None) -> Usage:
    """Count what a home takes; blocking.

    Raises:
        FilesError: it could not be counted in time.
        NotFoundError: there is no such user any more.
        StateError: the user is held by an export or import.
    """
    argv = ["/bin/sh", "-c", _COUNT]
    with job(host, user, argv, directories=[Directory(user.home_dir)], stdout=True, timeout=timeout, stop=stop) as du:
        answer = du.output.read(_ANSWER_BYTES)
        code = du.wait()
    try:
        used, entries, sandboxes = map(int, answer.split())
    except ValueError as error:
        raise FilesError(f"the home of {user.linux_username} could not be counted (exit code {code})") from error
    return Usage(used, entries, sandboxes)


def make_sandbox_directory(host: Host, user: IsolatedUser, service_id: str) -> None:
    """Make `sandboxes/<service_id>`, if it is missing, as the tenant; blocking.

    Raises:
        StartError: it cannot be made; the tenant has put something else there, say.
        NotFoundError: there is no such user any more.
    """
    directories = [Directory(user.home_dir), Directory("sandboxes", make=True), Directory(service_id, make=True)]
    with job(host, user, ["/bin/true"], directories=directories) as true:
        true.wait()
