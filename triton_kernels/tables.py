"""Tables of tiles, configs/*.json: the frame that they share, the kinds of values in a row, how one is read.

{"schema": 1, "architectures": {"default": {"measured_on": null, "rows": [{...}, ...]}, "sm_90": {...}}}
"""

import json
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = 1
Row = dict[str, Any]


class Kind(NamedTuple):
    """What a value must be: in words for an error, and as a test."""

    name: str
    holds: Callable[[Any], bool]


def one_of(words: tuple[str, ...]) -> Kind:
    return Kind(f"one of {words}", words.__contains__)


def of_type(kind: Any) -> Kind:
    return Kind(str(kind), lambda value: isinstance(value, kind))


COUNT = Kind("a number", lambda value: isinstance(value, int) and value >= 0)
POSITIVE = Kind("a positive integer", lambda value: isinstance(value, int) and value > 0)
POWER_OF_TWO = Kind("a power of two", lambda value: POSITIVE.holds(value) and value & (value - 1) == 0)


def need(holds: bool, source: str, place: str, what: str) -> None:
    """Raise ValueError, naming the place in a table, unless something holds."""
    if not holds:
        raise ValueError(f"{source}: {place}: needs {what}")


def check(table: Any, source: str, kinds: dict[str, Kind], provenance: str = "measured_on") -> None:
    """Raise ValueError, naming the place, where a table has not the frame or a row not exactly these values.

    `provenance` is the key under which an architecture names the device that its rows come from, or null.
    """
    need(isinstance(table, dict) and table.get("schema") == SCHEMA, source, "schema", str(SCHEMA))
    architectures = table.get("architectures")
    has_default = isinstance(architectures, dict) and "default" in architectures
    need(has_default, source, "architectures", 'an object with "default"')
    for name, entry in architectures.items():
        need(isinstance(entry, dict), source, name, "an object")
        named = provenance in entry and isinstance(entry[provenance], str | None)
        need(named, source, f"{name}.{provenance}", "a device name or null")
        need(isinstance(entry.get("rows"), list), source, f"{name}.rows", "a list")
        for number, row in enumerate(entry["rows"]):
            place = f"{name}.rows[{number}]"
            need(isinstance(row, dict) and set(row) == set(kinds), source, place, f"exactly {[*kinds]}")
            for key, kind in kinds.items():
                need(kind.holds(row[key]), source, f"{place}.{key}", f"{kind.name}, not {row[key]!r}")


def read(name: str, check_table: Callable[[Any, str], None]) -> dict[str, Any]:
    """The checked architectures of configs/<name>.json."""
    path = Path(__file__).parent / "configs" / f"{name}.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    check_table(table, path.name)
    return table["architectures"]


def rows_of(
    architectures: dict[str, Any], architecture: str, key_of: Callable[[Row], Hashable]
) -> tuple[Row, ...]:
    """The rows of one architecture, and those of "default" whose key it has no row of its own for."""
    default = architectures["default"]
    own = architectures.get(architecture, default)["rows"]
    taken = {key_of(row) for row in own}
    return (*own, *(row for row in default["rows"] if key_of(row) not in taken))
