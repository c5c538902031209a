"""Files into a sandbox: this process packs or passes on, a `tar` or `cat` with the tenant's uid writes."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from ..descriptors import pieces
from ..errors import FilesError, RunnerError, SpecError
from ..host import Host
from ..jobs import Stop, job
from ..models import IsolatedUser
from .packing import Survey, pack, pack_bytes, survey
from .transfer import Inside, OnProgress, Transfer, explained, how, parts_of

__all__ = ["Put"]

_CLEANING_TIMEOUT = 10.0
"""Seconds for removing what a killed job left."""

_UNPACK = ("--extract", "--file=-", "--no-same-owner", "--no-same-permissions", "--warning=no-timestamp")

_REPLACE = """\
/bin/tar "$@" && mv -f -T -- "$new" "$name"
status=$?
[ $status = 0 ] || rm -f -- "$new"
exit $status"""
"""Whoever opens a file while it is put reads the old or the new one, never a part: rename(2) is atomic."""

_TAKE = 'exec /bin/cat >"$1"'


class Put:
    """One transfer into a sandbox."""

    def __init__(self, host: Host, stop: Stop, timeout: float, on_progress: OnProgress | None) -> None:
        self._host = host
        self._stop = stop
        self._timeout = timeout
        self._on_progress = on_progress

    def put(self, user_id: str, service_id: str, source: Path | bytes, target: str | PurePosixPath | None) -> Transfer:
        parts = parts_of(target or ".")
        if isinstance(source, bytes):
            _check_named(target, parts)
            found = Survey(False, 1, len(source))
        else:
            found = survey(source)
            if not found.folder and (not parts or str(target).endswith("/")):
                parts = (*parts, Path(os.path.abspath(source)).name)
        # Not before the source is known to be good.
        user = self._host.users.get_or_create(user_id)
        if found.folder:
            assert isinstance(source, Path)
            return self._put_folder(user, service_id, source, found, parts)
        return self._put_file(user, Inside.of(service_id, PurePosixPath(*parts)), source, found)

    def put_stream(self, user_id: str, service_id: str, source: int, target: str | PurePosixPath) -> Transfer:
        parts = parts_of(target)
        _check_named(target, parts)
        where = Inside.of(service_id, PurePosixPath(*parts))
        user = self._host.users.get_or_create(user_id)
        new = _new_name()

        def pass_on(write: Callable[[bytes | memoryview], None]) -> Survey:
            size = 0
            for piece in pieces(source, self._stop):
                write(piece)
                size += len(piece)
            return Survey(False, 1, size)

        try:
            put = self._send(user, where, ("/bin/sh", "-c", _TAKE, "put", f"./{new}"), 0, pass_on)
            # Not by the same job: it would take our own sudden end for that of the content.
            self._send(user, where, ("/bin/mv", "-f", "-T", "--", f"./{new}", f"./{where.name}"), 0, lambda _: put)
        except BaseException:
            self._remove(user, where, new)
            raise
        return Transfer(put.files, put.bytes)

    def _put_folder(
        self, user: IsolatedUser, service_id: str, source: Path, found: Survey, folders: tuple[str, ...]
    ) -> Transfer:
        where = Inside(service_id, folders, "")
        packed = self._send(user, where, ("/bin/tar", *_UNPACK), found.bytes, lambda write: pack(source, write))
        return Transfer(packed.files, packed.bytes)

    def _put_file(self, user: IsolatedUser, where: Inside, source: Path | bytes, found: Survey) -> Transfer:
        new = _new_name()
        script = f"new=./{new} name=./$1\nshift\n{_REPLACE}"

        def write_packed(write: Callable[[bytes | memoryview], None]) -> Survey:
            if isinstance(source, bytes):
                pack_bytes(source, write, file_name=new)
                return found
            packed = pack(source, write, file_name=new)
            if packed.folder:
                raise FilesError(f"{source} is no file any more: it changed while it was put")
            return packed

        argv = ("/bin/sh", "-c", script, "put", where.name, *_UNPACK)
        try:
            packed = self._send(user, where, argv, found.bytes, write_packed)
        except BaseException:
            self._remove(user, where, new)
            raise
        return Transfer(packed.files, packed.bytes)

    def _send(
        self,
        user: IsolatedUser,
        where: Inside,
        argv: tuple[str, ...],
        total: int,
        write_packed: Callable[[Callable[[bytes | memoryview], None]], Survey],
    ) -> Survey:
        packed: Survey | None = None
        sent = 0
        with (
            explained("put"),
            job(
                self._host,
                user,
                argv,
                directories=where.directories(user, make=True),
                stdin=True,
                timeout=self._timeout,
                stop=self._stop,
            ) as child,
        ):

            def write(data: bytes | memoryview) -> None:
                nonlocal sent
                child.write(data)
                sent += len(data)
                if self._on_progress is not None:
                    self._on_progress(min(sent, total), total)

            # Should packing fail, the job is killed before it could take what came for all there is.
            with contextlib.suppress(BrokenPipeError):
                packed = write_packed(write)
            code = child.wait()
            if code != 0 or packed is None:
                raise FilesError(f"cannot put it: {how(code, child)}")
        return packed

    def _remove(self, user: IsolatedUser, where: Inside, new: str) -> None:
        """Remove what a killed job may have left; it could not do so itself."""
        with (
            contextlib.suppress(RunnerError, OSError),
            job(
                self._host,
                user,
                ("/bin/rm", "-f", "--", f"./{new}"),
                directories=where.directories(user, make=False),
                timeout=_CLEANING_TIMEOUT,
            ) as child,
        ):
            child.wait()


def _check_named(target: str | PurePosixPath | None, parts: tuple[str, ...]) -> None:
    if not parts or str(target).endswith("/"):
        raise SpecError("content needs the name of a file to go to", remedy="give a target")


def _new_name() -> str:
    """What a file is called until it is whole."""
    return f".pactown-{secrets.token_hex(8)}"
