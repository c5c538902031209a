"""Bytes to records, records to JSON lines, and back.

A record is one JSON object on one line:

    {"user":"auth0|1","service":"api","run":"3f2a","ts":1.5,"seq":7,"stream":"stdout","line":"hi","spool":[21,0]}

`line_b64` stands in place of `line` for bytes that are not UTF-8, and `"partial":true` where the line goes
on in the stream's next record or ended without a newline. `spool` holds how much of both streams of this
run is in the log once this record is: the last line alone tells where to go on after a crash. A tenant can
forge nothing: its newlines end records, and all else it writes is inside a JSON string.

In place of a line, `"dropped":{"lines":3,"bytes":12}` counts what a tenant's rate limit dropped here. And a file
that took another's place begins with a mark, which is no record: `"file"` tells how many files were before it,
`seq` and `spool` where the one before ended, `"left"` how much the log holds of other runs that are not wholly in
it. So the newest file alone tells where to go on, whatever becomes of those before it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from ..models import LogRecord, Stream
from .errors import LogError

if TYPE_CHECKING:
    import structlog

__all__ = [
    "PIECE_BYTES",
    "Ends",
    "Head",
    "Piece",
    "Position",
    "RecordLogger",
    "parse_head",
    "parse_position",
    "parse_record",
    "record_logger",
    "run_mark",
    "split",
]

PIECE_BYTES = 1 << 16
"""The most bytes of a line that one record holds."""

Ends = tuple[int, int]
"""How much of a run's two streams is in the log, in bytes."""

Piece = tuple[bytes, int, bool]
"""The bytes without newline, the bytes of the stream that they stand for, and whether they are partial."""


def split(data: bytes, limit: int, *, at_end: bool) -> list[Piece]:
    """Cut a stream into records: about `limit`, and what is not known to be whole yet is left out.

    Where a cut falls depends on the stream's bytes alone, never on how they were read: after a crash the
    same bytes give the same records.

    Args:
        data: the stream from the end of its last record on.
        limit: how many lines to take.
        at_end: nothing follows `data`, so a line without newline is whole too.
    """
    lines = data.split(b"\n", limit)
    rest = lines.pop()
    pieces: list[Piece] = []
    add = pieces.append
    for line in lines:
        if len(line) <= PIECE_BYTES:
            add((line, len(line) + 1, False))
        else:
            last = _cut(line, pieces)
            add((last, len(last) + 1, False))
    if len(lines) < limit:
        rest = _cut(rest, pieces)
        if at_end and rest:
            add((rest, len(rest), True))
    return pieces


def _cut(line: bytes, pieces: list[Piece]) -> bytes:
    """Move full pieces off the front of a long line; what remains fits into one."""
    begin = 0
    while len(line) - begin > PIECE_BYTES:
        end = begin + PIECE_BYTES
        # Not inside a UTF-8 sequence, or two readable pieces would become two in base64.
        for _ in range(3):
            if line[end] & 0xC0 != 0x80:
                break
            end -= 1
        pieces.append((line[begin:end], end - begin, True))
        begin = end
    return line[begin:]


class RecordLogger:
    """What a structlog logger, bound to user, service and run, makes of events that are records."""

    def __init__(self, logger: structlog.BoundLoggerBase) -> None:
        self._process_event = logger._process_event

    def render(
        self, pieces: list[Piece], *, ts: float, seq: int, stream: Stream, ends: list[int], index: int
    ) -> list[bytes]:
        """Render records as JSON lines.

        Args:
            pieces: from `split`.
            ts: seconds since the epoch.
            seq: the number of the last record before these.
            stream: whose they are.
            ends: spool offsets before these records; moved on by what they stand for.
            index: the stream's place in `ends`.
        """
        process = self._process_event
        lines: list[bytes] = []
        for raw, length, partial in pieces:
            seq += 1
            ends[index] += length
            event: dict[str, Any] = {"ts": ts, "seq": seq, "stream": stream}
            try:
                event["line"] = raw.decode()
            except UnicodeDecodeError:
                event["line_b64"] = base64.b64encode(raw).decode("ascii")
            if partial:
                event["partial"] = True
            event["spool"] = ends
            arguments, _ = process("record", None, event)
            lines.append(arguments[0])
        return lines

    def count_dropped(
        self, lines: int, length: int, *, ts: float, seq: int, stream: Stream, ends: list[int], index: int
    ) -> bytes:
        """Render the record, of number `seq`, that stands for lines that were dropped; otherwise as `render`."""
        ends[index] += length
        dropped = {"lines": lines, "bytes": length}
        event: dict[str, Any] = {"ts": ts, "seq": seq, "stream": stream, "dropped": dropped, "spool": ends}
        arguments, _ = self._process_event("record", None, event)
        return cast(bytes, arguments[0])


def record_logger(user_id: str, service_id: str, run_id: str) -> RecordLogger:
    """A logger for one run; nothing of structlog is configured globally.

    The first one waits for structlog to be imported: some 30 ms where there is rich, which it imports in turn.
    """
    import structlog  # noqa: PLC0415 - much of the time that importing this package would take

    logger = structlog.BoundLoggerBase(
        structlog.ReturnLogger(),
        processors=[structlog.processors.JSONRenderer(serializer=_serializer())],
        context={"user": user_id, "service": service_id, "run": run_id},
    )
    return RecordLogger(logger)


