"""Attention over sequences of unequal length on Triton: the host side of forward and backward.

The kernels are those of a batch (attention_forward, attention_backward), which here find the sequence of a
tile by themselves (attention_sequences): a batch of one, whose tokens are those of all sequences. Nothing is
copied to the host.

Legend: see attention_mask; Nq, Nk tokens of queries and keys of all sequences, S sequences.
"""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from . import attention_backward
from .attention import call_of
from .attention_call import Call, Starts
from .attention_plan import plan_forward

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def as_batch(tokens: Tensor) -> Tensor:
    """(N, H, D) as (1, H, N, D), without a copy."""
    return tokens.transpose(0, 1)[None]


def as_tokens(batch: Tensor | None) -> Tensor | None:
    """The reverse of `as_batch`."""
    return None if batch is None else batch[0].transpose(0, 1)


def extras_of(sinks: Tensor | None) -> SimpleNamespace:
    """What a batch may have, of which sequences have sinks alone."""
    return SimpleNamespace(
        mask=None, bias=None, padding=None, global_mask=None, sinks=sinks, seed=None, distance_bias=None
    )


def sequences_call(query: Tensor, key: Tensor, value: Tensor, extras, settings, starts, at_end) -> Call:
    """The metadata of a call; query, key and value as a batch.

    Raises:
        NotImplementedError: a dtype without a kernel, or 2**30 tokens or more.
    """
    call = call_of(query, key, value.shape[-1], extras, settings)
    return replace(call, sequences=len(starts.queries) - 1, at_end=at_end)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    sinks: Tensor | None,
    settings,
    at_end: bool,
) -> tuple[Tensor, Tensor]:
    """out_i = sum_j P[i, j] v_j and lse_i of the visible keys j of query i's sequence.

    Args:
        query: (Nq, H, D), key (Nk, Hk, D), value (Nk, Hk, Dv), any strides, H a multiple of Hk; float32,
            float16 or bfloat16; D and Dv at most 256.
        cu_q, cu_k: (S + 1,) int32, contiguous: sequence s is queries cu_q[s] to cu_q[s + 1] - 1 and keys
            cu_k[s] to cu_k[s + 1] - 1. Ascending from 0 to Nq and Nk, which is not tested here.
        sinks: (H,) or None.
        settings: scale, is_causal, left, right, query_offset, softcap, within each sequence; no dilation,
            global tokens or dropout.
        at_end: whether the last query of each sequence stands at its last key, in place of query_offset.

    Returns:
        (out, lse): (Nq, H, Dv) in the query's dtype, contiguous; (H, Nq) float32, natural logarithm, -inf for
        a query that sees nothing, whose out is zero.

    Raises:
        NotImplementedError: a dtype without a kernel, wider heads, or 2**30 tokens or more.
    """
    starts, extras = Starts(cu_q, cu_k), extras_of(sinks)
    out = torch.empty((*query.shape[:2], value.shape[-1]), dtype=query.dtype, device=query.device)
    lse = torch.empty((query.shape[1], len(query)), dtype=torch.float32, device=query.device)
    batch = [as_batch(tokens) for tokens in (query, key, value)]
    call = sequences_call(*batch, extras, settings, starts, at_end)
    plan_forward(call, *batch, extras, as_batch(out), lse[None], starts).run(query.device)
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
    sinks: Tensor | None,
    settings,
    at_end: bool,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients (query, key, value, sinks) of `forward`; None where not needed. Bitwise repeatable.

    Args:
        grad_out: as out, any strides, also expanded ones; grad_lse: as lse, or None for zeros.
        out, lse: what the forward returned. needs: which of the four to compute.

    Returns:
        Each in its tensor's dtype, dense, in its tensor's order of dimensions.

    Raises:
        NotImplementedError: as `forward`; in float32 also heads wider than 128.
    """
    starts, extras = Starts(cu_q, cu_k), extras_of(sinks)
    batch = [as_batch(tokens) for tokens in (query, key, value)]
    call = sequences_call(*batch, extras, settings, starts, at_end)
    dq, dk, dv, _, dsinks, _ = attention_backward.run(
        call,
        as_batch(grad_out),
        None if grad_lse is None else grad_lse[None],
        *batch,
        as_batch(out),
        lse[None],
        extras,
        (*needs[:3], False, needs[3], False),
        starts,
    )
    return as_tokens(dq), as_tokens(dk), as_tokens(dv), dsinks
