"""Tiles of the recurrent kernels as data: configs/recurrent.json, by architecture, kernel, cell and product.

`product` says what the matrix product runs on: "16" (fp16, bf16), "tf32" or "ieee" (fp32), "none" in
pointwise kernels. An architecture falls back to "default" key by key: where it has rows of its own for
(kernel, cell, product), only those count, so that a row with hidden_up_to 0 takes a kernel away.
`measured_on` names the device whose benchmark chose the rows and is null while they rest on the compile
audit alone.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
KERNELS = ("resident_forward", "resident_backward", "step_forward", "step_backward")
CELLS = ("lstm", "gru", "rnn")
PRODUCTS = ("16", "tf32", "ieee", "none")
WORDS = {"kernel": KERNELS, "cell": CELLS, "product": PRODUCTS}
NUMBERS = {
    "hidden_up_to": int | None,
    "block_b": int,
    "num_warps": int,
    "stages": int,
    "max_registers": int | None,
}
POWERS = ("block_b", "num_warps")


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
            for key, kind in NUMBERS.items():
                need(isinstance(row[key], kind), f"{place}.{key}", f"{kind}, not {row[key]!r}")
            for key in POWERS:
                power = row[key] > 0 and row[key] & (row[key] - 1) == 0
                need(power, f"{place}.{key}", f"a power of two, not {row[key]!r}")


@functools.cache
def tuning(architecture: str) -> Tuning:
    """Read and check configs/recurrent.json and return the rows for one architecture.

    Raises:
        ValueError: the table does not have the expected shape.
    """
    path = Path(__file__).parent / "configs" / "recurrent.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    check_table(table, path.name)
    default = table["architectures"]["default"]
    own = table["architectures"].get(architecture, default)
    taken = {key_of(row) for row in own["rows"]}
    inherited = [row for row in default["rows"] if key_of(row) not in taken]
    return Tuning((*own["rows"], *inherited))
