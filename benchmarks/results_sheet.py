"""Every row of a results document as one sheet of its page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.goals import goal_text
from benchmarks.plots import is_slower
from benchmarks.results import is_beside_stock
from pyarch.page import Sheet

EVERY_ROW = "Every row"
COMPILE_NOTE = (
    "compile s: what our first call on a GPU took more than a warm one. Kernels for CPUs are compiled "
    "beforehand; figures of theirs in older files are the time of memory touched first."
)

Row = dict


def every_row(document: dict) -> Sheet:
    """All rows, failures too, under every column that some row fills."""
    names = dict.fromkeys(name for row in document["rows"] for name in row.get("peers", {}))
    columns = COLUMNS | {f">{name} ms": figure("peers", name, "median_ms") for name in names}
    cells = {title: [cell(document, row) for row in document["rows"]] for title, cell in columns.items()}
    filled = {title: values for title, values in cells.items() if any(each is not None for each in values)}
    formats = {title: form for title, form in FORMATS.items() if title in filled}
    rows = list(zip(*filled.values(), strict=True))
    note = "A click on a heading sorts by it."
    if ">compile s" in filled:
        note += f" {COMPILE_NOTE}"
    return Sheet(EVERY_ROW, list(filled), rows, note, formats)


def variant_of(row: Row) -> str:
    return f"{row['allocator']} {row['isa']}"


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
    "variant": lambda document, row: variant_of(row),
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