def _serializer() -> Callable[..., bytes]:
    """One JSON object and a newline, as bytes; by orjson where it is installed, which is twice as fast."""
    try:
        import orjson  # noqa: PLC0415 - optional
    except ImportError:

        def dump(event: Any, default: Callable[[Any], Any]) -> bytes:
            text = json.dumps(event, default=default, ensure_ascii=False, separators=(",", ":"))
            return text.encode() + b"\n"

        return dump

    dumps, newline = orjson.dumps, orjson.OPT_APPEND_NEWLINE

    def dump_fast(event: Any, default: Callable[[Any], Any]) -> bytes:
        return dumps(event, default, newline)

    return dump_fast


def loader() -> Callable[[bytes], Any]:
    """The fastest JSON parser that is installed."""
    try:
        import orjson  # noqa: PLC0415 - optional
    except ImportError:
        return json.loads
    return orjson.loads


def parse_record(line: bytes, load: Callable[[bytes], Any]) -> LogRecord:
    """A line of a log as a record.

    Raises:
        LogError: it is none.
    """
    try:
        fields = load(line)
        ts, seq, stream = fields["ts"], fields["seq"], fields["stream"]
        text = fields.get("line")
        if text is not None:
            return LogRecord(ts, seq, stream, text.encode(), fields.get("partial", False))
        dropped = fields.get("dropped")
        if dropped is not None:
            return LogRecord(
                ts, seq, stream, b"", dropped_lines=int(dropped["lines"]), dropped_bytes=int(dropped["bytes"])
            )
        raw = base64.b64decode(fields["line_b64"])
        return LogRecord(ts, seq, stream, raw, fields.get("partial", False))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LogError(f"not a log record: {line[:80]!r}") from error


def run_mark(run_id: str) -> bytes:
    """The very bytes that stand in each record of a run, and in no other.

    Whatever a tenant writes is inside a JSON string, where each quotation mark has a backslash before it.
    """
    return b'"run":' + json.dumps(run_id, ensure_ascii=False).encode() + b","


@dataclass(frozen=True, slots=True)
class Position:
    """How far a log is.

    Attributes:
        user_id, service_id: whose log it is.
        run_id: the run that its last record is of; empty if there is none.
        seq: of its last record.
        ts: of its last record, in seconds since the epoch.
        ends: how much of that run's two streams it holds.
    """

    user_id: str = ""
    service_id: str = ""
    run_id: str = ""
    seq: int = 0
    ts: float = 0.0
    ends: Ends = (0, 0)

    def mark(self, number: int, left: Mapping[str, Ends]) -> bytes:
        """The line that begins the next file of the log.

        Args:
            number: how many files there were before, and one.
            left: how much the log holds of other runs, by their ids.
        """
        fields = {
            "user": self.user_id,
            "service": self.service_id,
            "run": self.run_id,
            "ts": self.ts,
            "seq": self.seq,
            "spool": self.ends,
            "file": number,
            "left": left,
        }
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def parse_position(line: bytes) -> Position:
    """Where a log whose last line is `line` goes on.

    Raises:
        LogError: it is no record, nor a mark.
    """
    fields = _fields(line)
    try:
        return Position(
            user_id=str(fields["user"]),
            service_id=str(fields["service"]),
            run_id=str(fields["run"]),
            seq=int(fields["seq"]),
            ts=float(fields["ts"]),
            ends=_ends(fields["spool"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _no_record(line) from error


@dataclass(frozen=True, slots=True)
class Head:
    """How a file of a log begins.

    Attributes:
        length: bytes of its mark; 0 if it has none.
        number: of the file, as the mark says; 0 if there is none.
        seq: of the last record before the file.
        ts: of that record, or of the file's first one if there is no mark.
        left: how much the files before hold of other runs, by their ids.
    """

    length: int = 0
    number: int = 0
    seq: int = 0
    ts: float = 0.0
    left: Mapping[str, Ends] = field(default_factory=dict)


def parse_head(line: bytes) -> Head:
    """How a file begins whose first line is `line`, without its newline.

    Raises:
        LogError: it is neither a mark nor a record.
    """
    fields = _fields(line)
    try:
        seq, ts = int(fields["seq"]), float(fields["ts"])
        if "file" not in fields:
            return Head(seq=seq - 1, ts=ts)
        left = {str(run): _ends(ends) for run, ends in fields["left"].items()}
        return Head(len(line) + 1, int(fields["file"]), seq, ts, left)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_record(line) from error


def _ends(value: Any) -> Ends:
    out, err = value
    return int(out), int(err)


def _fields(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise _no_record(line) from error
    if not isinstance(fields, dict):
        raise _no_record(line)
    return fields


def _no_record(line: bytes) -> LogError:
    return LogError(f"not a log record: {line[:80]!r}", remedy="move the log away; a new one counts from 1")
