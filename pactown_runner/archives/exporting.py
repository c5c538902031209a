"""Export: a home as a `tar.gz`, packed by a child with the tenant's uid, while all of the tenant stands still."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..descriptors import Sink
from ..homes import OnProgress
from ..host import Host
from ..jobs import Stop
from ..models import IsolatedUser
from ..whole_file import WholeFile
from .children import LeftOut, Said, child
from .errors import ArchiveError
from .holding import held
from .ways import check_way

__all__ = ["ARCHIVE_TIMEOUT", "Exported", "While", "export_home", "export_stream"]

ARCHIVE_TIMEOUT = 3600.0
"""Seconds for a whole export or import. A tenant can stop the child that does it."""

While = Literal["frozen", "stopped"]
"""What the tenant's sandboxes are while their home is read: frozen here, or stopped before by whoever asks."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What an archive holds. All but its size is the tenant's word.

    Attributes:
        entries: files, folders and links, the home itself among them.
        files: how many of them are files; further names of one are not counted.
        bytes: the content of these, holes not counted.
        archive_bytes: the archive's own size.
        left_out: what it does not hold, the first 10,000 of that.
        left_out_count: how much that is.
    """

    entries: int
    files: int
    bytes: int
    archive_bytes: int
    left_out: tuple[LeftOut, ...] = ()
    left_out_count: int = 0


def export_home(
    host: Host,
    user: IsolatedUser,
    target: Path,
    *,
    while_: While = "frozen",
    progress: OnProgress | None = None,
    stop: Stop | None = None,
    timeout: float = ARCHIVE_TIMEOUT,
    python: Path | None = None,
) -> Exported:
    """Write a tenant's home into an archive, mode 0600, that appears whole or not at all, also over an older one.

    Nothing of the tenant starts meanwhile. Left out, and listed, are FIFOs, sockets, devices, what only others than the
    tenant can read, and the virtual environments of its sandboxes, which work nowhere else. It blocks.

    Args:
        target: no tenant may be able to change what lies on the way to it.
        while_: `frozen` freezes all that runs of the tenant; with `stopped` it is an error that something does.
        progress: is told the archive's bytes so far.
        stop: lets another thread end it.
        timeout: seconds, after which it is given up.
        python: the interpreter for the child, see `find_python`.

    Raises:
        ArchiveError: the home is too large, cannot be read, or the target cannot be written, or is in tenants' reach.
        StateError: something runs though it should not, or did not stand still; or another export or import is on.
        FilesError: it was stopped, or its time was up.
        AccountError: the user's account is not what it was.
        NotFoundError: there is no such user any more.
    """
    target = Path(os.path.abspath(target))
    check_way(host, target)
    with _written(target) as fd:
        return export_stream(
            host, user, fd, while_=while_, progress=progress, stop=stop, timeout=timeout, python=python
        )


def export_stream(
    host: Host,
    user: IsolatedUser,
    output: int,
    *,
    while_: While = "frozen",
    progress: OnProgress | None = None,
    stop: Stop | None = None,
    timeout: float = ARCHIVE_TIMEOUT,
    python: Path | None = None,
) -> Exported:
    """As `export_home`, into a descriptor: a file, a pipe or a socket.

    What was written is an archive only if this returns. As long as it takes to be read the tenant stands still.

    Raises:
        OSError: it cannot be written to.
        RunnerError: as `export_home`.
    """
    stop = stop or Stop()
    host.users.verify(user)
    sink, most = Sink(output, stop), host.settings.archive_max_bytes

    def on_data(data: bytes) -> None:
        if sink.written + len(data) > most:
            raise ArchiveError(
                f"the archive is larger than {most} bytes", remedy="raise archive_max_bytes, or tidy the home up"
            )
        sink.write(data)
        if progress is not None:
            progress(sink.written, None)

    with (
        held(host, user) as hold,
        child(
            host, user, "packing", user.home_dir, python=python, timeout=timeout, stop=stop, run_id=hold.run_id
        ) as packer,
    ):
        if while_ == "stopped":
            hold.must_be_idle()
        # The child is there first: what was about to start when the tenant was held has a scope by now.
        hold.freeze()
        packer.begin(_arguments(host, user))
        said = packer.take(on_data)
        hold.check_still()
    return _exported(said, sink.written)


def _arguments(host: Host, user: IsolatedUser) -> dict[str, str | int]:
    return {
        "name": user.linux_username,
        "home": str(user.home_dir),
        "user_id": user.saas_user_id,
        "max_bytes": host.settings.archive_max_bytes,
        "max_entries": host.settings.archive_max_entries,
        "max_depth": host.settings.archive_max_depth,
    }


def _exported(said: Said, archive_bytes: int) -> Exported:
    numbers = said.numbers
    return Exported(
        numbers["entries"], numbers["files"], numbers["bytes"], archive_bytes, said.left_out, numbers["skipped"]
    )


@contextmanager
def _written(target: Path) -> Iterator[int]:
    """A new file, which gets its name when the block has ended well, and is on the disk then."""
    try:
        with WholeFile(target) as file:
            yield file.fd
            file.finish()
    except OSError as error:
        raise ArchiveError(f"cannot write {target}: {error.strerror or error}") from error
