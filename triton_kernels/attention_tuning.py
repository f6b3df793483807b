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
from dataclasses import dataclass
from typing import Any

from . import tables

KERNELS = ("forward", "weights", "backward_dkdv", "backward_dq", "backward_bias", "decode")
PRODUCTS = ("16", "tf32", "ieee")
SCORES = ("plain", "changed", "any")
KINDS = {
    "kernel": tables.one_of(KERNELS),
    "product": tables.one_of(PRODUCTS),
    "scores": tables.one_of(SCORES),
    "width_up_to": tables.POSITIVE,
    "block_m": tables.POWER_OF_TWO,
    "block_n": tables.POWER_OF_TWO,
    "num_warps": tables.POWER_OF_TWO,
    "num_stages": tables.POSITIVE,
}
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

    tables.check(table, source, KINDS)
    for name, entry in table["architectures"].items():
        for key in SPLITTING if "splitting" in entry or name == "default" else ():
            number = entry["splitting"].get(key) if isinstance(entry.get("splitting"), dict) else None
            kind = tables.POSITIVE
            tables.need(kind.holds(number), source, f"{name}.splitting.{key}", f"{kind.name}, not {number!r}")


@functools.cache
def tuning(architecture: str) -> Tuning:
    """Read and check configs/attention.json and return the rows for one architecture.

    Raises:
        ValueError: the table does not have the expected shape.
    """
    architectures = tables.read("attention", check_table)
    default = architectures["default"]
    own = architectures.get(architecture, default)
    rows = tables.rows_of(architectures, architecture, key_of)
    return Tuning(rows, Splitting(**own.get("splitting", default["splitting"])))
