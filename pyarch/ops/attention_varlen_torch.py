"""Attention over sequences of unequal length on torch's own operator, one sequence after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyarch.ops import attention_torch as of_one
from pyarch.reference.attention import Extras, Settings
from pyarch.reference.attention_varlen import Gradients, as_batch, as_tokens, stretches

_NONE = Extras()


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    sinks: None,
    settings: Settings,
    at_end: bool,
) -> tuple[Tensor, Tensor]:
    """Arguments and result as `pyarch.reference.attention_varlen.forward`; sinks and softcap are refused."""
    wide = query.dtype if query.dtype == torch.float64 else torch.float32
    out = query.new_zeros(*query.shape[:2], value.shape[2])
    lse = query.new_full((query.shape[1], query.shape[0]), -float("inf"), dtype=wide)
    for queries, keys, own in stretches(cu_q, cu_k, settings, at_end):
        if _holds_both(queries, keys):
            tensors = as_batch(query, queries), as_batch(key, keys), as_batch(value, keys)
            found, of_found = of_one.forward(*tensors, _NONE, own)
            out[queries], lse[:, queries] = as_tokens(found), of_found[0]
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    sinks: None,
    settings: Settings,
    at_end: bool,
    needs: Sequence[bool],
) -> Gradients:
    """Arguments and result as `pyarch.reference.attention_varlen.backward`."""
    tensors = query, key, value
    grads = [torch.zeros_like(each) if need else None for each, need in zip(tensors, needs, strict=False)]
    for queries, keys, own in stretches(cu_q, cu_k, settings, at_end):
        if not _holds_both(queries, keys):
            continue
        of_lse = None if grad_lse is None else grad_lse[:, queries][None]
        parts = as_batch(query, queries), as_batch(key, keys), as_batch(value, keys)
        made = as_batch(out, queries), lse[:, queries][None]
        wanted = *needs[:3], False, False, False
        found = of_one.backward(as_batch(grad_out, queries), of_lse, *parts, *made, _NONE, own, wanted)
        for grad, part, where in zip(grads, found, (queries, keys, keys), strict=False):
            if grad is not None:
                grad[where] = as_tokens(part)
    return *grads, None


def _holds_both(queries: slice, keys: slice) -> bool:
    return queries.start < queries.stop and keys.start < keys.stop
