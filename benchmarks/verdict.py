"""Whether a run is good enough: beside an older run, and beside the least speedup that is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from benchmarks import comparison, results
from benchmarks.table import console_here

# A case may have been unlucky in one process; one that is slower in fresh ones too is slower.
TRIES = 2

# A row's suite, case and pass.
Key = tuple[str, str, str]
Again = Callable[[list[Key]], dict]


@dataclass(frozen=True)
class Demands:
    """What a run is held to: an older results file, and the least speedup over stock.

    `force` compares runs of different devices too.
    """

    compare: str | None = None
    force: bool = False
    fail_under: float | None = None

    def old(self) -> dict | None:
        """The older results. Raises ResultsError when they cannot be used."""
        return results.load(self.compare) if self.compare else None

    def met(self, old: dict | None, document: dict, again: Again) -> bool:
        """Whether the run passes; prints what was found. `again` measures rows in fresh processes."""
        slower = believed(old, document, again, self.force, console_here()) if old else []
        for suite, case, pass_name in slower:
            say(f"SLOWER than {self.compare}, each time it was measured: {suite} | {case} | {pass_name}")
        low = [] if self.fail_under is None else comparison.below(document, self.fail_under)
        for row in low:
            median, least, most = (row["speedup"][name] for name in ("median", "low", "high"))
            place = " | ".join((row.get("suite", document["suite"]), row["case"], row["pass"]))
            say(f"BELOW {self.fail_under:g}x of stock: {place}: {median:.3f} [{least:.3f}-{most:.3f}]")
        return not slower and not low


def believed(old: dict, document: dict, again: Again, force: bool, console: Console) -> list[Key]:
    """Print how the run compares with the older one; the rows that are slower in every measurement."""
    changes = comparison.compare(old, document, force)
    console.print(changes.table())
    suspects = [tuple(key) for key in changes.slower]
    for attempt in range(TRIES):
        if not suspects:
            break
        say(f"{len(suspects)} rows look slower; measuring them again ({attempt + 1} of at most {TRIES})")
        fresh = again(suspects)
        # What cannot be measured again stays suspected.
        known = keys_measured(fresh) & set(suspects)
        still = {tuple(key) for key in comparison.compare(old, fresh, force).slower} if known else set()
        suspects = [key for key in suspects if key in still or key not in known]
    return suspects


def keys_measured(document: dict) -> set[Key]:
    return {
        (row.get("suite", document["suite"]), row["case"], row["pass"])
        for row in document["rows"]
        if not row.get("failure")
    }


def say(line: str) -> None:
    print(line, file=sys.stderr)
