"""Recurrent layers in plain torch: the meaning that every kernel is held to.

    lstm  i, f, o = sigmoid(s), g = tanh(s), s = W_ih x + b_ih + W_hh h + b_hh;  c' = f c + i g
          h' = o tanh(c'), with a projection h' = W_hr (o tanh(c'))
          (Hochreiter and Schmidhuber, 1997, Neural Computation 9(8); projection: Sak et al., 2014,
          arXiv:1402.1128)
    gru   r, z = sigmoid(s), q = W_hn h + b_hn, n = tanh(W_in x + b_in + r q);  h' = (1 - z) n + z h
          (Cho et al., 2014, arXiv:1406.1078)
    rnn   h' = tanh(s) or relu(s)   (Elman, 1990, Cognitive Science 14(2))

A layer has one or two directions; the second one runs from each sequence's last step to its first. Without
`batch_sizes` every sequence has T steps; with it the rows are packed as torch's PackedSequence: the rows of
step t stand together, batch_sizes[t] of them, longest sequence first.

For 16-bit inputs sums and carried states are float32, and h is rounded where it enters a product; otherwise
everything is in the input's dtype. Gates are saved for the backward in the input's dtype, each (D, N, 4 H):
lstm i f g o, gru r z n q; an rnn needs none beside its output. `cells` is an lstm's c after each step.

Legend: T steps, B batch, N rows (T B, or the packed total), I input size, H hidden size, P size of h (H
without a projection), D directions, G gates a unit (4 lstm, 3 gru, 1 rnn).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
SAVED_BLOCKS = {"lstm": 4, "gru": 4, "rnn_tanh": 0, "rnn_relu": 0}

Result = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]


class Direction(NamedTuple):
    """One direction's parameters, None where the layer has none."""

    w_ih: Tensor  # (G H, I)
    w_hh: Tensor  # (G H, P)
    b_ih: Tensor | None  # (G H,)
    b_hh: Tensor | None  # (G H,)
    w_hr: Tensor | None  # (P, H)


def split_directions(weights: Sequence[Tensor], directions: int) -> list[Direction]:
    """A layer's flat list of parameters, torch's order, by direction."""
    count = len(weights) // directions
    split = []
    for first in range(0, directions * count, count):
        w_ih, w_hh, *rest = weights[first : first + count]
        biases = rest[:2] if count >= 4 else (None, None)
        split.append(Direction(w_ih, w_hh, *biases, rest[-1] if count in (3, 5) else None))
    return split


class Step(NamedTuple):
    """The rows of one time step: `count` sequences are alive, at rows `start` to `stop`."""

    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start


def steps_of(input: Tensor, batch_sizes: Tensor | None) -> list[Step]:
    """Where each step's rows stand in (N, I), of padded (T, B, I) or packed (N, I) input."""
    sizes = [input.shape[1]] * input.shape[0] if batch_sizes is None else batch_sizes.tolist()
    steps, start = [], 0
    for size in sizes:
        steps.append(Step(start, start + size))
        start += size
    return steps


def _in_order(steps: list[Step], reverse: bool) -> Iterator[tuple[int, Step]]:
    return reversed(list(enumerate(steps))) if reverse else iter(enumerate(steps))


# -------------------------------------------------------------------------------- one step


def activate(mode: str, input_side: Tensor, hidden_side: Tensor) -> Tensor:
    """The gates of rows from their two products: i f g o, r z n q, or an rnn's h itself.

    Args:
        input_side: (rows, G H), W_ih x + b_ih.
        hidden_side: (rows, G H), W_hh h + b_hh.
    """
    if mode == "lstm":
        i, f, g, o = (input_side + hidden_side).chunk(4, -1)
        return torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], -1)
    if mode == "gru":
        (x_r, x_z, x_n), (h_r, h_z, q) = input_side.chunk(3, -1), hidden_side.chunk(3, -1)
        r = (x_r + h_r).sigmoid()
        return torch.cat([r, (x_z + h_z).sigmoid(), (x_n + r * q).tanh(), q], -1)
    total = input_side + hidden_side
    return total.tanh() if mode == "rnn_tanh" else total.relu()


