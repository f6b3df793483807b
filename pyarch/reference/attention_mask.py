"""What an attention call is made of beside its three tensors, and which keys its queries see.

    visible(i, j) = (windowed(i, j) or global(j) or global(p)) and (j <= p, if causal)
                    and mask[i, j] and not padding[j],                              p = i + query_offset
    windowed(i, j): j - p = dilation * m for an integer m, -left <= m <= right

A window is Longformer's (Beltagy, Peters and Cohan, 2020, arXiv:2004.05150): with both sides given it
reaches from `left` keys before the query to `right` behind it, `dilation` apart. A global token sees every
token and is seen by every token. Without a window and with dilation 1 every key is windowed.

Legend: B batch, H query heads, Hk key heads, Tq queries, Tk keys, T tokens, i query, j key, p query's token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Settings(NamedTuple):
    """The plain numbers of a call; hashable.

    Args:
        scale: multiplies query @ key^T.
        is_causal: whether query i sees only keys j <= i + query_offset (upper-left for offset 0, as torch).
        left, right: how far the window reaches, inclusive, in steps of `dilation`; None is unbounded.
        dilation: distance between the keys of a window.
        global_tokens: the first n tokens are global.
        query_offset: query i is the token at position i + query_offset.
        softcap: scores become softcap * tanh(scores / softcap); 0 for none.
        dropout_p: the probability of dropping a probability.
    """

    scale: float
    is_causal: bool = False
    left: int | None = None
    right: int | None = None
    dilation: int = 1
    global_tokens: int = 0
    query_offset: int = 0
    softcap: float = 0.0
    dropout_p: float = 0.0

    @property
    def is_windowed(self) -> bool:
        return self.left is not None or self.right is not None or self.dilation != 1


class Extras(NamedTuple):
    """The optional tensors of a call.

    Args:
        mask: bool, True where a query may attend; 4-D, broadcastable to (B, H, Tq, Tk).
        bias: the query's dtype or float32, added to the scores; 4-D, broadcastable to (B, H, Tq, Tk).
        padding: bool (B, Tk), True where a key is ignored.
        global_mask: bool (B, T) by position: which tokens are global, beside the first `global_tokens`.
        sinks: (H,) float32 or the query's dtype: one more logit in each head's denominator.
        seed: int64, one element; given exactly when 0 < dropout_p < 1.
        distance_bias: (B or 1, H or 1, Tq + Tk - 1) float32 or the query's dtype, added to the scores: entry
            j - i + Tq - 1 to that of query i and key j.
    """

    mask: Tensor | None = None
    bias: Tensor | None = None
    padding: Tensor | None = None
    global_mask: Tensor | None = None
    sinks: Tensor | None = None
    seed: Tensor | None = None
    distance_bias: Tensor | None = None


def visible(extras: Extras, settings: Settings, queries: int, keys: int, device: torch.device):
    """Which keys each query sees: bool, 4-D, broadcastable to (B, H, Tq, Tk); None where all see all."""
    seen = None
    if settings.is_windowed or settings.is_causal:
        seen = _pattern(extras.global_mask, settings, queries, keys, device)
    seen = _both(seen, extras.mask)
    if extras.padding is not None:
        seen = _both(seen, ~extras.padding[:, None, None, :])
    return seen


def _pattern(global_mask: Tensor | None, settings: Settings, queries: int, keys: int, device) -> Tensor:
    """Visibility by window, global tokens and causality: (B or 1, 1, Tq, Tk)."""
    position = torch.arange(queries, device=device)[:, None] + settings.query_offset  # (Tq, 1)
    key = torch.arange(keys, device=device)  # (Tk,)
    seen = None
    if settings.is_windowed:
        seen = _windowed(key - position, settings)[None, None]
        if settings.global_tokens or global_mask is not None:
            of_queries = _is_global(position[:, 0], global_mask, settings.global_tokens)
            of_keys = _is_global(key, global_mask, settings.global_tokens)
            seen = seen | (of_queries[:, :, None] | of_keys[:, None, :])[:, None]
    return _both(seen, (key <= position)[None, None] if settings.is_causal else None)


def used_keys(seen: Tensor, heads: int) -> Tensor:
    """Which keys any query sees, for each of `heads` key heads: (B or 1, Hk or 1, Tk)."""
    used = seen.any(-2)
    return used if used.shape[1] in (1, heads) else used.unflatten(1, (heads, -1)).any(2)


def _windowed(distance: Tensor, settings: Settings) -> Tensor:
    inside = distance.remainder(settings.dilation) == 0
    if settings.left is not None:
        inside = inside & (distance >= -settings.left * settings.dilation)
    if settings.right is not None:
        inside = inside & (distance <= settings.right * settings.dilation)
    return inside


def _is_global(position: Tensor, global_mask: Tensor | None, global_tokens: int) -> Tensor:
    """Whether the tokens at these positions are global: (B or 1, positions)."""
    first = ((position >= 0) & (position < global_tokens))[None]
    if global_mask is None or global_mask.shape[1] == 0:
        return first
    tokens = global_mask.shape[1]
    named = global_mask[:, position.clamp(0, tokens - 1)]
    return first | (named & (position >= 0) & (position < tokens))


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one & other
