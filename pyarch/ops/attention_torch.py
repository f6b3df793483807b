"""Attention on torch's own operator: what our kernels are measured against and fall back to.

Window, causality, mask, padding and both biases become one mask of torch's, which holds Tq * Tk numbers where
they differ along both. What no query sees is zeroed before the call; a query that sees nothing is shown
everything and its result replaced by zeros, so that neither NaN nor torch's own answer for an empty row
shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as stock

from pyarch.reference import attention as reference
from pyarch.reference.attention import Extras, Gradients, Settings, empty_output
from pyarch.reference.attention_distance import of_pairs
from pyarch.reference.attention_mask import used_keys, visible

# The same operator, which an attention_context leaves alone; calling it takes a little longer.
_unseen_stock = torch.ops.aten.scaled_dot_product_attention.default
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_INFINITY = float("inf")


class _Stock(NamedTuple):
    """A call as torch's operator takes it."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None  # bool or float, as attn_mask
    is_causal: bool
    blind: Tensor | None  # broadcastable to (B, H, Tq, 1): queries that see nothing


def _as_stock(query, key, value, extras: Extras, settings: Settings) -> _Stock:
    queries, keys = query.shape[2], key.shape[2]
    is_upper_left = settings.is_causal and settings.query_offset == 0 and not settings.is_windowed
    mask = _bias(extras, queries, keys)
    if is_upper_left and extras.mask is None and mask is None and extras.padding is None:
        # Keys behind the last query are seen by none.
        return _Stock(query, key[:, :, :queries], value[:, :, :queries], None, True, None)
    seen = visible(extras, settings, queries, keys, query.device)
    if seen is None and mask is None:
        return _Stock(query, key, value, None, False, None)
    if seen is not None:
        used = used_keys(seen, key.shape[1])[..., None]
        query = torch.where(seen.any(-1, keepdim=True), query, 0.0)
        key, value = torch.where(used, key, 0.0), torch.where(used, value, 0.0)
        mask = seen if mask is None else torch.where(seen, mask, -_INFINITY)
    if mask.dtype == torch.bool:
        blind = ~mask.any(-1, keepdim=True)
        return _Stock(query, key, value, mask | blind, False, blind)
    blind = (mask == -_INFINITY).all(-1, keepdim=True)
    return _Stock(query, key, value, torch.where(blind, 0.0, mask), False, blind)


def _bias(extras: Extras, queries: int, keys: int) -> Tensor | None:
    """Both biases as one, broadcastable to (B, H, Tq, Tk); their sum is no narrower than float32."""
    if extras.distance_bias is None:
        return extras.bias
    of_distance = of_pairs(extras.distance_bias, queries, keys)
    return of_distance if extras.bias is None else reference.widen(extras.bias) + reference.widen(of_distance)


