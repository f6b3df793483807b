"""Recurrent layers on torch's own operators: what our kernels are measured against and fall back to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyarch.reference.recurrent import Gradients, Result, cells_of, gates_of, steps_of, widen

_STOCK = {name: getattr(torch._VF, name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}
_STOCK_CELLS = {name: getattr(torch._VF, f"{name}_cell") for name in _STOCK}


def run_stock(
    mode: str,
    input: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """torch.nn's own computation, its errors and gradients included: (output, h_n, c_n or None).

    input (T, B, I), or packed (N, I) with `batch_sizes`; hx is (h0,), for an lstm (h0, c0).
    """
    states = tuple(hx) if mode == "lstm" else hx[0]
    settings = list(weights), has_biases, num_layers, dropout, training, bidirectional
    if batch_sizes is None:
        results = _STOCK[mode](input, states, *settings, False)
    else:
        results = _STOCK[mode](input, batch_sizes, states, *settings)
    return results if mode == "lstm" else (*results, None)


def run_stock_cell(
    mode: str, input: Tensor, hx: Sequence[Tensor], weights: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """torch.nn's own computation of one cell: (h,), for an lstm (h, c). input (B, I) or (I,)."""
    if isinstance(input, Tensor) and input.dim() == 1:
        batched = run_stock_cell(mode, input.unsqueeze(0), [state.unsqueeze(0) for state in hx], weights)
        return tuple(state.squeeze(0) for state in batched)
    results = _STOCK_CELLS[mode](input, tuple(hx) if mode == "lstm" else hx[0], *weights)
    return results if mode == "lstm" else (results,)


def forward(
    mode: str,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    save: bool,
) -> Result:
    """Arguments and result as `pyarch.reference.recurrent.forward`."""
    with torch.no_grad():
        results = _one_layer(mode, input, h0, c0, weights, batch_sizes, training=False)
    # Torch may return views of one another, which an operator may not.
    output, h_n, c_n = (
        each if each is None else each.clone(memory_format=torch.contiguous_format) for each in results
    )
    gates = cells = input.new_zeros(0)
    if save:
        gates = gates_of(mode, widen(input), h0, weights, batch_sizes, output)
        if mode == "lstm":
            cells = cells_of(gates, c0, steps_of(input, batch_sizes))
    return output, h_n, c_n, gates.to(input.dtype), cells


def backward(
    mode: str,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    needs: Sequence[bool],
) -> Gradients:
    """Arguments and result as `pyarch.reference.recurrent.backward`; runs the forward again."""
    tensors = [input, h0, c0, *weights]
    leaves = [
        tensor if tensor is None else tensor.detach().requires_grad_(need)
        for tensor, need in zip(tensors, needs, strict=True)
    ]
    with torch.enable_grad(), _recording_autograd():
        results = _one_layer(mode, *leaves[:3], leaves[3:], batch_sizes, training=True)
    arriving = [
        (result, grad.contiguous())
        for result, grad in zip(results, (grad_output, grad_h_n, grad_c_n), strict=True)
        if grad is not None
    ]
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [result for result, _ in arriving], wanted, [grad for _, grad in arriving], materialize_grads=True
        )
        if arriving
        else map(torch.zeros_like, wanted)
    )
    grads = [next(found).contiguous() if need else None for need in needs]
    return *grads[:3], grads[3:]


def _recording_autograd():
    """Record a graph also below autograd, where an operator runs under a dispatch mode."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)


def _one_layer(mode, input, h0, c0, weights, batch_sizes, training: bool):
    directions = h0.shape[0]
    hx = (h0,) if c0 is None else (h0, c0)
    has_biases = len(weights) // directions >= 4
    return run_stock(
        mode, input, hx, weights, batch_sizes, has_biases, 1, 0.0, training, bidirectional=directions == 2
    )
