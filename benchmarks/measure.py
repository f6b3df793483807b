"""Time two callables against each other, in turn, in one process; and the statistics of such pairs.

Absolute times drift on shared machines, ratios of neighbours far less: each pair runs stock and ours one
after the other, the order alternating, and the speedup is the median of the pairs' ratios.
"""

from __future__ import annotations

import gc
import math
import resource
import time
from collections.abc import Callable, Sequence
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
class Pairs:
    """Seconds per call, pair by pair, and the page faults a call of each side took."""

    stock: list[float]
    ours: list[float]
    stock_faults: float
    ours_faults: float

    @property
    def ratios(self) -> list[float]:
        return [stock / ours for stock, ours in zip(self.stock, self.ours, strict=True)]

    @property
    def added_us(self) -> list[float]:
        return [(ours - stock) * 1e6 for stock, ours in zip(self.stock, self.ours, strict=True)]


def cpu_timer(function: Callable[[], object], calls: int) -> float:
    """Seconds per call of `function` over `calls` calls."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def paired_times(
    stock: Callable[[], object],
    ours: Callable[[], object],
    budget_seconds: float,
    timer: Timer = cpu_timer,
    sample_seconds: float = SAMPLE_SECONDS,
) -> Pairs:
    """Warm both sides up, then time them in turn: MIN_PAIRS at least, until the budget or MAX_PAIRS is used.

    A sample repeats calls shorter than `sample_seconds` (0: one call a sample) so that the clock's resolution
    does not matter.
    """
    functions = (stock, ours)
    fastest = warm_up(functions, timer, budget_seconds * WARM_UP_SHARE)
    calls = [max(1, math.ceil(sample_seconds / max(seconds, 1e-9))) for seconds in fastest]
    times: tuple[list[float], list[float]] = ([], [])
    faults = [0, 0]
    was_collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + budget_seconds
        while len(times[0]) < MIN_PAIRS or (time.perf_counter() < deadline and len(times[0]) < MAX_PAIRS):
            order = (0, 1) if len(times[0]) % 2 == 0 else (1, 0)
            for side in order:
                before = page_faults()
                times[side].append(timer(functions[side], calls[side]))
                faults[side] += page_faults() - before
    finally:
        if was_collecting:
            gc.enable()
    per_call = [count / (len(times[0]) * calls[side]) for side, count in enumerate(faults)]
    return Pairs(times[0], times[1], per_call[0], per_call[1])


def warm_up(functions: Sequence[Callable[[], object]], timer: Timer, budget_seconds: float) -> list[float]:
    """Call the functions in turn until a round improves none noticeably; return their fastest times."""
    fastest = [timer(function, 1) for function in functions]
    deadline = time.perf_counter() + budget_seconds
    rounds = 1
    settled = False
    while rounds < WARM_UP_ROUNDS or (not settled and time.perf_counter() < deadline):
        latest = [timer(function, 1) for function in functions]
        settled = all(new >= SETTLED * best for new, best in zip(latest, fastest, strict=True))
        fastest = [min(new, best) for new, best in zip(latest, fastest, strict=True)]
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
