"""Attention of a few new queries on a cache in plain torch: each batch entry by the reference of attention.

Query t of entry b stands at positions[b] + t and sees the keys up to itself, within the window.

Legend: B batch, H query heads, Hk key heads, Tq queries, S places of a cache, D width of queries and keys, Dv
of values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyarch.reference import attention as of_one
from pyarch.reference.attention import Extras, Settings


def forward(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        query: (B, H, Tq, D), any floating dtype and strides.
        key_cache: (B, Hk, S, D), H a multiple of Hk; what no query sees may hold anything.
        value_cache: (B, Hk, S, Dv).
        positions: (B,) int32, of each entry's first query; a query at a negative one sees nothing.
        sinks: (H,), one more logit of each head, or None.
        settings: causal, with neither query_offset, dilation, global tokens nor dropout.

    Returns:
        out (B, H, Tq, Dv) in the query's dtype; lse (B, H, Tq) in float32, for float64 in float64; both
        contiguous.
    """
    wide = query.dtype if query.dtype == torch.float64 else torch.float32
    out = query.new_empty(*query.shape[:3], value_cache.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=wide)
    for b, position in enumerate(positions.tolist()):
        own, entry = settings._replace(query_offset=position), slice(b, b + 1)
        tensors = query[entry], key_cache[entry], value_cache[entry]
        out[entry], lse[entry] = of_one.attention(*tensors, Extras(sinks=sinks), own)
    return out, lse
