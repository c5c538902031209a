from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pactown_runner.logs.errors import LogError
from pactown_runner.logs.records import (
    PIECE_BYTES,
    loader,
    parse_position,
    parse_record,
    record_logger,
    split,
)
from pactown_runner.models import LogRecord

texts = st.lists(
    st.one_of(
        st.binary(max_size=30),
        st.text(max_size=20).map(str.encode),
        st.sampled_from([b"\n", b"\n\n", b"x" * PIECE_BYTES, "é".encode() * 40_000, b"\xff" * 70_000]),
    ),
    max_size=12,
).map(b"".join)


def cut(stream: bytes, window: int, limit: int) -> Iterator[tuple[bytes, bool]]:
    """As a pump cuts it, reading `window` bytes at a time."""
    begin = 0
    while True:
        data = stream[begin : begin + window]
        pieces = split(data, limit, at_end=begin + len(data) == len(stream))
        if not pieces:
            return
        for raw, length, partial in pieces:
            yield raw, partial
            begin += length


@given(texts)
def test_no_byte_is_lost_and_cuts_do_not_depend_on_how_a_stream_was_read(stream: bytes) -> None:
    whole = list(cut(stream, len(stream) + 1, 10**9))
    assert b"".join(raw if partial else raw + b"\n" for raw, partial in whole) == stream
    assert all(len(raw) <= PIECE_BYTES for raw, _ in whole)
    assert list(cut(stream, PIECE_BYTES + 1, 3)) == whole


def test_a_line_without_newline_waits_until_it_is_known_to_be_whole() -> None:
    assert split(b"a\nb", 10, at_end=False) == [(b"a", 2, False)]
    assert split(b"a\nb", 10, at_end=True) == [(b"a", 2, False), (b"b", 1, True)]
    assert split(b"x" * PIECE_BYTES, 10, at_end=False) == []


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_long_line_is_not_cut_inside_a_character(before: int) -> None:
    line = b"x" * before + "€".encode() * 30_000 + b"\n"
    pieces = [raw.decode() for raw, _, _ in split(line, 10, at_end=False)]
    assert "".join(pieces) == line.decode()[:-1]


@pytest.fixture(params=["orjson", "json"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "json":
        monkeypatch.setitem(sys.modules, "orjson", None)
    else:
        pytest.importorskip("orjson")
    return str(request.param)


def render(raws: list[tuple[bytes, int, bool]], user: str = "auth0|1") -> list[bytes]:
    return record_logger(user, "api", "r1").render(raws, ts=1.5, seq=6, stream="stderr", ends=[100, 50], index=1)


def test_a_record_comes_back_as_it_was(library: str) -> None:
    raws = [b"hi", b"", b"\xff\xfe", "é\u2028\x85".encode(), b"\0\x1b[31m\r", b'{"seq":1}']
    lines = render([(raw, len(raw) + 1, raw == b"") for raw in raws])
    assert all(line.count(b"\n") == 1 and line.endswith(b"\n") for line in lines)
    back = [parse_record(line, loader()) for line in lines]
    assert back == [LogRecord(1.5, 7 + i, "stderr", raw, raw == b"") for i, raw in enumerate(raws)]
    assert json.loads(lines[0]) == {
        "user": "auth0|1", "service": "api", "run": "r1", "ts": 1.5, "seq": 7, "stream": "stderr",
        "line": "hi", "spool": [100, 53],
    }  # fmt: skip
    last = parse_position(lines[-1])
    assert (last.run_id, last.seq, last.ends) == ("r1", 12, (100, 50 + sum(map(len, raws)) + len(raws)))


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"3", b'{"ts":1}', b'{"ts":1,"seq":1,"stream":"stdout"}'])
def test_what_is_no_record_is_an_error(line: bytes) -> None:
    with pytest.raises(LogError):
        parse_record(line, loader())
    with pytest.raises(LogError):
        parse_position(line)
