"""Attention of new queries on a cache by torch's own operator and a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from pyarch.ops import attention_torch
from pyarch.reference.attention import Extras, Settings


def forward(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    sinks: None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Arguments and result as `pyarch.reference.attention_decode.forward`; sinks and softcap are refused."""
    steps = torch.arange(query.shape[2], device=query.device)
    at = (positions[:, None] + steps)[:, None, :, None]  # (B, 1, Tq, 1)
    keys = torch.arange(key_cache.shape[2], device=query.device)
    seen = keys <= at  # (B, 1, Tq, S)
    if settings.left is not None:
        seen = seen & (keys >= at - settings.left)
    plain = Settings(settings.scale)
    out, lse = attention_torch.forward(query, key_cache, value_cache, Extras(mask=seen), plain)
    return out.contiguous(), lse
