"""A suite's run: measuring processes for each allocator state and instruction set, their rows merged.

This process imports no torch; the allocator's and torch's environment variables only act on a fresh process.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import results
from benchmarks.environment import process_environment
from benchmarks.plan import Settings, left_out, overhead_case, selected_cases
from benchmarks.visits import joined
from benchmarks.watch import INTERRUPTED, NO_ANSWER, watched
from benchmarks.worker import failure_row

WORKER = ("-m", "benchmarks.worker")
# What differs between the processes of one run.
VARIANT_FACTS = ("torch_cpu_capability", "cpu_kernels", "libraries", "allocator_variables", "ceilings")


@dataclass(frozen=True)
class Machine:
    """The states of this machine that a run is to have: of malloc, of the kernels' choice, and threads."""

    allocators: tuple[str, ...] = ("steady",)
    instruction_sets: tuple[str, ...] = ("native",)
    threads: int | None = None

    def variants(self) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
        """The keys that a variant gives its rows, and the environment of its processes."""
        for isa in self.instruction_sets:
            for allocator in self.allocators:
                environment = process_environment(allocator, isa, self.threads)
                yield {"allocator": allocator, "isa": isa}, environment


def task_names(settings: Settings) -> list[str]:
    """The names of what a variant's process measures, in its order."""
    names = [case.name for case in selected_cases(settings)]
    return names + ["overhead"] * (overhead_case(settings) is not None)


def measured(settings: Settings, machine: Machine) -> tuple[dict, bool]:
    """The document of a suite's run, every variant in it; and whether it was interrupted."""
    start = time.monotonic()
    document = {
        "schema": results.SCHEMA,
        "suite": settings.suite_name,
        "extent": settings.extent,
        "left_out": left_out(settings),
        "versus": "eager",
        "environment": {},
        "rows": [],
    }
    names, interrupted = task_names(settings), False
    try:
        for variant, environment in machine.variants():
            interrupted = visit_variant(settings, variant, names, document, environment)
            if interrupted:
                break
    except KeyboardInterrupt:
        interrupted = True
    document["interrupted"] = interrupted
    return document | {"wall_seconds": round(time.monotonic() - start, 1)}, interrupted


def is_failure(row: dict) -> bool:
    """Whether a case went wrong; one that lacks what it is to be timed against did not."""
    return bool(row.get("failure")) and not row.get("absent")


def visit_variant(
    settings: Settings, variant: dict, names: list[str], document: dict, environment: dict[str, str]
) -> bool:
    """Add one variant's rows to the document, joined over all visits; return whether one was interrupted.

    Peers are timed in the first visit alone.
    """
    start, alone = len(document["rows"]), replace(settings, peers=())
    interrupted = measure_variant(settings, variant, names, document, environment)
    for _ in range(1, settings.visits):
        if interrupted:
            break
        later = {"environment": {}, "rows": []}
        interrupted = measure_variant(alone, variant, names, later, environment)
        document["rows"][start:] = joined(document["rows"][start:], later["rows"])
    return interrupted


def measure_variant(
    settings: Settings, variant: dict, names: list[str], document: dict, environment: dict[str, str]
) -> bool:
    """Run one variant's process and add its rows; return whether it was interrupted.

    When the process dies within a case, or is killed because it gave no answer, a fresh one goes on with the
    next case. The one that it died in is measured again where peers may have been the cause, without them;
    else its death becomes a row, as does one behind the last case.
    """
    first = 0
    while first < len(names):
        code, part = measuring_process(settings, variant, first, environment)
        add_part(document, variant, part)
        if code == 0 or code in (INTERRUPTED, -signal.SIGINT):
            return code != 0
        words = words_of_death(code, settings.patience)
        if part["environment"] and part["next"] >= len(names):
            document["rows"].append(failure_row("end", words) | variant)
            return False
        died, first = (
            (names[part["next"]], part["next"] + 1) if part["environment"] else ("start", len(names))
        )
        rows = []
        if part["environment"] and settings.peers:
            rows, interrupted = without_peers(settings, variant, died, environment, words)
            if interrupted:
                document["rows"] += rows
                return True
        document["rows"] += rows or [failure_row(died, words) | variant]
    return False


def without_peers(
    settings: Settings, variant: dict, case: str, environment: dict[str, str], words: str
) -> tuple[list[dict], bool]:
    """The rows of a case from a process of its own, without peers, of which they say `words`.

    None where that process dies within the case too; where it dies behind it, that is a row more. The second
    result tells whether it was interrupted.
    """
    alone = replace(settings, peers=(), only=tuple((case, name) for name in settings.chosen_passes))
    code, part = measuring_process(alone, variant, 0, environment)
    interrupted = code in (INTERRUPTED, -signal.SIGINT)
    died = code != 0 and not interrupted
    if died and not (part["environment"] and part["next"]):
        return [], False
    told = {"peers": {name: {"failure": words} for name in settings.peers}}
    rows = [row if row.get("failure") else row | told for row in part["rows"]]
    if died:
        rows.append(failure_row("end", words_of_death(code, alone.patience)) | variant)
    return rows, interrupted


def words_of_death(code: int, patience: float) -> str:
    """Why there are no figures of what a process died in."""
    if code == NO_ANSWER:
        return f"no answer in {patience:g} s"
    return f"the measuring process ended with status {code}"


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
        code = watched([sys.executable, *WORKER, *arguments], environment, path, settings.patience)
        return code, results.load(path) if path.exists() else {"environment": {}, "rows": []}
