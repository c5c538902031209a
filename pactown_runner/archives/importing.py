"""Import: an archive, of which every byte may be forged, becomes a tenant's home, or nothing of it does."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..config import Settings
from ..descriptors import pieces
from ..homes import OnProgress
from ..host import Host
from ..jobs import Stop
from ..models import IsolatedUser
from .children import LeftOut, Said, child
from .errors import ArchiveError
from .exporting import ARCHIVE_TIMEOUT
from .holding import held
from .swapping import fresh_home, remove_home, swap
from .ways import check_way

__all__ = ["Imported", "import_home", "import_stream"]


@dataclass(frozen=True, slots=True)
class Imported:
    """What a home was made of. The tenant's word, as the home is.

    Attributes:
        entries: files, folders and links, the home itself among them.
        files: how many of them are files; further names of one are not counted.
        bytes: the content of these, holes not counted.
        verified: whether the archive had a manifest; if so, all of it is as that says.
        left_out: FIFOs, which are not made; the first 10,000 of them.
        left_out_count: how many there are.
    """

    entries: int
    files: int
    bytes: int
    verified: bool
    left_out: tuple[LeftOut, ...] = ()
    left_out_count: int = 0


def import_home(
    host: Host,
    user: IsolatedUser,
    archive: Path,
    *,
    made_for: str | None = None,
    progress: OnProgress | None = None,
    stop: Stop | None = None,
    timeout: float = ARCHIVE_TIMEOUT,
    python: Path | None = None,
) -> Imported:
    """Replace a tenant's home by what an archive holds: wholly, or not at all.

    The archive is one of `export_home`, or what `tar -czf` made of a folder `pactown_<key>`. All of it becomes the
    tenant's, without set-id and sticky bits. Symbolic links are kept as they are, wherever they lead: nothing here
    follows them. Nothing of the tenant may run, nor does anything start meanwhile. It blocks.

    Args:
        archive: no tenant may be able to change what lies on the way to it.
        made_for: the id of the user whose home the archive was made of, if that is another one.
        progress: is told the archive's bytes so far, and its size.
        stop: lets another thread end it.
        timeout: seconds, after which it is given up.
        python: the interpreter for the child, see `find_python`.

    Raises:
        ArchiveError: the archive was refused, cannot be read, or is in tenants' reach; the home is what it was.
        StateError: something of the tenant runs, or another export or import is on.
        FilesError: it was stopped, or its time was up.
        AccountError: the user's account is not what it was.
        NotFoundError: there is no such user any more.
    """
    archive = Path(os.path.abspath(archive))
    check_way(host, archive)
    try:
        fd = os.open(archive, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ArchiveError(f"cannot read {archive}: {error.strerror}") from error
    try:
        return import_stream(
            host,
            user,
            fd,
            size=os.fstat(fd).st_size,
            made_for=made_for,
            progress=progress,
            stop=stop,
            timeout=timeout,
            python=python,
        )
    except OSError as error:
        raise ArchiveError(f"cannot read {archive}: {error.strerror}") from error
    finally:
        os.close(fd)


def import_stream(
    host: Host,
    user: IsolatedUser,
    source: int,
    *,
    size: int | None = None,
    made_for: str | None = None,
    progress: OnProgress | None = None,
    stop: Stop | None = None,
    timeout: float = ARCHIVE_TIMEOUT,
    python: Path | None = None,
) -> Imported:
    """As `import_home`, from a descriptor: a file, a pipe or a socket, read to its end.

    Args:
        size: how many bytes will come, for `progress`.

    Raises:
        OSError: it cannot be read.
        RunnerError: as `import_home`.
    """
    stop = stop or Stop()
    host.users.verify(user)
    fresh: Path | None = None
    try:
        with held(host, user) as hold:
            hold.must_be_idle()
            fresh = fresh_home(host, user, hold.run_id)
            with child(
                host, user, "extracting", fresh, python=python, timeout=timeout, stop=stop, run_id=hold.run_id
            ) as extractor:
                extractor.begin(_arguments(host.settings, made_for or user.saas_user_id))
                taken = 0
                for piece in pieces(source, stop):
                    if not extractor.feed(piece):
                        break
                    taken += len(piece)
                    if progress is not None:
                        progress(taken, size)
                said = extractor.take()
            # Who was killed meanwhile started nothing, but who takes over what he left may have.
            hold.must_be_idle()
            swap(user, fresh)
    finally:
        if fresh is not None:
            # By now it is the former home, or what there is of one that did not come about.
            remove_home(host, user, fresh, python=python)
    return _imported(said)


def _arguments(settings: Settings, user_id: str) -> dict[str, str | int]:
    return {
        "user_id": user_id,
        "max_bytes": settings.archive_max_bytes,
        "max_entries": settings.archive_max_entries,
        "max_depth": settings.archive_max_depth,
        "max_ratio": settings.archive_max_ratio,
    }


def _imported(said: Said) -> Imported:
    numbers = said.numbers
    return Imported(
        numbers["entries"],
        numbers["files"],
        numbers["bytes"],
        bool(numbers["verified"]),
        said.left_out,
        numbers["skipped"],
    )
