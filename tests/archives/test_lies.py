"""Children that lie: to the host their words are a tenant's words, and nothing comes of them but bytes."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pactown_runner.archives import ArchiveError, export_home, import_home
from pactown_runner.archives.inside import wire
from pactown_runner.errors import FilesError
from pactown_runner.host import Host
from pactown_runner.jobs import Stop
from pactown_runner.models import IsolatedUser
from tests.archives.trees import as_tenant, differences, looks
from tests.files.helpers import until

pytestmark = pytest.mark.host

EXPORTED = b'{"entries": 1, "files": 0, "bytes": 0, "skipped": 0}'
IMPORTED = b'{"entries": 1, "files": 0, "bytes": 0, "skipped": 0, "verified": true}'


def frame(kind: bytes, payload: bytes) -> bytes:
    return wire.HEAD.pack(kind, len(payload)) + payload


def liar(users_base: Path, said: bytes, then: str = "") -> Path:
    """A program that reads nothing, says this, and does that."""
    (users_base / "said").write_bytes(said)
    (users_base / "said").chmod(0o644)
    program = users_base / "liar"
    program.write_text(f"#!/bin/sh\ncat {users_base}/said\n{then}\n")
    program.chmod(0o755)
    return program


def lies(done: bytes) -> dict[str, tuple[bytes, str, str]]:
    """What is said, what is done then, and what is thought of it; `done` is what an honest child says at its end."""
    return {
        "nothing": (b"", "", "said nothing"),
        "no frame": (b"hello", "", "no frame"),
        "an unknown frame": (frame(b"X", b""), "", "no frame"),
        "a huge frame": (wire.HEAD.pack(b"D", 1 << 31), "", "no frame"),
        "half a head": (b"D\0", "", "middle of a frame"),
        "half a frame": (wire.HEAD.pack(b"D", 100) + b"x", "", "middle of a frame"),
        "no summary": (frame(b"D", b"data"), "", "said nothing"),
        "a summary that is no JSON": (frame(b".", b"{"), "", "cannot be understood"),
        "a summary that is a list": (frame(b".", b"[]"), "", "summary is malformed"),
        "a summary that nests": (frame(b".", b"[" * 500_000), "", "cannot be understood"),
        "a summary that is no UTF-8": (frame(b".", b'"\xff"'), "", "cannot be understood"),
        "an incomplete summary": (frame(b".", b'{"entries": 1}'), "", "summary is malformed"),
        "a summary of more": (frame(b".", done.replace(b"{", b'{"x": 1, ')), "", "summary is malformed"),
        "text for a number": (frame(b".", done.replace(b"1", b'"1"')), "", "summary is malformed"),
        "less than nothing": (frame(b".", done.replace(b"1", b"-1")), "", "summary is malformed"),
        "a number without end": (frame(b".", done.replace(b"1", b"1" * 5000)), "", "cannot be understood"),
        "more behind the summary": (frame(b".", done) * 2, "", "goes on behind its end"),
        "a summary, then failure": (frame(b".", done), "exit 3", "ended with code 3"),
        "a summary, then death": (frame(b".", done), "kill -9 $$", "killed by signal 9"),
        "too much left out": (frame(b"S", b"FIFO\0x") * 10_001 + frame(b".", done), "", "not asked for"),
        "an archive without end": (frame(b"D", bytes(1 << 20)) * 3, "exec cat /dev/zero", "larger than|no frame"),
        "control characters": (b"", "printf 'a\\033[2Jb\\rc' >&2; exit 1", r"a\?\[2Jb"),
    }


LIES = tuple(lies(b""))


@pytest.mark.parametrize("lie", LIES)
def test_an_export_that_lies_leaves_nothing(
    host: Host, user: IsolatedUser, users_base: Path, archive: Path, lie: str
) -> None:
    said, then, says = lies(EXPORTED)[lie]
    host = replace(host, settings=replace(host.settings, archive_max_bytes=2 << 20))
    program = liar(users_base, said, then)
    with pytest.raises(ArchiveError, match=says) as caught:
        export_home(host, user, archive, python=program)
    assert "\033" not in str(caught.value)
    assert sorted(os.listdir(users_base)) == [".state", "liar", user.linux_username, "said"]


@pytest.mark.parametrize("lie", LIES)
def test_an_import_that_lies_changes_nothing(
    host: Host, user: IsolatedUser, users_base: Path, archive: Path, lie: str
) -> None:
    as_tenant(user, 'open("f", "w").write("x")')
    export_home(host, user, archive)
    before, inode = looks(user.home_dir), user.home_dir.stat().st_ino
    said, then, says = lies(IMPORTED)[lie]
    with pytest.raises(ArchiveError, match=says + "|not asked for"):
        import_home(host, user, archive, python=liar(users_base, said, then))
    assert differences(before, looks(user.home_dir)) == []
    assert user.home_dir.stat().st_ino == inode


@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.parametrize("how", ["its time is up", "it is stopped", "it is stopped before"])
def test_a_child_that_does_nothing_is_given_up(
    host: Host, user: IsolatedUser, users_base: Path, archive: Path, direction: str, how: str
) -> None:
    as_tenant(user, 'import os; open("f", "wb").write(os.urandom(4 << 20))')
    if direction == "in":
        export_home(host, user, archive)
    before, names = looks(user.home_dir), sorted(os.listdir(users_base))
    stop = Stop()
    if how == "it is stopped before":
        stop.now("nobody wants it")
    (users_base / "ready").mkdir(mode=0o777)
    (users_base / "ready").chmod(0o777)
    program = liar(users_base, b"", f"touch {users_base}/ready/now; kill -STOP $$")
    stopper = threading.Thread(target=stop_when, args=(users_base / "ready/now", stop))
    if how == "it is stopped":
        stopper.start()
    move = export_home if direction == "out" else import_home
    with pytest.raises(FilesError, match="given up"):
        move(host, user, archive, python=program, stop=stop, timeout=0.5 if how == "its time is up" else 60.0)
    if how == "it is stopped":
        stopper.join()
    assert differences(before, looks(user.home_dir)) == []
    assert sorted(set(os.listdir(users_base)) - {"said", "liar", "ready"}) == names


def stop_when(there: Path, stop: Stop) -> None:
    until(there.exists)
    stop.now("nobody wants it")
