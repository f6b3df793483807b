"""Attention as three opaque operators for torch.compile, and its place in autograd.

A call on plain tensors outside any tracing goes straight to its backend's function, because the way through
torch's dispatcher takes longer than the kernel of a small call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyarch.dispatch import Backend
from pyarch.ops.attention_call import BACKWARD, FORWARD, WEIGHTS, describe
from pyarch.ops.plain_calls import is_plain, without_autocast
from pyarch.reference import attention as reference
from pyarch.reference.attention import Extras, Settings, empty_output

# -------------------------------------------------------------------------------- the three operators

_EXTRAS = (
    "Tensor? mask, Tensor? bias, Tensor? padding, Tensor? global_mask, Tensor? sinks, Tensor? seed, "
    "Tensor? distance_bias"
)
_SETTINGS = (
    "float scale, bool is_causal, SymInt? left, SymInt? right, SymInt dilation, SymInt global_tokens, "
    "SymInt query_offset, float softcap, float dropout_p"
)
_library = torch.library.Library("pyarch", "FRAGMENT")
_library.define(
    f"attention_forward(Tensor query, Tensor key, Tensor value, {_EXTRAS}, {_SETTINGS}, bool save, "
    "str backend) -> (Tensor, Tensor)"
)
_library.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    f"Tensor out, Tensor lse, {_EXTRAS}, {_SETTINGS}, bool[6] needs, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"attention_weights(Tensor query, Tensor key, Tensor lse, {_EXTRAS}, {_SETTINGS}, bool mean, "
    "str backend) -> Tensor"
)
_FIRST_SETTING = len(Extras._fields)
_AFTER = _FIRST_SETTING + len(Settings._fields)


def _options(flat) -> tuple[Extras, Settings, tuple]:
    """The operators' flat arguments: extras, settings and what follows."""
    return Extras(*flat[:_FIRST_SETTING]), Settings(*flat[_FIRST_SETTING:_AFTER]), flat[_AFTER:]


def _forward(query, key, value, *options):
    extras, settings, (save, backend) = _options(options)
    bias_grad = save and extras.bias is not None and extras.bias.requires_grad
    chosen = FORWARD.choose(describe(query, key, value, extras, settings, save, bias_grad), backend)
    return without_autocast(chosen.run, query.device, query, key, value, extras, settings)


def _backward(grad_out, grad_lse, query, key, value, out, lse, *options):
    extras, settings, (needs, backend) = _options(options)
    chosen = BACKWARD.choose(describe(query, key, value, extras, settings, True, needs[3]), backend)
    arguments = grad_out, grad_lse, query, key, value, out, lse, extras, settings, needs
    grads = without_autocast(chosen.run, query.device, *arguments)
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)


def _weights(query, key, lse, *options):
    extras, settings, (mean, backend) = _options(options)
    chosen = WEIGHTS.choose(describe(query, key, key, extras, settings, False), backend)
    return without_autocast(chosen.run, query.device, query, key, lse, extras, settings, mean)


def _forward_fake(query, key, value, *options):
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return empty_output(query, value.shape[-1]), query.new_empty(query.shape[:3], dtype=wide)


def _backward_fake(grad_out, grad_lse, query, key, value, out, lse, *options):
    extras, _, (needs, _) = _options(options)
    tensors = query, key, value, extras.bias, extras.sinks, extras.distance_bias
    return tuple(
        torch.empty_like(tensor) if need else query.new_empty(0)
        for tensor, need in zip(tensors, needs, strict=True)
    )


def _weights_fake(query, key, lse, *options):
    _, _, (mean, _) = _options(options)
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, *(() if mean else (heads,)), queries, key.shape[2]))


_library.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")
_library.impl("attention_weights", _weights, "CompositeExplicitAutograd")
torch.library.register_fake("pyarch::attention_forward", _forward_fake, lib=_library)
torch.library.register_fake("pyarch::attention_backward", _backward_fake, lib=_library)
torch.library.register_fake("pyarch::attention_weights", _weights_fake, lib=_library)
_forward_op = torch.ops.pyarch.attention_forward.default
_backward_op = torch.ops.pyarch.attention_backward.default
_weights_op = torch.ops.pyarch.attention_weights.default


