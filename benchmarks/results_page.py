"""Results as one HTML page: the machine, speedups, roofline, errors, memory, peers, and every row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from benchmarks.environment import cpu_words
from benchmarks.plots import PASS_WORDS, is_slower, roofs, suites_of, timed_rows
from benchmarks.results import is_beside_stock
from benchmarks.results_sheet import EVERY_ROW, Row, every_row, variant_of, worst_error
from benchmarks.table import ceiling_words
from pyarch.page import Axis, Bars, Facts, Page, Point, Scatter, Sheet

INTRODUCTION = (
    "Stock PyTorch and pyarch timed in turn in one process, call beside call. Where several processes "
    "measured a row, its times are of the first, its speedup of all. Where a speedup is below 1, torch is "
    "faster, and the row says so."
)
TIMES_FASTER = Axis("times faster than torch", log=True)

# More bars are not read; a sweep has hundreds.
MOST_CASES = 60
# Before the name of a case that has a slower row in the chart.
SLOWER = "SLOWER "
# What is shown under which name.
SIDES = {"torch": "stock", "pyarch": "ours"}

Section = Facts | Bars | Scatter | Sheet


def page_of(document: dict) -> Page:
    """The page of a results document, of one suite or of all; keys that old files lack are left out."""
    sections: list[Section] = [facts(document["environment"])]
    for suite in suites_of(document):
        rows = timed_rows(document, suite)
        which = which_variant(document, suite, rows)
        for section in (speedups, times, roofline, errors, memory):
            sections += [noted(chart, which) for chart in section(document, suite, rows)]
        sections += missing_peers(document, suite)
    sections.append(every_row(document))
    return Page(title_of(document), INTRODUCTION, sections)


def title_of(document: dict) -> str:
    return f"pyarch benchmarks: {', '.join(suites_of(document)) or document['suite']}"


def facts(environment: dict) -> Facts:
    """Where and with what the figures were measured."""
    gpu, cpu = environment.get("gpu"), environment.get("cpu")
    state = (gpu or {}).get("state") or {}
    dirty = ", with uncommitted changes" if environment.get("dirty") else ""
    pairs = {
        "device": gpu["name"] if gpu else cpu_words(cpu) if cpu else environment.get("device"),
        "driver": state.get("driver"),
        "clock at the start": state.get("sm_mhz") and f"{state['sm_mhz']:g} MHz",
        "results of": environment.get("device"),
        "threads": environment.get("threads"),
        "cores": ", ".join(map(str, environment.get("affinity") or ())),
        "torch": environment.get("torch"),
        "triton": environment.get("triton"),
        "instruction set of our kernels": environment.get("cpu_kernels"),
        "commit": f"{environment.get('commit')}{dirty}",
        "date": environment.get("date"),
        "load at the start": ", ".join(map(str, environment.get("load_average") or ())),
        "ceilings": ceiling_words(environment.get("ceilings", {})),
    }
    return Facts("Measured on", {name: str(value) for name, value in pairs.items() if value})


def which_variant(document: dict, suite: str, rows: Sequence[Row]) -> str:
    """What a reader must know of charts where there are several variants: which one is drawn."""
    variants = list(dict.fromkeys(map(variant_of, rows_of_suite(document, suite))))
    if len(variants) < 2 or not rows:
        return ""
    drawn = variant_of(rows[0])
    others = ", ".join(each for each in variants if each != drawn)
    return f'Drawn: allocator and instruction set {drawn}. Under "{EVERY_ROW}" also: {others}.'


def noted(chart: Bars | Scatter, words: str) -> Bars | Scatter:
    return replace(chart, note=f"{chart.note} {words}".strip())


def rows_of_suite(document: dict, suite: str) -> list[Row]:
    return [row for row in document["rows"] if row.get("suite", document["suite"]) == suite]


def speedups(document: dict, suite: str, rows: Sequence[Row]) -> Iterator[Bars]:
    """A bar a case and pass; what has our own call on the stock side is no speedup over torch."""
    beside_stock = [row for row in rows if is_beside_stock(row)]
    if beside_stock:
        slower = sum(map(is_slower, beside_stock))
        note = f"{slower} of {len(beside_stock)} rows are slower than torch: their bars end below 1."
        yield bars_of(
            f"{suite}: speedup over torch",
            beside_stock,
            {PASS_WORDS.get(name, name): by_pass(name, speedup_of) for name in passes_of(beside_stock)},
            TIMES_FASTER,
            note,
            mark=1.0,
        )


def times(document: dict, suite: str, rows: Sequence[Row]) -> Iterator[Bars]:
    """The time of a call on each side, and of other ways to run the same."""
    for pass_name in passes_of(rows):
        of_pass = [row for row in rows if row["pass"] == pass_name]
        peers = dict.fromkeys(name for row in of_pass for name in row.get("peers", {}))
        timed = [name for name in peers if any(peer_time(name, [row]) for row in of_pass)]
        beside = f" beside {', '.join(timed)}: the same inputs and threads. No bar: it cannot run the case."
        yield bars_of(
            f"{suite}: time of a call, {PASS_WORDS.get(pass_name, pass_name)}",
            of_pass,
            {name: partial(time_of, side) for name, side in SIDES.items()}
            | {name: partial(peer_time, name) for name in timed},
            Axis("median time", "ms", log=True),
            f"Before and after{beside if timed else '.'}",
        )


def roofline(document: dict, suite: str, rows: Sequence[Row]) -> Iterator[Scatter]:
    """Every row at its intensity and rate, under the ceilings of the same run."""
    shown = [row for row in rows if "roofline" in row]
    if not shown:
        return
    yield Scatter(
        f"{suite}: roofline",
        {
            PASS_WORDS.get(name, name): [
                Point(row["roofline"]["intensity"], row["gflop_per_s"], row["case"])
                for row in shown
                if row["pass"] == name
            ]
            for name in passes_of(shown)
        },
        Axis("floating-point operations a byte that must move", log=True),
        Axis("rate", "GFLOP/s", log=True),
        roofs(document, shown),
        "A point above a roof is data that the caches held, or dtypes under another roof.",
    )


def errors(document: dict, suite: str, rows: Sequence[Row]) -> Iterator[Bars]:
    """The worst error of each case against float64, ours beside torch's own in the same dtype."""
    shown = [row for row in rows if any(each["stock"] is not None for each in row.get("error", {}).values())]
    if shown:
        yield bars_of(
            f"{suite}: error against float64",
            shown,
            {name: partial(worst_error, side) for name, side in SIDES.items()},
            Axis("largest absolute error of any output or gradient", log=True),
            "Both sides against the same problem in float64; what torch has wrong itself is not counted.",
        )


