"""Bytes to records, records to JSON lines, and back.

A record is one JSON object on one line:

    {"user":"auth0|1","service":"api","run":"3f2a","ts":1.5,"seq":7,"stream":"stdout","line":"hi","spool":[21,0]}

`line_b64` stands in place of `line` for bytes that are not UTF-8, and `"partial":true` where the line goes
on in the stream's next record or ended without a newline. `spool` holds how much of both streams of this
run is in the log once this record is: the last line alone tells where to go on after a crash. A tenant can
forge nothing: its newlines end records, and all else it writes is inside a JSON string.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..models import LogRecord, Stream
from .errors import LogError

if TYPE_CHECKING:
    import structlog

__all__ = [
    "PIECE_BYTES",
    "Position",
    "RecordLogger",
    "parse_position",
    "parse_record",
    "record_logger",
    "run_mark",
    "split",
]

PIECE_BYTES = 1 << 16
"""The most bytes of a line that one record holds."""

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
        text = fields.get("line")
        raw = text.encode() if text is not None else base64.b64decode(fields["line_b64"])
        return LogRecord(fields["ts"], fields["seq"], fields["stream"], raw, fields.get("partial", False))
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
        run_id: the run that its last record is of; empty if there is none.
        seq: of its last record.
        ends: how much of that run's two streams it holds.
    """

    run_id: str = ""
    seq: int = 0
    ends: tuple[int, int] = (0, 0)


def parse_position(line: bytes) -> Position:
    """Where a log whose last line is `line` goes on.

    Raises:
        LogError: it is no record.
    """
    try:
        fields = json.loads(line)
        out, err = fields["spool"]
        return Position(str(fields["run"]), int(fields["seq"]), (int(out), int(err)))
    except (ValueError, KeyError, TypeError) as error:
        raise LogError(
            f"not a log record: {line[:80]!r}", remedy="move the log away; a new one counts from 1"
        ) from error
