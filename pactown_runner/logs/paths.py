"""Where a service's log, and the FIFOs and spools of its runs, lie."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from ..models import Stream
from ..passage import exposed
from .errors import LogError

__all__ = ["LOG_ENDING", "STREAMS", "LogPaths", "fifo_runs", "private_directory", "put_aside"]

STREAMS: tuple[Stream, Stream] = ("stdout", "stderr")
_ENDINGS = ("out", "err")
LOG_ENDING = ".jsonl"
_ASIDE = ".aside"


@dataclass(frozen=True, slots=True)
class LogPaths:
    """The paths of one tenant. Strings, not `Path`: they are made anew at each start.

    Attributes:
        log_dir: the settings' `log_dir`.
        run_dir: the settings' `run_dir`.
        key: the tenant's key. It has no dot, and neither has a run id: file names can be taken apart again.
    """

    log_dir: Path
    run_dir: Path
    key: str

    @property
    def fifo_dir(self) -> str:
        """One directory for all tenants' FIFOs; only its owner can enter, so no tenant opens another's."""
        return f"{self.run_dir}/fifo"

    @property
    def tenant_dir(self) -> str:
        """The directory of the tenant's logs."""
        return f"{self.log_dir}/pactown_{self.key}"

    @property
    def aside_dir(self) -> str:
        """The files that were put aside, of all the tenant's logs."""
        return f"{self.log_dir}/pactown_{self.key}/{_ASIDE}"

    @property
    def gone_dir(self) -> str:
        """Where logs ended that were dropped whole."""
        return f"{self.log_dir}/pactown_{self.key}/.gone"

    @property
    def spool_dir(self) -> str:
        """Raw output that is not yet, or not yet wholly, in a log."""
        return f"{self.log_dir}/pactown_{self.key}/.spool"

    def log(self, service_id: str) -> str:
        """The log of a service, over all its runs: one JSON object a line."""
        return f"{self.log_dir}/pactown_{self.key}/{service_id}{LOG_ENDING}"

    def fifos(self, service_id: str, run_id: str) -> tuple[str, str]:
        """The FIFOs that a run has as standard output and standard error."""
        stem = f"{self.run_dir}/fifo/{self.key}.{service_id}.{run_id}"
        return f"{stem}.{_ENDINGS[0]}", f"{stem}.{_ENDINGS[1]}"

    def spools(self, service_id: str, run_id: str) -> tuple[str, str]:
        """The spools of a run's two streams; they exist once it has written something."""
        stem = f"{self.log_dir}/pactown_{self.key}/.spool/{service_id}.{run_id}"
        return f"{stem}.{_ENDINGS[0]}", f"{stem}.{_ENDINGS[1]}"

    def spooled(self, service_id: str) -> set[str]:
        """The ids of a service's runs that have a spool: their output is not, or not yet wholly, in the log."""
        try:
            names = os.listdir(self.spool_dir)
        except FileNotFoundError:
            return set()
        parts = [name.rsplit(".", 2) for name in names]
        return {part[1] for part in parts if len(part) == 3 and part[0] == service_id and part[2] in _ENDINGS}

    def prepare(self) -> None:
        """Make the directories that all tenants share. `LogPump.create` relies on it that they are private.

        Raises:
            OSError: they cannot be made.
            LogError: others than their owner can enter them, or, as root, could put others in their place.
        """
        for path in (self.fifo_dir, str(self.log_dir)):
            private_directory(path)
            if (reason := exposed(Path(path))) is not None:
                raise LogError(
                    f"{path} is not safe: {reason}", remedy="name a directory whose parents are root's alone to change"
                )

    def leftovers(self) -> set[tuple[str, str]]:
        """`(service id, run id)` of this tenant's runs that have a FIFO or a spool, alive or left behind."""
        found: set[tuple[str, str]] = set()
        for directory, prefix in ((self.fifo_dir, f"{self.key}."), (self.spool_dir, "")):
            try:
                names = os.listdir(directory)
            except FileNotFoundError:
                continue
            for name in names:
                parts = name.removeprefix(prefix).rsplit(".", 2)
                if name.startswith(prefix) and len(parts) == 3 and parts[2] in _ENDINGS:
                    found.add((parts[0], parts[1]))
        return found


def fifo_runs(run_dir: Path) -> set[str]:
    """The ids of all runs, of any tenant, that have a FIFO."""
    try:
        names = os.listdir(LogPaths(run_dir, run_dir, "").fifo_dir)
    except FileNotFoundError:
        return set()
    return {parts[1] for name in names if len(parts := name.rsplit(".", 2)) == 3}


def put_aside(path: str) -> str:
    """What the paths of a log's files that were put aside begin with; a dot and a number follow.

    Those of all the tenant's logs have one directory: to look for one's takes as long as there are many of them, and
    no longer where the tenant has had many services.
    """
    directory, name = os.path.split(path)
    return f"{directory}/{_ASIDE}/{name}"


def private_directory(path: str) -> None:
    """Make `path`, and what is missing on the way to it, so that only the caller can enter.

    Raises:
        OSError: it cannot be made.
        LogError: it is there already, and is a link, another's, or open to others.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except FileNotFoundError:
        private_directory(os.path.dirname(path))
        os.mkdir(path, 0o700)
    state = os.lstat(path)
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid() or state.st_mode & 0o077:
        raise LogError(
            f"{path} is not a directory that only its owner can enter",
            remedy=f"chown {os.geteuid()} {path} && chmod 700 {path}",
        )
