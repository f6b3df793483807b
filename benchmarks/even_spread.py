"""Points spread evenly over a product of axes, the same ones every time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence


def plastic_root(dimensions: int) -> float:
    """Positive root of x^(d+1) = x + 1, which generates the evenly spread R_d sequence (M. Roberts, 2018)."""
    root = 2.0
    for _ in range(60):
        root = (1.0 + root) ** (1.0 / (dimensions + 1))
    return root


def evenly_spread(axes: Mapping[str, Sequence]) -> Iterator[dict]:
    """Yield one value of every axis, for ever; any first part of the sequence covers the axes evenly."""
    root = plastic_root(len(axes))
    step = 0
    while True:
        step += 1
        yield {
            name: values[int((0.5 + step * root ** -(axis + 1)) % 1.0 * len(values))]
            for axis, (name, values) in enumerate(axes.items())
        }
