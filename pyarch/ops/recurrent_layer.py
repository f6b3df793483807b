"""One recurrent layer: two opaque operators for torch.compile, and its place in autograd.

A call on plain tensors outside any tracing goes straight to its backend's function, because the way through
torch's dispatcher takes longer than the kernel of a small layer.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from pyarch.dispatch import Backend
from pyarch.ops.plain_calls import is_plain, without_autocast
from pyarch.ops.recurrent_call import BACKWARD, FORWARD, describe
from pyarch.reference import recurrent as reference
from pyarch.reference.recurrent import GATES, SAVED_BLOCKS, Result

_unsafe_view = torch.ops.aten._unsafe_view.default

# -------------------------------------------------------------------------------- the two operators

_library = torch.library.Library("pyarch", "FRAGMENT")
_library.define(
    "recurrent_forward(str mode, Tensor input, Tensor h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, "
    "bool save, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "recurrent_backward(str mode, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, "
    "Tensor h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor output, Tensor gates, "
    "Tensor cells, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor[])"
)


def _forward(mode, input, h0, c0, weights, batch_sizes, save, backend):
    if batch_sizes is not None and not packs(batch_sizes, input.shape[0], h0.shape[1]):
        raise RuntimeError(
            f"recurrent_forward: batch_sizes must fall from {h0.shape[1]}, the batch of h0, and add up to "
            f"{input.shape[0]}, the rows of the input"
        )
    chosen = FORWARD.choose(describe(mode, input, h0, weights, batch_sizes, save), backend)
    output, h_n, *others = without_autocast(
        chosen.run, input.device, mode, input, h0, c0, weights, batch_sizes, save
    )
    # An operator's results are new tensors, while a backend may give the same empty one twice.
    present = (input.new_empty(0) if each is None or each.dim() == 1 else each for each in others)
    return output, h_n, *present


def _backward(
    mode,
    grad_output,
    grad_h_n,
    grad_c_n,
    input,
    h0,
    c0,
    weights,
    batch_sizes,
    output,
    gates,
    cells,
    needs,
    backend,
):
    chosen = BACKWARD.choose(describe(mode, input, h0, weights, batch_sizes, True), backend)
    grads = grad_output, grad_h_n, grad_c_n
    tensors = input, h0, c0, weights, batch_sizes, output, gates, cells
    *states, of_weights = without_autocast(chosen.run, input.device, mode, *grads, *tensors, needs)
    present = [input.new_empty(0) if grad is None else grad for grad in (*states, *of_weights)]
    return *present[:3], present[3:]


def _forward_fake(mode, input, h0, c0, weights, batch_sizes, save, backend):
    directions, batch, width = h0.shape
    rows = input.shape[:-1]
    count = rows[0] if batch_sizes is not None else rows[0] * rows[1]
    hidden = weights[1].shape[0] // GATES[mode]
    saves_gates, is_lstm = save and SAVED_BLOCKS[mode] > 0, c0 is not None
    saves_cells = save and is_lstm
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    return (
        input.new_empty((*rows, directions * width)),
        input.new_empty((directions, batch, width)),
        input.new_empty((directions, batch, hidden) if is_lstm else 0),
        input.new_empty((directions, count, 4 * hidden) if saves_gates else 0),
        input.new_empty((directions, count, hidden), dtype=wide) if saves_cells else input.new_empty(0),
    )


def _backward_fake(
    mode,
    grad_output,
    grad_h_n,
    grad_c_n,
    input,
    h0,
    c0,
    weights,
    batch_sizes,
    output,
    gates,
    cells,
    needs,
    backend,
):
    grads = [
        input.new_empty(tensor.shape if need else 0)
        for tensor, need in zip((input, h0, c0, *weights), needs, strict=True)
    ]
    return *grads[:3], grads[3:]


_library.impl("recurrent_forward", _forward, "CompositeExplicitAutograd")
_library.impl("recurrent_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("pyarch::recurrent_forward", _forward_fake, lib=_library)
torch.library.register_fake("pyarch::recurrent_backward", _backward_fake, lib=_library)
_forward_op = torch.ops.pyarch.recurrent_forward.default
_backward_op = torch.ops.pyarch.recurrent_backward.default


def packs(batch_sizes: Tensor, rows: int, batch: int) -> bool:
    """Whether batch_sizes are those of a packed sequence of `rows` rows and `batch` sequences."""
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
        return False
    sizes = batch_sizes.tolist()
    return (
        len(sizes) > 0
        and sizes[0] == batch
        and sizes[-1] >= 0
        and sum(sizes) == rows
        and all(before >= after for before, after in pairwise(sizes))
    )


# -------------------------------------------------------------------------------- running a backend


def forward_layer(kernel: Backend | None, mode, input, h0, c0, weights, batch_sizes, save, backend) -> Result:
    """A layer's results and residuals by `kernel`, or by the opaque operator where that is None."""
    if kernel is not None:
        return without_autocast(kernel.run, input.device, mode, input, h0, c0, weights, batch_sizes, save)
    output, h_n, c_n, gates, cells = _forward_op(mode, input, h0, c0, weights, batch_sizes, save, backend)
    return output, h_n, None if c0 is None else c_n, gates, cells


