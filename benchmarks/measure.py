"""Time callables against each other, in turn, in one process; and the statistics of such rounds.

Absolute times drift on shared machines, ratios of neighbours far less: each round runs every callable once,
one after the other, another one first each time, and backward every other time around, so that none always
follows the same one; a speedup is the median of two's ratios, round by round.
"""

from __future__ import annotations

import gc
import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Timer = Callable[[Callable[[], object], int], float]

# Several short calls: the first one after the other side's finds cold caches and sleeping threads.
SAMPLE_SECONDS = 2e-3
MIN_PAIRS = 5
MAX_PAIRS = 1000
WARM_UP_SHARE = 0.3
WARM_UP_ROUNDS = 3
SETTLED = 0.97


@dataclass(frozen=True)
class Rounds:
    """Seconds per call of each callable, round by round, and the page faults that a call of it took."""

    seconds: dict[str, list[float]]
    faults: dict[str, float]

    @property
    def count(self) -> int:
        return len(next(iter(self.seconds.values())))

    def ratios(self, slower: str, faster: str) -> list[float]:
        """How many times faster the second callable was than the first, round by round."""
        return [one / other for one, other in zip(self.seconds[slower], self.seconds[faster], strict=True)]

    def added_us(self, plain: str, more: str) -> list[float]:
        """Microseconds that the second callable took more than the first, round by round."""
        pairs = zip(self.seconds[plain], self.seconds[more], strict=True)
        return [(one - other) * 1e6 for other, one in pairs]


def cpu_timer(function: Callable[[], object], calls: int) -> float:
    """Seconds per call of `function` over `calls` calls."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def paired_times(
    calls: Mapping[str, Callable[[], object]],
    budget_seconds: float,
    timer: Timer = cpu_timer,
    sample_seconds: float = SAMPLE_SECONDS,
) -> Rounds:
    """Warm all callables up, then time them in turn: MIN_PAIRS rounds at least, MAX_PAIRS at most.

    The budget is that of two; more callables get as much more. A sample repeats calls shorter than
    `sample_seconds` (0: one call a sample) so that the clock's resolution does not matter.
    """
    names = list(calls)
    budget_seconds *= len(names) / 2
    fastest = warm_up(calls, timer, budget_seconds * WARM_UP_SHARE)
    repeats = {name: max(1, math.ceil(sample_seconds / max(fastest[name], 1e-9))) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    faults = dict.fromkeys(names, 0)
    was_collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + budget_seconds
        done = 0
        while done < MIN_PAIRS or (time.perf_counter() < deadline and done < MAX_PAIRS):
            first, is_backward = done % len(names), done // len(names) % 2
            order = names[first:] + names[:first]
            for name in reversed(order) if is_backward else order:
                before = page_faults()
                seconds[name].append(timer(calls[name], repeats[name]))
                faults[name] += page_faults() - before
            done += 1
    finally:
        if was_collecting:
            gc.enable()
    return Rounds(seconds, {name: count / (done * repeats[name]) for name, count in faults.items()})


def warm_up(
    calls: Mapping[str, Callable[[], object]], timer: Timer, budget_seconds: float
) -> dict[str, float]:
    """Call all in turn until a round improves none noticeably; return their fastest times in seconds."""
    fastest = {name: timer(call, 1) for name, call in calls.items()}
    deadline = time.perf_counter() + budget_seconds
    rounds = 1
    settled = False
    while rounds < WARM_UP_ROUNDS or (not settled and time.perf_counter() < deadline):
        latest = {name: timer(call, 1) for name, call in calls.items()}
        settled = all(latest[name] >= SETTLED * fastest[name] for name in calls)
        fastest = {name: min(latest[name], fastest[name]) for name in calls}
        rounds += 1
    return fastest


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def quantile(values: Sequence[float], share: float) -> float:
    """The `share` quantile (0 to 1) by linear interpolation between order statistics."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the median from order statistics; it assumes nothing about the distribution.

    The number of values below the median is binomial(n, 1/2), so ranks n/2 -+ 1.96 sqrt(n)/2 enclose it.
    """
    ordered = sorted(values)
    count = len(ordered)
    reach = 1.96 * math.sqrt(count) / 2
    low = max(0, math.floor(count / 2 - reach))
    high = min(count - 1, math.ceil(count / 2 + reach))
    return ordered[low], ordered[high]


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80 in milliseconds."""
    shares = {"median_ms": 0.5, "p20_ms": 0.2, "p80_ms": 0.8}
    return {name: quantile(seconds, share) * 1e3 for name, share in shares.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median of `values` and the 95 % interval of that median."""
    low, high = median_interval(values)
    return {"median": quantile(values, 0.5), "low": low, "high": high}