def step(
    mode: str, input_side: Tensor, h: Tensor, c: Tensor | None, weights: Direction, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One time step: (h', c', gates), wide, from input_side (B, G H), h (B, P), c (B, H) and wide weights."""
    gates = activate(mode, input_side, linear(_rounded(h, dtype), weights.w_hh, weights.b_hh))
    if mode == "lstm":
        i, f, g, o = gates.chunk(4, -1)
        c = f * c + i * g
        unprojected = o * c.tanh()
        if weights.w_hr is None:
            return unprojected, c, gates
        return linear(_rounded(unprojected, dtype), weights.w_hr), c, gates
    if mode == "gru":
        _, z, n, _ = gates.chunk(4, -1)
        return (1 - z) * n + z * h, None, gates
    return gates, None, gates


# -------------------------------------------------------------------------------- a layer


def forward(
    mode: str,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    save: bool,
) -> Result:
    """Run one layer, all its directions, over whole sequences; differentiable by autograd.

    Args:
        mode: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        input: (T, B, I), or packed (N, I) with `batch_sizes`; T >= 1, B may be 0; any floating dtype.
        h0: (D, B, P).
        c0: (D, B, H) for an lstm, else None.
        weights: for each direction w_ih (G H, I), w_hh (G H, P), then b_ih and b_hh (G H,) or neither, then
            w_hr (P, H) for an lstm with projection.
        batch_sizes: (T,) int64 on the CPU, falling, of packed input; else None.
        save: whether to return gates and cells.

    Returns:
        output (T, B, D P) or (N, D P), h_n (D, B, P) and c_n (D, B, H) or None in the input's dtype; gates
        (D, N, 4 H) in the input's dtype, cells (D, N, H) in float32 (float64 for float64), both empty, of
        shape (0,), where not asked for or not needed by the mode.
    """
    steps = steps_of(input, batch_sizes)
    rows = input if batch_sizes is not None else input.flatten(0, 1)
    runs = [
        _run_direction(mode, rows, h0[d], None if c0 is None else c0[d], direction, steps, reverse=d == 1)
        for d, direction in enumerate(split_directions(weights, h0.shape[0]))
    ]
    hidden, h_n, c_n, gates, cells = zip(*runs, strict=True)
    dtype, is_lstm = input.dtype, mode == "lstm"
    return (
        torch.cat([rows.view(*input.shape[:-1], rows.shape[-1]) for rows in hidden], -1).to(dtype),
        torch.stack(h_n).to(dtype),
        torch.stack(c_n).to(dtype) if is_lstm else None,
        torch.stack(gates).to(dtype) if save and SAVED_BLOCKS[mode] else input.new_zeros(0),
        torch.stack(cells) if save and is_lstm else input.new_zeros(0),
    )


def _run_direction(mode, rows, h, c, weights: Direction, steps, reverse):
    """(hidden (N, P), h_n (B, P), c_n, gates, cells) of one direction, all wide, rows in time order."""
    dtype = rows.dtype
    h, c, weights = widen(h), widen(c), Direction(*map(widen, weights))
    input_side = linear(widen(rows), weights.w_ih, weights.b_ih)
    hidden, gates, cells = ([None] * len(steps) for _ in range(3))
    for t, (start, stop) in _in_order(steps, reverse):
        alive = stop - start
        new_h, new_c, gates[t] = step(
            mode, input_side[start:stop], h[:alive], None if c is None else c[:alive], weights, dtype
        )
        hidden[t], cells[t] = new_h, new_c
        h = torch.cat([new_h, h[alive:]])
        c = None if c is None else torch.cat([new_c, c[alive:]])
    return torch.cat(hidden), h, c, torch.cat(gates), None if c is None else torch.cat(cells)


def states_before(states: Tensor, initial: Tensor, steps: list[Step], reverse: bool) -> Tensor:
    """For every row the state that its step began with: (N, *) from the states after each step and (B, *)."""
    batch = steps[0].count
    if batch == steps[-1].count:
        initial = initial.to(states.dtype)
        return torch.cat([states[batch:], initial] if reverse else [initial, states[: len(states) - batch]])
    before, previous = [None] * len(steps), None
    for t, now in _in_order(steps, reverse):
        if previous is None:
            before[t] = initial[: now.count]
        else:
            kept = min(previous.count, now.count)
            ran = states[previous.start : previous.start + kept]
            before[t] = torch.cat([ran, initial[kept : now.count].to(ran.dtype)])
        previous = now
    return torch.cat(before)


def _of_direction(rows: Tensor, d: int, directions: int) -> Tensor:
    """One direction's half of (T, B, D P) or (N, D P), as (N, P)."""
    return rows.flatten(0, -2).chunk(directions, -1)[d]


# -------------------------------------------------------------------------------- residuals made afterwards


# Of gates made again: their parts are then far smaller than all that are kept.
_ROWS_AT_A_TIME = 256


def gates_of(
    mode: str,
    input: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    output: Tensor,
) -> Tensor:
    """The gates that `forward` would save, from its output: two products, no recurrence.

    Arguments as of `forward`; `output` is its result. Returns (D, N, 4 H), or (0,) for an rnn.
    """
    if not SAVED_BLOCKS[mode]:
        return input.new_zeros(0)
    steps = steps_of(input, batch_sizes)
    rows = input.flatten(0, -2)
    gates = input.new_empty(h0.shape[0], rows.shape[0], 4 * weights[1].shape[0] // GATES[mode])
    for d, direction in enumerate(split_directions(weights, h0.shape[0])):
        before = states_before(_of_direction(output, d, h0.shape[0]), h0[d], steps, reverse=d == 1)
        w_ih, w_hh, b_ih, b_hh, _ = map(widen, direction)
        blocks = (each.split(_ROWS_AT_A_TIME) for each in (rows, before, gates[d]))
        for x, h, saved in zip(*blocks, strict=True):
            saved.copy_(activate(mode, linear(widen(x), w_ih, b_ih), linear(widen(h), w_hh, b_hh)))
    return gates


def cells_of(gates: Tensor, c0: Tensor, steps: list[Step]) -> Tensor:
    """An lstm's c after each step (D, N, H), wide, from its gates (D, N, 4 H) and c0 (D, B, H)."""
    directions = []
    for d, (saved, c) in enumerate(zip(widen(gates), widen(c0), strict=True)):
        cells = [None] * len(steps)
        i, f, g, _ = saved.chunk(4, -1)
        for t, (start, stop) in _in_order(steps, reverse=d == 1):
            now = slice(start, stop)
            cells[t] = f[now] * c[: stop - start] + i[now] * g[now]
            c = torch.cat([cells[t], c[stop - start :]])
        directions.append(torch.cat(cells))
    return torch.stack(directions)


# -------------------------------------------------------------------------------- backward


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
    """The gradients of `forward`, written out.

    Args:
        grad_output, grad_h_n, grad_c_n: of the results' shapes; None is zero.
        input, h0, c0, weights, batch_sizes: as `forward` got them.
        output, gates, cells: as `forward` returned them, with save=True.
        needs: for input, h0, c0 and each weight, whether its gradient is wanted.

    Returns:
        grad_input, grad_h0, grad_c0 and a list of one gradient a weight, each None where not wanted.
    """
    dtype, directions = input.dtype, h0.shape[0]
    steps = steps_of(input, batch_sizes)
    rows = widen(input.flatten(0, -2))
    grad_rows, grad_h0, grad_c0, grad_weights = rows.new_zeros(rows.shape), [], [], []
    for d, direction in enumerate(split_directions(weights, directions)):
        wide, reverse = Direction(*map(widen, direction)), d == 1
        hidden = widen(_of_direction(output, d, directions))
        before = widen(states_before(hidden, h0[d], steps, reverse))
        arriving = (
            torch.zeros_like(hidden)
            if grad_output is None
            else widen(_of_direction(grad_output, d, directions))
        )
        grad_h = _state_gradient(grad_h_n, h0, d)
        if mode == "lstm":
            grad_c = _state_gradient(grad_c_n, c0, d)
            cell, cell_before = cells[d], states_before(cells[d], widen(c0[d]), steps, reverse)
            grads = _through_lstm(
                arriving, grad_h, grad_c, widen(gates[d]), cell, cell_before, wide, steps, reverse
            )
        elif mode == "gru":
            grads = _through_gru(arriving, grad_h, widen(gates[d]), before, wide, steps, reverse)
        else:
            grads = _through_rnn(mode, arriving, grad_h, hidden, wide, steps, reverse)
        grad_rows = grad_rows + grads.input_side @ wide.w_ih
        grad_h0.append(grads.h0)
        grad_c0.append(grads.c0)
        grad_weights += [grads.input_side.mT @ rows, grads.hidden_side.mT @ before]
        if direction.b_ih is not None:
            grad_weights += [grads.input_side.sum(0), grads.hidden_side.sum(0)]
        if direction.w_hr is not None:
            unprojected = _rounded(widen(gates[d]).chunk(4, -1)[3] * cells[d].tanh(), dtype)
            grad_weights.append(grads.hidden.mT @ unprojected)
    return (
        grad_rows.view(input.shape).to(dtype) if needs[0] else None,
        torch.stack(grad_h0).to(dtype) if needs[1] else None,
        torch.stack(grad_c0).to(dtype) if needs[2] else None,
        [grad.to(dtype) if need else None for grad, need in zip(grad_weights, needs[3:], strict=True)],
    )


class _Through(NamedTuple):
    """What a direction's recurrence sends back, wide; rows in time order."""

    input_side: Tensor  # (N, G H), of W_ih x + b_ih
    hidden_side: Tensor  # (N, G H), of W_hh h + b_hh
    hidden: Tensor  # (N, P), of h after each step
    h0: Tensor  # (B, P)
    c0: Tensor | None  # (B, H)


def _through_lstm(arriving, grad_h, grad_c, gates, cell, cell_before, weights, steps, reverse) -> _Through:
    i, f, g, o = gates.chunk(4, -1)
    tanh_cell = cell.tanh()
    sums, hidden = [None] * len(steps), [None] * len(steps)
    for t, (start, stop) in _in_order(steps, not reverse):
        now, alive = slice(start, stop), stop - start
        hidden[t] = grad_h[:alive] + arriving[now]
        grad = hidden[t] if weights.w_hr is None else hidden[t] @ weights.w_hr
        grad_cell = grad_c[:alive] + _through_tanh(grad * o[now], tanh_cell[now])
        sums[t] = torch.cat(
            [
                _through_sigmoid(grad_cell * g[now], i[now]),
                _through_sigmoid(grad_cell * cell_before[now], f[now]),
                _through_tanh(grad_cell * i[now], g[now]),
                _through_sigmoid(grad * tanh_cell[now], o[now]),
            ],
            -1,
        )
        grad_h = torch.cat([sums[t] @ weights.w_hh, grad_h[alive:]])
        grad_c = torch.cat([grad_cell * f[now], grad_c[alive:]])
    total = torch.cat(sums)
    return _Through(total, total, torch.cat(hidden), grad_h, grad_c)


def _through_gru(arriving, grad_h, gates, before, weights, steps, reverse) -> _Through:
    r, z, n, q = gates.chunk(4, -1)
    input_side, hidden_side, hidden = ([None] * len(steps) for _ in range(3))
    for t, (start, stop) in _in_order(steps, not reverse):
        now, alive = slice(start, stop), stop - start
        grad = hidden[t] = grad_h[:alive] + arriving[now]
        grad_n = _through_tanh(grad * (1 - z[now]), n[now])
        grad_z = _through_sigmoid(grad * (before[now] - n[now]), z[now])
        grad_r = _through_sigmoid(grad_n * q[now], r[now])
        input_side[t] = torch.cat([grad_r, grad_z, grad_n], -1)
        hidden_side[t] = torch.cat([grad_r, grad_z, grad_n * r[now]], -1)
        grad_h = torch.cat([grad * z[now] + hidden_side[t] @ weights.w_hh, grad_h[alive:]])
    return _Through(torch.cat(input_side), torch.cat(hidden_side), torch.cat(hidden), grad_h, None)


def _through_rnn(mode, arriving, grad_h, states, weights, steps, reverse) -> _Through:
    sums, hidden = [None] * len(steps), [None] * len(steps)
    for t, (start, stop) in _in_order(steps, not reverse):
        grad = hidden[t] = grad_h[: stop - start] + arriving[start:stop]
        after = states[start:stop]
        sums[t] = _through_tanh(grad, after) if mode == "rnn_tanh" else grad.masked_fill(after <= 0, 0)
        grad_h = torch.cat([sums[t] @ weights.w_hh, grad_h[stop - start :]])
    total = torch.cat(sums)
    return _Through(total, total, torch.cat(hidden), grad_h, None)


def _through_sigmoid(grad: Tensor, value: Tensor) -> Tensor:
    return grad * value * (1 - value)


def _through_tanh(grad: Tensor, value: Tensor) -> Tensor:
    return grad * (1 - value * value)


def _state_gradient(grad: Tensor | None, state: Tensor, d: int) -> Tensor:
    return widen(torch.zeros_like(state[d]) if grad is None else grad[d])


# -------------------------------------------------------------------------------- rounding


def widen(tensor: Tensor | None) -> Tensor | None:
    """16-bit values as float32."""
    if tensor is None or tensor.dtype not in (torch.float16, torch.bfloat16):
        return tensor
    return tensor.float()


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as the dtype holds them, in the dtype they came in."""
    return tensor.to(dtype).to(tensor.dtype)
