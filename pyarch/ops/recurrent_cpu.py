"""Recurrent layers on the C++ CPU kernels: allocation and layout, then one native call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyarch import native
from pyarch.reference.recurrent import GATES, SAVED_BLOCKS, Gradients, Result

# Stands for what is not saved.
_NOTHING = torch.empty(0, dtype=torch.float32, device="cpu")


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
    directions, batch, width = h0.shape
    hidden = weights[1].shape[0] // GATES[mode]
    *rows, _ = input.shape
    count = rows[0] * batch if batch_sizes is None else rows[0]
    dtype = input.dtype
    output = torch.empty((*rows, directions * width), dtype=dtype)
    h_n = torch.empty((directions, batch, width), dtype=dtype)
    c_n = None if c0 is None else torch.empty((directions, batch, hidden), dtype=dtype)
    saves_gates, saves_cells = save and SAVED_BLOCKS[mode] > 0, save and c0 is not None
    gates = torch.empty((directions, count, 4 * hidden), dtype=dtype) if saves_gates else _NOTHING
    cells = torch.empty((directions, count, hidden), dtype=torch.float32) if saves_cells else _NOTHING
    native.operators().recurrent_forward(
        output,
        h_n,
        c_n,
        gates if saves_gates else None,
        cells if saves_cells else None,
        input.contiguous(),
        h0.contiguous(),
        None if c0 is None else c0.contiguous(),
        [weight.contiguous() for weight in weights],
        batch_sizes,
        mode,
    )
    return output, h_n, c_n, gates, cells


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
    """Arguments and result as `pyarch.reference.recurrent.backward`."""
    grad_input, grad_h0, grad_c0, *grad_weights = (
        torch.empty(tensor.shape, dtype=tensor.dtype) if need else None
        for tensor, need in zip((input, h0, c0, *weights), needs, strict=True)
    )
    native.operators().recurrent_backward(
        grad_input,
        grad_h0,
        grad_c0,
        [input.new_empty(0) if grad is None else grad for grad in grad_weights],
        _contiguous(grad_output),
        _contiguous(grad_h_n),
        _contiguous(grad_c_n),
        input.contiguous(),
        h0.contiguous(),
        _contiguous(c0),
        [weight.contiguous() for weight in weights],
        batch_sizes,
        output,
        gates,
        cells,
        mode,
    )
    return grad_input, grad_h0, grad_c0, grad_weights


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
