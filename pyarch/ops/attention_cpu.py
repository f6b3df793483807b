"""Attention on the C++ CPU kernels: allocation and layout, then one native call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pyarch import native
from pyarch.dispatch import Backend
from pyarch.reference.attention import Extras, Gradients, Settings, empty_output

_UNBOUNDED = -1
_FARTHEST = 2**40


def forward(
    query: Tensor, key: Tensor, value: Tensor, extras: Extras, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Arguments and result as `pyarch.reference.attention.forward`."""
    if settings.dropout_p >= 1:
        value, settings = torch.zeros_like(value), settings._replace(dropout_p=0.0)
    out = empty_output(query, value.shape[3])
    lse = torch.empty(query.shape[:3], dtype=torch.float32)
    native.operators().attention_forward(out, lse, query, key, value, *_options(extras, settings))
    return out, lse


def forward_and_weights(
    query: Tensor, key: Tensor, value: Tensor, extras: Extras, settings: Settings, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` and `weights` in one go and not in two."""
    made = torch.empty(_weights_shape(query, key, mean), dtype=query.dtype)
    if settings.dropout_p >= 1 or not query.shape[1]:
        return *forward(query, key, value, extras, settings), made.zero_()
    out = empty_output(query, value.shape[3])
    lse = torch.empty(query.shape[:3], dtype=torch.float32)
    native.operators().attention_forward_and_weights(
        out, lse, made, query, key, value, *_options(extras, settings)
    )
    return out, lse, made


class Kernel(NamedTuple):
    """What stands for a backend's function where a call has one of its own."""

    run: Callable


def make_both(kernel: Backend, weights_kernel: Backend) -> bool:
    """Whether these are the two functions of which `out_and_weights` does the work at once."""
    return kernel.run is forward and weights_kernel.run is weights


def out_and_weights(mean: bool) -> tuple[Kernel, Kernel]:
    """A call's `forward`, which makes its weights too, and `weights`, which hands them over once."""
    kept = []

    def run(*arguments) -> tuple[Tensor, Tensor]:
        out, lse, made = forward_and_weights(*arguments, mean)
        kept.append(made)
        return out, lse

    return Kernel(run), Kernel(lambda *arguments: kept.pop())


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
    if settings.dropout_p >= 1:
        value, settings = torch.zeros_like(value), settings._replace(dropout_p=0.0)
        grad_out = torch.zeros_like(grad_out)
    tensors = query, key, value
    # Without queries or without keys there is nothing to sum, and the kernels write nothing.
    make = torch.empty_like if query.shape[2] and key.shape[2] else torch.zeros_like
    grads = [make(each) if need else None for each, need in zip(tensors, needs, strict=False)]
    written = [grad if grad is None or grad.stride(-1) == 1 else grad.contiguous() for grad in grads]
    grad_bias, is_met_once = None, False
    if needs[3]:
        full = (*query.shape[:3], key.shape[2])
        is_met_once = extras.bias.shape == full and _sees_everything(extras, settings)
        grad_bias = torch.empty(full) if is_met_once else torch.zeros(extras.bias.shape)
    grad_distance = None
    if needs[5]:
        # One for each sample and head, whoever shares a bias: no two tasks add to the same sums.
        grad_distance = torch.zeros(*query.shape[:2], extras.distance_bias.shape[2])
    if any(needs[:4]) or needs[5]:
        native.operators().attention_backward(
            *written,
            grad_bias,
            is_met_once,
            grad_distance,
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
    grad_sinks = sinks_gradient(grad_out, grad_lse, out, lse, extras.sinks) if needs[4] else None
    if needs[3]:
        grad_bias = grad_bias.to(extras.bias.dtype)
    if needs[5]:
        grad_distance = grad_distance.sum_to_size(extras.distance_bias.shape).to(extras.distance_bias.dtype)
    return *grads, grad_bias, grad_sinks, grad_distance


def weights(
    query: Tensor, key: Tensor, lse: Tensor, extras: Extras, settings: Settings, mean: bool
) -> Tensor:
    """Arguments and result as `pyarch.reference.attention.weights`."""
    shape = _weights_shape(query, key, mean)
    if settings.dropout_p >= 1:
        return torch.zeros(shape, dtype=query.dtype)
    made = torch.empty(shape, dtype=query.dtype)
    native.operators().attention_weights(made, query, key, lse, mean, *_options(extras, settings))
    return made


def _weights_shape(query: Tensor, key: Tensor, mean: bool) -> tuple[int, ...]:
    batch, heads, queries, _ = query.shape
    return (batch, queries, key.shape[2]) if mean else (batch, heads, queries, key.shape[2])


def _options(extras: Extras, settings: Settings) -> tuple:
    """The native operators' last arguments."""
    if extras.sinks is not None:
        extras = extras._replace(sinks=extras.sinks.float().contiguous())
    if extras.distance_bias is not None:
        extras = extras._replace(distance_bias=extras.distance_bias.float().contiguous())
    return *extras, native_numbers(settings)


@lru_cache(maxsize=4096)
def native_numbers(settings: Settings) -> Tensor:
    """What `Settings` says, in the order of the native operators; as one tensor: each argument takes time."""
    scale, is_causal, left, right, dilation, global_tokens, query_offset, softcap, dropout_p = settings
    left, right = (_UNBOUNDED if reach is None else min(reach, _FARTHEST) for reach in (left, right))
    numbers = scale, softcap, dropout_p, is_causal, left, right, dilation, global_tokens, query_offset
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def _sees_everything(extras: Extras, settings: Settings) -> bool:
    """Whether every query sees every key."""
    is_near = settings.left is not None or settings.right is not None or settings.dilation != 1
    return not (settings.is_causal or is_near) and extras.mask is None and extras.padding is None


def sinks_gradient(grad_out, grad_lse, out, lse, sinks: Tensor) -> Tensor:
    """The gradient of sinks (H,) from those of out (B, H, Tq, Dv) and lse (B, H, Tq), the latter or None."""
    delta = (grad_out.float() * out.float()).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    share = torch.exp(sinks.float()[:, None] - torch.where(lse.isinf(), 0.0, lse))  # (B, H, Tq)
    return -(share * delta).sum((0, 2)).to(sinks.dtype)
