"""Tile sizes as data: configs/<operator>.json, per architecture, kernel, layout, dtype width and number of
taps.

Every architecture falls back to "default" row by row. `measured_on` names the device whose benchmark chose
the rows and is null while they are derived on paper and checked by the compile audit alone.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
LAYOUTS = ("channels_first", "channels_last")
KEYS = {"kernel": str, "layout": str, "bits": int, "taps_up_to": int | None}
POWERS = ("lanes", "channels", "columns", "group", "num_warps")
NUMBERS = {"num_stages": int, "max_registers": int | None}
TILES = (*POWERS, *NUMBERS)


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
                return Tile(**{name: row[name] for name in TILES})
        raise KeyError(f"no tile for kernel={kernel} layout={layout} bits={bits} taps={taps}")


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
        need("measured_on" in entry, f"{name}.measured_on", "a device name or null")
        need(isinstance(entry.get("rows"), list), f"{name}.rows", "a list")
        for number, row in enumerate(entry["rows"]):
            place = f"{name}.rows[{number}]"
            need(isinstance(row, dict) and set(row) == {*KEYS, *TILES}, place, f"exactly {[*KEYS, *TILES]}")
            for key, kind in (KEYS | NUMBERS).items():
                need(isinstance(row[key], kind), f"{place}.{key}", f"{kind}, not {row[key]!r}")
            need(row["layout"] in LAYOUTS, f"{place}.layout", f"one of {LAYOUTS}")
            for key in POWERS:
                value = row[key]
                power = isinstance(value, int) and value > 0 and value & (value - 1) == 0
                need(power, f"{place}.{key}", f"a power of two, not {value!r}")
    default = architectures["default"]
    need(isinstance(default.get("programs"), int), "default.programs", "an integer")
    fused = default.get("fused_taps")
    need(
        isinstance(fused, dict) and set(fused) == set(LAYOUTS),
        "default.fused_taps",
        f"one number for each of {LAYOUTS}",
    )


@functools.cache
def tuning(operator: str, architecture: str) -> Tuning:
    """Read and check configs/<operator>.json and return the rows for one architecture.

    Raises:
        ValueError: the table does not have the expected shape.
    """
    path = Path(__file__).parent / "configs" / f"{operator}.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    check_table(table, path.name)
    default = table["architectures"]["default"]
    own = table["architectures"].get(architecture, default)
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
