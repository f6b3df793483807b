"""Tiles of the attention kernels as data: configs/attention.json.

A row is found by kernel, product, scores and width. `product` says what the matrix products run on: "16"
(fp16, bf16), "tf32" or "ieee" (fp32). `scores` says whether single scores or probabilities are changed or
tested besides the pattern ("changed": bias, bool mask, softcap, dropout, global tokens, each of which takes
registers) or not ("plain"); "any" serves both. The width is the wider one of queries and values, D and Dv.
An architecture falls back to "default" key by key: where it has rows of its own for (kernel, product), only
those count. `measured_on` names the device whose benchmark chose the rows and is null while they rest on the
compile audit alone. A row of "decode" counts rows of queries that share a key head as its block_m.

`splitting` says how an architecture divides the keys of a cache: into so many programs for each of its
multiprocessors, a stretch of keys having `tiles_at_least` tiles.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
KERNELS = ("forward", "weights", "backward_dkdv", "backward_dq", "backward_bias", "decode")
PRODUCTS = ("16", "tf32", "ieee")
SCORES = ("plain", "changed", "any")
WORDS = {"kernel": KERNELS, "product": PRODUCTS, "scores": SCORES}
NUMBERS = ("width_up_to", "block_m", "block_n", "num_warps", "num_stages")
POWERS = ("block_m", "block_n", "num_warps")
SPLITTING = ("programs_per_multiprocessor", "tiles_at_least")
# Stretches that the keys of one head are divided into at most; a power of two.
MOST_SPLITS = 128


@dataclass(frozen=True)
class Tile:
    """Tile of one kernel: block_m queries by block_n keys, and the launch options."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Splitting:
    """How the keys of a cache are divided among programs."""

    programs_per_multiprocessor: int
    tiles_at_least: int


@dataclass(frozen=True)
class Tuning:
    """The rows of one architecture, fall-back rows included."""

    rows: tuple[dict[str, Any], ...]
    splitting: Splitting

    def tile(self, kernel: str, product: str, scores: str, width: int) -> Tile:
        """The first row that fits; scores is "plain" or "changed".

        Raises:
            NotImplementedError: wider than any row.
        """
        for row in self.rows:
            if fits(row, kernel, product, scores, width):
                return Tile(row["block_m"], row["block_n"], row["num_warps"], row["num_stages"])
        widest = max((row["width_up_to"] for row in self.rows if key_of(row) == (kernel, product)), default=0)
        raise NotImplementedError(f"head width {width}, the {kernel} kernel needs at most {widest}")


def fits(row: dict[str, Any], kernel: str, product: str, scores: str, width: int) -> bool:
    """Whether a row serves a call."""
    wide_enough = width <= row["width_up_to"]
    return wide_enough and key_of(row) == (kernel, product) and row["scores"] in (scores, "any")


def key_of(row: dict[str, Any]) -> tuple[str, str]:
    return row["kernel"], row["product"]


def check_table(table: Any, source: str) -> None:
    """Raise ValueError, naming the place, where a table does not have the shape that `tuning` reads."""

    def need(holds: bool, place: str, what: str) -> None:
        if not holds:
            raise ValueError(f"{source}: {place}: needs {what}")

    need(isinstance(table, dict) and table.get("schema") == SCHEMA, "schema", str(SCHEMA))
    architectures = table.get("architectures")
    need(
        isinstance(architectures, dict) and "default" in architectures,
        "architectures",
        'an object with "default"',
    )
    for name, entry in architectures.items():
        need(isinstance(entry, dict), name, "an object")
        measured = "measured_on" in entry and isinstance(entry["measured_on"], str | None)
        need(measured, f"{name}.measured_on", "a device name or null")
        for key in SPLITTING if "splitting" in entry or name == "default" else ():
            number = entry["splitting"].get(key) if isinstance(entry.get("splitting"), dict) else None
            positive = isinstance(number, int) and number > 0
            need(positive, f"{name}.splitting.{key}", f"a positive integer, not {number!r}")
        need(isinstance(entry.get("rows"), list), f"{name}.rows", "a list")
        for number, row in enumerate(entry["rows"]):
            place = f"{name}.rows[{number}]"
            need(
                isinstance(row, dict) and set(row) == {*WORDS, *NUMBERS},
                place,
                f"exactly {[*WORDS, *NUMBERS]}",
            )
            for key, words in WORDS.items():
                need(row[key] in words, f"{place}.{key}", f"one of {words}, not {row[key]!r}")
            for key in NUMBERS:
                positive = isinstance(row[key], int) and row[key] > 0
                need(positive, f"{place}.{key}", f"a positive integer, not {row[key]!r}")
            for key in POWERS:
                power = row[key] & (row[key] - 1) == 0
                need(power, f"{place}.{key}", f"a power of two, not {row[key]!r}")


@functools.cache
def tuning(architecture: str) -> Tuning:
    """Read and check configs/attention.json and return the rows for one architecture.

    Raises:
        ValueError: the table does not have the expected shape.
    """
    path = Path(__file__).parent / "configs" / "attention.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    check_table(table, path.name)
    default = table["architectures"]["default"]
    own = table["architectures"].get(architecture, default)
    taken = {key_of(row) for row in own["rows"]}
    inherited = [row for row in default["rows"] if key_of(row) not in taken]
    return Tuning((*own["rows"], *inherited), Splitting(**own.get("splitting", default["splitting"])))
