"""What an operator sees of a service's log."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator

from ..models import LogRecord
from .output import Output, Part
from .visible import visible

__all__ = ["Gap", "JsonView", "View", "with_gaps"]


class Gap(LogRecord):
    """Stands where records have made room for newer ones; `dropped_lines` of them."""


async def with_gaps(records: AsyncIterator[LogRecord], first: int | None) -> AsyncGenerator[LogRecord, None]:
    """The records, and a `Gap` where their numbers tell of one.

    Args:
        first: the number that the first one should have; None if that is not known.
    """
    async for record in records:
        if first is not None and record.seq > first:
            yield Gap(record.ts, record.seq, "stderr", b"", dropped_lines=record.seq - first)
        yield record
        first = record.seq + 1


class View(Output):
    """For people: the lines as they are, but without a control character of the tenant's in them.

    That also goes for what is no terminal: a pipe or a file ends on one as a rule.

    Args:
        raw: let control characters through.
    """

    def __init__(self, *, raw: bool) -> None:
        super().__init__({"stdout": 1, "stderr": 2}, raw=True)
        self._raw = raw
        self._unfinished = False
        self._together = os.path.samestat(os.fstat(1), os.fstat(2))

    def part(self, record: LogRecord) -> Part:
        """A line of the tenant's, or one of our own on standard error."""
        if isinstance(record, Gap):
            return self._note(f"{record.dropped_lines} records that were here have made room for newer ones")
        if record.dropped_bytes:
            return self._note(
                f"{record.dropped_lines} lines of {record.stream} ({record.dropped_bytes} bytes) were dropped here: "
                "more than log_rate_bytes allows"
            )
        data = record.data
        self._unfinished = record.partial
        return self._targets[record.stream], data if self._raw else visible(data)

    def _note(self, text: str) -> Part:
        """A line of its own, in our own name."""
        begin = "\n" if self._unfinished and self._together else ""
        self._unfinished = False
        return 2, f"{begin}pactown-runner: {text}\n".encode()


class JsonView(Output):
    """For programs, and safe on any terminal: all but printable ASCII is escaped."""

    def __init__(self) -> None:
        super().__init__({"stdout": 1, "stderr": 1}, raw=True)

    def part(self, record: LogRecord) -> Part:
        """A line of JSON."""
        fields: dict[str, object] = {"ts": record.ts, "seq": record.seq, "stream": record.stream}
        if isinstance(record, Gap):
            return 1, b""  # the numbers tell
        if record.dropped_bytes:
            fields["dropped"] = {"lines": record.dropped_lines, "bytes": record.dropped_bytes}
        else:
            try:
                fields["line"] = record.raw.decode()
            except UnicodeDecodeError:
                fields["line_b64"] = base64.b64encode(record.raw).decode()
            if record.partial:
                fields["partial"] = True
        return 1, json.dumps(fields).encode() + b"\n"
