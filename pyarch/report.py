"""Tables for people: through rich on a terminal, plain aligned text everywhere else."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TextIO

GAP = "  "


@dataclass(frozen=True)
class Table:
    """A titled table of texts, with lines of remarks under it.

    Args:
        title: one line above the table.
        columns: the headings. One that starts with ">" is aligned to the right.
        rows: as many texts each as there are columns.
        notes: lines below the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = field(default=())

    def __str__(self) -> str:
        """Plain text without trailing blanks."""
        lines = [self.title]
        if self.rows:
            headings = [column.lstrip(">") for column in self.columns]
            widths = [max(map(len, column)) for column in zip(headings, *self.rows, strict=True)]
            lines.append(self._line(headings, widths))
            lines.append(GAP.join("-" * width for width in widths))
            lines += [self._line(row, widths) for row in self.rows]
        return "\n".join([*lines, *self.notes])

    def show(self, file: TextIO | None = None) -> None:
        """Print the table: with rich where `file` (by default stdout) is a terminal and rich is installed."""
        file = sys.stdout if file is None else file
        if draws(file):
            self._show_rich(file)
        else:
            print(self, file=file)

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        aligned = (
            cell.rjust(width) if column.startswith(">") else cell.ljust(width)
            for cell, width, column in zip(cells, widths, self.columns, strict=True)
        )
        return GAP.join(aligned).rstrip()

    def _show_rich(self, file: TextIO) -> None:
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        console = Console(file=file)
        console.print(Text(self.title, style="bold"))
        if self.rows:
            drawn = RichTable()
            for column in self.columns:
                drawn.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
            for row in self.rows:
                drawn.add_row(*(Text(cell) for cell in row))
            console.print(drawn)
        for note in self.notes:
            console.print(Text(note))


def draws(file: TextIO) -> bool:
    """Whether rich is installed and `file` is a terminal that it can draw on."""
    return file.isatty() and importlib.util.find_spec("rich") is not None


def with_progress(names: Sequence[str]) -> Iterator[str]:
    """Yield the names and show on stderr which one is at work: a bar on a terminal, else a line each."""
    if draws(sys.stderr):
        yield from _with_bar(names)
        return
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name}", file=sys.stderr, flush=True)
        yield name


def _with_bar(names: Sequence[str]) -> Iterator[str]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            yield name
            progress.advance(task)


def as_json(document: object) -> str:
    """Plain data as JSON; numbers that it has not become the texts "inf", "-inf" and "nan"."""
    return json.dumps(_finite(document), indent=2)


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def milliseconds(seconds: float) -> str:
    """A duration in milliseconds with three significant digits, or whole ones."""
    amount = seconds * 1e3
    return f"{amount:.0f} ms" if amount >= 100 else f"{amount:.3g} ms"


def times(speedup: float) -> str:
    """A ratio of durations."""
    return f"{speedup:.2f}x"
