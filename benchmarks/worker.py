"""The measuring process: runs the cases of a plan under the environment it was started with.

benchmarks.run starts it: `python -m benchmarks.worker SETTINGS_JSON VARIANT_JSON RESULTS_PATH FIRST`. Before
each case the results file is rewritten whole, naming that case: a crash or Ctrl-C keeps what was done.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace

from benchmarks import results
from benchmarks.plan import Settings, overhead_case, passes_of, selected_cases
from benchmarks.progress import Progress
from benchmarks.suites import Absent

INTERRUPTED = 130
GOALS_ARE_FOR = {"allocator": "steady", "isa": "native"}
PREFAULT_BYTES = 768 << 20


def main(arguments: list[str]) -> int:
    settings, variant = Settings.from_json(arguments[0]), json.loads(arguments[1])
    path, first = arguments[2], int(arguments[3])
    document = {
        "schema": results.SCHEMA,
        "suite": settings.suite_name,
        "environment": {},
        "rows": [],
        "next": first,
    }
    try:
        tasks = prepare(settings, variant, document)
        with Progress(f"{variant['allocator']}, {variant['isa']}", len(tasks), first) as progress:
            for number in range(first, len(tasks)):
                document["next"] = number
                results.write(path, document)
                name, rows_of_task = tasks[number]
                progress.begin(name)
                rows = finished_rows(name, rows_of_task)
                document["rows"] += [row | variant for row in rows]
                progress.end(rows)
            document["next"] = len(tasks)
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        results.write(path, document)
    return 0


def prepare(settings: Settings, variant: dict, document: dict) -> list[tuple[str, Callable[[], list[dict]]]]:
    """Import torch and pyarch, note the environment, and return each task's name with what gives its rows."""
    import torch

    from benchmarks.environment import describe
    from pyarch import dispatch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("device=cuda, needs a GPU that torch sees; use --device cpu")
    if variant["allocator"] == "steady":
        # Memory touched once and kept by malloc: page faults stay out of the times.
        torch.ones(PREFAULT_BYTES, dtype=torch.uint8)
    benchmark = settings.suite.load()(settings.device, settings.budget, settings.versus)

    def task(measure: Callable[[], list[dict]]) -> Callable[[], list[dict]]:
        def run() -> list[dict]:
            with dispatch.backend(settings.backend):
                return measure()

        return run

    def case_rows(case):
        passes = passes_of(settings, case)
        rows = benchmark.rows(case, passes)
        return [{"case": case.name, "pass": name} | row for name, row in zip(passes, rows, strict=True)]

    cases = selected_cases(settings)
    if settings.device == "cpu" and variant != GOALS_ARE_FOR:
        cases = [replace(case, goals={}) for case in cases]
    tasks = [(case.name, task(lambda case=case: case_rows(case))) for case in cases]
    if (tiny := overhead_case(settings)) is not None:
        row = {"case": tiny.name, "pass": "overhead"}
        tasks.append((f"overhead {tiny.name}", task(lambda: [row | benchmark.overhead_row(tiny)])))
    document["environment"] = describe(settings.device, settings.commit) | {
        "ceilings": benchmark.ceilings(),
        "backend_asked": settings.backend,
    }
    return tasks


def finished_rows(name: str, rows_of_task: Callable[[], list[dict]]) -> list[dict]:
    """The rows of a task, or one row with its error: a failing case must not end the run."""
    try:
        return rows_of_task()
    except Absent as absence:
        return [failure_row(name, str(absence)) | {"absent": True}]
    except Exception as error:
        return [failure_row(name, f"{type(error).__name__}: {error}")]


def failure_row(name: str, reason: str) -> dict:
    return {"case": name, "pass": "all", "failure": reason}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
