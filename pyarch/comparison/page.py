"""A comparison as a page: recommendation, bars, growth with length, the reach of gradients, all figures."""

from __future__ import annotations

from collections.abc import Iterator

from pyarch.comparison.advice import advise
from pyarch.comparison.measure import TIMED
from pyarch.comparison.reach import FADED, TEXTBOOK, textbook
from pyarch.comparison.results import GROWING, SIDES, Comparison, remarks
from pyarch.page import Axis, Bars, Facts, Lines, Page, Prose, Sheet

# Shares of the largest gradient below this are not drawn: a faded gradient would flatten the others.
FAINTEST = 1e-6
MILLISECONDS, MEBIBYTES = 1e3, 2**-20
SCALES = {"forward": MILLISECONDS, "step": MILLISECONDS, "token": MILLISECONDS, "memory": MEBIBYTES}
LENGTH = Axis("length", "tokens", log=True)
FIGURES = {
    "step": ("training step", Axis("median time of a step", "ms", log=True)),
    "token": ("generated token", Axis("median time of a token", "ms", log=True)),
    "memory": ("memory of a training step", Axis("most memory held", "MiB", log=True)),
}


def page_of(comparison: Comparison) -> Page:
    """The page of a comparison."""
    question = comparison.question
    lengths = ", ".join(map(str, question.lengths))
    return Page(
        "Architectures over sequences",
        f"Layers of width {question.width} on {question.batch} sequences of {lengths} tokens: torch's own "
        "and the same swapped to pyarch, in turns on this machine.",
        [
            Prose(
                f"What to choose for {question.longest} tokens", [str(each) for each in advise(comparison)]
            ),
            *(_bars(comparison, figure) for figure in FIGURES),
            *_growth(comparison),
            _reach(comparison),
            _figures(comparison),
            _architectures(comparison),
            Prose("Remarks", remarks(comparison)),
            Facts("Measured on", {**comparison.machine, **_asked(comparison)}),
        ],
    )


def _asked(comparison: Comparison) -> dict[str, str]:
    numbers = comparison.question.as_dict().items()
    return {name: str(value).strip("[]") for name, value in numbers if name != "device"}


def _bars(comparison: Comparison, figure: str) -> Bars:
    """Each architecture on the longest sequence, stock and pyarch."""
    title, axis = FIGURES[figure]
    rows = [(each.name, each.rows[-1]) for each in comparison.compared]
    series = {
        side: [_scaled(getattr(getattr(row, side), figure), figure) for _, row in rows] for side in SIDES
    }
    note = "A bar is missing where nothing could be measured; the remarks below say why."
    heading = f"{title.capitalize()} at {comparison.question.longest} tokens"
    return Bars(heading, [name for name, _ in rows], series, Axis(axis.title, axis.unit), note)


def _growth(comparison: Comparison) -> Iterator[Lines]:
    """Each figure over the lengths, of pyarch and of stock; nothing for one length."""
    if len(comparison.question.lengths) < 2:
        return
    for figure, (title, axis) in FIGURES.items():
        for side in reversed(SIDES):
            series = {}
            for each in comparison.compared:
                points = ((row.length, getattr(getattr(row, side), figure)) for row in each.rows)
                drawn = [(length, _scaled(value, figure)) for length, value in points if value is not None]
                if drawn:
                    series[each.name] = drawn
            note = "A line of slope 1 grows with the length, a line of slope 2 with its square."
            yield Lines(f"{title.capitalize()} over length, {side}", series, LENGTH, axis, note)


def _reach(comparison: Comparison) -> Lines:
    series = {}
    for each in comparison.compared:
        if each.reach is not None:
            series[each.name] = [point for point in each.reach.sampled() if point[1] >= FAINTEST]
    series.update({f"{factor}^d": textbook(factor) for factor in TEXTBOOK})
    note = (
        "How much the last output's gradient says of a token d before it, at torch's initial parameters. "
        f"Beside it the textbook picture of a recurrence that multiplies by {TEXTBOOK[0]} or {TEXTBOOK[1]} a "
        f"step. Below {100 * FADED:.0f} % little is learned of a token; a line that ends has no gradient, or "
        "next to none, beyond."
    )
    distance = Axis("distance d", "tokens", log=True)
    return Lines(
        "How far the gradient reaches", series, distance, Axis("share of its largest", log=True), note
    )


def _figures(comparison: Comparison) -> Sheet:
    """All that was measured of calls."""
    columns = ["architecture", ">tokens", "side"]
    for figure in GROWING:
        units = ("ms", "p20", "p80") if figure in TIMED else ("MiB",)
        columns += [f">{figure} {unit}" for unit in units]
    rows = []
    for each, row, side, figures in comparison.sides():
        cells = []
        for figure in GROWING:
            cells.append(_scaled(getattr(figures, figure), figure))
            if figure in TIMED:
                between = figures.spread.get(figure, (None, None))
                cells += [_scaled(end, figure) for end in between]
        rows.append((each.name, row.length, side, *cells, figures.refused))
    note = "p20, p80: the times at 20 % and at 80 % of the rounds; empty where there was one round."
    return Sheet("All figures", [*columns, "remark"], rows, note)


def _architectures(comparison: Comparison) -> Sheet:
    """What belongs to an architecture itself."""
    columns = ["architecture", ">parameters", ">GFLOP", ">gradient half at", ">1 % at"]
    columns += [f">{figure}, {side}" for figure in FIGURES for side in SIDES]
    rows = []
    for each in comparison.compared:
        reach = (None, None) if each.reach is None else (each.reach.half, each.reach.faded)
        growth = (each.growth(side, figure) for figure in FIGURES for side in SIDES)
        gflop = None if each.flop[-1] is None else each.flop[-1] / 1e9
        rows.append((each.name, each.parameters, gflop, *reach, *growth))
    formats = {column: "{:.1f}" for column in columns[-len(FIGURES) * len(SIDES) :]}
    note = "GFLOP of a forward on the longest sequence; step, token, memory: the exponent p of growth T^p."
    return Sheet("Architectures", columns, rows, note, formats)


def _scaled(value: float | None, figure: str) -> float | None:
    return None if value is None else value * SCALES[figure]
