"""The attention function that transformers' layers call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from pyarch.attention_context import answered
from pyarch.integrations.transformers_mask import Pattern, PatternMask

# What a layer may say beside its mask of who sees whom, and no option of ours does; none is passed over.
_REFUSED = {
    "indices": "keys chosen for each query by an index",
    "block_indices": "blocks of keys chosen for each query by an index",
    "sinks": "a sink for each query; sinks of a head come as s_aux",
    "cache": "the paged cache of continuous batching",
}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as a layer of transformers asks.

    Args:
        module: the layer; its `is_causal`, True where it has none, holds where the argument is None.
        query: (B, H, Tq, D).
        key: (B, Hk, Tk, D), H a multiple of Hk.
        value: (B, Hk, Tk, Dv).
        attention_mask: what our mask function returned, or a mask of the caller's, bool (True: may attend)
            or float (added), (B, 1 or H, Tq, Tk). None leaves it to is_causal: one query sees all keys, more
            see those up to their own position.
        dropout: probability of dropping a probability.
        scaling: None for 1 / sqrt(D).
        is_causal: goes before `module.is_causal`; not read beside a mask.
        position_bias: added to the scores, (1 or B, H, Tq, Tk).
        sliding_window: W, a query sees the last W keys up to itself. The mask says so already, so this is
            read only for a causal call without one.
        softcap: c of c * tanh(scores / c).
        s_aux: (H,), one more logit of each head in the softmax's denominator.
        output_attentions: whether to return the probabilities.
        others: what transformers adds for its models and other implementations.

    Returns:
        out (B, Tq, H, Dv) in the query's dtype, and the probabilities (B, H, Tq, Tk) or None.

    Raises:
        NotImplementedError: the layer says in another way who sees whom.
    """
    for name, meaning in _REFUSED.items():
        if others.get(name) is not None:
            raise NotImplementedError(
                f"{type(module).__name__} passes {name} ({meaning}), which pyarch's attention does not take; "
                'use attn_implementation="sdpa" or "eager"'
            )
    shape = query.shape[0], 1, query.shape[2], key.shape[2]
    pattern = Pattern(False, None, 0, None)
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        pattern = _unmasked(bool(causal), sliding_window, *shape[2:])
    elif isinstance(attention_mask, PatternMask):
        known, fits = attention_mask.pattern, attention_mask.shape == shape
        pattern, attention_mask = (known, None) if known and fits else (pattern, attention_mask.read())
    result = answered(
        query,
        key,
        value,
        attention_mask,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
        bias=position_bias,
        softcap=softcap,
        sinks=s_aux,
        return_weights="heads" if output_attentions else None,
        **pattern._asdict(),
    )
    out, weights = result if output_attentions else (result, None)
    return out.transpose(1, 2).contiguous(), weights


def _unmasked(is_causal: bool, sliding_window: int | None, queries: int, keys: int) -> Pattern:
    """The pattern of a call without a mask: one query is the last token, more begin with the first."""
    if not is_causal:
        return Pattern(False, None, 0, None)
    if sliding_window is None or max(queries, keys) <= sliding_window:
        return Pattern(queries > 1, None, 0, None)
    return Pattern(queries > 1, (sliding_window - 1, None), keys - 1 if queries == 1 else 0, None)


def is_registered_as(name: str) -> bool:
    """Whether a name for `attn_implementation` stands for `attention`."""
    registry = AttentionInterface()
    return name in registry and registry[name] is attention
