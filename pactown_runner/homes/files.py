"""`SandboxFiles`: files into and out of sandboxes' directories, awaited."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath

from ..host import Host
from ..jobs import JOB_TIMEOUT
from ..specs import check_service_id, check_user_id
from ..tenant_threads import TenantThreads
from .get import Get
from .put import Put
from .transfer import Inside, OnProgress, Transfer
from .unpacking import Bounds

__all__ = ["SandboxFiles"]

MAX_GET_BYTES = 4 << 30
MAX_GET_ENTRIES = 200_000
MAX_READ_BYTES = 16 << 20


class SandboxFiles:
    """Puts files into sandboxes' directories and gets them out. The sandboxes need not run.

    Use it from one event loop. Each transfer is one helper process with the tenant's uid and limits, none longer than
    `job_timeout`. A cancelled transfer has ended when the cancellation is seen.

    Args:
        host: what the supervisor's sandboxes share.
        threads: where transfers are done; the caller's.
        job_timeout: seconds.
    """

    def __init__(self, host: Host, threads: TenantThreads, *, job_timeout: float = JOB_TIMEOUT) -> None:
        self._host = host
        self._threads = threads
        self._timeout = job_timeout

    async def put(
        self,
        user_id: str,
        service_id: str,
        source: Path | bytes,
        target: str | PurePosixPath | None = None,
        *,
        on_progress: OnProgress | None = None,
    ) -> Transfer:
        """Put a file, a folder or some bytes into a sandbox's directory. Makes the user and the directory if missing.

        A single file appears whole or not at all, also over an older one. A folder is merged into what is there, file
        by file: files and links of the same name are replaced, others stay, and what arrived before an error stays
        too. Links stay links. All of it is the tenant's, with no permissions for others.

        Args:
            source: a path, or the content of a file.
            target: where it goes, relative to the sandbox's directory. By default, or for a name that ends in `/`, a
                file keeps its name; a folder's content goes into the directory itself by default.

        Raises:
            SpecError: the target leads out of the directory, or content comes without a target.
            FilesError: the source cannot be read or holds sockets, FIFOs or devices; or the tenant's `tar` failed.
        """
        check_user_id(user_id)
        check_service_id(service_id)
        return await self._threads.run(
            user_id,
            lambda stop: Put(self._host, stop, self._timeout, on_progress).put(user_id, service_id, source, target),
        )

    async def put_stream(self, user_id: str, service_id: str, source: int, target: str | PurePosixPath) -> Transfer:
        """Put a file whose content is read from a descriptor to its end; as `put` puts one, whole or not at all.

        Args:
            source: the reading end of a pipe, or a socket.

        Raises:
            SpecError: the target leads out of the directory, or names no file.
            FilesError: it could not be written.
            OSError: it cannot be read.
        """
        check_user_id(user_id)
        check_service_id(service_id)
        return await self._threads.run(
            user_id,
            lambda stop: Put(self._host, stop, self._timeout, None).put_stream(user_id, service_id, source, target),
            lasting=True,
        )

    async def get(
        self,
        user_id: str,
        service_id: str,
        path: str | PurePosixPath = ".",
        destination: Path | None = None,
        *,
        max_bytes: int = MAX_GET_BYTES,
        max_entries: int = MAX_GET_ENTRIES,
        on_progress: OnProgress | None = None,
    ) -> Transfer:
        """Get a file or folder out of a sandbox's directory: wholly, or not at all.

        Only files and folders come along. They belong to the caller, with the permissions that they had. A file under
        several names becomes several files.

        Args:
            path: relative to the sandbox's directory, by default all of it.
            destination: what it is to be called here; by default its own name, in the current directory. A file that
                is there is replaced by a file; a folder that is there is an error.
            max_bytes, max_entries: more than that is an error.

        Raises:
            NotFoundError: there is no such user, directory or file.
            SpecError: the path leads out of the directory.
            FilesError: it is neither file nor folder, is too large, cannot be read by the tenant, or the destination
                cannot be written.
        """
        where = Inside.of(service_id, path)
        destination = Path(destination or where.name or service_id)
        bounds = Bounds(max_bytes, max_entries)
        return await self._threads.run(
            user_id,
            lambda stop: Get(self._host, stop, self._timeout).fetch(user_id, where, destination, bounds, on_progress),
        )

    async def read(
        self, user_id: str, service_id: str, path: str | PurePosixPath, *, max_bytes: int = MAX_READ_BYTES
    ) -> bytes:
        """The content of one file in a sandbox's directory.

        Raises:
            NotFoundError: there is no such user, directory or file.
            SpecError: the path leads out of the directory.
            FilesError: it is no file, is larger than `max_bytes`, or the tenant cannot read it.
        """
        where = Inside.of(service_id, path)
        return await self._threads.run(
            user_id, lambda stop: Get(self._host, stop, self._timeout).read(user_id, where, max_bytes)
        )

    async def read_stream(
        self,
        user_id: str,
        service_id: str,
        path: str | PurePosixPath,
        output: int,
        *,
        on_size: Callable[[int], object],
        max_bytes: int = MAX_READ_BYTES,
    ) -> None:
        """As `read`, into a descriptor: a pipe or a socket. What was written is all of it only if this returns.

        Args:
            on_size: is told how many bytes it will be before the first of them is written, from a thread.

        Raises:
            OSError: it cannot be written to.
        """
        where = Inside.of(service_id, path)
        await self._threads.run(
            user_id,
            lambda stop: Get(self._host, stop, self._timeout).read_stream(user_id, where, max_bytes, output, on_size),
            lasting=True,
        )
