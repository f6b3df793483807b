"""Backward of a recurrent layer with the whole recurrent weight resident in one program: one launch a layer.

    dh[t] = grad_output[t] + dpre[t+1] W_hh,     dpre[t], dc[t-1] = gates_backward(dh[t], dc[t], gates[t], ..)

with t+1 the step that followed t (its left neighbour in the reverse direction). The kernel walks the chain
and writes dpre, the gradient of the gates' inputs; the gradients of W_ih, W_hh, the biases and x are products
and sums over all rows of dpre after it. For gru the hidden side of n has a gradient dq = dpre_n * r of its
own, and rows are written in the order n r z q, so that both the input side (n r z) and the hidden side
(r z q) lie next to each other. Formulas: recurrent_gates. Legend: see recurrent_tiles.
"""

import triton
import triton.language as tl

from .recurrent_gates import gru_gates_backward, lstm_gates_backward, rnn_gates_backward
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
def load_last_cells(
    cells_ptr, starts_ptr, lengths, lanes, units, first, direction, B, T, H, valid,
):  # fmt: skip
    """c after every sequence's last step in its direction: step lengths - 1, or 0 in direction 1."""
    t = tl.maximum(lengths - 1, 0) * (1 - direction)
    if starts_ptr is None:
        starts = t.to(tl.int64) * B
    else:
        starts = tl.load(starts_ptr + t)
    pointers = cells_ptr + (starts + first + lanes)[:, None] * H + units[None, :]
    return tl.load(pointers, mask=valid, other=0.0)


