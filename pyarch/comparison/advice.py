"""The plain recommendation: for each purpose the best that was measured, with the figures that make it so.

All figures are of the longest sequence. Of both sides of an architecture the better one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pyarch.comparison.results import Compared, Comparison
from pyarch.report import milliseconds, times

# Figures nearer than this are called equal: medians on a shared machine move by so much.
EQUAL = 1.05
# Parameters that differ by less than this share are not worth a word.
SAME_PARAMETERS = 0.01
UNITS = {10: "KiB", 20: "MiB", 30: "GiB"}


@dataclass(frozen=True)
class Advice:
    """What to choose for a purpose, and why in figures."""

    purpose: str
    choice: str
    reason: str

    def __str__(self) -> str:
        return f"{self.purpose[0].upper()}{self.purpose[1:]}: {self.choice}. {self.reason}"


@dataclass(frozen=True)
class Purpose:
    """What a user may want least of: `figure` of a Side, shown by `show`."""

    name: str
    figure: str
    show: Callable[[float], str]
    what: str
    better: str


@dataclass(frozen=True)
class Group:
    """Among which architectures is chosen."""

    name: str
    holds: Callable[[Compared], bool]


def binary(count: float) -> str:
    """Bytes in KiB, MiB or GiB with three significant digits, or whole ones."""
    power = next((power for power in (30, 20) if count >= 2**power), 10)
    amount = count / 2**power
    return f"{amount:.0f} {UNITS[power]}" if amount >= 100 else f"{amount:.3g} {UNITS[power]}"


PURPOSES = (
    Purpose("training speed", "step", milliseconds, "a training step", "faster"),
    Purpose("generation latency", "token", milliseconds, "a generated token", "faster"),
    Purpose("memory", "memory", binary, "in a training step", "less"),
)
GROUPS = (
    Group("", lambda each: True),
    Group("with every token in reach", lambda each: each.reach is not None and each.reach.is_whole),
    Group("among recurrent layers", lambda each: each.family == "recurrent"),
)


def advise(comparison: Comparison) -> list[Advice]:
    """For each purpose the best of all, of those that reach every token, and of the recurrent ones."""
    return [*_best_of_groups(comparison), *_farthest(comparison), *_gains(comparison)]


@dataclass(frozen=True)
class _Candidate:
    """An architecture and its figure on each side, None where there is none."""

    compared: Compared
    stock: float | None
    pyarch: float | None

    @property
    def best(self) -> float:
        return min(each for each in (self.stock, self.pyarch) if each is not None)


def _candidates(comparison: Comparison, figure: str) -> list[_Candidate]:
    """Those that have the figure on the longest sequence, best first."""
    found = []
    for each in comparison.compared:
        row = each.rows[-1]
        candidate = _Candidate(each, getattr(row.stock, figure), getattr(row.pyarch, figure))
        if candidate.stock is not None or candidate.pyarch is not None:
            found.append(candidate)
    return sorted(found, key=lambda each: each.best)


def _best_of_groups(comparison: Comparison) -> Iterator[Advice]:
    for purpose in PURPOSES:
        candidates, chosen = _candidates(comparison, purpose.figure), set()
        for group in GROUPS:
            ranked = [each for each in candidates if group.holds(each.compared)]
            if ranked and ranked[0].compared.name not in chosen:
                chosen.add(ranked[0].compared.name)
                name = ", ".join(filter(None, (purpose.name, group.name)))
                yield Advice(name, ranked[0].compared.name, _reason(purpose, ranked))


def _reason(purpose: Purpose, ranked: list[_Candidate]) -> str:
    first = ranked[0]
    parts = [_figure(purpose, first)]
    if len(ranked) > 1:
        parts.append(_distance(purpose, first, ranked[1]))
    mind = f" Mind: {first.compared.note}." if first.compared.note else ""
    return f"{', '.join(parts)}. {_reach(first.compared)}{mind}"


def _figure(purpose: Purpose, each: _Candidate) -> str:
    """ "12.3 ms a training step with pyarch, where torch takes 25.8 ms (2.10x)"."""
    if each.pyarch is None:
        return f"{purpose.show(each.stock)} {purpose.what} with torch alone"
    if each.stock is None:
        return f"{purpose.show(each.pyarch)} {purpose.what} with pyarch alone"
    gain = times(each.stock / each.pyarch)
    if each.pyarch <= each.stock:
        what = f"{purpose.show(each.pyarch)} {purpose.what} with pyarch"
        return f"{what}, where torch takes {purpose.show(each.stock)} ({gain})"
    what = f"{purpose.show(each.stock)} {purpose.what} with torch"
    return f"{what}, where pyarch takes {purpose.show(each.pyarch)} ({gain})"


def _distance(purpose: Purpose, first: _Candidate, second: _Candidate) -> str:
    """ "2.10x faster than LSTM (25.8 ms), with 25 % fewer parameters"."""
    ratio = second.best / first.best
    named = f"{second.compared.name} ({purpose.show(second.best)})"
    if ratio < EQUAL:
        return f"equal to {named} within {100 * (EQUAL - 1):.0f} %"
    parameters = first.compared.parameters / second.compared.parameters
    text = f"{times(ratio)} {purpose.better} than {named}"
    if abs(parameters - 1) < SAME_PARAMETERS:
        return text
    if parameters >= 2:
        return f"{text}, with {parameters:.1f}x the parameters"
    percent = f"{100 * abs(parameters - 1):.0f} %"
    return f"{text}, with {percent} {'fewer' if parameters < 1 else 'more'} parameters"


def _reach(each: Compared) -> str:
    if each.reach is None:
        return "How far its gradient reaches was not measured."
    if each.reach.is_whole:
        return f"Its gradient reaches all {len(each.reach.norms) - 1} tokens before."
    return f"Its gradient falls below 1 % beyond {each.reach.faded} tokens."


def _farthest(comparison: Comparison) -> Iterator[Advice]:
    """The farthest reach, and of equal ones the fastest step."""
    candidates = [each for each in _candidates(comparison, "step") if each.compared.reach is not None]
    if not candidates:
        return
    farthest = max(each.compared.reach.faded for each in candidates)
    equal = [each for each in candidates if each.compared.reach.faded == farthest]
    reach = equal[0].compared.reach
    share = f"{100 * reach.shares[farthest]:.3g} % of its largest at {farthest} tokens before"
    reason = f"At torch's initial parameters its gradient is still {share}"
    shorter = sorted((each for each in candidates if each not in equal), key=_faded, reverse=True)
    if shorter:
        next_best = shorter[0].compared
        reason += f"; the next, {next_best.name}, falls below 1 % beyond {next_best.reach.faded}"
    if len(equal) > 1:
        reason += f". Of {len(equal)} that reach so far its training step is the fastest"
        reason += f", {milliseconds(equal[0].best)}"
    yield Advice("far reach", equal[0].compared.name, f"{reason}.")


def _faded(each: _Candidate) -> int:
    return each.compared.reach.faded


def _gains(comparison: Comparison) -> Iterator[Advice]:
    """What pyarch gains with each architecture, the largest gain first; "none" where it loses with all."""
    for purpose in PURPOSES:
        both = [
            (each.stock / each.pyarch, each.compared.name)
            for each in _candidates(comparison, purpose.figure)
            if each.stock and each.pyarch
        ]
        if both:
            listed = ", ".join(f"{name} {times(gain)}" for gain, name in sorted(both, reverse=True))
            gain, name = max(both)
            choice = name if gain > 1 else "none"
            yield Advice(f"largest gain by pyarch, {purpose.name}", choice, f"torch over pyarch: {listed}.")
