"""The command that measures: suites one after another, a table each, the files, and whether all is well."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

from benchmarks import beforehand, results
from benchmarks.outputs import Outputs
from benchmarks.plan import Settings
from benchmarks.run import Machine, is_failure, measured, task_names
from benchmarks.table import print_results, sum_up_all
from benchmarks.verdict import Demands, Key
from benchmarks.watch import INTERRUPTED


def run(plans: list[Settings], machine: Machine, outputs: Outputs, demands: Demands) -> int:
    """Measure the suites of all plans that have cases, print their tables, write the files, judge.

    Returns 0; 1 when a case failed or a demand is not met; 2 when no case was selected; 130 after Ctrl-C,
    when the cases finished until then are printed and written. Raises ResultsError before anything is
    measured when results to compare with cannot be read or do not compare, or a file cannot be written.
    """
    plans = [settings for settings in plans if task_names(settings)]
    if not plans:
        print("no case agrees with the filter, dtype and passes", file=sys.stderr)
        return 2
    old = demands.old()
    outputs.prepare()
    try:
        if old:
            beforehand.refuse(old, plans, machine, demands.force)
        return measured_and_judged(plans, machine, outputs, demands, old)
    except KeyboardInterrupt:
        print("interrupted: files that are not named above are not written", file=sys.stderr)
        return INTERRUPTED


def measured_and_judged(
    plans: list[Settings], machine: Machine, outputs: Outputs, demands: Demands, old: dict | None
) -> int:
    """The exit status of `run`; KeyboardInterrupt where nothing is being measured."""
    start = time.monotonic()
    documents, interrupted = measured_suites(plans, machine, shown=True)
    if documents:
        for path in outputs.write(documents):
            print(f"results written to {path}")
        print(sum_up_all(documents, time.monotonic() - start))
    if interrupted:
        return INTERRUPTED
    if len(documents) < len(plans):
        return 1

    def again(keys: list[Key]) -> dict:
        return measured_again(plans, machine, keys)

    met = demands.met(old, results.merged(documents), again)
    return int(not met or any(is_failure(row) for document in documents for row in document["rows"]))


def measured_suites(plans: list[Settings], machine: Machine, shown: bool) -> tuple[list[dict], bool]:
    """The documents of the suites that could be measured, each printed if `shown`; whether interrupted."""
    documents, interrupted = [], False
    for settings in plans:
        document, interrupted = measured(settings, machine)
        if document["environment"]:
            documents.append(document)
            if shown:
                print_results(document)
        for row in () if document["environment"] else document["rows"]:
            print(f"FAILED {settings.suite_name}, {row['case']}: {row['failure']}", file=sys.stderr)
        if interrupted:
            break
    return documents, interrupted


def measured_again(plans: list[Settings], machine: Machine, keys: list[Key]) -> dict:
    """The named rows, without peers, from fresh processes. Raises KeyboardInterrupt when interrupted."""
    chosen = {settings.suite_name: settings for settings in plans}
    again = [
        replace(
            settings, peers=(), only=tuple((case, name) for suite, case, name in keys if suite == suite_name)
        )
        for suite_name, settings in chosen.items()
    ]
    documents, interrupted = measured_suites([each for each in again if each.only], machine, shown=False)
    if interrupted:
        raise KeyboardInterrupt
    return results.merged(documents) if documents else {"suite": results.ALL, "rows": []}
