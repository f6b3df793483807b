"""The rows of a results document as a table for spreadsheets: one line a row, failures too."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from benchmarks.results import replacing

# Always there and in this order, filled or not; what only some rows have follows by name.
COLUMNS = (
    "suite",
    "case",
    "pass",
    "allocator",
    "isa",
    "failure",
    "absent",
    "matches",
    *(f"{side}.{figure}" for side in ("stock", "ours") for figure in ("median_ms", "p20_ms", "p80_ms")),
    *(f"speedup.{figure}" for figure in ("median", "low", "high")),
    "pairs",
    "goal.metric",
    "goal.value",
    "met",
    "flop",
    "bytes",
    "gflop_per_s",
    "gb_per_s",
    "roofline.intensity",
    "roofline.bound",
    "roofline.share",
    "launch_us",
    "compile_s",
    "peak_mib.ours",
    "peak_mib.stock",
    "backend.forward",
    "backend.backward",
)
# What the environment says of every row.
FACTS = ("device", "commit", "dirty", "date", "torch", "threads")


def write(path: str | Path, document: dict) -> None:
    """Write every row under `path` as CSV, whole or not at all."""
    rows = [flat_row(document, row) for row in document["rows"]]
    more = sorted({name for row in rows for name in row} - {*COLUMNS, *FACTS})
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [*COLUMNS, *more, *FACTS], restval="")
        writer.writeheader()
        writer.writerows(rows)


def flat_row(document: dict, row: dict) -> dict[str, str | float]:
    """A row with dotted names, its suite, and what the environment says of all."""
    facts = {name: document["environment"].get(name) for name in FACTS}
    named = {"suite": row.get("suite", document["suite"])} | row | facts
    return {name: cell(value) for name, value in flat(named) if value is not None}


def flat(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def cell(value: object) -> object:
    """A truth value in JSON's words; anything else is left to csv, which writes floats in full."""
    return str(value).lower() if isinstance(value, bool) else value
