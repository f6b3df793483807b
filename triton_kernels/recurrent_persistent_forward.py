"""Forward of a recurrent layer by many programs at once, each holding a shard of the recurrent weight.

    pre[t] = xg[t] + W_hh h[t-1],    (h[t], c[t]) = gates(pre[t], h[t-1], c[t-1])

W_hh is cut by hidden units: a program computes the gates of UNITS units for a whole tile of the batch, and
keeps these units' rows of W_hh on chip for all steps. Each step needs all of h[t-1], so the programs of a
group (one direction, one batch tile) exchange h through memory: the exchange buffer is `output` itself, into
which every step writes new rows, and one barrier a step (recurrent_barrier) makes them visible. Weights held
on chip over the steps: Diamos et al., "Persistent RNNs", ICML 2016; gates: recurrent_gates.

The product is computed transposed, pre^T = W_shard h^T, with the gates of a unit in adjacent rows: the many
rows of the shard take the tensor cores' long side and the small batch their short one, and all gates of a
unit end in the thread that needs them.

Legend: T steps, B batch, N rows (T * B, or the packed total, in time order), H hidden size, G gates a unit, D
directions. Sequence b has lengths[b] steps, its rows are starts[t] + b; unpacked, T and t * B. SLOTS is G
rounded up to a power of two. A *step* s counts in the order of computation: t = s forward, t = T - 1 - s in
reverse.
"""

import triton
import triton.language as tl

from .recurrent_barrier import arrive, wait
from .recurrent_gates import gru_gates, lstm_gates, rnn_gates
from .recurrent_tiles import GRU, LSTM, RNN_RELU, first_row, sequence_lengths


@triton.jit
def step_rows(starts_ptr, lengths, t, B, T, lanes):
    """(row of each lane, whether it has one) at time t, which may lie outside the sequence."""
    return first_row(starts_ptr, t, B, T) + lanes, (t >= 0) & (t < lengths)


@triton.jit
def split_gates(rows, UNITS: tl.constexpr, BLOCK_B: tl.constexpr):
    """The four gates [UNITS, BLOCK_B] of a tile [UNITS * 4, BLOCK_B] whose row is unit * 4 + gate."""
    pairs = rows.reshape(UNITS, 2, 2, BLOCK_B).permute(0, 3, 1, 2)  # [UNITS, BLOCK_B, gate // 2, gate % 2]
    even, odd = pairs.split()
    gate0, gate2 = even.split()
    gate1, gate3 = odd.split()
    return gate0, gate1, gate2, gate3


@triton.jit
def load_units(ptr, rows, units, row_size, valid):
    """A tile [UNITS, BLOCK_B] in fp32 of a matrix whose rows hold units side by side; 0 where not valid."""
    return tl.load(ptr + rows[None, :] * row_size + units[:, None], mask=valid, other=0.0).to(tl.float32)


@triton.jit
def store_units(ptr, value, rows, units, row_size, valid):
    """Store a tile [UNITS, BLOCK_B] there, rounded to the matrix's type."""
    tl.store(
        ptr + rows[None, :] * row_size + units[:, None], value.to(ptr.dtype.element_ty), mask=valid
    )  # fmt: skip


@triton.jit
def load_weight_piece(weight_at, row_valid, j: tl.constexpr, H, BLOCK_K: tl.constexpr):
    """Piece j of the shard's rows, [rows, BLOCK_K]; weight_at points to piece 0."""
    inside = (tl.arange(0, BLOCK_K) < H - j * BLOCK_K)[None, :]
    return tl.load(weight_at + j * BLOCK_K, mask=row_valid[:, None] & inside, other=0.0)