def memory(document: dict, suite: str, rows: Sequence[Row]) -> Iterator[Bars]:
    """The most memory that a call of either side allocates."""
    shown = [row for row in rows if row.get("peak_mib")]
    if shown:
        yield bars_of(
            f"{suite}: peak memory of a call",
            shown,
            {
                f"{name}, {PASS_WORDS.get(each, each)}": by_pass(each, partial(peak_of, side))
                for each in passes_of(shown)
                for name, side in SIDES.items()
            },
            Axis("allocated beyond what was there", "MiB", log=True),
        )


def missing_peers(document: dict, suite: str) -> Iterator[Sheet]:
    """Why a peer stands beside a row without a time, in every variant."""
    reasons = [
        (row["case"], row["pass"], variant_of(row), name, kind, peer[kind])
        for row in rows_of_suite(document, suite)
        for name, peer in row.get("peers", {}).items()
        for kind in ("absent", "failure")
        if kind in peer
    ]
    if reasons:
        columns = ("case", "pass", "variant", "peer", "what", "reason")
        yield Sheet(f"{suite}: peers that did not run", columns, reasons)


def bars_of(
    title: str,
    rows: Sequence[Row],
    series: dict[str, Callable[[list[Row]], float | None]],
    axis: Axis,
    note: str = "",
    mark: float | None = None,
) -> Bars:
    """Bars with the cases for names, or with the worst ones; a series is a function of a case's rows."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    if len(cases) > MOST_CASES:
        note = f"{note} The {MOST_CASES} of {len(cases)} cases with the least speedup; the sheet has all."
        worst = sorted(rows, key=speedup_of)
        cases = list(dict.fromkeys(row["case"] for row in worst))[:MOST_CASES]
    grouped = [[row for row in rows if row["case"] == case] for case in cases]
    values = {name: [figure(group) for group in grouped] for name, figure in series.items()}
    marks = [SLOWER * any(map(is_slower, group)) for group in grouped]
    names = [mark + case for mark, case in zip(marks, cases, strict=True)]
    return Bars(title, names, values, axis, note, mark)


def by_pass(name: str, figure: Callable[[Row], float | None]) -> Callable[[list[Row]], float | None]:
    """The figure of a case's row of this pass, if it has one."""
    return lambda rows: next((figure(row) for row in rows if row["pass"] == name), None)


def passes_of(rows: Sequence[Row]) -> list[str]:
    found = dict.fromkeys(row["pass"] for row in rows)
    return [name for name in PASS_WORDS if name in found] + [name for name in found if name not in PASS_WORDS]


def speedup_of(row: Row) -> float:
    return row["speedup"]["median"]


def peak_of(side: str, row: Row) -> float | None:
    return row.get("peak_mib", {}).get(side) or None


def time_of(side: str, rows: Sequence[Row]) -> float:
    return rows[0][side]["median_ms"]


def peer_time(name: str, rows: Sequence[Row]) -> float | None:
    return rows[0].get("peers", {}).get(name, {}).get("median_ms")
