"""What a comparison found: all figures of each architecture, and what follows from several lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product

from pyarch.comparison.growth import exponent
from pyarch.comparison.measure import Row, Side
from pyarch.comparison.question import Question
from pyarch.comparison.reach import Reach

SIDES = ("stock", "pyarch")
# The figures of a Side that are fitted over the lengths.
GROWING = ("forward", "step", "token", "memory")
BOTH_WAYS = (
    "attention: causal here; without a mask (bidirectional) it scores twice the pairs, and cannot generate"
)


@dataclass(frozen=True)
class Compared:
    """One architecture.

    Args:
        parameters: how many numbers it learns; None where it could not be built.
        flop: operations of the products in a forward of the whole batch, one for each row; counted; None
            where it could not be built.
        rows: its figures on each length, ascending.
        reach: of its gradient, on the longest sequence on which it runs.
    """

    name: str
    family: str
    note: str
    parameters: int | None
    flop: tuple[int | None, ...]
    rows: tuple[Row, ...]
    reach: Reach | None

    def growth(self, side: str, figure: str) -> float | None:
        """p of figure ~ T^p; `side` is one of SIDES, `figure` one of GROWING."""
        return exponent((row.length, getattr(getattr(row, side), figure)) for row in self.rows)

    def as_dict(self) -> dict:
        reach = None
        if self.reach is not None:
            reach = {
                "tokens": len(self.reach.norms),
                "half": self.reach.half,
                "faded": self.reach.faded,
                "ends": self.reach.ends,
                "shares": [list(point) for point in self.reach.sampled()],
            }
        return {
            "name": self.name,
            "family": self.family,
            "note": self.note,
            "parameters": self.parameters,
            "rows": [{**asdict(row), "flop": flop} for row, flop in zip(self.rows, self.flop, strict=True)],
            "growth": {side: {figure: self.growth(side, figure) for figure in GROWING} for side in SIDES},
            "reach": reach,
        }


@dataclass(frozen=True)
class Comparison:
    """All architectures on the user's numbers."""

    question: Question
    machine: dict[str, str]
    compared: tuple[Compared, ...]

    @property
    def ok(self) -> bool:
        """Whether anything was measured."""
        return any(side.step is not None for _, _, _, side in self.sides())

    def sides(self) -> Iterator[tuple[Compared, Row, str, Side]]:
        """Every side of every row, with what it belongs to."""
        for each in self.compared:
            for row, name in product(each.rows, SIDES):
                yield each, row, name, getattr(row, name)

    def named(self, name: str) -> Compared:
        """One architecture."""
        return next(each for each in self.compared if each.name == name)


def remarks(comparison: Comparison) -> list[str]:
    """What a reader must know: of attention, of single architectures, and of all that was not measured."""
    said = [f"{each.name}: {each.note}" for each in comparison.compared if each.note]
    return [BOTH_WAYS, *said, *refusals(comparison)]


def refusals(comparison: Comparison) -> list[str]:
    """A line for each side of an architecture that has no figures, with its lengths and the reason."""
    lengths: dict[tuple[str, str, str], list[str]] = {}
    for each, row, side, figures in comparison.sides():
        if figures.refused:
            lengths.setdefault((each.name, side, figures.refused), []).append(str(row.length))
    everywhere = len(comparison.question.lengths)
    lines = []
    for (name, side, reason), where in lengths.items():
        at = "" if len(where) == everywhere else f" at {', '.join(where)} tokens"
        lines.append(f"{name}, {side}{at}: {reason}")
    return lines
