"""Attention of new queries on a cache on the C++ CPU kernels: allocation, then one native call."""

from __future__ import annotations

import torch
from torch import Tensor

from pyarch import native
from pyarch.ops.attention_cpu import native_numbers
from pyarch.reference.attention import Settings


def forward(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Arguments and result as `pyarch.reference.attention_decode.forward`."""
    out = query.new_empty(*query.shape[:3], value_cache.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    sinks = None if sinks is None else sinks.float().contiguous()
    native.operators().attention_decode(
        out, lse, query, key_cache, value_cache, positions, sinks, native_numbers(settings)
    )
    return out, lse