def _backward_layer(kernel: Backend | None, mode, grads, tensors, needs, backend):
    """Likewise the gradients of the flat (input, h0, c0, *weights)."""
    if kernel is not None:
        *states, of_weights = without_autocast(kernel.run, tensors[0].device, mode, *grads, *tensors, needs)
    else:
        *states, of_weights = _backward_op(mode, *grads, *tensors, needs, backend)
    return *states, *of_weights


# -------------------------------------------------------------------------------- autograd


class _Layer(torch.autograd.Function):
    """Saves what the operator defines; the backward is chosen on its own, differentiable by the reference.

    With `recompute` an lstm or gru saves no gates: the backward makes them again from output and input. With
    `copies` the output that is saved is a copy, so that the one returned may be changed in place.
    """

    @staticmethod
    def forward(ctx, kernel, mode, backend, recompute, copies, input, h0, c0, batch_sizes, *weights):
        output, h_n, c_n, gates, cells = forward_layer(
            kernel, mode, input, h0, c0, weights, batch_sizes, True, backend
        )
        ctx.set_materialize_grads(False)
        ctx.settings = mode, backend
        ctx.lacks_gates = recompute and SAVED_BLOCKS[mode] > 0
        residuals = output.clone() if copies else output, None if ctx.lacks_gates else gates, cells
        ctx.save_for_backward(input, h0, c0, batch_sizes, *residuals, *weights)
        return (output, h_n) if c_n is None else (output, h_n, c_n)

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n=None):
        input, h0, c0, batch_sizes, output, gates, cells, *weights = ctx.saved_tensors
        mode, backend = ctx.settings
        needs = ctx.needs_input_grad
        grads, needs = (grad_output, grad_h_n, grad_c_n), (*needs[5:8], *needs[9:])
        if ctx.lacks_gates and not torch.is_grad_enabled():
            arguments = mode, input, h0, weights, batch_sizes, output
            gates = without_autocast(reference.gates_of, input.device, *arguments)
        residuals = output, gates, cells
        found = backward_of(mode, grads, input, h0, c0, weights, batch_sizes, residuals, needs, backend)
        return None, None, None, None, None, *found[:3], None, *found[3:]


class _Cell(torch.autograd.Function):
    """One step of one direction, with (B, *) or (*,) around the operator's (1, B, *)."""

    @staticmethod
    def forward(ctx, kernel, mode, backend, input, h0, c0, *weights):
        layered = [_with_three_dimensions(each) for each in (input, h0, c0)]
        output, h_n, c_n, gates, cells = forward_layer(kernel, mode, *layered, weights, None, True, backend)
        ctx.set_materialize_grads(False)
        ctx.settings = mode, backend
        ctx.save_for_backward(input, h0, c0, output, gates, cells, *weights)
        # No views, which torch would not let a user change in place.
        h = _unsafe_view(h_n, h0.shape)
        return h if c_n is None else (h, _unsafe_view(c_n, c0.shape))

    @staticmethod
    def backward(ctx, grad_h, grad_c=None):
        *states, output, gates, cells = ctx.saved_tensors[:6]
        weights = list(ctx.saved_tensors[6:])
        mode, backend = ctx.settings
        needs = ctx.needs_input_grad[3:]
        grads = None, _with_three_dimensions(grad_h), _with_three_dimensions(grad_c)
        layered = [_with_three_dimensions(each) for each in states]
        found = backward_of(mode, grads, *layered, weights, None, (output, gates, cells), needs, backend)
        of_states = (
            grad if grad is None else grad.view(state.shape)
            for grad, state in zip(found[:3], states, strict=True)
        )
        return None, None, None, *of_states, *found[3:]


run_tracked_layer = _Layer.apply
run_tracked_cell = _Cell.apply


def _with_three_dimensions(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.unsqueeze(0) if tensor.dim() == 2 else tensor.view(1, 1, -1)


def backward_of(mode, grads, input, h0, c0, weights, batch_sizes, residuals, needs, backend):
    """The gradients of (input, h0, c0, *weights), None where `needs` says so or nothing arrived."""
    tensors = input, h0, c0, weights, batch_sizes, *residuals
    if all(grad is None for grad in grads):
        return (None,) * len(needs)
    if torch.is_grad_enabled():
        return _differentiable_backward(mode, grads, *tensors[:5], needs)
    kernel = None
    if is_plain([grad for grad in (*grads, input) if grad is not None]):
        kernel = BACKWARD.choose(describe(mode, input, h0, weights, batch_sizes, True), backend)
    found = _backward_layer(kernel, mode, grads, tensors, needs, backend)
    return [grad if need else None for grad, need in zip(found, needs, strict=True)]


def _differentiable_backward(mode, grads, input, h0, c0, weights, batch_sizes, needs):
    """The same gradients as a graph of torch's own operators, so that they can be differentiated again."""
    with torch.enable_grad(), torch.autocast(input.device.type, enabled=False):
        # Views, so that a tensor given in two places gets the gradient of each apart.
        given = [None if each is None else each.view_as(each) for each in (input, h0, c0, *weights)]
        results = reference.forward(mode, *given[:3], given[3:], batch_sizes, False)
        arriving = [
            (result, grad) for result, grad in zip(results[:3], grads, strict=True) if grad is not None
        ]
        found = iter(
            torch.autograd.grad(
                [result for result, _ in arriving],
                [each for each, need in zip(given, needs, strict=True) if need],
                [grad for _, grad in arriving],
                create_graph=True,
                allow_unused=True,
            )
        )
    return [next(found) if need else None for need in needs]
