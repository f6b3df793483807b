"""Attention maps for a page: reduced to a size that a page can hold, with the mean of the heads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pyarch.page.charts import rounded

Map = Sequence[Sequence[float]]
LARGEST_SIDE = 64  # cells; what a screen of 400 dots still shows one by one
SMALLEST_SIDE = 8
MOST_CELLS = 150_000  # of all maps of a page, at about seven bytes each
DIGITS = 3


@dataclass(frozen=True)
class HeatMaps:
    """Maps of weights whose layer and head the reader chooses.

    Colours follow the square root of the weights, or one weight of 1 would leave all others dark. A map with
    more rows or columns than the page has room for shows the largest weight of each block.

    Args:
        title: the heading.
        maps: for each layer [head][row][column], weights of at least 0; NaN where there is none.
        row, column: what the rows and columns are.
        note: a line under the title.

    Raises:
        ValueError: a layer without heads, rows or columns, rows of different lengths, or a negative weight.
    """

    title: str
    maps: Mapping[str, Sequence[Map]]
    row: str = "query"
    column: str = "key"
    note: str = ""

    def __post_init__(self) -> None:
        for layer, heads in self.maps.items():
            shapes = {(len(each), len(line)) for each in heads for line in each}
            if len(shapes) != 1 or not all(map(len, heads)) or (0 in next(iter(shapes))):
                raise ValueError(
                    f"heat maps {self.title!r}, layer {layer!r}: needs heads that are all of one shape "
                    f"[row][column] and not empty, got {sorted(shapes)}"
                )
            if any(value < 0 for each in heads for line in each for value in line):
                raise ValueError(f"heat maps {self.title!r}, layer {layer!r}: a weight is negative")

    @property
    def count(self) -> int:
        """How many maps the page shows of this, means of heads included."""
        return sum(len(heads) + (len(heads) > 1) for heads in self.maps.values())

    def drawing(self, side: int) -> dict:
        """Every map with at most `side` rows and columns."""
        layers = []
        for layer, heads in self.maps.items():
            shown = [[f"head {number}", each] for number, each in enumerate(heads)]
            if len(heads) > 1:
                shown.append(["mean of heads", mean(heads)])
            rows, columns = len(heads[0]), len(heads[0][0])
            layers.append(
                {
                    "name": layer,
                    "rows": rows,
                    "columns": columns,
                    "row_step": math.ceil(rows / side),
                    "column_step": math.ceil(columns / side),
                    "heads": [[name, flat(pooled(each, side))] for name, each in shown],
                }
            )
        return {
            "kind": "heat maps",
            "title": self.title,
            "row": self.row,
            "column": self.column,
            "layers": layers,
        }


def side_for(maps: int) -> int:
    """The most rows and columns of a map, where a page has so many maps."""
    return max(SMALLEST_SIDE, min(LARGEST_SIDE, math.isqrt(MOST_CELLS // max(1, maps))))


def mean(heads: Sequence[Map]) -> list[list[float]]:
    """The mean of maps, cell by cell."""
    return [
        [sum(cells) / len(heads) for cells in zip(*lines, strict=True)] for lines in zip(*heads, strict=True)
    ]


def pooled(weights: Map, side: int) -> list[list[float]]:
    """The largest weight of each block, blocks as small as at most `side` rows and columns allow."""
    row_step, column_step = math.ceil(len(weights) / side), math.ceil(len(weights[0]) / side)
    return [
        [
            largest(
                value
                for line in weights[row : row + row_step]
                for value in line[column : column + column_step]
            )
            for column in range(0, len(weights[0]), column_step)
        ]
        for row in range(0, len(weights), row_step)
    ]


def largest(values: Iterable[float]) -> float:
    """The largest value that is a number, NaN where none is."""
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def flat(weights: Map) -> list[float | None]:
    """A map row after row, rounded; whole numbers without a point, because most maps hold many zeros."""
    values = (value for line in weights for value in rounded(line, DIGITS))
    return [int(value) if value in (0.0, 1.0) else value for value in values]
