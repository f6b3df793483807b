"""The sections of a page that are read: paragraphs, facts, tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Cell = str | float | None
ABSENT = "-"


@dataclass(frozen=True)
class Prose:
    """Paragraphs of plain text under a title."""

    title: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """Names and what they are, such as the device, the threads, the versions."""

    title: str
    pairs: Mapping[str, str]


@dataclass(frozen=True)
class Sheet:
    """A table that its reader sorts by any column, and filters where it is long.

    Args:
        title: its heading.
        columns: the headings. One that starts with ">" is aligned to the right.
        rows: as many cells each as there are columns: texts, numbers, or None where there is nothing.
        note: a line under the title.
        formats: how the numbers of a column are shown, such as {"time": "{:.2f}"}; the column is named with
            or without its ">". A column without a format shows four significant digits, and integers whole.

    Raises:
        ValueError: a row has more or fewer cells than there are columns, or a format names no column.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    formats: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"sheet {self.title!r}: {len(self.columns)} columns, but a row of {len(row)}: {row!r}"
                )
        unknown = sorted(set(self.formats) - set(self.columns) - set(self.headings))
        if unknown:
            raise ValueError(f"sheet {self.title!r}: formats for {unknown}, the columns are {self.headings}")

    @property
    def headings(self) -> list[str]:
        """The columns without the sign of their alignment."""
        return [column.removeprefix(">") for column in self.columns]

    def shown(self, number: int, cell: Cell) -> str:
        """The text of a cell of the column with this number."""
        if cell is None:
            return ABSENT
        if isinstance(cell, str):
            return cell
        if isinstance(cell, bool):
            return "yes" if cell else "no"
        form = self.formats.get(self.columns[number]) or self.formats.get(self.headings[number])
        if form and math.isfinite(cell):
            return form.format(cell)
        return str(cell) if isinstance(cell, int) else f"{cell:.4g}"
