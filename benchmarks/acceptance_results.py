"""What the steps of the acceptance wrote, in numbers: tests line by line, suites, the sanitizer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path


def list_unreached(path: Path | None) -> None:
    """In the tests' file, in place of the list of what was to run: a line for each test that did not.

    They stand in the order in which they would have run, bfloat16 first.
    """
    if path is None or path.suffix != ".jsonl" or not path.is_file():
        return
    lines = lines_of(path)
    finished = {line["test"] for line in lines if "test" in line}
    collected = [test for line in lines for test in line.get("collected", ())]
    lines = [line for line in lines if "test" in line]
    lines += [{"test": test, "outcome": "not reached"} for test in collected if test not in finished]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def lines_of(path: Path) -> list[dict]:
    """The lines of JSON; a process that was killed may have left half of the last one."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def counts_of(path: Path | None) -> dict[str, int]:
    """What a step's file holds, in numbers; empty where it wrote none."""
    if path is None or not path.is_file():
        return {}
    if path.suffix == ".jsonl":
        return dict(Counter(line["outcome"] for line in lines_of(path)))
    document = json.loads(path.read_text(encoding="utf-8"))
    if "tools" in document:
        return {name: tool["errors"] + len(tool["failures"]) for name, tool in document["tools"].items()}
    failures = sum(bool(row.get("failure")) for row in document["rows"])
    return {"rows": len(document["rows"]), "failures": failures}


def print_table(rows: list[dict]) -> None:
    print(f"\n{'step':12} {'outcome':12} {'seconds':>7}  counts")
    for row in rows:
        counts = ", ".join(f"{count} {name}" for name, count in row["counts"].items())
        print(f"{row['step']:12} {row['outcome']:12} {row['seconds']:7.1f}  {counts}")
    for row in rows:
        if row["outcome"] not in ("passed", "rehearsed"):
            print(f"\n---- {row['step']}: {row['outcome']}\n{row['tail'][-600:]}")
