"""Attention over sequences of unequal length in plain torch: each sequence by the reference of attention.

Sequence s is the queries [cu_q[s], cu_q[s + 1]) on the keys [cu_k[s], cu_k[s + 1]). Causality and windows
count from its first query and key; with `at_end` its last query stands at its last key, whatever
`query_offset` says.

Legend: S sequences, Nq queries and Nk keys of all of them, H query heads, Hk key heads, D width of queries
and keys, Dv of values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyarch.reference import attention as of_one
from pyarch.reference.attention import Extras, Settings

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Stretch(NamedTuple):
    """Where one sequence lies, and its settings."""

    queries: slice
    keys: slice
    settings: Settings


def stretches(cu_q: Tensor, cu_k: Tensor, settings: Settings, at_end: bool) -> Iterator[Stretch]:
    """The sequences, one after another."""
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    for first, end, first_key, end_key in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        own = settings
        if at_end:
            own = settings._replace(query_offset=(end_key - first_key) - (end - first))
        yield Stretch(slice(first, end), slice(first_key, end_key), own)


def as_batch(tokens: Tensor, stretch: slice) -> Tensor:
    """One sequence's tokens (T, H, D) as a batch (1, H, T, D)."""
    return tokens[stretch].transpose(0, 1)[None]


def as_tokens(batch: Tensor) -> Tensor:
    """The reverse: (1, H, T, D) as (T, H, D)."""
    return batch[0].transpose(0, 1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    sinks: Tensor | None,
    settings: Settings,
    at_end: bool,
) -> tuple[Tensor, Tensor]:
    """`forward` in operations that autograd, its second order and functorch's transforms follow."""
    wide = query.dtype if query.dtype == torch.float64 else torch.float32
    outs, lses = [query.new_empty(0, query.shape[1], value.shape[2])], []
    lses.append(query.new_empty(query.shape[1], 0, dtype=wide))
    for queries, keys, own in stretches(cu_q, cu_k, settings, at_end):
        tensors = as_batch(query, queries), as_batch(key, keys), as_batch(value, keys)
        out, lse = of_one.attention(*tensors, Extras(sinks=sinks), own)
        outs.append(as_tokens(out))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    sinks: Tensor | None,
    settings: Settings,
    at_end: bool,
) -> tuple[Tensor, Tensor]:
    """Attend within each sequence.

    Args:
        query: (Nq, H, D), any floating dtype and strides.
        key: (Nk, Hk, D), H a multiple of Hk.
        value: (Nk, Hk, Dv).
        cu_q, cu_k: (S + 1,) int32, contiguous: 0, ascending, Nq or Nk.
        sinks: (H,), one more logit of each head, or None.
        settings: without dilation, global tokens and dropout.
        at_end: whether each sequence's last query stands at its last key.

    Returns:
        out (Nq, H, Dv) in the query's dtype; lse (H, Nq) in float32, for float64 in float64; both contiguous.
    """
    out, lse = attention(query, key, value, cu_q, cu_k, sinks, settings, at_end)
    return out.contiguous(), lse.contiguous()


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
    sinks: Tensor | None,
    settings: Settings,
    at_end: bool,
    needs: Sequence[bool],
) -> Gradients:
    """The gradients of query, key, value and sinks.

    Args:
        grad_out: as `out`, any strides.
        grad_lse: as `lse`, or None for zeros.
        out, lse: results of `forward` on the same arguments.
        needs: for each of the four whether it is wanted.

    Returns:
        Each gradient in the shape, dtype and order of dimensions of its tensor; None where not wanted.
    """
    parts: list[list[Tensor]] = [[], [], []]
    of_sinks = []
    wanted = *needs[:3], False, needs[3], False
    for queries, keys, own in stretches(cu_q, cu_k, settings, at_end):
        tensors = as_batch(query, queries), as_batch(key, keys), as_batch(value, keys)
        made = as_batch(out, queries), lse[:, queries][None]
        grads = as_batch(grad_out, queries), None if grad_lse is None else grad_lse[:, queries][None]
        *found, _, dsinks, _ = of_one.backward(*grads, *tensors, *made, Extras(sinks=sinks), own, wanted)
        for part, grad, need in zip(parts, found, needs, strict=False):
            if need:
                part.append(as_tokens(grad))
        if needs[3]:
            of_sinks.append(dsinks)
    joined = [
        torch.empty_like(tensor).copy_(torch.cat([tensor[:0], *part])) if need else None
        for tensor, part, need in zip((query, key, value), parts, needs, strict=False)
    ]
    dsinks = torch.stack([torch.zeros_like(sinks), *of_sinks]).sum(0) if needs[3] else None
    return *joined, dsinks
