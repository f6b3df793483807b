"""The results file: versioned JSON, checked when read, whole or absent when written."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"
REQUIRED = {"schema": int, "suite": str, "environment": dict, "rows": list}
REQUIRED_IN_ROW = {"case": str, "pass": str, "allocator": str, "isa": str}


class ResultsError(ValueError):
    """A results file that cannot be used; its text names the file, the fault and the way out."""


def write(path: str | Path, results: dict) -> None:
    """Write `results` as JSON under `path`: to a temporary neighbour first, then renamed over it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(results, stream, indent=1, allow_nan=False)
            stream.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path: str | Path) -> dict:
    """Read a results file. Raises ResultsError when missing, corrupt, of another schema or incomplete."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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
    return results


def check_fields(path: str | Path, found: dict, required: dict[str, type], where: str) -> None:
    for name, kind in required.items():
        if not isinstance(found.get(name), kind):
            raise fault(path, f"{name!r} of {where} is missing or no {kind.__name__}")


def fault(path: str | Path, reason: str) -> ResultsError:
    return ResultsError(
        f"results file {path}: {reason}; delete it and run `python -m benchmarks SUITE --json {path}`"
    )


def default_path(document: dict) -> Path:
    """Where a run is committed: results/<device>/<date>-<commit>-<suite>[-sweep][-compile].json."""
    environment = document["environment"]
    words = [environment["date"][:10], environment["commit"][:12], document["suite"]]
    words += ["sweep"] * (document["extent"] == "sweep") + ["compile"] * (document["versus"] == "compile")
    return RESULTS / environment["device"] / f"{'-'.join(words)}.json"


def newest_per_device(suite: str, folder: Path = RESULTS) -> list[dict]:
    """The latest results of `suite`'s table for each device under `folder`, in order of device name.

    Sweeps, and runs whose stock side was compiled, are kept beside them and are no tables.
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
    """Whether a document holds the suite's table, against torch as it runs by default."""
    return document.get("extent") != "sweep" and document.get("versus", "eager") == "eager"
