"""Attention on the C++ CPU kernels: allocation and layout, then one native call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyarch import native
from pyarch.reference.attention import Extras, Gradients, Settings, empty_output

_UNBOUNDED = -1
_FARTHEST = 2**40


def forward(
    query: Tensor, key: Tensor, value: Tensor, extras: Extras, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Arguments and result as `pyarch.reference.attention.forward`."""
    out = empty_output(query, value.shape[3])
    lse = torch.empty(query.shape[:3], dtype=torch.float32)
    native.operators().attention_forward(out, lse, query, key, value, *_options(extras, settings))
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    extras: Extras,
    settings: Settings,
    needs: Sequence[bool],
) -> Gradients:
    """Arguments and result as `pyarch.reference.attention.backward`."""
    tensors = query, key, value
    grads = [torch.empty_like(each) if need else None for each, need in zip(tensors, needs, strict=False)]
    written = [
        grad if grad is None or grad.stride(-1) == 1 else torch.empty(grad.shape, dtype=grad.dtype)
        for grad in grads
    ]
    grad_bias = torch.zeros(extras.bias.shape) if needs[3] else None
    if any(needs[:4]):
        native.operators().attention_backward(
            *written,
            grad_bias,
            grad_out,
            None if grad_lse is None else grad_lse.contiguous(),
            *tensors,
            out,
            lse,
            *_options(extras, settings),
        )
    for grad, own in zip(grads, written, strict=True):
        if grad is not own:
            grad.copy_(own)
    grad_sinks = _sinks_gradient(grad_out, grad_lse, out, lse, extras.sinks) if needs[4] else None
    return *grads, None if grad_bias is None else grad_bias.to(extras.bias.dtype), grad_sinks


def weights(
    query: Tensor, key: Tensor, lse: Tensor, extras: Extras, settings: Settings, mean: bool
) -> Tensor:
    """Arguments and result as `pyarch.reference.attention.weights`."""
    batch, heads, queries, _ = query.shape
    shape = (batch, queries, key.shape[2]) if mean else (batch, heads, queries, key.shape[2])
    made = torch.empty(shape, dtype=query.dtype)
    native.operators().attention_weights(made, query, key, lse, mean, *_options(extras, settings))
    return made


def _options(extras: Extras, settings: Settings) -> tuple:
    """The native operators' last arguments."""
    mask, bias, padding, global_mask, sinks, seed = extras
    scale, is_causal, left, right, dilation, global_tokens, query_offset, softcap, dropout_p = settings
    return (
        mask,
        bias,
        padding,
        global_mask,
        sinks if sinks is None else sinks.float().contiguous(),
        scale,
        softcap,
        dropout_p,
        is_causal,
        _UNBOUNDED if left is None else min(left, _FARTHEST),
        _UNBOUNDED if right is None else min(right, _FARTHEST),
        dilation,
        global_tokens,
        query_offset,
        0 if seed is None else int(seed),
    )


def _sinks_gradient(grad_out, grad_lse, out, lse, sinks: Tensor) -> Tensor:
    delta = (grad_out.float() * out.float()).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    share = torch.exp(sinks.float()[:, None] - lse)  # (B, H, Tq)
    return -(share * delta).sum((0, 2)).to(sinks.dtype)
