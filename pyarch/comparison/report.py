"""A comparison as tables and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from pyarch.comparison.advice import advise, binary
from pyarch.comparison.growth import shown
from pyarch.comparison.measure import Row, Side, overlap
from pyarch.comparison.page import page_of
from pyarch.comparison.results import SIDES, Compared, Comparison, remarks
from pyarch.page import Page
from pyarch.report import Table, as_json, milliseconds, times

SCHEMA = "pyarch.compare/1"
NOTHING = "-"
TIMES = (">tokens", "architecture", ">forward", ">pyarch", ">speedup", ">step", ">pyarch", ">speedup")
COSTS = (">tokens", "architecture", ">token", ">pyarch", ">speedup", ">keeps", ">memory", ">pyarch", ">saves")
TRAITS = ("architecture", ">parameters", ">GFLOP", ">half at", ">1 % at")
GROWTHS = (">step", ">pyarch", ">token", ">pyarch", ">memory", ">pyarch")
GROWN = ("step", "token", "memory")
TIME_NOTES = (
    "forward: without gradients; step: forward and backward, to the input and the parameters; the first",
    "figure is torch's own, the second pyarch's, measured in turns, both in training mode without dropout;",
    "±: half of what lies between the times at 20 % and at 80 % of the rounds; once: not repeated;",
    "?: the times of both sides overlap, which is the faster is not settled",
)
COST_NOTES = (
    "token: one more token of every sequence, with what it `keeps` of those before; memory: the most that a",
    "first training step holds beyond parameters and input, masks and gradients included",
)


@dataclass(frozen=True)
class Tables:
    """Several tables, shown one after another."""

    tables: tuple[Table, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.tables))

    def show(self) -> None:
        for each in self.tables:
            each.show()


@dataclass(frozen=True)
class Report:
    """A comparison in the forms in which it is shown."""

    comparison: Comparison

    @property
    def ok(self) -> bool:
        return self.comparison.ok

    def table(self) -> Tables:
        """Time; generation and memory; what belongs to an architecture itself; the recommendation."""
        comparison, question = self.comparison, self.comparison.question
        machine = ", ".join(f"{name} {value}" for name, value in comparison.machine.items())
        dtype = str(question.dtype).removeprefix("torch.")
        sizes = f"batch {question.batch}, width {question.width}, {dtype}"
        advice = [f"- {each}" for each in advise(comparison)]
        return Tables(
            (
                Table(f"{machine}\n\ntime of a call: {sizes}", TIMES, list(_times(comparison)), TIME_NOTES),
                Table(f"\ngeneration and memory: {sizes}", COSTS, list(_costs(comparison)), COST_NOTES),
                _traits(comparison),
                Table(f"\nwhat these figures say of {question.longest} tokens", ("",), (), advice),
            )
        )

    def page(self) -> Page:
        """The same with charts."""
        return page_of(self.comparison)

    def to_json(self) -> str:
        comparison = self.comparison
        return as_json(
            {
                "schema": SCHEMA,
                "ok": comparison.ok,
                "question": comparison.question.as_dict(),
                "machine": comparison.machine,
                "architectures": [each.as_dict() for each in comparison.compared],
                "advice": [asdict(each) for each in advise(comparison)],
            }
        )


def _times(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    for place, length in enumerate(comparison.question.lengths):
        for each in comparison.compared:
            row = each.rows[place]
            yield str(length), each.name, *_timed_pair(row, "forward"), *_timed_pair(row, "step")


def _costs(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    for place, length in enumerate(comparison.question.lengths):
        for each in comparison.compared:
            row = each.rows[place]
            token = _timed_pair(row, "token")
            kept = row.stock.state if row.stock.state is not None else row.pyarch.state
            memory = _pair(row.stock.memory, row.pyarch.memory, binary)
            yield str(length), each.name, *token, _cell(kept, binary), *memory


def _traits(comparison: Comparison) -> Table:
    has_growth = len(comparison.question.lengths) > 1
    columns = (*TRAITS, *GROWTHS) if has_growth else TRAITS
    rows = []
    for each in comparison.compared:
        traits = each.name, _cell(each.parameters, str), _cell(each.flop[-1], _giga), *_reach_cells(each)
        growth = (shown(each.growth(side, figure)) for figure in GROWN for side in SIDES)
        rows.append((*traits, *growth) if has_growth else traits)
    notes = [
        f"GFLOP: of a forward on {comparison.question.longest} tokens, counted; half at, 1 % at: how many",
        "tokens before the last output its gradient still has half, or 1 %, of its largest norm, at torch's",
        "initial parameters, which training moves",
    ]
    if has_growth:
        notes.append("step, token, memory: how torch's and pyarch's figures grow with the length T, fitted")
    return Table("\narchitectures", columns, rows, [*notes, *remarks(comparison)])


def _reach_cells(each: Compared) -> tuple[str, str]:
    if each.reach is None:
        return NOTHING, NOTHING
    last = len(each.reach.norms) - 1
    return tuple(f"all {last}" if at == last else str(at) for at in (each.reach.half, each.reach.faded))


def _timed_pair(row: Row, figure: str) -> tuple[str, str, str]:
    """Both sides' times with their spread, and the speedup, marked where it is not settled."""
    stock, pyarch = getattr(row.stock, figure), getattr(row.pyarch, figure)
    speedup = NOTHING
    if stock and pyarch:
        is_open = overlap(row.stock.interval(figure), row.pyarch.interval(figure))
        speedup = times(stock / pyarch) + " ?" * is_open
    return _timed(row.stock, figure), _timed(row.pyarch, figure), speedup


def _timed(side: Side, figure: str) -> str:
    value = getattr(side, figure)
    if value is None:
        return NOTHING
    if figure not in side.spread:
        return f"{milliseconds(value)} once"
    low, high = side.spread[figure]
    return f"{milliseconds(value)} ±{(high - low) / 2 / value:.0%}"


def _pair(stock: float | None, pyarch: float | None, show: Callable[[float], str]) -> tuple[str, str, str]:
    ratio = times(stock / pyarch) if stock and pyarch else NOTHING
    return _cell(stock, show), _cell(pyarch, show), ratio


def _cell(figure: float | None, show: Callable[[float], str]) -> str:
    return NOTHING if figure is None else show(figure)


def _giga(count: float) -> str:
    return f"{count / 1e9:.3g}"
