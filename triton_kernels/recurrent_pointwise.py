"""One step of a recurrent cell, element by element: the gates and states behind the two products.

    pre = x W_ih^T + b_ih + h W_hh^T + b_hh,     (h, c) = gates(pre, h, c)     and its backward

The products are matrix multiplications of their own, one a step for the hidden side; these kernels do all the
rest of a step in one launch. They serve the cells (T = 1) and layers whose recurrent weight does not stay on
chip. Formulas: recurrent_gates. Legend: see recurrent_tiles; here rows are the sequences active at the step.
"""

import triton
import triton.language as tl

from .recurrent_gates import (
    gru_gates,
    gru_gates_backward,
    lstm_gates,
    lstm_gates_backward,
    rnn_gates,
    rnn_gates_backward,
)
from .recurrent_tiles import GRU, LSTM, RNN_RELU, load_tile, store_tile


@triton.jit
def step_tile(rows, H, column_tiles, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """(first row, its lanes, units, which of them exist) of this program."""
    first = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_B
    lanes = tl.arange(0, BLOCK_B)
    units = (tl.program_id(0) % column_tiles) * BLOCK_H + tl.arange(0, BLOCK_H)
    return first, lanes, units, (first + lanes < rows)[:, None] & (units < H)[None, :]


@triton.jit
def biased(value, bias_ptr, units, H):
    """value + bias of one gate; the value itself where there is none."""
    if bias_ptr is not None:
        value = value + tl.load(bias_ptr + units, mask=units < H, other=0.0).to(tl.float32)[None, :]
    return value


@triton.jit
def gate_sides(
    xg_ptr, hg_ptr, b_ih_ptr, b_hh_ptr, gate: tl.constexpr, lanes, units, H, stride_xg, stride_hg, valid
):
    """(input side, hidden side) of one gate, biases included."""
    x = load_tile(xg_ptr + gate * H, lanes, units, stride_xg, valid)
    h = load_tile(hg_ptr + gate * H, lanes, units, stride_hg, valid)
    if b_ih_ptr is not None:
        x = biased(x, b_ih_ptr + gate * H, units, H)
        h = biased(h, b_hh_ptr + gate * H, units, H)
    return x, h


@triton.jit
def recurrent_step_forward_kernel(
    xg_ptr, hg_ptr, b_ih_ptr, b_hh_ptr, carry_ptr, state_ptr, output_ptr, gates_ptr, cells_ptr,
    rows, H, column_tiles, stride_xg, stride_output,
    MODE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """(h, c) = gates(xg + b_ih + hg + b_hh, h, c) for BLOCK_B rows x BLOCK_H units.

    Grid: (row tiles * column_tiles,), column tiles fastest. xg (rows, G*H) of stride stride_xg and hg (rows,
    G*H) fp32; b_ih, b_hh (G*H) or None; carry (rows, H) fp32, updated in place: c for lstm, h for gru, None
    for rnn; state (rows, H): h rounded, the operand of the next product; output (rows, H) of stride
    stride_output, the same, or None. Residuals, unless None: gates (rows, 4*H), activated i f g o or r z n
    and q; cells (rows, H) fp32. Biases, state, output and gates are fp32, fp16 or bf16; all is computed in
    fp32.
    """
    first, lanes, units, valid = step_tile(rows, H, column_tiles, BLOCK_B, BLOCK_H)
    GATES: tl.constexpr = 4 if MODE == LSTM else (3 if MODE == GRU else 1)
    stride_hg = GATES * H
    xg_ptr += first * stride_xg
    hg_ptr += first * stride_hg
    x0, h0 = gate_sides(xg_ptr, hg_ptr, b_ih_ptr, b_hh_ptr, 0, lanes, units, H, stride_xg, stride_hg, valid)
    if MODE == LSTM or MODE == GRU:
        x1, h1 = gate_sides(
            xg_ptr, hg_ptr, b_ih_ptr, b_hh_ptr, 1, lanes, units, H, stride_xg, stride_hg, valid
        )
        x2, h2 = gate_sides(
            xg_ptr, hg_ptr, b_ih_ptr, b_hh_ptr, 2, lanes, units, H, stride_xg, stride_hg, valid
        )
        before = load_tile(carry_ptr + first * H, lanes, units, H, valid)
    if MODE == LSTM:
        x3, h3 = gate_sides(
            xg_ptr, hg_ptr, b_ih_ptr, b_hh_ptr, 3, lanes, units, H, stride_xg, stride_hg, valid
        )
        gate0, gate1, gate2, gate3, c, h = lstm_gates(x0 + h0, x1 + h1, x2 + h2, x3 + h3, before)
        store_tile(carry_ptr + first * H, c, lanes, units, H, valid)
        if cells_ptr is not None:
            store_tile(cells_ptr + first * H, c, lanes, units, H, valid)
    elif MODE == GRU:
        gate3 = h2
        gate0, gate1, gate2, h = gru_gates(x0 + h0, x1 + h1, x2, gate3, before)
        store_tile(carry_ptr + first * H, h, lanes, units, H, valid)
    else:
        h = rnn_gates(x0 + h0, MODE == RNN_RELU)
    if gates_ptr is not None:
        gates_ptr += first * 4 * H
        store_tile(gates_ptr, gate0, lanes, units, 4 * H, valid)
        store_tile(gates_ptr + H, gate1, lanes, units, 4 * H, valid)
        store_tile(gates_ptr + 2 * H, gate2, lanes, units, 4 * H, valid)
        store_tile(gates_ptr + 3 * H, gate3, lanes, units, 4 * H, valid)
    store_tile(state_ptr + first * H, h, lanes, units, H, valid)
    if output_ptr is not None:
        store_tile(output_ptr + first * stride_output, h, lanes, units, stride_output, valid)


@triton.jit
def recurrent_step_backward_kernel(
    grad_output_ptr, dh_ptr, carry_ptr, before_ptr, start_ptr, output_ptr, gates_ptr, cells_ptr, dpre_ptr,
    rows, followers, H, column_tiles, stride_gn, stride_gp, stride_before, stride_output,
    MODE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dpre = gates_backward(dh + grad_output, ..) for BLOCK_B rows x BLOCK_H units, and the carried gradient.

    Grid: (row tiles * column_tiles,), column tiles fastest. grad_output (rows, H) of any strides, or None;
    dh (rows, H) fp32, what later steps say of h through the product; carry (rows, H) fp32, updated in place:
    dc for lstm, for gru the part of dh that passed z, None for rnn. before (rows, H) of stride
    stride_before: the state of the step before (cells for lstm, output for gru), which the first `followers`
    rows have; the others had start (rows, H). output (rows, H) of stride stride_output for rnn. gates (rows,
    4*H) and cells (rows, H) as the forward saves them. dpre (rows, K*H): lstm i f g o, gru n r z q, rnn one.
    """
    first, lanes, units, valid = step_tile(rows, H, column_tiles, BLOCK_B, BLOCK_H)
    dh = load_tile(dh_ptr + first * H, lanes, units, H, valid)
    if grad_output_ptr is not None:
        pointers = grad_output_ptr + (first + lanes)[:, None] * stride_gn
        pointers += units[None, :].to(tl.int64) * stride_gp
        dh += tl.load(pointers, mask=valid, other=0.0).to(tl.float32)
    if MODE == LSTM or MODE == GRU:
        gates_ptr += first * 4 * H
        dpre_ptr += first * 4 * H
        gate0 = load_tile(gates_ptr, lanes, units, 4 * H, valid)
        gate1 = load_tile(gates_ptr + H, lanes, units, 4 * H, valid)
        gate2 = load_tile(gates_ptr + 2 * H, lanes, units, 4 * H, valid)
        gate3 = load_tile(gates_ptr + 3 * H, lanes, units, 4 * H, valid)
        carry = load_tile(carry_ptr + first * H, lanes, units, H, valid)
        follows = (first + lanes < followers)[:, None]
        before = load_tile(before_ptr + first * stride_before, lanes, units, stride_before, valid & follows)
        start = load_tile(start_ptr + first * H, lanes, units, H, valid & (follows == 0))
        before = tl.where(follows, before, start)
    if MODE == LSTM:
        c = load_tile(cells_ptr + first * H, lanes, units, H, valid)
        d0, d1, d2, d3, carry = lstm_gates_backward(gate0, gate1, gate2, gate3, c, before, dh, carry)
    elif MODE == GRU:
        d1, d2, d0, d3, carry = gru_gates_backward(gate0, gate1, gate2, gate3, before, dh + carry)
    else:
        h = load_tile(output_ptr + first * stride_output, lanes, units, stride_output, valid)
        d0 = rnn_gates_backward(h, dh, MODE == RNN_RELU)
        store_tile(dpre_ptr + first * H, d0, lanes, units, H, valid)
    if MODE == LSTM or MODE == GRU:
        store_tile(dpre_ptr, d0, lanes, units, 4 * H, valid)
        store_tile(dpre_ptr + H, d1, lanes, units, 4 * H, valid)
        store_tile(dpre_ptr + 2 * H, d2, lanes, units, 4 * H, valid)
        store_tile(dpre_ptr + 3 * H, d3, lanes, units, 4 * H, valid)
        store_tile(carry_ptr + first * H, carry, lanes, units, H, valid)