@triton.jit
def recurrent_resident_backward_kernel(
    grad_output_ptr, grad_h_n_ptr, grad_c_n_ptr, w_ptr, h0_ptr, c0_ptr, starts_ptr, lengths_ptr,
    output_ptr, gates_ptr, cells_ptr,
    dpre_ptr, grad_h0_ptr, grad_c0_ptr,
    T, B, N, H, tiles, stride_gn, stride_gp,
    MODE: tl.constexpr, DIRECTIONS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """dpre of all steps of BLOCK_B sequences in one direction, and the gradients of h0 and c0.

    A program walks its tile's steps against the direction of the forward; a sequence that is not active at
    a step keeps its gradients. Grid: (tiles * D,), tiles fastest. grad_output (N, D*H) of any strides,
    grad_h_n, grad_c_n (D, B, H) contiguous; each may be None for zero. w (D, G*H, H); h0, c0 (D, B, H);
    output (N, D*H); gates (D, N, 4*H), cells (D, N, H) fp32 as the forward saves them; starts, lengths as in
    the forward. dpre (D, N, K*H), K = 4 for lstm (i f g o) and gru (n r z q), 1 for rnn; grad_h0, grad_c0
    (D, B, H). Tensors fp32, fp16 or bf16 besides cells; gradients carried and summed in fp32, dpre rounded
    once, the same value in memory and in the next product.
    """
    # Shows the compiler that ALIGN divides H, so that rows are read in vectors of so many.
    H = H // ALIGN * ALIGN
    direction = tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * BLOCK_B
    lanes = tl.arange(0, BLOCK_B)
    units = tl.arange(0, BLOCK_H)
    exists = first + lanes < B
    inside = units < H
    whole = exists[:, None] & inside[None, :]
    GATES: tl.constexpr = 4 if MODE == LSTM else (3 if MODE == GRU else 1)
    stride_output = DIRECTIONS * H

    w_ptr += direction * GATES * H * H
    w0 = load_gate_weight(w_ptr, units, units, H, False)  # [BLOCK_H units, BLOCK_H inputs]
    if MODE == LSTM or MODE == GRU:
        w1 = load_gate_weight(w_ptr + H * H, units, units, H, False)
        w2 = load_gate_weight(w_ptr + 2 * H * H, units, units, H, False)
    if MODE == LSTM:
        w3 = load_gate_weight(w_ptr + 3 * H * H, units, units, H, False)

    rows_before = direction.to(tl.int64) * N
    state = (direction.to(tl.int64) * B + first) * H
    output_ptr += direction * H
    dpre_stride = H
    if MODE == LSTM or MODE == GRU:
        dpre_stride = 4 * H
        gates_ptr += rows_before * 4 * H
    dpre_ptr += rows_before * dpre_stride
    if grad_output_ptr is not None:
        grad_output_ptr += direction.to(tl.int64) * H * stride_gp
    steps, lengths = sequence_lengths(lengths_ptr, first, lanes, exists, T)
    dh = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    if grad_h_n_ptr is not None:
        dh += load_tile(grad_h_n_ptr + state, lanes, units, H, whole)
    if MODE == LSTM:
        cells_ptr += rows_before * H
        dc = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
        if grad_c_n_ptr is not None:
            dc += load_tile(grad_c_n_ptr + state, lanes, units, H, whole)
        start = load_tile(c0_ptr + state, lanes, units, H, whole)
        c = load_last_cells(cells_ptr, starts_ptr, lengths, lanes, units, first, direction, B, T, H, whole)
    if MODE == GRU:
        start = load_tile(h0_ptr + state, lanes, units, H, whole)

    begin = (1 - direction) * (steps - 1)
    onward = 2 * direction - 1
    for step in tl.range(0, steps, num_stages=STAGES):
        t = begin + step * onward
        row = first_row(starts_ptr, t, B, T) + first
        row_before = first_row(starts_ptr, t + onward, B, T) + first
        active = (t < lengths)[:, None]
        valid = active & inside[None, :]
        follows = ((t + onward >= 0) & (t + onward < lengths))[:, None]
        dh_t = dh
        if grad_output_ptr is not None:
            pointers = grad_output_ptr + row * stride_gn + lanes[:, None].to(tl.int64) * stride_gn
            pointers += units[None, :].to(tl.int64) * stride_gp
            dh_t += tl.load(pointers, mask=valid, other=0.0).to(tl.float32)
        dpre_row = dpre_ptr + row * dpre_stride
        if MODE == LSTM or MODE == GRU:
            gates_row = gates_ptr + row * 4 * H
            gate0 = load_tile(gates_row, lanes, units, 4 * H, valid)
            gate1 = load_tile(gates_row + H, lanes, units, 4 * H, valid)
            gate2 = load_tile(gates_row + 2 * H, lanes, units, 4 * H, valid)
            gate3 = load_tile(gates_row + 3 * H, lanes, units, 4 * H, valid)
        if MODE == LSTM:
            c_before = load_tile(cells_ptr + row_before * H, lanes, units, H, valid & follows)
            c_before = tl.where(follows, c_before, start)
            d0, d1, d2, d3, dc_before = lstm_gates_backward(gate0, gate1, gate2, gate3, c, c_before, dh_t, dc)
            c = tl.where(active, c_before, c)
            dc = tl.where(active, dc_before, dc)
            d0, d1, d2, d3 = d0.to(w0.dtype), d1.to(w0.dtype), d2.to(w0.dtype), d3.to(w0.dtype)
            store_tile(dpre_row, d0, lanes, units, dpre_stride, valid)
            store_tile(dpre_row + H, d1, lanes, units, dpre_stride, valid)
            store_tile(dpre_row + 2 * H, d2, lanes, units, dpre_stride, valid)
            store_tile(dpre_row + 3 * H, d3, lanes, units, dpre_stride, valid)
            dh_before = tl.dot(d0, w0, input_precision=PRECISION)  # [BLOCK_B, BLOCK_H]
            dh_before = tl.dot(d1, w1, dh_before, input_precision=PRECISION)
            dh_before = tl.dot(d2, w2, dh_before, input_precision=PRECISION)
            dh_before = tl.dot(d3, w3, dh_before, input_precision=PRECISION)
        elif MODE == GRU:
            h_row = output_ptr + row_before * stride_output
            h_before = load_tile(h_row, lanes, units, stride_output, valid & follows)
            h_before = tl.where(follows, h_before, start)
            d0, d1, d2, d3, direct = gru_gates_backward(gate0, gate1, gate2, gate3, h_before, dh_t)
            d0, d1, d2, d3 = d0.to(w0.dtype), d1.to(w0.dtype), d2.to(w0.dtype), d3.to(w0.dtype)
            store_tile(dpre_row, d2, lanes, units, dpre_stride, valid)
            store_tile(dpre_row + H, d0, lanes, units, dpre_stride, valid)
            store_tile(dpre_row + 2 * H, d1, lanes, units, dpre_stride, valid)
            store_tile(dpre_row + 3 * H, d3, lanes, units, dpre_stride, valid)
            dh_before = tl.dot(d0, w0, direct, input_precision=PRECISION)
            dh_before = tl.dot(d1, w1, dh_before, input_precision=PRECISION)
            dh_before = tl.dot(d3, w2, dh_before, input_precision=PRECISION)
        else:
            h_t = load_tile(output_ptr + row * stride_output, lanes, units, stride_output, valid)
            d0 = rnn_gates_backward(h_t, dh_t, MODE == RNN_RELU).to(w0.dtype)
            store_tile(dpre_row, d0, lanes, units, dpre_stride, valid)
            dh_before = tl.dot(d0, w0, input_precision=PRECISION)
        dh = tl.where(active, dh_before, dh)

    if grad_h0_ptr is not None:
        store_tile(grad_h0_ptr + state, dh, lanes, units, H, whole)
    if MODE == LSTM:
        if grad_c0_ptr is not None:
            store_tile(grad_c0_ptr + state, dc, lanes, units, H, whole)
