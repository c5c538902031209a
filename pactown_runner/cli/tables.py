"""Tables and pairs for people: with colours on a terminal, else aligned text that `cut`, `awk` and `grep` can take."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from .visible import one_line

__all__ = ["show_pairs", "show_table"]

_GAP = "  "


def show_table(headings: Sequence[str], rows: Sequence[Sequence[str]], colours: Mapping[str, str]) -> None:
    """Write a table to standard output; nothing where it would be empty.

    Args:
        headings: one for each column.
        rows: what stands in them, whoever chose it.
        colours: of what stands in the last column.
    """
    lines = [[one_line(cell) for cell in row] for row in rows]
    if not lines:
        return
    if not sys.stdout.isatty():
        _write_aligned([[heading.upper() for heading in headings], *lines])
        return
    from rich.console import Console  # noqa: PLC0415 - only for a terminal
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for *cells, last in lines:
        table.add_row(*map(Text, cells), Text(last, style=colours.get(last, "")))
    Console().print(table)


def show_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Write what is known of one thing to standard output, a line each."""
    lines = [[name, one_line(value)] for name, value in pairs]
    if not sys.stdout.isatty():
        _write_aligned(lines)
        return
    from rich.console import Console  # noqa: PLC0415 - only for a terminal
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines:
        table.add_row(name, Text(value))
    Console().print(table)


def _write_aligned(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = "".join(
        _GAP.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines
    )
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace"))
    sys.stdout.buffer.flush()