@triton.jit
def add_product(
    pre, weight, weight_at, row_valid, h_at, lane_valid, H,
    BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr, RESIDENT: tl.constexpr, AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """pre + W_shard h^T, [rows, BLOCK_B]; h_at points to piece 0 of h, [BLOCK_K, BLOCK_B].

    Pieces differ by a constant, which costs no registers. AHEAD pieces of h are on their way while one is
    used.
    """
    pieces = ()
    for j in tl.static_range(CHUNKS + AHEAD):
        if j < CHUNKS:
            inside = (tl.arange(0, BLOCK_K) < H - j * BLOCK_K)[:, None] & lane_valid[None, :]
            pieces = pieces + (tl.load(h_at + j * BLOCK_K, mask=inside, other=0.0, cache_modifier=".cg"),)
        if j >= AHEAD:
            if j - AHEAD < RESIDENT:
                w_piece = weight[j - AHEAD]
            else:
                w_piece = load_weight_piece(weight_at, row_valid, j - AHEAD, H, BLOCK_K)
            pre = tl.dot(w_piece, pieces[j - AHEAD], pre, input_precision=PRECISION)
    return pre


@triton.jit
def recurrent_persistent_forward_kernel(
    xg_ptr, w_ptr, b_hn_ptr, h0_ptr, starts_ptr, lengths_ptr,
    h_from_ptr, c_from_ptr, h_to_ptr, c_to_ptr, output_ptr, gates_ptr, cells_ptr,
    counters_ptr, failed_ptr, alarm_ptr,
    step_begin, step_end, T, B, N, H, shards, spin_limit,
    MODE: tl.constexpr, DIRECTIONS: tl.constexpr, PRECISION: tl.constexpr, BARRIER: tl.constexpr,
    WAVES: tl.constexpr, COUNTER_STRIDE: tl.constexpr, ALIGN: tl.constexpr,
    UNITS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr, RESIDENT: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """(h[t], c[t]) = gates(xg[t] + W_hh h[t-1], h[t-1], c[t-1]) for steps step_begin <= s < step_end.

    A program computes UNITS units of BLOCK_B sequences in one direction. Grid: (batch tiles * DIRECTIONS *
    shards,), shards fastest; with BARRIER the launch must be cooperative, without it one step is all it may
    do. The first RESIDENT of the CHUNKS pieces [rows, BLOCK_K] of the weight shard stay on chip, the others
    are read from the L2 cache in every step. xg (N, D, G*H) fp32, biases included but for gru's b_hn (D, H)
    fp32 or None; w (D, G*H, H); h0 (D, B, H); output (N, D*H), of which earlier steps' rows are read. h_from,
    c_from, h_to, c_to (D, B, H): the states before and after these steps, c for lstm alone. Residuals, unless
    None: gates (D, N, 4*H), activated i f g o or r z n and q; cells (D, N, H) fp32. w, h0, output, gates in
    fp32, fp16 or bf16, states in any of them; states and sums in fp32, h rounded where it enters a product.
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
    xg_ptr += direction * GATES * H
    output_ptr += direction * H
    if gates_ptr is not None:
        gates_ptr += direction.to(tl.int64) * N * 4 * H
    if cells_ptr is not None:
        cells_ptr += direction.to(tl.int64) * N * H
    counter_ptr = counters_ptr + group * COUNTER_STRIDE

    state_rows = direction.to(tl.int64) * B + lanes
    h = load_units(h_from_ptr, state_rows, units, H, exists)
    c = h
    if MODE == LSTM:
        c = load_units(c_from_ptr, state_rows, units, H, exists)
    b_hn = tl.zeros([UNITS], tl.float32)
    if b_hn_ptr is not None:
        b_hn += tl.load(b_hn_ptr + direction * H + units, mask=units < H, other=0.0)

    weight_rows = tl.arange(0, UNITS * SLOTS)
    row_unit = shard * UNITS + weight_rows // SLOTS
    row_gate = weight_rows % SLOTS
    row_valid = (row_unit < H) & (row_gate < GATES)
    weight_row = (direction * GATES + row_gate).to(tl.int64) * H + row_unit
    weight_at = w_ptr + (weight_row * H)[:, None] + tl.arange(0, BLOCK_K)[None, :]
    weight = ()
    for j in tl.static_range(RESIDENT):
        weight = weight + (load_weight_piece(weight_at, row_valid, j, H, BLOCK_K),)
    # What a sequence's first step adds in place of the product with the step before.
    h0_at = h0_ptr + (state_rows * H)[None, :] + tl.arange(0, BLOCK_K)[:, None]
    pre_h0 = add_product(
        tl.zeros([UNITS * SLOTS, BLOCK_B], tl.float32), weight, weight_at, row_valid, h0_at, lanes < B, H,
        BLOCK_K, CHUNKS, RESIDENT, AHEAD, PRECISION,
    )  # fmt: skip

    # One stage: the software pipeliner may not move a step's loads above its wait.
    for step in tl.range(step_begin, step_end, num_stages=1):
        t = step if direction == 0 else T - 1 - step
        rows, active = step_rows(starts_ptr, lengths, t, B, T, lanes)
        valid = exists & active[None, :]
        x = ()
        for gate in tl.static_range(GATES):
            x = x + (load_units(xg_ptr + gate * H, rows, units, DIRECTIONS * GATES * H, valid),)
        if BARRIER:
            # The first step waits for nothing: it reads h0, or rows of an earlier launch.
            wait(counter_ptr, (step - step_begin) * shards, spin_limit, failed_ptr, alarm_ptr, WAVES)

        t_before = t - 1 if direction == 0 else t + 1
        rows_before, has_before = step_rows(starts_ptr, lengths, t_before, B, T, lanes)
        h_at = output_ptr + (rows_before * DIRECTIONS * H)[None, :] + tl.arange(0, BLOCK_K)[:, None]
        pre = add_product(
            tl.where(has_before[None, :], 0.0, pre_h0), weight, weight_at, row_valid, h_at, has_before, H,
            BLOCK_K, CHUNKS, RESIDENT, AHEAD, PRECISION,
        )  # fmt: skip
        if MODE == LSTM:
            p0, p1, p2, p3 = split_gates(pre, UNITS, BLOCK_B)
            i, f, g, o, c_next, h_next = lstm_gates(p0 + x[0], p1 + x[1], p2 + x[2], p3 + x[3], c)
            c = tl.where(active[None, :], c_next, c)
            saved = (i, f, g, o)
        elif MODE == GRU:
            p0, p1, p2, _ = split_gates(pre, UNITS, BLOCK_B)
            q = p2 + b_hn[:, None]
            r, z, n, h_next = gru_gates(p0 + x[0], p1 + x[1], x[2], q, h)
            saved = (r, z, n, q)
        else:
            h_next = rnn_gates(pre + x[0], MODE == RNN_RELU)
        h = tl.where(active[None, :], h_next, h)
        store_units(output_ptr, h_next, rows, units, DIRECTIONS * H, valid)
        if BARRIER:
            arrive(counter_ptr, WAVES)
        # What no other program waits for is stored behind the arrival.
        if gates_ptr is not None:
            for gate in tl.static_range(4):
                store_units(gates_ptr + gate * H, saved[gate], rows, units, 4 * H, valid)
        if cells_ptr is not None:
            store_units(cells_ptr, c, rows, units, H, valid)

    store_units(h_to_ptr, h, state_rows, units, H, exists)
    if MODE == LSTM:
        store_units(c_to_ptr, c, state_rows, units, H, exists)
