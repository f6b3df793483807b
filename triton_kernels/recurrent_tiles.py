"""What the kernels of the recurrent family share: names of the cells, and tiles of rows x units in memory.

Legend: T steps, B batch, N rows (T * B, or the packed total), H hidden size, G gates a unit (lstm 4, gru 3,
rnn 1), D directions. A tile is [BLOCK_B, BLOCK_H] in float32, BLOCK_H a power of two; lanes beyond the rows
or the units hold zeros, which every cell keeps zero. Base pointers carry the 64-bit part of an offset, so
that offsets within a tile fit 32 bits.
"""

import triton
import triton.language as tl

LSTM = tl.constexpr(0)
GRU = tl.constexpr(1)
RNN_TANH = tl.constexpr(2)
RNN_RELU = tl.constexpr(3)


@triton.jit
def load_tile(ptr, rows, columns, stride_row, valid):
    """ptr[rows, columns] in float32; zero where not valid."""
    pointers = ptr + rows[:, None] * stride_row + columns[None, :]
    return tl.load(pointers, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, value, rows, columns, stride_row, valid):
    """ptr[rows, columns] = value, rounded to the pointer's type, where valid."""
    pointers = ptr + rows[:, None] * stride_row + columns[None, :]
    tl.store(pointers, value.to(ptr.dtype.element_ty), mask=valid)


@triton.jit
def load_gate_weight(w_ptr, units, inputs, H, TRANSPOSED: tl.constexpr):
    """One gate's (H, H) block of W_hh in its own type: [units, inputs], or [inputs, units] transposed."""
    if TRANSPOSED:
        pointers = w_ptr + units[None, :] * H + inputs[:, None]
        valid = (units < H)[None, :] & (inputs < H)[:, None]
    else:
        pointers = w_ptr + units[:, None] * H + inputs[None, :]
        valid = (units < H)[:, None] & (inputs < H)[None, :]
    return tl.load(pointers, mask=valid, other=0.0)


@triton.jit
def sequence_lengths(lengths_ptr, first, lanes, exists, T):
    """(steps of the tile's longest sequence, steps of every lane's); all T where sequences are not packed."""
    if lengths_ptr is None:
        steps = T
        lengths = tl.where(exists, T, 0)
    else:
        steps = tl.load(lengths_ptr + first).to(tl.int32)
        lengths = tl.load(lengths_ptr + first + lanes, mask=exists, other=0).to(tl.int32)
    return steps, lengths


@triton.jit
def first_row(starts_ptr, t, B, T):
    """Row of the first sequence at step t, in int64; steps outside 0 <= t < T give some row in range."""
    if starts_ptr is None:
        row = t.to(tl.int64) * B
    else:
        row = tl.load(starts_ptr + tl.minimum(tl.maximum(t, 0), T - 1))
    return row
