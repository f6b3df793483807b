"""Where torch's own CPU kernels were measured to be faster: `auto` leaves it the call and `explain` says so.

The figures are medians over the shapes of `python -m benchmarks recurrent --sweep` that fall into a region,
ours against torch in one run, kept in benchmarks/results. A layer left to torch runs there forward and
backward, so `training` tells the two measurements apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch


class Slower(NamedTuple):
    """A region of calls, each bound inclusive, and how our speed compares there. None matches everything."""

    modes: tuple[str, ...]
    steps: tuple[int, float]
    batch: tuple[int, float]
    hidden_size: tuple[int, float]
    packed: bool | None
    training: bool | None
    dtype: torch.dtype | None
    speed: str


SLOWER: tuple[Slower, ...] = ()


def forward_concessions(call) -> Iterator[str]:
    """The measured reason, if any, to leave a `RecurrentCall` on a CPU to torch."""
    if call.device != "cpu":
        return
    for region in SLOWER:
        if (
            call.mode in region.modes
            and _within(call.steps, region.steps)
            and _within(call.batch, region.batch)
            and _within(call.hidden_size, region.hidden_size)
            and region.packed in (None, call.packed)
            and region.training in (None, call.save)
            and region.dtype in (None, call.dtype)
        ):
            yield (
                f"{call.mode} with {call.steps} steps, batch {call.batch}, {call.hidden_size} hidden units: "
                f"measured {region.speed}, see benchmarks/results"
            )
            return


def _within(value: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= value <= bounds[1]
