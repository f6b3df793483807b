"""Whether an older run will compare, found out before anything is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable

from benchmarks import comparison
from benchmarks.environment import ROOT
from benchmarks.plan import Settings, overhead_case, passes_of, selected_cases
from benchmarks.results import ResultsError
from benchmarks.run import Machine

# For a process of its own: variables act when it starts, and this one imports no torch.
IDENTITY = "import json; from benchmarks.environment import identity; print(json.dumps(identity({device!r})))"


def refuse(old: dict, plans: list[Settings], machine: Machine, force: bool) -> None:
    """Raise ResultsError where the rows that are to be measured cannot be compared with an older run's.

    They cannot where the older run has none of them, nor, without `force`, where it is of another machine.
    """
    if comparison.measured(old).keys().isdisjoint(planned(plans, machine)):
        raise ResultsError(
            "the older run has none of the rows that are to be measured; compare runs of the same suite, "
            "cases, passes and variants"
        )
    if not force:
        comparison.refuse_unlike(old, {"environment": identity(plans[0].device, machine)})


def planned(plans: list[Settings], machine: Machine) -> Iterable[comparison.Key]:
    """Suite, case, pass and variant of every row that a run is to have."""
    for variant, _ in machine.variants():
        for settings in plans:
            rows = [
                (case.name, name) for case in selected_cases(settings) for name in passes_of(settings, case)
            ]
            if (tiny := overhead_case(settings)) is not None:
                rows.append((tiny.name, "overhead"))
            yield from ((settings.suite_name, *row, variant["allocator"], variant["isa"]) for row in rows)


def identity(device: str, machine: Machine) -> dict:
    """What the environment of a run's first variant will be; ResultsError where it cannot be told."""
    _, variables = next(machine.variants())
    command = [sys.executable, "-c", IDENTITY.format(device=device)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ResultsError(f"cannot tell what would be measured on, device={device}: {last_line}")
    return json.loads(done.stdout)
