"""Forward of a recurrent layer with the whole recurrent weight resident in one program: one launch a layer.

    pre[t] = x[t] W_ih^T + b + h[t-1] W_hh^T,    (h[t], c[t]) = gates(pre[t], h[t-1], c[t-1])

The input side x W_ih^T + b of all steps is one product before this kernel. What is left is a chain of T small
products by the same W_hh: a program loads W_hh once, keeps it on chip, and walks the steps of its batch tile
alone, so that no program waits for another. Keeping weights on chip over the steps: Diamos et al.,
"Persistent RNNs: Stashing Recurrent Weights On-Chip", ICML 2016. Gates: recurrent_gates.

H is padded to a power of two. (Blocks over H waste fewer lanes, but their small products do not share the
work among eight warps: at H 96 three blocks of 32 take 72 tensor-core instructions a warp, one of 128 takes
64.) Legend: see recurrent_tiles.
"""

import triton
import triton.language as tl

from .recurrent_gates import gru_gates, lstm_gates, rnn_gates
from .recurrent_tiles import (
    GRU,
    LSTM,
    RNN_RELU,
    first_row,
    load_gate_weight,
    load_tile,
    sequence_lengths,
    store_tile,
)


@triton.jit
def recurrent_resident_forward_kernel(
    xg_ptr, w_ptr, b_hn_ptr, h0_ptr, c0_ptr, starts_ptr, lengths_ptr,
    output_ptr, h_n_ptr, c_n_ptr, gates_ptr, cells_ptr,
    T, B, N, H, tiles,
    MODE: tl.constexpr, DIRECTIONS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """(h[t], c[t]) = gates(xg[t] + h[t-1] W_hh^T, h[t-1], c[t-1]) for all t of BLOCK_B sequences.

    A program walks the steps of its tile's longest sequence in one direction (1: last step first); a
    sequence that has ended, or in direction 1 not begun, keeps its state. Grid: (tiles * D,), tiles fastest.
    xg (N, D, G*H) fp32, biases included but for gru's b_hn (D, H) fp32 or None; w (D, G*H, H); h0, c0, h_n,
    c_n (D, B, H); output (N, D*H). Packed: the rows of step t begin at starts[t], sequence b has lengths[b]
    steps, longest first; else both are None. Residuals, unless None: gates (D, N, 4*H), activated i f g o or
    r z n and q; cells (D, N, H) fp32, c of every step. w, h0, c0, output and gates are fp32, fp16 or bf16;
    states and sums fp32; h is rounded where it enters a product.
    """
    # Shows the compiler that ALIGN divides H, so that rows are read in vectors of so many.
    H = H // ALIGN * ALIGN
    direction = tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * BLOCK_B
    lanes = tl.arange(0, BLOCK_B)
    units = tl.arange(0, BLOCK_H)
    exists = first + lanes < B
    inside = units < H
    GATES: tl.constexpr = 4 if MODE == LSTM else (3 if MODE == GRU else 1)
    stride_xg = DIRECTIONS * GATES * H
    stride_output = DIRECTIONS * H

    w_ptr += direction * GATES * H * H
    w0 = load_gate_weight(w_ptr, units, units, H, True)  # [BLOCK_H inputs, BLOCK_H units]
    if MODE == LSTM or MODE == GRU:
        w1 = load_gate_weight(w_ptr + H * H, units, units, H, True)
        w2 = load_gate_weight(w_ptr + 2 * H * H, units, units, H, True)
    if MODE == LSTM:
        w3 = load_gate_weight(w_ptr + 3 * H * H, units, units, H, True)
    state = (direction.to(tl.int64) * B + first) * H
    h = load_tile(h0_ptr + state, lanes, units, H, exists[:, None] & inside[None, :])  # [BLOCK_B, BLOCK_H]
    if MODE == LSTM:
        c = load_tile(c0_ptr + state, lanes, units, H, exists[:, None] & inside[None, :])
    q0 = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    if b_hn_ptr is not None:
        q0 = q0 + tl.load(b_hn_ptr + direction * H + units, mask=inside, other=0.0)[None, :]

    xg_ptr += direction * GATES * H
    output_ptr += direction * H
    if gates_ptr is not None:
        gates_ptr += direction.to(tl.int64) * N * 4 * H
    if cells_ptr is not None:
        cells_ptr += direction.to(tl.int64) * N * H
    steps, lengths = sequence_lengths(lengths_ptr, first, lanes, exists, T)
    begin = direction * (steps - 1)
    onward = 1 - 2 * direction
    for step in tl.range(0, steps, num_stages=STAGES):
        t = begin + step * onward
        row = first_row(starts_ptr, t, B, T) + first
        active = (t < lengths)[:, None]
        valid = active & inside[None, :]
        x_row = xg_ptr + row * stride_xg
        x0 = load_tile(x_row, lanes, units, stride_xg, valid)
        if MODE == LSTM or MODE == GRU:
            x1 = load_tile(x_row + H, lanes, units, stride_xg, valid)
            x2 = load_tile(x_row + 2 * H, lanes, units, stride_xg, valid)
        if MODE == LSTM:
            x3 = load_tile(x_row + 3 * H, lanes, units, stride_xg, valid)

        h_operand = h.to(w0.dtype)
        pre0 = tl.dot(h_operand, w0, x0, input_precision=PRECISION)  # [BLOCK_B, BLOCK_H]
        if MODE == LSTM:
            pre1 = tl.dot(h_operand, w1, x1, input_precision=PRECISION)
            pre2 = tl.dot(h_operand, w2, x2, input_precision=PRECISION)
            pre3 = tl.dot(h_operand, w3, x3, input_precision=PRECISION)
            gate0, gate1, gate2, gate3, c_next, h_next = lstm_gates(pre0, pre1, pre2, pre3, c)
            c = tl.where(active, c_next, c)
            if cells_ptr is not None:
                store_tile(cells_ptr + row * H, c_next, lanes, units, H, valid)
        elif MODE == GRU:
            pre1 = tl.dot(h_operand, w1, x1, input_precision=PRECISION)
            gate3 = tl.dot(h_operand, w2, q0, input_precision=PRECISION)
            gate0, gate1, gate2, h_next = gru_gates(pre0, pre1, x2, gate3, h)
        else:
            h_next = rnn_gates(pre0, MODE == RNN_RELU)
        if gates_ptr is not None:
            gates_row = gates_ptr + row * 4 * H
            store_tile(gates_row, gate0, lanes, units, 4 * H, valid)
            store_tile(gates_row + H, gate1, lanes, units, 4 * H, valid)
            store_tile(gates_row + 2 * H, gate2, lanes, units, 4 * H, valid)
            store_tile(gates_row + 3 * H, gate3, lanes, units, 4 * H, valid)
        store_tile(output_ptr + row * stride_output, h_next, lanes, units, stride_output, valid)
        h = tl.where(active, h_next, h)

    store_tile(h_n_ptr + state, h, lanes, units, H, exists[:, None] & inside[None, :])
    if MODE == LSTM:
        store_tile(c_n_ptr + state, c, lanes, units, H, exists[:, None] & inside[None, :])