def attend(query: Tensor, key: Tensor, value: Tensor, extras: Extras, settings: Settings) -> Tensor:
    """out of `pyarch.reference.attention.forward`, differentiable as torch's operator is, in its strides."""
    made = _as_stock(query, key, value, extras, settings)
    out = (_unseen_stock if torch._C._len_torch_function_stack() else stock)(
        made.query,
        made.key,
        made.value,
        made.mask,
        0.0,
        made.is_causal,
        scale=settings.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out if made.blind is None else torch.where(made.blind, 0.0, out)


def forward(
    query: Tensor, key: Tensor, value: Tensor, extras: Extras, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Arguments and result as `pyarch.reference.attention.forward`."""
    if not _runs_flash(query, key, value):
        out = attend(query, key, value, extras, settings)
        return _laid_out(out, query), reference.lse_of(query, key, extras, settings)
    made = _as_stock(query, key, value, extras, settings)
    out, lse = _flash(*made[:3], 0.0, made.is_causal, attn_mask=_added(made), scale=settings.scale)
    if made.blind is not None:
        out = torch.where(made.blind, 0.0, out)
        lse = torch.where(made.blind.squeeze(-1), -_INFINITY, lse)
    return _laid_out(out, query), lse.contiguous()


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
    """Arguments and result as `pyarch.reference.attention.backward`, which also serves a gradient of lse."""
    if grad_lse is not None:
        return reference.backward(grad_out, grad_lse, query, key, value, out, lse, extras, settings, needs)
    if needs[3] or needs[5] or not _runs_flash(query, key, value):
        return _backward_by_autograd(grad_out, query, key, value, extras, settings, needs)
    made = _as_stock(query, key, value, extras, settings)
    if made.blind is not None:
        grad_out = torch.where(made.blind, 0.0, grad_out)
        # With an lse of infinity every probability of the row is zero, whatever its scores.
        lse = torch.where(made.blind.squeeze(-1), _INFINITY, lse)
    residuals = made.query, made.key, made.value, out, lse
    grads = _flash_backward(
        grad_out, *residuals, 0.0, made.is_causal, attn_mask=_added(made), scale=settings.scale
    )
    trimmed = key.shape[2] - made.key.shape[2]
    if trimmed:
        grads = grads[0], *(pad(grad, (0, 0, 0, trimmed)) for grad in grads[1:])
    return *_wanted(grads, (query, key, value), needs), None, None, None


def _backward_by_autograd(grad_out, query, key, value, extras, settings, needs) -> Gradients:
    tensors, needs = (query, key, value, extras.bias, extras.distance_bias), (*needs[:4], needs[5])
    leaves = [
        tensor if tensor is None else tensor.detach().requires_grad_(need)
        for tensor, need in zip(tensors, needs, strict=True)
    ]
    with torch.enable_grad(), _recording_autograd():
        out = attend(*leaves[:3], extras._replace(bias=leaves[3], distance_bias=leaves[4]), settings)
    found = iter(
        torch.autograd.grad(
            out,
            [leaf for leaf, need in zip(leaves, needs, strict=True) if need],
            grad_out,
            materialize_grads=True,
        )
    )
    *grads, grad_distance = _wanted([next(found) if need else None for need in needs], tensors, needs)
    return *grads, None, grad_distance


def weights(
    query: Tensor, key: Tensor, lse: Tensor, extras: Extras, settings: Settings, mean: bool
) -> Tensor:
    """Arguments and result as `pyarch.reference.attention.weights`, which torch's operators make."""
    return reference.weights(query, key, lse, extras, settings, mean)


def _runs_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch's fused CPU kernel takes these tensors, and gives lse."""
    return (
        query.device.type == "cpu"
        and query.shape[1] == key.shape[1]
        and query.shape[3] == value.shape[3]
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
    )


def _added(made: _Stock) -> Tensor | None:
    """The mask as the fused kernel takes it: what to add, no narrower than the query, without a gradient."""
    if made.mask is None:
        return None
    if made.mask.dtype != torch.bool:
        return made.mask.detach().to(torch.promote_types(made.mask.dtype, made.query.dtype))
    zero = torch.zeros((), dtype=made.query.dtype)
    return torch.where(made.mask, zero, -_INFINITY)


def _laid_out(out: Tensor, query: Tensor) -> Tensor:
    wanted = empty_output(query, out.shape[-1])
    return out if out.stride() == wanted.stride() else wanted.copy_(out)


def _wanted(grads, tensors, needs) -> list[Tensor | None]:
    """Each gradient in its tensor's layout, None where not wanted."""
    return [
        _like(grad, tensor) if need else None
        for grad, tensor, need in zip(grads, tensors, needs, strict=False)
    ]


def _like(grad: Tensor, tensor: Tensor) -> Tensor:
    wanted = torch.empty_like(tensor)
    return grad if grad.stride() == wanted.stride() else wanted.copy_(grad)


def _recording_autograd():
    """Record a graph also below autograd, where an operator runs under a dispatch mode."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
