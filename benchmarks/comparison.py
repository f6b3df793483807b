"""Two runs beside each other: which rows moved, and whether a suite moved as a whole. Imports no torch.

What is compared is the speedup over stock, a ratio of neighbours in time: absolute times drift on shared
machines. Its interval reaches over the 95 % intervals of a row's visits, see benchmarks.visits; processes
may differ by more, by how memory and threads were placed and what the neighbours did. With c the logarithm
of new speedup over old,

    variance(c) = s_old^2 + s_new^2 + t^2,    s = (log high - log low) / (2 * 1.96)

where t, the spread between processes, is 1.48 times the median distance of a suite's c from their median,
within bounds: where many rows truly changed, that distance is no noise, and would hide the others. A row has
moved when its intervals are disjoint, c is at least LEAST_CHANGE, and c is beyond what the largest of as many
rows reaches by chance. What moved by less shows in the group: the pseudomedian of all c and its interval, as
in Wilcoxon's signed-rank test (Hodges, Lehmann 1963, doi:10.1214/aoms/1177704172).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, median

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from benchmarks.results import ResultsError, is_beside_stock

NORMAL = NormalDist()
Z_95 = NORMAL.inv_cdf(0.975)
# The chance that a comparison of equal commits marks some row, or some group; noise has heavier tails than
# the normal distribution, so the bounds on the change itself matter too.
CHANCE_OF_A_ROW = 0.002
CHANCE_OF_A_GROUP = 0.005
LEAST_CHANGE = math.log(1.05)
# Two processes on a quiet machine: never less, and this much where a suite has too few rows to tell.
LEAST_SPREAD = 0.02
ASSUMED_SPREAD = 0.03
# Committed runs of a busy machine differ by 0.05 to 0.17; with this bound one of their rows is marked.
MOST_SPREAD = 0.08
FEWEST_ROWS = 8
# From the median distance from the median to the standard deviation.
TO_DEVIATION = 1.4826
# What must be equal, unless forced: where it stands in the environment, and its name.
SAME = (
    ("device", "devices"),
    ("threads", "numbers of threads"),
    ("torch_cpu_capability", "instruction sets of torch"),
    ("cpu_kernels", "instruction sets of ours"),
)
SLOWER, FASTER, SAME_AS_BEFORE = "slower", "faster", ""

Key = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Change:
    """One row of both runs: its suite, case, pass and variant, the speedups, and what is said of them."""

    key: Key
    old: dict[str, float]
    new: dict[str, float]
    beyond: float
    verdict: str = SAME_AS_BEFORE

    @property
    def log_ratio(self) -> float:
        return math.log(self.new["median"] / self.old["median"])


@dataclass(frozen=True)
class Shift:
    """How the speedups of a group of rows moved together: the middle of the changes and its interval."""

    suite: str
    pass_name: str
    count: int
    middle: float
    low: float
    high: float
    keys: tuple[Key, ...] = field(repr=False)

    @property
    def verdict(self) -> str:
        if abs(self.middle) < LEAST_CHANGE or self.low <= 0 <= self.high:
            return SAME_AS_BEFORE
        return SLOWER if self.middle < 0 else FASTER


@dataclass(frozen=True)
class Changes:
    """What a comparison found of two runs.

    `only_old`, `only_new`: rows that the other run lacks or could not measure. `runs`: what either is of.
    """

    rows: list[Change]
    shifts: list[Shift]
    spreads: dict[str, float]
    only_old: list[Key]
    only_new: list[Key]
    runs: tuple[str, str]

    @property
    def slower(self) -> list[tuple[str, str, str]]:
        """(suite, case, pass) of every row that is slower, alone or in a group that is."""
        alone = [change.key for change in self.rows if change.verdict == SLOWER]
        together = [key for shift in self.shifts if shift.verdict == SLOWER for key in shift.keys]
        return list(dict.fromkeys(key[:3] for key in alone + together))

    def table(self) -> Group:
        """The rows that moved, the groups, and what was not compared, for rich to print."""
        moved = [change for change in self.rows if change.verdict]
        moved.sort(key=lambda change: change.log_ratio)
        return Group(*([table_of_rows(moved)] if moved else []), table_of_shifts(self.shifts), *self.lines())

    def lines(self) -> list[Text]:
        slower = sum(change.verdict == SLOWER for change in self.rows)
        faster = sum(change.verdict == FASTER for change in self.rows)
        words = ", ".join(f"{suite} {spread:.0%}" for suite, spread in self.spreads.items())
        lines = [
            f"{len(self.rows)} rows in both runs: {slower} slower, {faster} faster, "
            f"{len(self.rows) - slower - faster} within their noise (between the two processes: {words})"
        ]
        for words, keys in (("the old run", self.only_old), ("the new run", self.only_new)):
            lines += [f"only in {words}: {' | '.join(key)}" for key in keys]
        lines += [f"{name} run: {words}" for name, words in zip(("old", "new"), self.runs, strict=True)]
        return [Text(line) for line in lines]


def compare(old: dict, new: dict, force: bool = False) -> Changes:
    """Compare two results documents row by row and suite by suite.

    Raises ResultsError when they are of different devices, threads or instruction sets, or beside another
    stock, without `force`; or have no measured row in common.
    """
    if not force:
        refuse_unlike(old, new)
    olds, news = measured(old), measured(new)
    common = [key for key in olds if key in news]
    if not common:
        raise ResultsError("the two runs have no measured row in common; compare runs of the same suite")
    changes = [Change(key, olds[key], news[key], math.inf) for key in common]
    suites = dict.fromkeys(key[0] for key in common)
    groups = {suite: [change for change in changes if change.key[0] == suite] for suite in suites}
    spreads = {suite: spread_between(group) for suite, group in groups.items()}
    return Changes(
        [judged(change, spreads[suite], len(group)) for suite, group in groups.items() for change in group],
        [shift for suite, group in groups.items() for shift in shifts_of(suite, group)],
        spreads,
        # Of suites that were measured now: an old run of all stands beside a new one of some.
        [key for key in olds if key not in news and key[0] in suites],
        [key for key in news if key not in olds],
        (facts_of(old), facts_of(new)),
    )


def facts_of(document: dict) -> str:
    """What a run is of: a newer torch moves speedups too, and changed files are in no commit."""
    environment = document["environment"]
    dirty = " with changes" if environment.get("dirty") else ""
    commit = str(environment.get("commit"))[:12]
    return f"commit {commit}{dirty}, torch {environment.get('torch')}, {environment.get('date')}"


def below(document: dict, bound: float) -> list[dict]:
    """The measured rows whose whole interval of the speedup over stock lies below `bound`."""
    return [
        row
        for row in document["rows"]
        if not row.get("failure") and is_beside_stock(row) and row["speedup"]["high"] < bound
    ]


def refuse_unlike(old: dict, new: dict) -> None:
    facts = [(words, *(document["environment"].get(name) for document in (old, new))) for name, words in SAME]
    facts.append(("opponents", *(document.get("versus", "eager") for document in (old, new))))
    for words, before, after in facts:
        if before != after:
            raise ResultsError(
                f"the runs are of different {words}, {before} and {after}: their speedups do not compare; "
                "use --force to compare them all the same"
            )


def measured(document: dict) -> dict[Key, dict[str, float]]:
    """The speedup of every measured row, by suite, case, pass, allocator and instruction set."""
    return {
        (
            row.get("suite", document["suite"]),
            row["case"],
            row["pass"],
            row["allocator"],
            row["isa"],
        ): row["speedup"]
        for row in document["rows"]
        if not row.get("failure")
    }


def spread_between(changes: Sequence[Change]) -> float:
    """The deviation t between processes, in the logarithm; a shift of all rows is no part of it."""
    if len(changes) < FEWEST_ROWS:
        return ASSUMED_SPREAD
    ratios = [change.log_ratio for change in changes]
    middle = median(ratios)
    deviation = TO_DEVIATION * median(abs(ratio - middle) for ratio in ratios)
    within = median(deviation_within(change) for change in changes)
    return min(MOST_SPREAD, max(LEAST_SPREAD, math.sqrt(max(0.0, deviation**2 - within**2))))


def deviation_within(change: Change) -> float:
    """The deviation of a change that the two runs' own intervals tell."""
    sides = (change.old, change.new)
    return math.hypot(*(math.log(side["high"] / side["low"]) / (2 * Z_95) for side in sides))


