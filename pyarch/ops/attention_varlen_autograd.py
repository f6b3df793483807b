"""Attention over sequences of unequal length as two opaque operators, and its place in autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from pyarch.ops.attention_varlen_call import VARLEN_BACKWARD, VARLEN_FORWARD, describe
from pyarch.ops.plain_calls import is_plain, without_autocast
from pyarch.reference import attention_varlen as reference
from pyarch.reference.attention import Settings

# -------------------------------------------------------------------------------- the two operators

_SETTINGS = (
    "float scale, bool is_causal, SymInt? left, SymInt? right, SymInt dilation, SymInt global_tokens, "
    "SymInt query_offset, float softcap, float dropout_p"
)
_library = torch.library.Library("pyarch", "FRAGMENT")
_library.define(
    "attention_varlen_forward(Tensor query, Tensor key, Tensor value, Tensor cu_q, Tensor cu_k, "
    f"Tensor? sinks, {_SETTINGS}, bool at_end, bool save, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "attention_varlen_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    f"Tensor out, Tensor lse, Tensor cu_q, Tensor cu_k, Tensor? sinks, {_SETTINGS}, bool at_end, "
    "bool[4] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LAST = len(Settings._fields)


def _forward(query, key, value, cu_q, cu_k, sinks, *flat):
    settings, (at_end, save, backend) = Settings(*flat[:_LAST]), flat[_LAST:]
    refuse_ends(cu_q, query.shape[0], cu_k, key.shape[0])
    call = describe(query, key, value, cu_q, sinks, settings, at_end, save)
    run = VARLEN_FORWARD.choose(call, backend).run
    return without_autocast(run, query.device, query, key, value, cu_q, cu_k, sinks, settings, at_end)


def _backward(grad_out, grad_lse, query, key, value, out, lse, cu_q, cu_k, sinks, *flat):
    settings, (at_end, needs, backend) = Settings(*flat[:_LAST]), flat[_LAST:]
    refuse_ends(cu_q, query.shape[0], cu_k, key.shape[0])
    call = describe(query, key, value, cu_q, sinks, settings, at_end, True)
    arguments = grad_out, grad_lse, query, key, value, out, lse, cu_q, cu_k, sinks, settings, at_end, needs
    grads = without_autocast(VARLEN_BACKWARD.choose(call, backend).run, query.device, *arguments)
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)


def _forward_fake(query, key, value, *_):
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty((*query.shape[:2], value.shape[2]))
    return out, query.new_empty((query.shape[1], query.shape[0]), dtype=wide)


def _backward_fake(grad_out, grad_lse, query, key, value, out, lse, cu_q, cu_k, sinks, *flat):
    needs = flat[_LAST + 1]
    return tuple(
        torch.empty_like(tensor) if need else query.new_empty(0)
        for tensor, need in zip((query, key, value, sinks), needs, strict=True)
    )


_library.impl("attention_varlen_forward", _forward, "CompositeExplicitAutograd")
_library.impl("attention_varlen_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("pyarch::attention_varlen_forward", _forward_fake, lib=_library)
torch.library.register_fake("pyarch::attention_varlen_backward", _backward_fake, lib=_library)
_forward_op = torch.ops.pyarch.attention_varlen_forward.default
_backward_op = torch.ops.pyarch.attention_varlen_backward.default


def refuse_ends(cu_q: Tensor, queries: int, cu_k: Tensor, keys: int) -> None:
    """Raise ValueError for ends on a CPU that do not divide the tokens; on a GPU reading them would wait."""
    for name, ends, tokens in (("cu_seqlens_q", cu_q, queries), ("cu_seqlens_k", cu_k, keys)):
        if ends.device.type != "cpu":
            continue
        first, last = int(ends[0]), int(ends[-1])
        if first != 0 or last != tokens:
            raise ValueError(f"{name} must go from 0 to the {tokens} tokens, got {first} to {last}")
        if bool((ends[1:] < ends[:-1]).any()):
            raise ValueError(f"{name} must never decrease, got {ends.tolist()}")


# -------------------------------------------------------------------------------- autograd


def forward_of(query, key, value, cu_q, cu_k, sinks, settings, at_end, save, backend):
    """out and lse by the backend that is chosen, through the opaque operator where somebody watches."""
    present = [each for each in (query, key, value, cu_q, cu_k, sinks) if each is not None]
    way = _forward if is_plain(present) and query.device.type != "meta" else _forward_op
    return way(query, key, value, cu_q, cu_k, sinks, *settings, at_end, save, backend)


class _Varlen(torch.autograd.Function):
    """Saves what the operator is given and gives; the backward is chosen on its own.

    A second backward differentiates the written-out gradients of the reference.
    """

    @staticmethod
    def forward(ctx, settings, at_end, backend, query, key, value, cu_q, cu_k, sinks):
        out, lse = forward_of(query, key, value, cu_q, cu_k, sinks, settings, at_end, True, backend)
        ctx.set_materialize_grads(False)
        ctx.options = settings, at_end, backend
        ctx.save_for_backward(query, key, value, out, lse, cu_q, cu_k, sinks)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        query, key, value, out, lse, cu_q, cu_k, sinks = ctx.saved_tensors
        needs = [*ctx.needs_input_grad[3:6], ctx.needs_input_grad[8]]
        if grad_out is None and grad_lse is None:
            return (None,) * 9
        settings, at_end, backend = ctx.options
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        tensors = grad_out, grad_lse, query, key, value, out, lse, cu_q, cu_k, sinks
        if torch.is_grad_enabled():
            grads = without_autocast(reference.backward, query.device, *tensors, settings, at_end, needs)
        else:
            present = [each for each in tensors if each is not None]
            way = _backward if is_plain(present) and query.device.type != "meta" else _backward_op
            found = way(*tensors, *settings, at_end, needs, backend)
            grads = [grad if need else None for grad, need in zip(found, needs, strict=True)]
        return None, None, None, *grads[:3], None, None, grads[3]


run_tracked = _Varlen.apply
