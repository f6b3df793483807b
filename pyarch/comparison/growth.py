"""How a figure grows with the length of a sequence: the exponent p of figure ~ T^p."""

from __future__ import annotations

import math
from collections.abc import Iterable


def exponent(points: Iterable[tuple[float, float | None]]) -> float | None:
    """The least-squares slope of log(figure) over log(T); None for fewer than two lengths with a figure.

    Args:
        points: (T, figure), None where there is no figure.
    """
    logs = [(math.log(length), math.log(figure)) for length, figure in points if figure]
    if len({length for length, _ in logs}) < 2:
        return None
    middle = sum(length for length, _ in logs) / len(logs)
    mean = sum(figure for _, figure in logs) / len(logs)
    spread = sum((length - middle) ** 2 for length, _ in logs)
    return sum((length - middle) * (figure - mean) for length, figure in logs) / spread


def shown(power: float | None) -> str:
    """ "~T^1.9", or "-" where there is none."""
    return "-" if power is None else f"~T^{abs(power) if abs(power) < 0.05 else power:.1f}"
