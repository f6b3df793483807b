"""Where torch's own CPU kernels were measured to be faster: `auto` leaves it the call and `explain` says so.

The figures are medians over the shapes of `python -m benchmarks attention --sweep` that fall into a region,
ours against torch in one run, kept in benchmarks/results, on an Emerald Rapids, whose AMX names the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from pyarch.ops.measured import ANY, Bounds, within


class Slower(NamedTuple):
    """A region of calls, each bound inclusive, and how our speed compares there. None matches everything."""

    speed: str
    queries: Bounds = ANY
    keys: Bounds = ANY
    head_dim: Bounds = ANY
    multiply_adds: Bounds = ANY  # of one product of queries and keys, over batch and heads
    training: bool | None = None
    dtype: torch.dtype | None = None


# Small calls, where our way from Python takes longer than the attention.
EMERALD_RAPIDS = (
    Slower("over 43 shapes 0.54x of torch", ANY, ANY, ANY, (0, 3e6), False, torch.float32),
    Slower("over 48 shapes 0.64x of torch", ANY, ANY, ANY, (0, 7e6), False, torch.bfloat16),
    Slower("over 50 shapes 0.60x of torch", ANY, ANY, ANY, (0, 7e6), True, torch.float32),
    Slower("over 18 shapes 0.47x of torch", ANY, ANY, ANY, (0, 3e4), True, torch.bfloat16),
)
# By architecture; of others no region is known.
SLOWER = {"amx": EMERALD_RAPIDS}


def forward_concessions(call) -> Iterator[str]:
    """The measured reason, if any, to leave an `AttentionCall` on a CPU to torch.

    Only what torch's fused kernel takes as it stands is left to it, never what it would need a mask or an
    unfused product for, nor heads that share keys, of which the sweep has none.
    """
    if call.device != "cpu" or not call.is_stock or call.heads != call.kv_heads:
        return
    multiply_adds = call.batch * call.heads * call.queries * call.keys * call.head_dim
    for region in SLOWER.get(call.architecture, ()):
        if (
            within(call.queries, region.queries)
            and within(call.keys, region.keys)
            and within(call.head_dim, region.head_dim)
            and within(multiply_adds, region.multiply_adds)
            and region.training in (None, call.save)
            and region.dtype in (None, call.dtype)
        ):
            yield (
                f"{call.queries} queries on {call.keys} keys of width {call.head_dim}, {call.batch} x "
                f"{call.heads} heads: measured {region.speed}, see benchmarks/results"
            )
            return
