"""Results as one HTML page: the machine, speedups, roofline, errors, memory, peers, and every row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from benchmarks.environment import cpu_words
from benchmarks.goals import goal_text
from benchmarks.plots import PASS_WORDS, is_slower, roofs, suites_of, timed_rows
from benchmarks.results import is_beside_stock
from benchmarks.table import ceiling_words
from pyarch.page import Axis, Bars, Facts, Page, Point, Scatter, Sheet

INTRODUCTION = (
    "Stock PyTorch and pyarch timed in turn in one process, call beside call. Where a speedup is below 1, "
    "torch is faster, and the row says so."
)
TIMES_FASTER = Axis("times faster than torch", log=True)

# More bars are not read; a sweep has hundreds.
MOST_CASES = 60
# Before the name of a case that has a slower row in the chart.
SLOWER = "SLOWER "
# What is shown under which name.
SIDES = {"torch": "stock", "pyarch": "ours"}

Row = dict
Section = Facts | Bars | Scatter | Sheet


def page_of(document: dict) -> Page:
    """The page of a results document, of one suite or of all; keys that old files lack are left out."""
    sections: list[Section] = [facts(document["environment"])]
    for suite in suites_of(document):
        rows = timed_rows(document, suite)
        for section in (speedups, times, roofline, errors, memory, missing_peers):
            sections += section(document, suite, rows)
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


def missing_peers(document: dict, suite: str, rows: Sequence[Row]) -> Iterator[Sheet]:
    """Why a peer stands beside a row without a time."""
    reasons = [
        (row["case"], row["pass"], name, kind, peer[kind])
        for row in rows
        for name, peer in row.get("peers", {}).items()
        for kind in ("absent", "failure")
        if kind in peer
    ]
    if reasons:
        columns = ("case", "pass", "peer", "what", "reason")
        yield Sheet(f"{suite}: peers that did not run", columns, reasons)


def every_row(document: dict) -> Sheet:
    """All rows, failures too, under every column that some row fills."""
    names = dict.fromkeys(name for row in document["rows"] for name in row.get("peers", {}))
    columns = COLUMNS | {f">{name} ms": figure("peers", name, "median_ms") for name in names}
    cells = {title: [cell(document, row) for row in document["rows"]] for title, cell in columns.items()}
    filled = {title: values for title, values in cells.items() if any(each is not None for each in values)}
    formats = {title: form for title, form in FORMATS.items() if title in filled}
    rows = list(zip(*filled.values(), strict=True))
    return Sheet("Every row", list(filled), rows, "A click on a heading sorts by it.", formats)


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


def worst_error(side: str, rows: Sequence[Row]) -> float | None:
    """The largest error of a side where both are known; None for zero, which no logarithm shows."""
    known = [each for row in rows for each in row.get("error", {}).values() if each["stock"] is not None]
    return max((each[side] for each in known), default=None) or None


def verdict(row: Row) -> str:
    """What became of a row, in a word."""
    if row.get("failure"):
        return f"{'absent' if row.get('absent') else 'FAILED'}: {row['failure']}"
    if not is_beside_stock(row):
        return "measured"
    words = "slower than torch" if is_slower(row) else "faster than torch"
    is_within_noise = row["speedup"]["low"] <= 1 <= row["speedup"]["high"]
    return words + ", within noise" * is_within_noise


def figure(*names: str) -> Callable[[dict, Row], float | None]:
    """A nested figure of a row, None where the row lacks it."""

    def read(document: dict, row: Row) -> float | None:
        value = row
        for name in names:
            value = (value or {}).get(name)
        return value

    return read


def goal_cell(document: dict, row: Row) -> str | None:
    return goal_text(row["goal"]) if row.get("goal") else None


def met_cell(document: dict, row: Row) -> str | None:
    return {True: "yes", False: "NO"}.get(row.get("met"))


COLUMNS: dict[str, Callable[[dict, Row], str | float | None]] = {
    "suite": lambda document, row: row.get("suite", document["suite"]),
    "case": lambda document, row: row["case"],
    "pass": lambda document, row: row["pass"],
    "variant": lambda document, row: f"{row['allocator']} {row['isa']}",
    ">torch ms": figure("stock", "median_ms"),
    ">pyarch ms": figure("ours", "median_ms"),
    ">speedup": figure("speedup", "median"),
    ">from": figure("speedup", "low"),
    ">to": figure("speedup", "high"),
    ">goal": goal_cell,
    "met": met_cell,
    ">GFLOP/s": figure("gflop_per_s"),
    ">GB/s": figure("gb_per_s"),
    ">of roofline": figure("roofline", "share"),
    "bound": figure("roofline", "bound"),
    ">launch us": figure("launch_us"),
    ">added us": figure("added_us", "median"),
    ">torch MiB": figure("peak_mib", "stock"),
    ">pyarch MiB": figure("peak_mib", "ours"),
    ">compile s": figure("compile_s"),
    ">torch error": lambda document, row: worst_error("stock", [row]),
    ">pyarch error": lambda document, row: worst_error("ours", [row]),
    "backend": lambda document, row: ", ".join(row.get("backend", {}).values()) or None,
    "outcome": lambda document, row: verdict(row),
}
FORMATS = {
    ">speedup": "{:.2f}",
    ">from": "{:.2f}",
    ">to": "{:.2f}",
    ">of roofline": "{:.0%}",
    ">torch error": "{:.1e}",
    ">pyarch error": "{:.1e}",
}
