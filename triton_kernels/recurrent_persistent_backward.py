"""Backward of a recurrent layer by many programs at once, each holding a shard of the recurrent weight.

    dh[t] = dy[t] + W_hh^T dpre[t+1] + local[t+1],    (dpre[t], dc[t-1], local[t]) = gates'(dh[t], dc[t])

`local` is the way from h[t] to h[t-1] that passes no product (gru's z * dh, else 0). The loop computes the
gradient dpre of every step's gates and nothing else: those of the input, the weights and the biases are
products and sums of dpre over all rows, computed once behind it.

A program owns UNITS hidden units of a tile of the batch. It computes their dh, then their gates' gradients.
The next step needs those of all units, so the programs of a group exchange them through the rows of `dpre`
that each step writes, with one barrier a step (recurrent_barrier). The weight shard is the UNITS columns of
W_hh that lead to these units: dh^T = W_shard^T dpre^T has few rows and a long sum, which is cut into PARTS
parts (the gates; for an rnn a quarter of the units each) as the batch of a batched product, so that the warps
share the sum.

After the last step one more computes dh before it, the gradient of h0. Papers and legend: see
recurrent_persistent_forward. A step s counts in the order of computation: t = T - 1 - s for the forward
direction, t = s for the reverse one.
"""

import triton
import triton.language as tl

from .recurrent_barrier import arrive, wait
from .recurrent_gates import gru_gates_backward, lstm_gates_backward, rnn_gates_backward
from .recurrent_persistent_forward import load_units, step_rows, store_units
from .recurrent_tiles import GRU, LSTM, RNN_RELU, sequence_lengths

# Parts of the sum over dpre: lstm's four gates, gru's four slots, four quarters of an rnn's units.
PARTS = tl.constexpr(4)


@triton.jit
def part_columns(H, MODE: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr):
    """Of piece 0: columns of dpre, rows of W_hh, both [PARTS, BLOCK_K], and how many are left in each part.

    Piece j lies j * BLOCK_K further on in both. A gru's dpre holds n r z q; W_hh leads from r, z and q.
    """
    part = tl.arange(0, PARTS)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    if MODE == LSTM:
        column = part * H + k
        row = column
        left = H + part * 0
    elif MODE == GRU:
        column = part * H + k
        row = tl.maximum(part - 1, 0) * H + k
        left = tl.where(part > 0, H, 0)
    else:
        column = part * (CHUNKS * BLOCK_K) + k
        row = column
        left = H - part * (CHUNKS * BLOCK_K)
    return column, row, left


@triton.jit
def load_weight_piece(weight_at, left, units_inside, j: tl.constexpr, H, BLOCK_K: tl.constexpr):
    """Piece j of the shard's columns, [PARTS, UNITS, BLOCK_K]; weight_at points to piece 0."""
    inside = tl.arange(0, BLOCK_K)[None, :] < left - j * BLOCK_K
    at = weight_at + (j * BLOCK_K) * H.to(tl.int64)
    return tl.load(at, mask=inside[:, None, :] & units_inside[None, :, None], other=0.0)


@triton.jit
def load_gradient_piece(dpre_at, left, has_after, j: tl.constexpr, BLOCK_K: tl.constexpr):
    """Piece j of dpre after this step, [PARTS, BLOCK_K, BLOCK_B], 0 where there is none.

    dpre_at points to piece 0. Pieces differ by a constant, which costs no registers.
    """
    inside = tl.arange(0, BLOCK_K)[None, :] < left - j * BLOCK_K
    return tl.load(
        dpre_at + j * BLOCK_K, mask=inside[:, :, None] & has_after[None, None, :], other=0.0,
        cache_modifier=".cg",
    )  # fmt: skip


@triton.jit
def load_before(ptr, first_ptr, rows, first_rows, has_before, units, row_size, H, valid):
    """A state before this step: from the rows of the step before, or the initial state."""
    stepped = load_units(ptr, rows, units, row_size, valid & has_before[None, :])
    return stepped + load_units(first_ptr, first_rows, units, H, valid & (has_before == 0)[None, :])