def judged(change: Change, spread: float, rows: int) -> Change:
    """The change with its verdict, by the rule at the head of this file."""
    most = NORMAL.inv_cdf(1 - CHANCE_OF_A_ROW / (2 * rows)) * math.hypot(deviation_within(change), spread)
    disjoint = change.new["high"] < change.old["low"] or change.old["high"] < change.new["low"]
    verdict = SAME_AS_BEFORE
    if disjoint and abs(change.log_ratio) > max(LEAST_CHANGE, most):
        verdict = SLOWER if change.log_ratio < 0 else FASTER
    return Change(change.key, change.old, change.new, most, verdict)


def shifts_of(suite: str, changes: Sequence[Change]) -> list[Shift]:
    """The shift of a suite's rows together, and of each pass where there are several."""
    passes = list(dict.fromkeys(change.key[2] for change in changes))
    groups = {"all passes": list(changes)}
    if len(passes) > 1:
        groups |= {name: [change for change in changes if change.key[2] == name] for name in passes}
    return [
        Shift(
            suite,
            name,
            len(group),
            *middle_and_interval([change.log_ratio for change in group]),
            tuple(change.key for change in group),
        )
        for name, group in groups.items()
        if len(group) >= FEWEST_ROWS
    ]


def middle_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The pseudomedian of the values, and the interval that misses it with CHANCE_OF_A_GROUP.

    It is the median of the means of all pairs, a value with itself too; so many of these lie below the middle
    as the signed-rank statistic counts, which is nearly normal with mean n(n+1)/4 and the variance below.
    """
    count = len(values)
    means = sorted((one + other) / 2 for place, one in enumerate(values) for other in values[place:])
    deviation = math.sqrt(count * (count + 1) * (2 * count + 1) / 24)
    reach = NORMAL.inv_cdf(1 - CHANCE_OF_A_GROUP / 2) * deviation
    rank = max(0, math.floor(len(means) / 2 - reach))
    return median(means), means[rank], means[-1 - rank]


def table_of_rows(changes: Sequence[Change]) -> Table:
    table = Table(title="rows that moved, by their speedup over stock", box=box.SIMPLE_HEAD)
    for title in ("suite", "case", "pass", "variant"):
        table.add_column(title, no_wrap=True)
    for title in ("old [95 %]", "new [95 %]", "change", "noise", "verdict"):
        table.add_column(title, justify="right", no_wrap=True)
    for change in changes:
        suite, case, pass_name, allocator, isa = change.key
        figures = map(interval_cell, (change.old, change.new))
        words = percent(change.log_ratio), f"±{math.expm1(change.beyond):.0%}", change.verdict
        table.add_row(Text(suite), Text(case), pass_name, f"{allocator} {isa}", *map(Text, figures), *words)
    return table


def interval_cell(speedup: dict[str, float]) -> str:
    return f"{speedup['median']:.2f} [{speedup['low']:.2f}-{speedup['high']:.2f}]"


def table_of_shifts(shifts: Sequence[Shift]) -> Table:
    table = Table(title="all rows of a suite together", box=box.SIMPLE_HEAD)
    table.add_column("suite")
    table.add_column("pass")
    for title in ("rows", "change", "interval", "verdict"):
        table.add_column(title, justify="right")
    for shift in shifts:
        interval = f"{percent(shift.low)} to {percent(shift.high)}"
        table.add_row(
            Text(shift.suite),
            shift.pass_name,
            str(shift.count),
            percent(shift.middle),
            interval,
            shift.verdict or "-",
        )
    return table


def percent(log_ratio: float) -> str:
    return f"{math.expm1(log_ratio):+.1%}"