# -------------------------------------------------------------------------------- running a backend


def forward_of(
    kernel: Backend | None, query, key, value, extras: Extras, settings: Settings, save: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """out and lse by `kernel`, or by the opaque operator where that is None."""
    if kernel is not None:
        return without_autocast(kernel.run, query.device, query, key, value, extras, settings)
    return _forward_op(query, key, value, *extras, *settings, save, backend)


def _backward_of(grads, tensors, extras: Extras, settings: Settings, needs, backend: str):
    """The gradients of query, key, value, bias, sinks and distance_bias, None where not needed."""
    grad_out, grad_lse = grads
    query, key, value, out, _ = tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    arguments = grad_out, grad_lse, *tensors, extras, settings, needs
    if torch.is_grad_enabled():
        return without_autocast(reference.backward, query.device, *arguments)
    given = [each for each in (grad_out, grad_lse, query) if each is not None]
    if is_plain(given) and query.device.type != "meta":
        call = describe(query, key, value, extras, settings, True, needs[3])
        return without_autocast(BACKWARD.choose(call, backend).run, query.device, *arguments)
    found = _backward_op(grad_out, grad_lse, *tensors, *extras, *settings, needs, backend)
    return [grad if need else None for grad, need in zip(found, needs, strict=True)]


# -------------------------------------------------------------------------------- autograd


class _Attention(torch.autograd.Function):
    """Saves what the operator is given and gives; the backward is chosen on its own.

    A second backward differentiates the written-out gradients of the reference, in which out and lse stand as
    results of this very function. The extras are all or none: each argument takes time.
    """

    @staticmethod
    def forward(ctx, kernel, settings, backend, query, key, value, *extras):
        out, lse = forward_of(kernel, query, key, value, Extras(*extras), settings, True, backend)
        ctx.set_materialize_grads(False)
        ctx.settings = settings, backend
        ctx.save_for_backward(query, key, value, out, lse, *extras)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        query, key, value, out, lse, *extras = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if grad_out is None and grad_lse is None:
            return (None,) * len(needs)
        wanted = *needs[3:6], *((needs[7], needs[10], needs[12]) if extras else (False, False, False))
        tensors, grads = (query, key, value, out, lse), (grad_out, grad_lse)
        settings, backend = ctx.settings
        found = _backward_of(grads, tensors, Extras(*extras), settings, wanted, backend)
        dq, dk, dv, dbias, dsinks, ddistance = found
        of_extras = (None, dbias, None, None, dsinks, None, ddistance) if extras else ()
        return None, None, None, dq, dk, dv, *of_extras


class _Weights(torch.autograd.Function):
    """The probabilities again, from lse, which passes its gradient on to what made it."""

    @staticmethod
    def forward(ctx, kernel, settings, mean, backend, query, key, lse, *extras):
        ctx.save_for_backward(query, key, lse, *extras)
        ctx.settings = settings
        return weights_of(kernel, query, key, lse, Extras(*extras), settings, mean, backend)

    @staticmethod
    def backward(ctx, grad):
        query, key, lse, *extras = ctx.saved_tensors
        needs = ctx.needs_input_grad
        needs = *needs[4:7], needs[8], needs[13]
        arguments = grad, query, key, lse, Extras(*extras), ctx.settings, needs
        found = without_autocast(reference.weights_backward, query.device, *arguments)
        dq, dk, dlse, dbias, ddistance = found
        return None, None, None, None, dq, dk, dlse, None, dbias, None, None, None, None, ddistance


run_tracked = _Attention.apply
run_tracked_weights = _Weights.apply


def weights_of(
    kernel: Backend | None, query, key, lse, extras: Extras, settings: Settings, mean: bool, backend: str
) -> Tensor:
    """The weights by `kernel`, or by the opaque operator where that is None."""
    if kernel is not None:
        return without_autocast(kernel.run, query.device, query, key, lse, extras, settings, mean)
    return _weights_op(query, key, lse, *extras, *settings, mean, backend)
