"""The measuring process: runs the cases of a plan under the environment it was started with.

benchmarks.run starts it: `python -m benchmarks.worker SETTINGS_JSON VARIANT_JSON RESULTS_PATH FIRST`. Before
each case the results file is rewritten whole, naming that case: a crash or Ctrl-C keeps the finished cases.
It is touched after each row: who waits knows that there is life.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from benchmarks import results
from benchmarks.plan import Settings, overhead_case, passes_of, selected_cases
from benchmarks.progress import Progress
from benchmarks.suites import Absent, WrongResult
from benchmarks.watch import INTERRUPTED, end_with_parent

# The peers that are packages of their own; the others are parts of torch.
PACKAGES = {"onnxruntime", "openvino"}
GOALS_ARE_FOR = {"allocator": "steady", "isa": "native"}
PREFAULT_BYTES = 768 << 20
# What torch and Python say, by the error's class or in its text, when there is no memory left.
OUT_OF_MEMORY_KINDS = ("MemoryError", "OutOfMemoryError")
OUT_OF_MEMORY_WORDS = ("can't allocate memory", "not enough memory", "out of memory")


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
        with Progress(title(settings, variant), len(tasks), first) as progress:
            for number in range(first, len(tasks)):
                document["next"] = number
                results.write(path, document)
                name, rows_of_task = tasks[number]
                progress.begin(name)
                rows = finished_rows(name, lambda rows=rows_of_task: with_signs(rows(), path))
                if "failure" in rows[-1]:
                    release_memory()
                document["rows"] += [row | variant for row in rows]
                progress.end(rows)
            document["next"] = len(tasks)
    except KeyboardInterrupt:
        # Both the terminal and benchmarks.run may tell: the finished cases are written in peace.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return INTERRUPTED
    finally:
        results.write(path, document)
    return 0


def title(settings: Settings, variant: dict) -> str:
    return f"{settings.suite_name}, {variant['allocator']}, {variant['isa']}"


def prepare(
    settings: Settings, variant: dict, document: dict
) -> list[tuple[str, Callable[[], Iterable[dict]]]]:
    """Import torch and pyarch, note the environment, and return each task's name with what gives its rows."""
    import torch

    from benchmarks.environment import describe, versions
    from pyarch import dispatch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("device=cuda, needs a GPU that torch sees; use --device cpu")
    if variant["allocator"] == "steady":
        # Memory touched once and kept by malloc: page faults stay out of the times.
        torch.ones(PREFAULT_BYTES, dtype=torch.uint8)
    benchmark = settings.suite.load()(settings.device, settings.budget, settings.peers)

    def task(measure: Callable[[], Iterable[dict]]) -> Callable[[], Iterator[dict]]:
        def run() -> Iterator[dict]:
            with dispatch.backend(settings.backend):
                yield from measure()

        return run

    def case_rows(case) -> Iterator[dict]:
        passes = passes_of(settings, case)
        for name, row in zip(passes, benchmark.rows(case, passes), strict=True):
            yield {"case": case.name, "pass": name} | row

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
        "peer_versions": versions(set(settings.peers) & PACKAGES),
    }
    return tasks


def with_signs(rows: Iterable[dict], path: str) -> Iterator[dict]:
    """The rows; the file is touched after each."""
    for row in rows:
        os.utime(path)
        yield row


def finished_rows(name: str, rows_of_task: Callable[[], Iterable[dict]]) -> list[dict]:
    """The rows of a task, the last one with its error where it fails: a failing case must not end the run."""
    rows: list[dict] = []
    try:
        for row in rows_of_task():
            rows.append(row)
    except Absent as absence:
        rows.append(failure_row(name, str(absence)) | {"absent": True})
    except Exception as error:
        row = failure_row(name, words_of(error))
        rows.append(row | {"matches": False} if isinstance(error, WrongResult) else row)
    return rows


def words_of(error: Exception) -> str:
    """The error with its kind; of a want of memory the first line, which says how much was asked for."""
    name, text = type(error).__name__, str(error)
    if name in OUT_OF_MEMORY_KINDS or any(words in text for words in OUT_OF_MEMORY_WORDS):
        first_line, *_ = text.splitlines() or [name]
        return f"out of memory: {first_line}"
    return f"{name}: {text}"


def release_memory() -> None:
    """Let go of what a failed case left behind, before the next one asks for memory."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def failure_row(name: str, reason: str) -> dict:
    return {"case": name, "pass": "all", "failure": reason}


if __name__ == "__main__":
    end_with_parent()
    # What a shell starts in the background ignores Ctrl-C, which is how benchmarks.run ends this process.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
