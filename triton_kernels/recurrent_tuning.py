"""Tiles of the recurrent kernels as data: configs/recurrent.json, by architecture, kernel, cell and product.

`product` says what the matrix product runs on: "16" (fp16, bf16), "tf32" or "ieee" (fp32), "none" in
pointwise kernels. An architecture falls back to "default" key by key: where it has rows of its own for
(kernel, cell, product), only those count, so that a row with hidden_up_to 0 takes a kernel away.
`measured_on` names the device whose benchmark chose the rows and is null while they rest on the compile
audit alone.
"""

import functools
from dataclasses import dataclass
from typing import Any

from . import tables

KERNELS = ("resident_forward", "resident_backward", "step_forward", "step_backward")
CELLS = ("lstm", "gru", "rnn")
PRODUCTS = ("16", "tf32", "ieee", "none")
KINDS = {
    "kernel": tables.one_of(KERNELS),
    "cell": tables.one_of(CELLS),
    "product": tables.one_of(PRODUCTS),
    "hidden_up_to": tables.of_type(int | None),
    "block_b": tables.POWER_OF_TWO,
    "num_warps": tables.POWER_OF_TWO,
    "stages": tables.of_type(int),
    "max_registers": tables.of_type(int | None),
}


@dataclass(frozen=True)
class Tile:
    """Tile of one kernel: block_b sequences a program, loads of `stages` steps in flight (1: of the present
    one), and the launch options. max_registers None leaves the number to the compiler."""

    block_b: int
    num_warps: int
    stages: int
    max_registers: int | None

    def options(self) -> dict[str, int]:
        """The launch options; maxnreg only where there is one, because AMD's compiler knows none."""
        options = {"num_warps": self.num_warps}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}


@dataclass(frozen=True)
class Tuning:
    """The rows of one architecture, fall-back rows included."""

    rows: tuple[dict[str, Any], ...]

    def tile(self, kernel: str, cell: str, product: str, hidden_size: int) -> Tile | None:
        """The first row that fits; None where the kernel does not reach that hidden size."""
        for row in self.rows:
            up_to = row["hidden_up_to"]
            if key_of(row) == (kernel, cell, product) and (up_to is None or hidden_size <= up_to):
                return Tile(row["block_b"], row["num_warps"], row["stages"], row["max_registers"])
        return None


def key_of(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["kernel"], row["cell"], row["product"]


def check_table(table: Any, source: str) -> None:
    """Raise ValueError, naming the place, where a table does not have the shape that `tuning` reads."""

    tables.check(table, source, KINDS)


@functools.cache
def tuning(architecture: str) -> Tuning:
    """Read and check configs/recurrent.json and return the rows for one architecture.

    Raises:
        ValueError: the table does not have the expected shape.
    """
    return Tuning(tables.rows_of(tables.read("recurrent", check_table), architecture, key_of))
