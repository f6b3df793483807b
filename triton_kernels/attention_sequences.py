"""Sequences of unequal length, one behind the other in a dimension of tokens: which of them a program serves.

Sequence s is tokens starts[s] to starts[s + 1] - 1. The host knows the number N of all tokens and the number
S of sequences, not where each begins, so the grid has slots for as many tiles as there can be:
N // BLOCK + S. Sequence s takes the slots from starts[s] // BLOCK + s on, which ascend, and as many as it has
tiles or one more, because ceil((b - a) / BLOCK) <= b // BLOCK - a // BLOCK + 1. A program finds its sequence
by binary search.
"""

import triton
import triton.language as tl


def slots_of(tokens: int, sequences: int, block: int) -> int:
    """Tiles that so many sequences may have together."""
    return tokens // block + sequences


@triton.jit
def sequence_tile(slot, starts_ptr, sequences, BLOCK: tl.constexpr):
    """(sequence, number of the tile within it) of a slot; the tile may lie just behind its sequence."""
    low = slot * 0
    high = low + sequences
    while high - low > 1:
        middle = (low + high) // 2
        started = tl.load(starts_ptr + middle) // BLOCK + middle <= slot
        low = tl.where(started, middle, low)
        high = tl.where(started, high, middle)
    return low, slot - (tl.load(starts_ptr + low) // BLOCK + low)


@triton.jit
def sequence_bounds(sequence, starts_ptr):
    """(first token as int64, number of tokens) of a sequence."""
    begin = tl.load(starts_ptr + sequence)
    return begin.to(tl.int64), tl.load(starts_ptr + sequence + 1) - begin
