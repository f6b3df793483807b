"""The plain recommendation: for each purpose the best that was measured, with the figures that make it so.

All figures are of the longest sequence. Of both sides of an architecture the better one counts. Where the
spreads of two times overlap nothing is recommended: it is not settled which is the shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pyarch.comparison.measure import Side, overlap
from pyarch.comparison.results import Compared, Comparison
from pyarch.report import milliseconds, times

# Figures nearer than this are called equal: medians on a shared machine move by so much.
EQUAL = 1.05
# Parameters that differ by less than this share are not worth a word.
SAME_PARAMETERS = 0.01
# What a reader can do about it.
TO_SETTLE = "A quiet machine may settle it; longer runs (--budget) know the spread better."
WITHIN_SPREAD = ", within their spread"
UNITS = {10: "KiB", 20: "MiB", 30: "GiB"}


@dataclass(frozen=True)
class Advice:
    """What to choose for a purpose, and why in figures; of several names which is best is not settled."""

    purpose: str
    choice: str
    reason: str
    settled: bool = True

    def __str__(self) -> str:
        choice = self.choice + ", not settled" * (not self.settled)
        return f"{self.purpose[0].upper()}{self.purpose[1:]}: {choice}. {self.reason}"


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
    """An architecture and a figure of both its sides on the longest sequence; one of them has it."""

    compared: Compared
    figure: str

    @property
    def name(self) -> str:
        return self.compared.name

    @property
    def sides(self) -> dict[str, Side]:
        """The sides that have the figure."""
        row = self.compared.rows[-1]
        both = {"torch": row.stock, "pyarch": row.pyarch}
        return {name: side for name, side in both.items() if getattr(side, self.figure) is not None}

    @property
    def values(self) -> dict[str, float]:
        return {name: getattr(side, self.figure) for name, side in self.sides.items()}

    @property
    def best_side(self) -> str:
        """The one with the lesser figure, pyarch of equal ones."""
        return min(reversed(self.values), key=self.values.__getitem__)

    @property
    def best(self) -> float:
        return self.values[self.best_side]

    @property
    def interval(self) -> tuple[float, float]:
        return self.sides[self.best_side].interval(self.figure)

    @property
    def gain(self) -> float:
        """The figure of torch over that of pyarch, of what has both."""
        return self.values["torch"] / self.values["pyarch"]

    @property
    def gain_interval(self) -> tuple[float, float]:
        (torch_low, torch_high), (low, high) = (
            self.sides[name].interval(self.figure) for name in ("torch", "pyarch")
        )
        return torch_low / high, torch_high / low

    @property
    def gain_is_settled(self) -> bool:
        low, high = self.gain_interval
        return not low < 1 < high


def _candidates(comparison: Comparison, figure: str) -> list[_Candidate]:
    """Those that have the figure on the longest sequence, best first."""
    found = [_Candidate(each, figure) for each in comparison.compared]
    return sorted((each for each in found if each.sides), key=lambda each: each.best)


def _rivals(ranked: list[_Candidate]) -> list[_Candidate]:
    """What may be as good as the first: the spreads overlap."""
    first, *others = ranked
    return [each for each in others if overlap(first.interval, each.interval)]


def _either(candidates: list[_Candidate]) -> str:
    """ "GRU, LSTM or attention"."""
    *others, last = (each.name for each in candidates)
    return f"{', '.join(others)} or {last}" if others else last


def _best_of_groups(comparison: Comparison) -> Iterator[Advice]:
    for purpose in PURPOSES:
        candidates, chosen = _candidates(comparison, purpose.figure), set()
        for group in GROUPS:
            ranked = [each for each in candidates if group.holds(each.compared)]
            if not ranked:
                continue
            rivals = _rivals(ranked)
            choice = _either([ranked[0], *rivals])
            if choice not in chosen:
                chosen.add(choice)
                name = ", ".join(filter(None, (purpose.name, group.name)))
                reason = _open_reason(purpose, ranked[0], rivals) if rivals else _reason(purpose, ranked)
                yield Advice(name, choice, reason, not rivals)


def _reason(purpose: Purpose, ranked: list[_Candidate]) -> str:
    first = ranked[0]
    parts = [_figure(purpose, first)]
    if len(ranked) > 1:
        parts.append(_distance(purpose, first, ranked[1]))
    mind = f" Mind: {first.compared.note}." if first.compared.note else ""
    return f"{', '.join(parts)}. {_reach(first.compared)}{mind}"


def _open_reason(purpose: Purpose, first: _Candidate, rivals: list[_Candidate]) -> str:
    """What was measured of the first and its rivals, and by how much they may differ."""
    parts = [f"{each.name} {_spread(purpose, each)}" for each in (first, *rivals)]
    said = [f"{purpose.what.capitalize()}: {', '.join(parts)}.", f"{_apart(first, rivals)}. {TO_SETTLE}"]
    for each in (first, *rivals):
        said.append(_reach(each.compared, f"{each.name}: its"))
        if each.compared.note:
            said.append(f"Mind: {each.compared.note}.")
    return " ".join(said)


def _spread(purpose: Purpose, each: _Candidate) -> str:
    """ "12.3 ms (11.9 ms to 12.8 ms) with pyarch"."""
    low, high = map(purpose.show, each.interval)
    return f"{purpose.show(each.best)} ({low} to {high}) with {each.best_side}"


def _apart(first: _Candidate, rivals: list[_Candidate]) -> str:
    """ "LSTM may be from 1.05x faster to 1.20x slower than GRU"."""
    low, high = first.interval
    words = []
    for each in rivals:
        faster, slower = times(high / each.interval[0]), times(each.interval[1] / low)
        words.append(f"{each.name} may be from {faster} faster to {slower} slower than {first.name}")
    return ", ".join(words)


def _figure(purpose: Purpose, each: _Candidate) -> str:
    """ "12.3 ms a training step with pyarch, where torch takes 25.8 ms (2.10x)"."""
    what = f"{purpose.show(each.best)} {purpose.what} with {each.best_side}"
    others = [name for name in each.values if name != each.best_side]
    if not others:
        return f"{what} alone"
    (other,) = others
    gain = times(each.gain) + WITHIN_SPREAD * (not each.gain_is_settled)
    return f"{what}, where {other} takes {purpose.show(each.values[other])} ({gain})"


def _distance(purpose: Purpose, first: _Candidate, second: _Candidate) -> str:
    """ "2.10x faster than LSTM (25.8 ms), with 25 % fewer parameters"."""
    ratio = second.best / first.best
    named = f"{second.name} ({purpose.show(second.best)})"
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


def _reach(each: Compared, whose: str = "Its") -> str:
    if each.reach is None:
        return f"{whose} gradient's reach was not measured."
    if each.reach.is_whole:
        return f"{whose} gradient reaches all {len(each.reach.norms) - 1} tokens before."
    return f"{whose} gradient falls below 1 % beyond {each.reach.faded} tokens."


def _farthest(comparison: Comparison) -> Iterator[Advice]:
    """The farthest reach, and of equal ones the fastest step."""
    candidates = [each for each in _candidates(comparison, "step") if each.compared.reach is not None]
    if not candidates:
        return
    farthest = max(map(_faded, candidates))
    equal = [each for each in candidates if _faded(each) == farthest]
    rivals = _rivals(equal)
    reach = equal[0].compared.reach
    share = f"{100 * reach.shares[farthest]:.3g} % of its largest at {farthest} tokens before"
    reason = f"At torch's initial parameters its gradient is still {share}"
    shorter = sorted((each for each in candidates if each not in equal), key=_faded, reverse=True)
    if shorter:
        reason += f"; the next, {shorter[0].name}, falls below 1 % beyond {_faded(shorter[0])}"
    if rivals:
        reason += f". Of {len(equal)} that reach so far which training step is the fastest is not settled: "
        reason += f"{_apart(equal[0], rivals)}. {TO_SETTLE[:-1]}"
    elif len(equal) > 1:
        reason += f". Of {len(equal)} that reach so far its training step is the fastest"
        reason += f", {milliseconds(equal[0].best)}"
    yield Advice("far reach", _either([equal[0], *rivals]), f"{reason}.", not rivals)


def _faded(each: _Candidate) -> int:
    return each.compared.reach.faded


def _gains(comparison: Comparison) -> Iterator[Advice]:
    """What pyarch gains with each architecture, the largest gain first; "none" where it loses with all."""
    for purpose in PURPOSES:
        candidates = _candidates(comparison, purpose.figure)
        both = [each for each in candidates if len(each.sides) == 2 and all(each.values.values())]
        ranked = sorted(both, key=lambda each: each.gain, reverse=True)
        if ranked:
            first, *others = ranked
            listed = ", ".join(f"{each.name} {_gain(each)}" for each in ranked)
            rivals = [each for each in others if overlap(first.gain_interval, each.gain_interval)]
            gains = [first, *rivals] if first.gain > 1 else []
            settled = first.gain_is_settled and not (gains and rivals)
            reason = f"torch over pyarch: {listed}.{'' if settled else f' {TO_SETTLE}'}"
            name = f"largest gain by pyarch, {purpose.name}"
            yield Advice(name, _either(gains) if gains else "none", reason, settled)


def _gain(each: _Candidate) -> str:
    """ "1.02x (0.96x to 1.09x)"; without an interval where it has no width."""
    low, high = each.gain_interval
    return times(each.gain) + (f" ({times(low)} to {times(high)})" if low < high else "")
