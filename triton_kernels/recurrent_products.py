"""The products and sums of a recurrent layer that run over all its rows at once, outside the steps' chain.

Sums are in float32 and rounded once, where the result has 16 bits. Float32 products follow torch's switch of
matrix multiplications (torch.backends.cuda.matmul), as they are torch's own. Legend: see recurrent_tiles.
"""

from typing import NamedTuple

import torch
from torch import Tensor

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


class Weights(NamedTuple):
    """One direction's weights; biases and projection may be missing."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None


def weights_of(weights: list[Tensor], directions: int) -> list[Weights]:
    """The operator's flat list, direction by direction."""
    each = len(weights) // directions
    sides = [weights[d * each : (d + 1) * each] for d in range(directions)]
    biased, projected = each >= 4, each in (3, 5)
    return [
        Weights(*side[:2], *(side[2:4] if biased else (None, None)), side[-1] if projected else None)
        for side in sides
    ]


def product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a @ b summed in float32: (M, K) x (K, N) -> (M, N) in `dtype`, written to `out` where given."""
    if a.device.type == "cuda" and dtype == torch.float32 and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype) if out is None else torch.mm(a, b, out_dtype=dtype, out=out)
    if a.device.type == "cuda" or a.dtype == torch.float32:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    result = torch.mm(a.float(), b.float())
    return result.to(dtype) if out is None else out.copy_(result)


def input_side(rows: Tensor, sides: list[Weights], mode: str) -> Tensor:
    """xg (N, D * G*H) float32: x W_ih^T and all biases but gru's b_hn, which r multiplies.

    It stays float32 because 16 bits would add an error at every step that the carried states do not have.
    """
    w_ih = sides[0].w_ih if len(sides) == 1 else torch.cat([side.w_ih for side in sides])
    xg = product(rows, w_ih.t(), torch.float32)
    if sides[0].b_ih is not None:
        total = torch.cat([side.b_ih.float() for side in sides])
        hidden = torch.cat([side.b_hh.float() for side in sides]).view(len(sides), -1)
        if mode == "gru":
            hidden = hidden.clone()
            hidden[:, -(hidden.shape[1] // 3) :] = 0
        xg += total + hidden.view(-1)
    return xg


def runs_of(sizes: list[int]) -> list[tuple[int, int, int]]:
    """(first step, steps, sequences) of every run of steps with equally many sequences."""
    runs: list[tuple[int, int, int]] = []
    for t, size in enumerate(sizes):
        if runs and runs[-1][2] == size:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, size)
        else:
            runs.append((t, 1, size))
    return runs


def states_before(states: Tensor, start: Tensor, sizes: list[int], reverse: bool) -> Tensor:
    """The state that each row's step began with, (N, P): the row of the step before, or the start.

    Args:
        states: (N, P), states after each step, rows in time order.
        start: (B, P), states that sequences begin with.
        sizes: sequences of each step, non-increasing.
        reverse: whether steps run from each sequence's last to its first.
    """
    pieces = []
    row = 0
    runs = runs_of(sizes)
    for number, (first, steps, size) in enumerate(runs):
        if reverse:
            pieces.append(states[row + size : row + steps * size])
            row += steps * size
            follow = runs[number + 1][2] if number + 1 < len(runs) else 0
            pieces += [states[row : row + follow], start[follow:size]]
        else:
            before = row if first == 0 else row - sizes[first - 1]
            pieces.append(start[:size] if first == 0 else states[before : before + size])
            pieces.append(states[row : row + (steps - 1) * size])
            row += steps * size
    return torch.cat(pieces)


def gate_sides(dpre: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """The columns of dpre (N, K*H) that belong to the input side and to the hidden side.

    gru's rows are n r z q: n r z meet the input, r z q the hidden state.
    """
    if mode != "gru":
        return dpre, dpre
    hidden_size = dpre.shape[1] // 4
    return dpre[:, : 3 * hidden_size], dpre[:, hidden_size:]


def in_torchs_order(grad: Tensor, mode: str) -> Tensor:
    """Rows of an input-side gradient, which gru has as n r z, in torch's order r z n."""
    return torch.roll(grad, -(grad.shape[0] // 3), 0) if mode == "gru" else grad


def grad_input(dpre: Tensor, sides: list[Weights], mode: str, dtype: torch.dtype) -> Tensor:
    """Gradient of the input's rows (N, I): the sum over directions of dpre W_ih."""
    total = None
    for d, side in enumerate(sides):
        w_ih = torch.roll(side.w_ih, side.w_ih.shape[0] // 3, 0) if mode == "gru" else side.w_ih
        kind = dtype if len(sides) == 1 else torch.float32
        part = product(gate_sides(dpre[d], mode)[0], w_ih, kind)
        total = part if total is None else total.add_(part)
    return total.to(dtype)


def grad_weights(
    dpre: Tensor, rows: Tensor, before: Tensor | None, mode: str, needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of one direction's w_ih, w_hh, b_ih, b_hh, None where not needed.

    Args:
        dpre: (N, K*H) of this direction.
        rows: (N, I) input.
        before: (N, P) from `states_before`; None where w_hh needs none.
        needs: whether each of the four is needed.
    """
    dtype = rows.dtype
    input_columns, hidden_columns = gate_sides(dpre, mode)
    w_ih = w_hh = b_ih = b_hh = None
    if needs[0]:
        w_ih = in_torchs_order(product(input_columns.t(), rows, torch.float32), mode).to(dtype)
    if needs[1]:
        w_hh = product(hidden_columns.t(), before, torch.float32).to(dtype)
    if needs[2]:
        b_ih = in_torchs_order(input_columns.sum(0, dtype=torch.float32), mode).to(dtype)
    if needs[3]:
        b_hh = hidden_columns.sum(0, dtype=torch.float32).to(dtype)
    return [w_ih, w_hh, b_ih, b_hh]