@triton.jit
def recurrent_persistent_backward_kernel(
    dy_ptr, w_ptr, h0_ptr, c0_ptr, starts_ptr, lengths_ptr, output_ptr, gates_ptr, cells_ptr,
    dh_from_ptr, dc_from_ptr, dh_to_ptr, dc_to_ptr, dpre_ptr,
    counters_ptr, failed_ptr, alarm_ptr,
    step_begin, step_end, T, B, N, H, shards, spin_limit, stride_dyn, stride_dyp,
    MODE: tl.constexpr, DIRECTIONS: tl.constexpr, PRECISION: tl.constexpr, BARRIER: tl.constexpr,
    WAVES: tl.constexpr, COUNTER_STRIDE: tl.constexpr, ALIGN: tl.constexpr,
    UNITS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr, RESIDENT: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """dpre[t] for steps step_begin <= s < step_end of T + 1, and the states' gradients before them.

    A program computes UNITS units of BLOCK_B sequences in one direction. Grid: (batch tiles * DIRECTIONS *
    shards,), shards fastest; with BARRIER the launch must be cooperative, without it one step is all it may
    do. The first RESIDENT of the CHUNKS pieces of the weight shard stay on chip, the others are read from the
    L2 cache in every step. dy (N, D*H) of any strides, or None for zeros; w (D, G*H, H); h0, c0 (D, B, H);
    dh_from, dc_from, dh_to, dc_to (D, B, H): the states' gradients after and before these steps, None for
    zeros; dpre (D, N, 4*H), lstm's i f g o, gru's n r z q (an rnn's (D, N, H)), of which earlier steps' rows
    are read. Residuals: output (N, D*H), gates (D, N, 4*H), cells (D, N, H) fp32, as saved by the forward.
    Tensors fp32, fp16 or bf16, states' gradients in any of them; gradients and sums in fp32, dpre rounded
    where it is stored.
    """
    # H as the compiler sees that ALIGN divides it: rows of 8 units are whole vectors too.
    H = H // ALIGN * ALIGN
    group = tl.program_id(0) // shards
    shard = tl.program_id(0) % shards
    direction = group % DIRECTIONS
    first = group // DIRECTIONS * BLOCK_B
    GATES: tl.constexpr = 4 if MODE == LSTM else (3 if MODE == GRU else 1)
    SLOTS: tl.constexpr = 1 if GATES == 1 else 4

    lane = tl.arange(0, BLOCK_B)
    lanes = first + lane
    units = shard * UNITS + tl.arange(0, UNITS)
    exists = (units < H)[:, None] & (lanes < B)[None, :]
    steps, lengths = sequence_lengths(lengths_ptr, first, lane, lanes < B, T)
    rows_of_direction = direction.to(tl.int64) * N
    dpre_ptr += rows_of_direction * SLOTS * H
    output_ptr += direction * H
    if dy_ptr is not None:
        dy_ptr += direction.to(tl.int64) * H * stride_dyp
    if MODE == LSTM or MODE == GRU:
        gates_ptr += rows_of_direction * 4 * H
    if MODE == LSTM:
        cells_ptr += rows_of_direction * H
    counter_ptr = counters_ptr + group * COUNTER_STRIDE

    state_rows = direction.to(tl.int64) * B + lanes
    dh = tl.zeros([UNITS, BLOCK_B], tl.float32)
    if dh_from_ptr is not None:
        dh = load_units(dh_from_ptr, state_rows, units, H, exists)
    dc = tl.zeros([UNITS, BLOCK_B], tl.float32)
    if dc_from_ptr is not None:
        dc = load_units(dc_from_ptr, state_rows, units, H, exists)
    w_ptr += direction.to(tl.int64) * GATES * H * H
    column, weight_row, left = part_columns(H, MODE, BLOCK_K, CHUNKS)
    weight_at = w_ptr + (weight_row.to(tl.int64) * H)[:, None, :] + units[None, :, None]
    weight = ()
    for j in tl.static_range(RESIDENT):
        weight = weight + (load_weight_piece(weight_at, left, units < H, j, H, BLOCK_K),)

    # One stage: the software pipeliner may not move a step's loads above its wait.
    for step in tl.range(step_begin, step_end, num_stages=1):
        t = T - 1 - step if direction == 0 else step
        rows, active = step_rows(starts_ptr, lengths, t, B, T, lanes)
        valid = exists & active[None, :]
        t_before = t - 1 if direction == 0 else t + 1
        rows_before, has_before = step_rows(starts_ptr, lengths, t_before, B, T, lanes)
        dy = tl.zeros([UNITS, BLOCK_B], tl.float32)
        if dy_ptr is not None:
            dy_pointers = dy_ptr + rows[None, :] * stride_dyn + units.to(tl.int64)[:, None] * stride_dyp
            dy += tl.load(dy_pointers, mask=valid, other=0.0).to(tl.float32)
        if MODE == LSTM:
            c = load_units(cells_ptr, rows, units, H, valid)
            c_before = load_before(cells_ptr, c0_ptr, rows_before, state_rows, has_before, units, H, H, valid)
        elif MODE == GRU:
            h_before = load_before(
                output_ptr, h0_ptr, rows_before, state_rows, has_before, units, DIRECTIONS * H, H, valid
            )
        else:
            h = load_units(output_ptr, rows, units, DIRECTIONS * H, valid)
        gates = ()
        if SLOTS == 4:
            for gate in tl.static_range(4):
                gates = gates + (load_units(gates_ptr + gate * H, rows, units, 4 * H, valid),)
        if BARRIER:
            # The first step waits for nothing: it reads rows of an earlier launch, or none.
            wait(counter_ptr, (step - step_begin) * shards, spin_limit, failed_ptr, alarm_ptr, WAVES)

        t_after = t + 1 if direction == 0 else t - 1
        rows_after, has_after = step_rows(starts_ptr, lengths, t_after, B, T, lanes)
        dpre_at = dpre_ptr + (rows_after * SLOTS * H)[None, None, :] + column[:, :, None]
        parts = tl.zeros([PARTS, UNITS, BLOCK_B], tl.float32)
        pieces = ()
        for j in tl.static_range(CHUNKS + AHEAD):
            if j < CHUNKS:
                pieces = pieces + (load_gradient_piece(dpre_at, left, has_after, j, BLOCK_K),)
            if j >= AHEAD:
                if j - AHEAD < RESIDENT:
                    w_piece = weight[j - AHEAD]
                else:
                    w_piece = load_weight_piece(weight_at, left, units < H, j - AHEAD, H, BLOCK_K)
                parts = tl.dot(w_piece, pieces[j - AHEAD], parts, input_precision=PRECISION)
        dh = tl.where(has_after[None, :], dh + tl.sum(parts, 0), dh)

        if MODE == LSTM:
            di, df, dg, do, dc_before = lstm_gates_backward(
                gates[0], gates[1], gates[2], gates[3], c, c_before, dh + dy, dc
            )
            dc = tl.where(active[None, :], dc_before, dc)
            dh = tl.where(active[None, :], 0.0, dh)
            dpre = (di, df, dg, do)
        elif MODE == GRU:
            dr, dz, dn, dq, dh_before = gru_gates_backward(
                gates[0], gates[1], gates[2], gates[3], h_before, dh + dy
            )
            dh = tl.where(active[None, :], dh_before, dh)
            dpre = (dn, dr, dz, dq)
        else:
            dpre = (rnn_gates_backward(h, dh + dy, MODE == RNN_RELU),)
            dh = tl.where(active[None, :], 0.0, dh)
        for gate in tl.static_range(SLOTS):
            store_units(dpre_ptr + gate * H, dpre[gate], rows, units, SLOTS * H, valid)
        if BARRIER:
            arrive(counter_ptr, WAVES)

    if dh_to_ptr is not None:
        store_units(dh_to_ptr, dh, state_rows, units, H, exists)
    if dc_to_ptr is not None:
        store_units(dc_to_ptr, dc, state_rows, units, H, exists)
