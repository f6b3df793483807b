"""What is known of an attention call before it runs, and which backend may run it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pyarch import hardware
from pyarch.dispatch import Backend, Op, Reasons, accepts_all
from pyarch.ops.attention_measured import forward_concessions
from pyarch.ops.kernel_refusals import cpu_refusals, cuda_refusals, triton_refusals
from pyarch.reference.attention import Extras, Settings


class AttentionCall(NamedTuple):
    """What a backend may ask about a call; forward, backward and weights share it.

    Args:
        batch, heads, kv_heads, queries, keys, head_dim, value_dim: B, H, Hk, Tq, Tk, D and Dv.
        is_causal, left, right, dilation, global_tokens, query_offset: as in `Settings`.
        softcap, dropout: whether there is any.
        mask, bias, padding, global_mask, sinks, distance_bias: whether the tensor is given.
        bias_grad: whether the bias needs a gradient.
        save: whether a backward will follow.
    """

    device: str
    architecture: str
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    is_causal: bool = False
    left: int | None = None
    right: int | None = None
    dilation: int = 1
    global_tokens: int = 0
    query_offset: int = 0
    softcap: bool = False
    dropout: bool = False
    mask: bool = False
    bias: bool = False
    bias_grad: bool = False
    padding: bool = False
    global_mask: bool = False
    sinks: bool = False
    distance_bias: bool = False
    save: bool = False

    @property
    def is_stock(self) -> bool:
        """Whether torch's fused kernel takes the call as it stands, with no mask to build."""
        return not (
            self.softcap
            or self.dropout
            or self.mask
            or self.bias
            or self.padding
            or self.sinks
            or self.distance_bias
            or self.left is not None
            or self.right is not None
            or self.dilation != 1
            or (self.is_causal and self.query_offset)
            or self.head_dim != self.value_dim
        )


def describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extras: Extras,
    settings: Settings,
    save: bool,
    bias_grad: bool = False,
) -> AttentionCall:
    """The metadata of a call on these tensors."""
    present = (
        extras.mask is not None,
        extras.bias is not None,
        bias_grad,
        extras.padding is not None,
        extras.global_mask is not None,
        extras.sinks is not None,
        extras.distance_bias is not None,
    )
    return _described(
        query.device, query.dtype, query.shape, key.shape, value.shape[-1], settings, present, save
    )


@lru_cache(maxsize=4096)
def _described(device, dtype, query, key, value_dim, settings, present, save) -> AttentionCall:
    _, *pattern, softcap, dropout_p = settings
    return AttentionCall(
        device.type,
        hardware.architecture(device),
        dtype,
        query[0],
        query[1],
        key[1],
        query[2],
        key[2],
        query[3],
        value_dim,
        *pattern,
        softcap != 0,
        dropout_p != 0,
        *present,
        save,
    )


# -------------------------------------------------------------------------------- which shapes make a call


def misfit(
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    mask: Sequence[int] | None,
    bias: Sequence[int] | None,
    padding: Sequence[int] | None,
    global_mask: Sequence[int] | None,
    sinks: Sequence[int] | None,
    distance_bias: Sequence[int] | None,
) -> str | None:
    """What is wrong with the shapes of a call, in words for an error; None when they fit."""
    if not len(query) == len(key) == len(value) == 4:
        return f"query, key and value must be 4-D, got {len(query)}-D, {len(key)}-D and {len(value)}-D"
    batch, heads, queries, width = query
    kv_heads, keys = key[1], key[2]
    if key[0] != batch or value[0] != batch:
        return f"query, key and value must have one batch size, got {batch}, {key[0]} and {value[0]}"
    if value[1] != kv_heads or kv_heads < 1 or heads < 1 or heads % kv_heads:
        return f"{heads} query heads cannot share {kv_heads} key and {value[1]} value heads"
    if value[2] != keys:
        return f"key and value must have one length, got {keys} and {value[2]}"
    if key[3] != width or width < 1 or value[3] < 1:
        return f"query and key must have one width, at least 1, got {width} and {key[3]}"
    full = batch, heads, queries, keys
    for name, shape in (("mask", mask), ("bias", bias)):
        if shape is not None and not _broadcasts(shape, full):
            return f"{name} {tuple(shape)} must be 4-D and broadcastable to {full}"
    if padding is not None and tuple(padding) != (batch, keys):
        return f"padding must be (batch, keys) = {(batch, keys)}, got {tuple(padding)}"
    if global_mask is not None and (len(global_mask) != 2 or global_mask[0] != batch):
        return f"the mask of global tokens must be ({batch}, tokens), got {tuple(global_mask)}"
    if sinks is not None and tuple(sinks) != (heads,):
        return f"sinks must be (heads,) = ({heads},), got {tuple(sinks)}"
    full = batch, heads, max(queries + keys - 1, 0)
    if distance_bias is not None and (not _broadcasts(distance_bias, full) or distance_bias[2] != full[2]):
        wanted = f"(batch or 1, heads or 1, queries + keys - 1) = {full}"
        return f"distance_bias must be {wanted}, got {tuple(distance_bias)}"
    return None


def _broadcasts(shape: Sequence[int], full: tuple[int, ...]) -> bool:
    return len(shape) == len(full) and all(
        size == 1 or size == wide for size, wide in zip(shape, full, strict=True)
    )


# -------------------------------------------------------------------------------- backends


def _torch_refusals(call: AttentionCall) -> Reasons:
    if call.softcap:
        yield "softcap, stock SDPA has none"
    if call.sinks:
        yield "sinks, stock SDPA has none"
    if call.dropout:
        yield "dropout, stock SDPA draws from another random stream"
    if 0 in (call.batch, call.queries, call.keys):
        yield "an empty query or key, of which stock SDPA gives no lse"


def attention_triton_refusals(call: AttentionCall) -> Reasons:
    yield from triton_refusals(call)
    yield from _wider_than(_WIDEST, call)


def attention_triton_backward_refusals(call: AttentionCall) -> Reasons:
    yield from triton_refusals(call)
    is_full = call.dtype == torch.float32 or call.distance_bias
    yield from _wider_than(_WIDEST_FULL_BACKWARD if is_full else _WIDEST, call)


def _wider_than(widest: int, call: AttentionCall) -> Reasons:
    for name, width in (("head_dim", call.head_dim), ("value_dim", call.value_dim)):
        if width > widest:
            yield f"{name} {width}, needs at most {widest}"


# Of the Triton kernels; a wider backward of float32, or with a bias of distances, has not the registers and
# would spill.
_WIDEST = 256
_WIDEST_FULL_BACKWARD = 128


def _op(
    name: str, function: str, torch_refusals, concessions=accepts_all, triton=attention_triton_refusals
) -> Op:
    return Op(
        name,
        (
            Backend("triton", f"pyarch.triton_kernels.attention:{function}", triton),
            Backend("cuda", f"pyarch.cuda_kernels.attention:{function}", cuda_refusals),
            Backend("cpu", f"pyarch.ops.attention_cpu:{function}", cpu_refusals, concessions),
            Backend("torch", f"pyarch.ops.attention_torch:{function}", torch_refusals),
            Backend("reference", f"pyarch.reference.attention:{function}", accepts_all),
        ),
    )


FORWARD = _op("attention_forward", "forward", _torch_refusals, forward_concessions)
BACKWARD = _op("attention_backward", "backward", _torch_refusals, triton=attention_triton_backward_refusals)
WEIGHTS = _op("attention_weights", "weights", accepts_all)
