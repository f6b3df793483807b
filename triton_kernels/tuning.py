"""Tile sizes as data: configs/<operator>.json, per architecture, kernel, layout, dtype width and number of
taps.

Every architecture falls back to "default" row by row. `measured_on` names the device whose benchmark chose
the rows and is null while they are derived on paper and checked by the compile audit alone.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from . import tables

LAYOUTS = ("channels_first", "channels_last")
KINDS = {
    "kernel": tables.of_type(str),
    "layout": tables.one_of(LAYOUTS),
    "bits": tables.of_type(int),
    "taps_up_to": tables.of_type(int | None),
}
TILE_KINDS = {
    "lanes": tables.POWER_OF_TWO,
    "channels": tables.POWER_OF_TWO,
    "columns": tables.POWER_OF_TWO,
    "group": tables.POWER_OF_TWO,
    "num_warps": tables.POWER_OF_TWO,
    "num_stages": tables.of_type(int),
    "max_registers": tables.of_type(int | None),
}


@dataclass(frozen=True)
class Tile:
    """Tile of one kernel: lanes = strips * channels of a program, at most `channels` of them channels,
    `columns` a strip, `group` taps of a long row unrolled, and the launch options. max_registers None
    leaves the number to the compiler; a number keeps it from spilling one or two registers to fit one more
    program."""

    lanes: int
    channels: int
    columns: int
    group: int
    num_warps: int
    num_stages: int
    max_registers: int | None


@dataclass(frozen=True)
class Tuning:
    """The rows of one architecture, its fall-back rows included."""

    programs: int
    fused_taps: dict[str, int]
    rows: tuple[dict[str, Any], ...]

    def tile(self, kernel: str, layout: str, bits: int, taps: int) -> Tile:
        """The first row that fits."""
        for row in self.rows:
            up_to = row["taps_up_to"]
            if (row["kernel"], row["layout"], row["bits"]) == (kernel, layout, bits) and (
                up_to is None or taps <= up_to
            ):
                return Tile(**{name: row[name] for name in TILE_KINDS})
        raise KeyError(f"no tile for kernel={kernel} layout={layout} bits={bits} taps={taps}")


def check_table(table: Any, source: str) -> None:
    """Raise ValueError, naming the place, where a table does not have the shape that `tuning` reads."""

    tables.check(table, source, KINDS | TILE_KINDS)
    default = table["architectures"]["default"]
    tables.need(isinstance(default.get("programs"), int), source, "default.programs", "an integer")
    fused = default.get("fused_taps")
    each_layout = isinstance(fused, dict) and set(fused) == set(LAYOUTS)
    tables.need(each_layout, source, "default.fused_taps", f"one number for each of {LAYOUTS}")


@functools.cache
def tuning(operator: str, architecture: str) -> Tuning:
    """Read and check configs/<operator>.json and return the rows for one architecture.

    Raises:
        ValueError: the table does not have the expected shape.
    """
    architectures = tables.read(operator, check_table)
    default = architectures["default"]
    own = architectures.get(architecture, default)
    return Tuning(
        programs=own.get("programs", default["programs"]),
        fused_taps=own.get("fused_taps", default["fused_taps"]),
        rows=(*own["rows"], *default["rows"]),
    )


@functools.cache
def architecture_of(device: torch.device) -> str:
    """The table's name for a device: "sm_90", "gfx942"; "default" for tensors without a GPU."""
    if device.type != "cuda":
        return "default"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return f"sm_{torch.cuda.get_device_capability(device)[0]}0"
