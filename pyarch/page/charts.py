"""The sections of a page that ECharts draws from numbers: bars, points, lines.

Each one states what is to be drawn as plain data (`drawing`, read by the page's scripts) and says the same as
a table (`sheet`), for those who cannot see the chart or want its numbers. A value that is None or not finite
is left out of the drawing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pyarch.page.texts import Sheet

DIGITS = 6  # significant ones of a number in the page
Pair = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """What an axis shows, in which unit, and whether its scale is logarithmic."""

    title: str
    unit: str = ""
    log: bool = False

    @property
    def label(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def drawing(self) -> dict:
        return {"label": self.label, "unit": self.unit, "log": self.log}


@dataclass(frozen=True)
class Point:
    """A labelled point of a scatter chart."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Bars:
    """Horizontal bars in groups: a group a name, a bar a series.

    Args:
        title: its heading.
        names: what the groups are, from the top.
        series: as many values each as there are names, None where there is none.
        axis: of the values.
        note: a line under the title.
        mark: a value that the bars are compared with, drawn as a thin line with its number.

    Raises:
        ValueError: a series has more or fewer values than there are names, or the axis has no place for the
            mark: it is not finite, or not positive where the axis is logarithmic.
    """

    title: str
    names: Sequence[str]
    series: Mapping[str, Sequence[float | None]]
    axis: Axis
    note: str = ""
    mark: float | None = None

    def __post_init__(self) -> None:
        for name, values in self.series.items():
            if len(values) != len(self.names):
                raise ValueError(
                    f"bars {self.title!r}: {len(self.names)} names, but {len(values)} values of {name!r}"
                )
        if self.mark is not None and (not math.isfinite(self.mark) or (self.axis.log and self.mark <= 0)):
            scale = "logarithmic" if self.axis.log else "linear"
            raise ValueError(f"bars {self.title!r}: no place for the mark {self.mark} on a {scale} axis")

    def drawing(self) -> dict:
        return {
            "kind": "bars",
            "title": self.title,
            "names": list(self.names),
            "series": [[name, rounded(values)] for name, values in self.series.items()],
            "axis": self.axis.drawing(),
            "mark": rounded([self.mark])[0],
        }

    def sheet(self) -> Sheet:
        columns = ["", *(f">{name}" for name in self.series)]
        rows = list(zip(self.names, *self.series.values(), strict=True)) if self.series else []
        marked = (
            ""
            if self.mark is None
            else f"; the line in the chart is at {self.mark:.{DIGITS}g} {self.axis.unit}"
        )
        return Sheet(self.title, columns, rows, f"{self.axis.label}{marked}".rstrip())


@dataclass(frozen=True)
class Scatter:
    """Labelled points in the plane, with lines to compare them with (such as a roofline).

    Args:
        title: its heading.
        series: the points of each.
        x, y: the axes.
        lines: the corners of each line, from left to right.
        note: a line under the title.
    """

    title: str
    series: Mapping[str, Sequence[Point]]
    x: Axis
    y: Axis
    lines: Mapping[str, Sequence[Pair]] = field(default_factory=dict)
    note: str = ""

    def drawing(self) -> dict:
        series = [
            [name, [[*rounded((point.x, point.y)), point.label] for point in points]]
            for name, points in self.series.items()
        ]
        return {
            "kind": "scatter",
            "title": self.title,
            "series": series,
            "lines": [[name, [rounded(pair) for pair in pairs]] for name, pairs in self.lines.items()],
            "x": self.x.drawing(),
            "y": self.y.drawing(),
        }

    def sheet(self) -> Sheet:
        points = [(name, each.label, each.x, each.y) for name, many in self.series.items() for each in many]
        corners = [(name, "", x, y) for name, pairs in self.lines.items() for x, y in pairs]
        columns = ("series", "point", f">{self.x.label}", f">{self.y.label}")
        return Sheet(self.title, columns, points + corners)


@dataclass(frozen=True)
class Lines:
    """Lines through points: how something grows.

    Args:
        title: its heading.
        series: the points of each line, from left to right.
        x, y: the axes.
        note: a line under the title.
    """

    title: str
    series: Mapping[str, Sequence[Pair]]
    x: Axis
    y: Axis
    note: str = ""

    def drawing(self) -> dict:
        return {
            "kind": "lines",
            "title": self.title,
            "series": [[name, [rounded(pair) for pair in pairs]] for name, pairs in self.series.items()],
            "x": self.x.drawing(),
            "y": self.y.drawing(),
        }

    def sheet(self) -> Sheet:
        columns = [f">{self.x.label}", *(f">{name}" for name in self.series)]
        values = [dict(pairs) for pairs in self.series.values()]
        places = sorted({x for known in values for x in known})
        rows = [(x, *(known.get(x) for known in values)) for x in places]
        return Sheet(self.title, columns, rows, f"columns: {self.y.label}")


def rounded(values: Iterable[float | None], digits: int = DIGITS) -> list[float | None]:
    """The values with so many significant digits, None for what a chart cannot show."""
    return [
        float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else None
        for value in values
    ]
