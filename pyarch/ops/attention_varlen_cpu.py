"""Attention over sequences of unequal length on the C++ CPU kernels: allocation, then one native call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyarch import native
from pyarch.ops.attention_cpu import native_numbers, sinks_gradient
from pyarch.reference.attention import Settings
from pyarch.reference.attention_varlen import Gradients


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
    """Arguments and result as `pyarch.reference.attention_varlen.forward`."""
    out = query.new_empty(*query.shape[:2], value.shape[2])
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    options = cu_q, cu_k, _single(sinks), native_numbers(settings), at_end
    native.operators().attention_varlen_forward(out, lse, query, key, value, *options)
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
    settings: Settings,
    at_end: bool,
    needs: Sequence[bool],
) -> Gradients:
    """Arguments and result as `pyarch.reference.attention_varlen.backward`."""
    tensors = query, key, value
    # Of a sequence without queries or without keys there is nothing to sum, and the kernels write nothing.
    is_whole = bool((cu_q[1:] > cu_q[:-1]).all() and (cu_k[1:] > cu_k[:-1]).all())
    make = torch.empty_like if is_whole else torch.zeros_like
    grads = [make(each) if need else None for each, need in zip(tensors, needs, strict=False)]
    written = [grad if grad is None or grad.stride(-1) == 1 else grad.contiguous() for grad in grads]
    if any(needs[:3]):
        of_lse = None if grad_lse is None else grad_lse.contiguous()
        options = cu_q, cu_k, _single(sinks), native_numbers(settings), at_end
        native.operators().attention_varlen_backward(*written, grad_out, of_lse, *tensors, out, lse, *options)
    for grad, own in zip(grads, written, strict=True):
        if grad is not own:
            grad.copy_(own)
    if not needs[3]:
        return *grads, None
    in_heads = grad_out.transpose(0, 1)[None], None if grad_lse is None else grad_lse[None]
    return *grads, sinks_gradient(*in_heads, out.transpose(0, 1)[None], lse[None], sinks)


def _single(sinks: Tensor | None) -> Tensor | None:
    return None if sinks is None else sinks.float().contiguous()
