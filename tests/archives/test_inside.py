"""The programs that run as the tenant, by themselves: no account, no cgroup, no root."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pactown_runner.archives import children
from pactown_runner.archives.children import Program, program_text
from pactown_runner.archives.inside import packing, wire
from pactown_runner.archives.inside.blocks import BLOCK
from pactown_runner.archives.inside.extracting import Extractor
from pactown_runner.archives.inside.unpressing import Unpressed
from pactown_runner.archives.inside.wire import Refused
from pactown_runner.pythons import find_python
from tests.archives.hostile import END, HOME, checked, file, folder, hardlink, named, pax, sparse, symlink

BOUNDS = {"user_id": "u", "max_bytes": 1 << 20, "max_entries": 100, "max_depth": 20, "max_ratio": 200}
TAR = (
    folder()
    + folder("a")
    + named(f"{HOME}/a/{'long' * 40}", b"content" * 100)
    + pax(("path", f"{HOME}/a/b"), ("mtime", "1.5"))
    + file("x", b"content")
    + sparse("a/s", 1 << 20, "2\n512\n512\n1048576\n0\n", b"s" * 512)
    + symlink("l", "a/b")
    + hardlink("h", f"{HOME}/a/b")
    + END
)


@contextmanager
def within(path: str | Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def extract(archive: bytes, top: str) -> dict[str, int] | None:
    """What is told of an archive that is taken; None if it is refused."""
    with within(top):
        extractor = Extractor(Unpressed(io.BytesIO(archive), BOUNDS["max_ratio"]), BOUNDS)  # type: ignore[arg-type]
        try:
            return extractor.extract()
        except (Refused, OSError):
            return None
        finally:
            for opened in extractor._within:
                with suppress(OSError):
                    os.close(opened.fd)


def look_around(top: str) -> list[str]:
    return sorted(os.listdir(top))


def test_the_seed_is_taken(tmp_path: Path) -> None:
    told = extract(gzip.compress(TAR), str(tmp_path))
    assert told == {"entries": 7, "files": 3, "bytes": 1731, "skipped": 0, "verified": False}


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(TAR) - 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6),
    st.booleans(),
)
def test_a_damaged_archive_is_refused_or_taken(damage: list[tuple[int, bytes]], resum: bool) -> None:
    tar = bytearray(TAR)
    for at, data in damage:
        tar[at : at + len(data)] = data
        if resum:
            block = at - at % BLOCK
            tar[block : block + BLOCK] = checked(tar[block : block + BLOCK])
    with tempfile.TemporaryDirectory() as around:
        os.mkdir(f"{around}/home")
        extract(gzip.compress(bytes(tar), 1), f"{around}/home")
        assert look_around(around) == ["home"]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=2000), st.integers(0, 9))
def test_noise_is_refused(noise: bytes, level: int) -> None:
    with tempfile.TemporaryDirectory() as around:
        assert extract(noise, around) is None
        assert extract(gzip.compress(noise, level), around) is None
        assert look_around(around) == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(3, 8), st.integers(0, 9000))
def test_segments_hold_all_data_whatever_their_number(gaps: list[int], most: int, tail: int) -> None:
    with tempfile.TemporaryFile(buffering=0) as sparse_file, pytest.MonkeyPatch.context() as patched:
        patched.setattr(packing, "MAX_SEGMENTS", most)
        at = 0
        for gap in gaps:
            at += gap * 4096
            sparse_file.seek(at)
            sparse_file.write(b"d" * 4096)
            at += 4096
        length = at + tail
        sparse_file.truncate(length)
        segments = packing._segments(sparse_file.fileno(), length)
        assert len(segments) <= most
        assert sum(segments[-1]) == length
        data = bytearray(length)
        end = 0
        for start, count in segments:
            assert start >= end
            end = start + count
            data[start:end] = os.pread(sparse_file.fileno(), count, start)
        assert data == os.pread(sparse_file.fileno(), length, 0)


# ---- As processes


def run(program: Program, arguments: object, cwd: Path) -> tuple[int, bytes, str]:
    text = program_text(program)
    done = subprocess.run(
        [find_python(), "-I", "-S", "-c", children._BOOT],
        input=b"%d\n%s%s\n" % (len(text), text, json.dumps(arguments).encode()),
        cwd=cwd,
        capture_output=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr.decode()


def test_a_folder_of_any_depth_is_emptied(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    (top / ".pactown-1").write_text("in the way")
    (top / ".pactown-2").mkdir()
    (top / ".pactown-2/full").mkdir()
    with within(top):
        for number in range(300):
            os.mkdir("d" * 200)
            os.symlink("/", f"l{number}")
            Path("f").write_text("x")
            os.mkdir("e")
            os.chmod("e", 0)
            os.chdir("d" * 200)
        for _ in range(300):
            os.chdir("..")
            os.chmod("d" * 200, 0o500)
    code, said, errors = run("emptying", {}, top)
    assert (code, errors) == (0, "")
    ((kind, payload),) = wire.receive(io.BytesIO(said).read)
    assert (kind, json.loads(payload)) == (wire.DONE, {"left": 0})
    assert os.listdir(top) == []
    assert os.listdir(tmp_path) == ["top"]


def test_a_home_packs_into_the_same_archive_each_time(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "a/b").mkdir(parents=True)
    (home / "a/f").write_text("f")
    bounds = {"max_bytes": 1 << 20, "max_entries": 10, "max_depth": 5}
    arguments = {"name": "pactown_0123abcd", "home": str(home), "user_id": "u", **bounds}
    one, other = (run("packing", arguments, home) for _ in range(2))
    assert one == other
    assert one[0] == 0


def test_what_goes_wrong_is_told_in_a_line(tmp_path: Path) -> None:
    code, _, errors = run("extracting", BOUNDS, tmp_path)
    assert (code, errors) == (1, "the archive is cut off\n")
