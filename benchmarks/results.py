"""The results file: versioned JSON, checked when read, whole or absent when written."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCHEMA = 1
ALL = "all"
RESULTS = Path(__file__).resolve().parent / "results"
REQUIRED = {"schema": int, "suite": str, "environment": dict, "rows": list}
REQUIRED_IN_ROW = {"case": str, "pass": str, "allocator": str, "isa": str}
REQUIRED_IN_MEASURED_ROW = {"stock": "median_ms", "ours": "median_ms", "speedup": "median low high"}


class ResultsError(ValueError):
    """A results file that cannot be used; its text names the file, the fault and the way out."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary neighbour of `path` to write to: renamed over it at the end, removed where that fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    temporary = Path(name)
    try:
        os.close(handle)
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: str | Path, results: dict) -> None:
    """Write `results` as JSON under `path`, whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        json.dump(results, stream, indent=1, allow_nan=False)
        stream.write("\n")


def load(path: str | Path) -> dict:
    """Read a results file. Raises ResultsError when missing, corrupt, of another schema or incomplete."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise fault(path, f"not readable as JSON ({error})") from error
    if not isinstance(results, dict):
        raise fault(path, f"holds a {type(results).__name__}, needs an object")
    check_fields(path, results, REQUIRED, "the file")
    if results["schema"] != SCHEMA:
        raise fault(path, f"schema={results['schema']}, needs {SCHEMA}")
    for number, row in enumerate(results["rows"]):
        if not isinstance(row, dict):
            raise fault(path, f"row {number} is a {type(row).__name__}, needs an object")
        check_fields(path, row, REQUIRED_IN_ROW, f"row {number}")
        if not row.get("failure"):
            check_figures(path, row, f"row {number}")
    return results


def check_fields(path: str | Path, found: dict, required: dict[str, type], where: str) -> None:
    for name, kind in required.items():
        if not isinstance(found.get(name), kind):
            raise fault(path, f"{name!r} of {where} is missing or no {kind.__name__}")


def check_figures(path: str | Path, row: dict, where: str) -> None:
    for name, figures in REQUIRED_IN_MEASURED_ROW.items():
        check_fields(path, row, {name: dict}, where)
        for figure in figures.split():
            value = row[name].get(figure)
            # JSON as Python reads it may hold NaN and infinities.
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise fault(path, f"{figure!r} of {name!r} of {where} is missing or no number above 0")


def fault(path: str | Path, reason: str) -> ResultsError:
    return ResultsError(
        f"results file {path}: {reason}; delete it and run `python -m benchmarks SUITE --json {path}`"
    )


def default_path(document: dict) -> Path:
    """Where a run is committed: results/<device>/<date>-<commit>-<suite>[-sweep][-quick][-compile].json.

    Instead of "quick" stands "part" where other cases were left out, or an interrupt ended the run.
    """
    environment = document["environment"]
    words = [environment["date"][:10], environment["commit"][:12], document["suite"]]
    words += ["sweep"] * (document["extent"] == "sweep")
    if not is_whole(document):
        words.append("part" if document.get("interrupted") or document["extent"] != "quick" else "quick")
    words += ["compile"] * (document["versus"] == "compile")
    return RESULTS / environment["device"] / f"{'-'.join(words)}.json"


def newest_per_device(suite: str, folder: Path = RESULTS) -> list[dict]:
    """The latest results of `suite`'s table for each device under `folder`, in order of device name.

    Sweeps, runs that left cases out, and those whose stock side was compiled are kept beside them and are no
    tables.
    """
    newest: dict[str, dict] = {}
    for path in sorted(folder.glob("*/*.json")):
        found = load(path)
        device = found["environment"]["device"]
        if found["suite"] != suite or not is_table(found):
            continue
        if device not in newest or found["environment"]["date"] > newest[device]["environment"]["date"]:
            newest[device] = found
    return [newest[device] for device in sorted(newest)]


def is_table(document: dict) -> bool:
    """Whether a document holds the suite's whole table, against torch as it runs by default."""
    is_default = document.get("extent") != "sweep" and document.get("versus", "eager") == "eager"
    return is_default and is_whole(document)


def is_whole(document: dict) -> bool:
    """Whether nothing was left out, by choice or by an interrupt."""
    return not document.get("left_out") and not document.get("interrupted")


def is_beside_stock(row: dict) -> bool:
    """Whether a measured row's speedup is over torch on the same call.

    It is not where our own call on an easier problem stands on the stock side, nor means it anything of the
    call that is too small to matter, which has a goal in microseconds.
    """
    return "opponent_share" not in row and "added_us" not in row


def merged(documents: list[dict]) -> dict:
    """One document of several suites' runs: every row names its suite, the ceilings of all are put together.

    A single document is given back as it is; the environment is otherwise that of the first one.
    """
    if len(documents) == 1:
        return documents[0]
    first = documents[0]
    environments = [each["environment"] for each in documents if each["environment"]]
    environment = dict(environments[0]) if environments else {}
    if environment:
        environment["ceilings"] = all_ceilings(environments)
        environment["variants"] = merged_variants(environments)
    return first | {
        "suite": ALL,
        "left_out": sum(each.get("left_out", 0) for each in documents),
        "interrupted": any(each.get("interrupted") for each in documents),
        "environment": environment,
        "rows": [{"suite": each["suite"]} | row for each in documents for row in each["rows"]],
        "wall_seconds": round(sum(each.get("wall_seconds", 0.0) for each in documents), 1),
    }


def all_ceilings(environments: list[dict]) -> dict[str, float]:
    """The highest that each ceiling was measured in any of the runs."""
    found: dict[str, float] = {}
    for environment in environments:
        for name, figure in environment.get("ceilings", {}).items():
            found[name] = max(figure, found.get(name, figure))
    return found


def merged_variants(environments: list[dict]) -> list[dict]:
    """The facts of each variant, as the first run that had it tells them, with the ceilings of all."""
    found: dict[tuple[str, str], list[dict]] = {}
    for environment in environments:
        for variant in environment.get("variants", []):
            found.setdefault((variant["allocator"], variant["isa"]), []).append(variant)
    return [same[0] | {"ceilings": all_ceilings(same)} for same in found.values()]
