"""Where torch's own CPU kernels were measured to be faster: `auto` leaves it the call and `explain` says so.

The figures are medians over the shapes of `python -m benchmarks attention --sweep` that fall into a region,
ours against torch in one run, kept in benchmarks/results.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

NO_LIMIT = float("inf")
ANY = (0, NO_LIMIT)


class Slower(NamedTuple):
    """A region of calls, each bound inclusive, and how our speed compares there. None matches everything."""

    speed: str
    queries: tuple[float, float] = ANY
    keys: tuple[float, float] = ANY
    head_dim: tuple[float, float] = ANY
    multiply_adds: tuple[float, float] = ANY  # of one product of queries and keys, over batch and heads
    training: bool | None = None
    dtype: torch.dtype | None = None


SLOWER: tuple[Slower, ...] = ()


def forward_concessions(call) -> Iterator[str]:
    """The measured reason, if any, to leave an `AttentionCall` on a CPU to torch.

    Only what torch's fused kernel takes as it stands is left to it, never what it would need a mask or an
    unfused product for.
    """
    if call.device != "cpu" or not call.is_stock:
        return
    multiply_adds = call.batch * call.heads * call.queries * call.keys * call.head_dim
    for region in SLOWER:
        if (
            _within(call.queries, region.queries)
            and _within(call.keys, region.keys)
            and _within(call.head_dim, region.head_dim)
            and _within(multiply_adds, region.multiply_adds)
            and region.training in (None, call.save)
            and region.dtype in (None, call.dtype)
        ):
            yield (
                f"{call.queries} queries on {call.keys} keys of width {call.head_dim}, {call.batch} x "
                f"{call.heads} heads: measured {region.speed}, see benchmarks/results"
            )
            return


def _within(value: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= value <= bounds[1]
