"""Bounds of the regions in which torch's own kernels were measured to be faster."""

from __future__ import annotations

Bounds = tuple[float, float]

NO_LIMIT = float("inf")
ANY: Bounds = (0, NO_LIMIT)


def within(value: float, bounds: Bounds) -> bool:
    """Whether a value lies between two bounds, both inclusive."""
    return bounds[0] <= value <= bounds[1]
