"""What is timed beside stock and ours in a row: its peers, those that run, and what became of the others.

A peer that is absent, fails or gives no number becomes text in the row and never spoils it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import peers
from benchmarks.check import is_broken
from benchmarks.measure import Rounds, spread, summary
from benchmarks.suites import Absent, WrongResult, reason_of
from benchmarks.twins import Results, Twins
from pyarch import tolerance


@dataclass(frozen=True)
class Beside:
    """`calls`: what is timed, by peer. `facts`: what is known of each of those. `others`: why one is not."""

    calls: dict[str, Callable[[], object]]
    facts: dict[str, dict]
    others: dict[str, dict]

    def told(self, rounds: Rounds) -> dict[str, dict]:
        """The peers of a row: times, and how many times faster ours was, round by round."""
        timed = {
            name: summary(rounds.seconds[name]) | {"speedup": spread(rounds.ratios(name, "ours"))} | facts
            for name, facts in self.facts.items()
        }
        return timed | self.others

    def failing(self, failure: Exception) -> Beside:
        """The same where one of them fails while all are timed: none is."""
        told = {"failure": f"{reason_of(failure)}, in turn with {', '.join(self.calls)}"}
        return Beside({}, {}, self.others | dict.fromkeys(self.calls, told))


def prepared(names: Sequence[str], twins: Twins, pass_name: str, case, exact: Results) -> Beside:
    """Every peer made and called once, and its output compared with the exact one."""
    found = Beside({}, {}, {})
    for name in names:
        try:
            peer = peers.prepare(name, twins, pass_name, case)
            outputs = dict(zip(twins.outputs, peer.outputs(), strict=False))
            error = max(tolerance.error(output, exact[result]) for result, output in outputs.items())
            peer.call()
            if not math.isfinite(error):
                raise ArithmeticError("its output is not finite, or of another shape")
            if any(is_broken(output, exact[result]) for result, output in outputs.items()):
                raise WrongResult(f"its error is {error:.3e}")
        except Absent as absence:
            found.others[name] = {"absent": str(absence)}
        # Other people's compilers and runtimes raise anything, which must not spoil torch's row and ours.
        except Exception as failure:
            found.others[name] = {"failure": reason_of(failure)}
        else:
            found.calls[name] = peer.call
            found.facts[name] = {"error": error, "compile_s": peer.compile_s}
    return found
