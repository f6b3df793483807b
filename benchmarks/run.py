"""A run: one measuring process for each allocator state and instruction set, their rows merged into one file.

This process imports no torch; the allocator's and torch's environment variables only act on a fresh process.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import results
from benchmarks.environment import ROOT, process_environment
from benchmarks.plan import Settings, overhead_case, selected_cases
from benchmarks.table import print_results
from benchmarks.worker import INTERRUPTED, failure_row

# What differs between the processes of one run.
VARIANT_FACTS = ("torch_cpu_capability", "cpu_kernels", "libraries", "allocator_variables", "ceilings")


def run(
    settings: Settings,
    allocators: list[str],
    instruction_sets: list[str],
    json_path: str | None = None,
    save: bool = False,
    threads: int | None = None,
) -> int:
    """Measure every variant, print the table, write the files.

    Returns 0, 1 when a case failed, 2 when none was selected, 130 after Ctrl-C (finished rows are kept).
    """
    names = [case.name for case in selected_cases(settings)]
    names += ["overhead"] * (overhead_case(settings) is not None)
    if not names:
        print(f"no case agrees with filter={settings.filter!r}, dtype={settings.dtype}", file=sys.stderr)
        return 2
    document = {
        "schema": results.SCHEMA,
        "suite": settings.suite_name,
        "extent": settings.extent,
        "versus": settings.versus,
        "environment": {},
        "rows": [],
    }
    interrupted = False
    for variant in ({"allocator": a, "isa": isa} for isa in instruction_sets for a in allocators):
        environment = process_environment(variant["allocator"], variant["isa"], threads)
        interrupted = measure_variant(settings, variant, names, document, environment)
        if interrupted:
            break
    if document["environment"]:
        print_results(document)
        write_files(document, json_path, save)
    failed = not document["environment"] or any(is_failure(row) for row in document["rows"])
    return INTERRUPTED if interrupted else int(failed)


def is_failure(row: dict) -> bool:
    """Whether a case went wrong; one that lacks what it is to be timed against did not."""
    return bool(row.get("failure")) and not row.get("absent")


def write_files(document: dict, json_path: str | None, save: bool) -> None:
    paths = [json_path] * bool(json_path) + [results.default_path(document)] * save
    for path in paths:
        results.write(path, document)
        print(f"results written to {path}")


def measure_variant(
    settings: Settings, variant: dict, names: list[str], document: dict, environment: dict[str, str]
) -> bool:
    """Run one variant's process and add its rows; return whether it was interrupted.

    When the process dies within a case, that becomes a row and a fresh process goes on with the next case.
    """
    first = 0
    while first < len(names):
        code, part = measuring_process(settings, variant, first, environment)
        add_part(document, variant, part)
        if code == 0 or code in (INTERRUPTED, -signal.SIGINT):
            return code != 0
        died, first = (
            (names[part["next"]], part["next"] + 1) if part["environment"] else ("start", len(names))
        )
        row = failure_row(died, f"the measuring process ended with status {code}")
        document["rows"].append(row | variant)
    return False


def add_part(document: dict, variant: dict, part: dict) -> None:
    """Add a process's rows to the run's, and to the environment what is peculiar to its variant."""
    document["rows"] += part["rows"]
    if not part["environment"]:
        return
    environment = document["environment"] = document["environment"] or part["environment"]
    facts = variant | {name: part["environment"][name] for name in VARIANT_FACTS}
    others = [each for each in environment.get("variants", []) if each | variant != each]
    environment["variants"] = [*others, facts]


def measuring_process(
    settings: Settings, variant: dict, first: int, environment: dict[str, str]
) -> tuple[int, dict]:
    """Run benchmarks.worker from case `first` on; return its exit status and its results, if it wrote any."""
    with tempfile.TemporaryDirectory(prefix="pyarch-benchmarks-") as folder:
        path = Path(folder) / "rows.json"
        arguments = [settings.to_json(), json.dumps(variant), str(path), str(first)]
        command = [sys.executable, "-m", "benchmarks.worker", *arguments]
        code = wait(subprocess.Popen(command, cwd=ROOT, env=environment))
        return code, results.load(path) if path.exists() else {"environment": {}, "rows": []}


def wait(process: subprocess.Popen) -> int:
    """The process's exit status; Ctrl-C is passed on so that it can write what it has."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        return INTERRUPTED
