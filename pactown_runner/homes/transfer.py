"""What putting and getting share: the place inside, what came of it, and what went wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import ENOENT
from pathlib import PurePosixPath

from ..errors import FilesError, NotFoundError, SpecError, StartError
from ..jobs import Job
from ..launcher import Directory
from ..models import IsolatedUser
from ..specs import check_service_id
from .unpacking import MAX_NAME_BYTES

__all__ = ["Inside", "OnProgress", "Transfer", "explained", "how", "parts_of"]

OnProgress = Callable[[int, int | None], None]
"""Is told the bytes of content so far, and how many there will be if that is known; from another thread."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """What was put or got.

    Attributes:
        files: how many, folders and links not counted.
        bytes: their content together.
        skipped: what a `get` left out since it is neither file nor folder: links, FIFOs, devices.
        warnings: what the tenant's `tar` remarked, such as that a file changed while it was read. The tenant's word.
    """

    files: int
    bytes: int
    skipped: tuple[str, ...] = ()
    warnings: str = ""


@dataclass(frozen=True, slots=True)
class Inside:
    """A place in a sandbox's directory: the folders on the way, and the name there; none for the directory itself."""

    service_id: str
    folders: tuple[str, ...]
    name: str

    @classmethod
    def of(cls, service_id: str, path: str | PurePosixPath) -> Inside:
        *folders, name = parts_of(path) or ("",)
        return cls(check_service_id(service_id), tuple(folders), name)

    def directories(self, user: IsolatedUser, *, make: bool) -> list[Directory]:
        """The way to the innermost folder, for the launcher."""
        return [
            Directory(user.home_dir),
            *(Directory(name, make) for name in ("sandboxes", self.service_id, *self.folders)),
        ]


def parts_of(path: str | PurePosixPath) -> tuple[str, ...]:
    """The parts of a relative path that leads nowhere else; raises `SpecError` for others."""
    text = str(path)
    parts = PurePosixPath(text).parts
    if text.startswith("/") or ".." in parts or "\0" in text or len(os.fsencode(text)) >= MAX_NAME_BYTES:
        raise SpecError(f"{text[:200]!r} is not a path within a sandbox's directory", remedy="name it without / and ..")
    return parts


@contextmanager
def explained(verb: str) -> Iterator[None]:
    """Turn what the launcher says of a directory that it could not enter into an error about files."""
    try:
        yield
    except StartError as error:
        if error.step == "directories" and error.errno == ENOENT:
            raise NotFoundError(f"cannot {verb} it: {error.message}") from error
        raise FilesError(f"cannot {verb} it: {error.message}", remedy=error.remedy) from error


def how(code: int, child: Job) -> str:
    """How a job ended, and what it said."""
    ended = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"the tenant's process {ended}: {child.message() or 'it said nothing'}"
