"""Tiles of the attention kernels as data: configs/attention.json.

A row is found by kernel, product, scores and width. `product` says what the matrix products run on: "16"
(fp16, bf16), "tf32" or "ieee" (fp32). `scores` says whether single scores or probabilities are changed or
tested besides the pattern ("changed": bias, bool mask, softcap, dropout, global tokens, each of which takes
registers) or not ("plain"); "any" serves both. The width is the wider one of queries and values, D and Dv.
An architecture falls back to "default" key by key: where it has rows of its own for (kernel, product), only
those count. `measured_on` names the device whose benchmark chose the rows and is null while they rest on the
compile audit alone.
"""

import functools
from dataclasses import dataclass
from typing import Any

from . import tables

KERNELS = ("forward", "weights", "backward_dkdv", "backward_dq", "backward_bias")
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
class Tuning:
    """The rows of one architecture, fall-back rows included."""

    rows: tuple[dict[str, Any], ...]

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


@functools.cache
def tuning(architecture: str) -> Tuning:
    """Read and check configs/attention.json and return the rows for one architecture.

    Raises:
        ValueError: the table does not have the expected shape.
    """
    return Tuning(tables.rows_of(tables.read("attention", check_table), architecture, key_of))
