"""Tables and pairs for people: with colours on a terminal, else aligned text that `cut`, `awk` and `grep` can take."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .visible import one_line

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Grid", "coloured", "show_grid", "show_pairs", "show_table"]

_GAP = "  "


@dataclass(frozen=True)
class Grid:
    """A table's content.

    Attributes:
        headings: one for each column.
        rows: what stands in them, whoever chose it.
        colours: of what stands in one of the columns.
        in_colour: the number of that column.
        cut: whether the last column is cut off where the terminal ends, and not folded.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    colours: Mapping[str, str]
    in_colour: int = -1
    cut: bool = False

    def for_terminal(self) -> Table:
        """As rich shows it."""
        from rich.table import Table  # noqa: PLC0415 - only for a terminal
        from rich.text import Text  # noqa: PLC0415

        table = Table(box=None, header_style="bold", pad_edge=False)
        for heading in self.headings:
            is_cut = self.cut and heading == self.headings[-1]
            table.add_column(heading, overflow="ellipsis" if is_cut else "fold", no_wrap=is_cut)
        for row in self.rows:
            cells = [Text(one_line(cell)) for cell in row]
            cells[self.in_colour].style = self.colours.get(row[self.in_colour], "")
            table.add_row(*cells)
        return table


def show_grid(grid: Grid) -> None:
    """Write a table to standard output; nothing where it would be empty."""
    if not grid.rows:
        return
    if not sys.stdout.isatty():
        lines = [[one_line(cell) for cell in row] for row in grid.rows]
        _write_aligned([[heading.upper() for heading in grid.headings], *lines])
        return
    from rich.console import Console  # noqa: PLC0415 - only for a terminal

    Console().print(grid.for_terminal())


def show_table(headings: Sequence[str], rows: Sequence[Sequence[str]], colours: Mapping[str, str]) -> None:
    """Write a table to standard output whose last column is in colour; see `Grid`."""
    show_grid(Grid(headings, rows, colours))


def coloured(text: str, colour: str) -> str:
    """Words for standard output, in a colour if that is a terminal of somebody who wants any."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    import typer  # noqa: PLC0415

    return typer.style(text, fg=colour)


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
