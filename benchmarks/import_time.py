"""What `import pyarch` adds to `import torch`: fresh processes of each kind in turn."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks import results
from benchmarks.environment import ROOT
from benchmarks.measure import spread

ROUNDS = 7
LIMIT_MS = 50.0
TIMED_IMPORT = (
    "import time; start = time.perf_counter(); import {modules}; print(time.perf_counter() - start)"
)


def import_seconds(modules: str) -> float:
    """Seconds a fresh process takes to import `modules`, once."""
    command = [sys.executable, "-c", TIMED_IMPORT.format(modules=modules)]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def report_import_time(json_path: str | None, rounds: int = ROUNDS) -> int:
    """Print, and write as JSON when asked, the milliseconds added; 1 when they pass the limit."""
    import_seconds("torch, pyarch")
    times = [(import_seconds("torch"), import_seconds("torch, pyarch")) for _ in range(rounds)]
    report = {
        "torch_ms": spread([alone * 1e3 for alone, _ in times]),
        "torch_and_pyarch_ms": spread([both * 1e3 for _, both in times]),
        "added_ms": spread([(both - alone) * 1e3 for alone, both in times]),
        "limit_ms": LIMIT_MS,
        "rounds": rounds,
    }
    if json_path:
        results.write(json_path, report)
    print(json.dumps(report, indent=1))
    return int(report["added_ms"]["median"] > LIMIT_MS)
