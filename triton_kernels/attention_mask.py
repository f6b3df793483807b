"""What one tile of attention scores may show: the pattern, masks, score changes and dropout of the family.

    score[i, j] = cap(scale * q_i . k_j) + bias[i, j],       cap(s) = c tanh(s / c), or s without a softcap
    visible(i, j) = (window(i, j) or global(p) or global(j)) and (j <= p, if causal)
                    and mask[i, j] and not padding[j]

Query i stands at position p = i + query_offset. The forward, the backward and the weights take every one of
these formulas from here. Global tokens and windows: Beltagy, Peters and Cohan, "Longformer: The
Long-Document Transformer", 2020 (arXiv:2004.05150). Dropout: Philox4x32-10 of Salmon, Moraes, Dror and Shaw,
"Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.

Units. A dilated window joins only positions of one residue class modulo the dilation, so that a tile holds
positions of one class: position = residue + step * unit, step = dilation, and in units the window has no
gaps. Where global tokens join the classes, step is 1 and a tile tests the lattice itself (LATTICE). A query
of unit w stands at the key unit w + shift, `shift_of`.

Distances are in positions and plain integers: `left` and `right` reach that far behind and ahead of p, and
`ahead` is 0 where causal; FAR means unbounded, for each. Ranges in units divide them by step.

Legend: B, H, Tq, Tk, D as in torch's SDPA; tiles [BLOCK_M queries, BLOCK_N keys]. Pointers have been moved
to their batch and head. A pointer that is None stands for what the call does not have.
"""

import triton
import triton.language as tl

from .recurrent_gates import tanh

# A reach that no sequence exceeds, with room for one more in 32 bits; lengths stay below it.
FAR = tl.constexpr(1 << 30)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# ------------------------------------------------------------------------------------ residue classes


@triton.jit
def residue_of(position, step):
    """position modulo step, in [0, step) also where position is negative."""
    return (position % step + step) % step


@triton.jit
def units_of(length, residue, step):
    """How many positions below length a residue class holds."""
    return (length - residue + step - 1) // step


@triton.jit
def shift_of(query_residue, key_residue, query_offset, step):
    """What leads from a query's unit to the key unit at its position; the division leaves no rest."""
    return (query_residue + query_offset - key_residue) // step


# ------------------------------------------------------------------------------------ tiles to visit


@triton.jit
def round_up(number, BLOCK: tl.constexpr):
    return (number + BLOCK - 1) // BLOCK * BLOCK


@triton.jit
def clip(number, low, high):
    return tl.minimum(tl.maximum(number, low), high)


@triton.jit
def tiles_within(first, last, count, behind, front, BLOCK: tl.constexpr):
    """Of `count` others, which the members first..last of a tile reach from x - behind to x + front.

    Returns (lo, full_lo, full_hi, hi), multiples of BLOCK, lo <= full_lo <= full_hi <= hi: some member
    reaches something in tiles of [lo, hi), every member reaches all of [full_lo, full_hi).
    """
    lo = clip(first - behind, 0, count) // BLOCK * BLOCK
    hi = tl.maximum(round_up(clip(last + front + 1, 0, count), BLOCK), lo)
    full_lo = clip(round_up(clip(last - behind, 0, count), BLOCK), lo, hi)
    full_hi = clip(clip(first + front + 1, 0, count) // BLOCK * BLOCK, full_lo, hi)
    return lo, full_lo, full_hi, hi


@triton.jit
def key_tiles(
    first, last, count, left, right, ahead, step, global_tokens, sees_all,
    HAS_GLOBAL: tl.constexpr, SPREAD: tl.constexpr, ALL_EDGE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The key tiles that a query tile visits.

    Args:
        first, last: key units of the tile's first and last query (unit + shift).
        count: keys of the class.
        sees_all: whether a query of the tile is global.
        HAS_GLOBAL: whether there are global tokens; SPREAD: whether global_mask names some, so that they may
            be anywhere. ALL_EDGE: whether no tile is free of tests (a bool mask, a lattice).

    Returns:
        (begin, outside, lo, full_lo, full_hi, hi, end), key units, multiples of BLOCK_N: tiles of
        [full_lo, full_hi) need no test but padding; those of [begin, outside), [lo, full_lo) and
        [full_hi, end) are edges. Outside [lo, hi) only global tokens are visible; with SPREAD a tile there
        need only be visited where `is_global` finds one.
    """
    front = tl.minimum(right, ahead) // step
    lo, full_lo, full_hi, hi = tiles_within(first, last, count, left // step, front, BLOCK_N)
    if ALL_EDGE:
        full_lo = hi
        full_hi = hi
    begin = lo * 0
    outside = begin
    end = hi
    if HAS_GLOBAL:
        reach = clip(last + ahead + 1, 0, count)
        some = reach if SPREAD else tl.where(sees_all, reach, tl.minimum(global_tokens, reach))
        outside = tl.minimum(round_up(some, BLOCK_N), lo)
        end = tl.maximum(round_up(some, BLOCK_N), hi)
    return begin, outside, lo, full_lo, full_hi, hi, end


@triton.jit
def query_tiles(
    first, last, count, shift, left, right, ahead, step, global_tokens, seen_by_all,
    HAS_GLOBAL: tl.constexpr, SPREAD: tl.constexpr, ALL_EDGE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The query tiles that visit a key tile: the reverse of `key_tiles`, in query units.

    Args:
        first, last: key units of the tile's first and last key.
        count: queries of the class.
        shift: as `shift_of` gives it.
        seen_by_all: whether a key of the tile is global. The others are those of `key_tiles`.

    Returns:
        As `key_tiles`, in query units and multiples of BLOCK_M.
    """
    behind = tl.minimum(right, ahead) // step
    lo, full_lo, full_hi, hi = tiles_within(first - shift, last - shift, count, behind, left // step, BLOCK_M)
    if ALL_EDGE:
        full_lo = hi
        full_hi = hi
    begin = lo * 0
    outside = begin
    end = hi
    if HAS_GLOBAL:
        reach = clip(first - ahead - shift, 0, count) // BLOCK_M * BLOCK_M
        some = count if SPREAD else tl.where(seen_by_all, count, clip(global_tokens - shift, 0, count))
        outside = tl.minimum(round_up(some, BLOCK_M), lo)
        begin = tl.minimum(reach, outside)
        end = tl.maximum(round_up(some, BLOCK_M), hi)
    return begin, outside, lo, full_lo, full_hi, hi, end


@triton.jit
def edge_count(begin, outside, lo, full_lo, full_hi, end, BLOCK: tl.constexpr):
    """Edge tiles of `key_tiles` or `query_tiles`."""
    return (outside - begin + full_lo - lo + end - full_hi) // BLOCK


@triton.jit
def edge_start(number, begin, outside, lo, full_lo, full_hi, BLOCK: tl.constexpr):
    """First unit of an edge tile, numbered through the three ranges."""
    start = begin + number * BLOCK
    start += tl.where(start >= outside, lo - outside, 0)
    return start + tl.where(start >= full_lo, full_hi - full_lo, 0)


# ------------------------------------------------------------------------------------ visibility


@triton.jit
def is_global(positions, global_tokens, global_ptr, stride_gt, T):
    """Which positions, any of them also outside the sequence, hold a global token; global_mask has T."""
    first = (positions >= 0) & (positions < global_tokens)
    if global_ptr is not None:
        within = (positions >= 0) & (positions < T)
        offsets = positions.to(tl.int64) * stride_gt
        first = first | (tl.load(global_ptr + offsets, mask=within, other=0) != 0)
    return first


@triton.jit
def holds_global(positions, exist, global_tokens, global_ptr, stride_gt, T):
    """Whether any of the positions that exist holds a global token: one bool."""
    found = is_global(positions, global_tokens, global_ptr, stride_gt, T) & exist
    return tl.max(found.to(tl.int32), axis=0) > 0


@triton.jit
def unpadded(cols, Tk, padding_ptr, stride_ps):
    """Which keys exist and are no padding. [BLOCK_N]"""
    exist = cols < Tk
    if padding_ptr is not None:
        offsets = cols.to(tl.int64) * stride_ps
        exist = exist & (tl.load(padding_ptr + offsets, mask=exist, other=1) == 0)
    return exist


@triton.jit
def visible_tile(
    rows, cols, Tq, Tk, left, right, ahead, dilation, query_offset,
    mask_ptr, stride_mt, stride_ms, padding_ptr, stride_ps,
    global_tokens, global_ptr, stride_gt, T,
    LATTICE: tl.constexpr, HAS_GLOBAL: tl.constexpr,
):  # fmt: skip
    """visible(i, j) of queries `rows` [BLOCK_M] and keys `cols` [BLOCK_N]; False beyond Tq and Tk.

    Args:
        mask_ptr: uint8, 0 where attention is forbidden; padding_ptr: uint8 (Tk), not 0 where a key is to be
            ignored; global_ptr: uint8 (T), not 0 where a token is global. Each or None.
    """
    positions = rows + query_offset
    distance = cols[None, :] - positions[:, None]  # [BLOCK_M, BLOCK_N]
    visible = (distance >= -left) & (distance <= right)
    if LATTICE:
        visible = visible & (distance % dilation == 0)
    if HAS_GLOBAL:
        visible = visible | is_global(cols, global_tokens, global_ptr, stride_gt, T)[None, :]
        visible = visible | is_global(positions, global_tokens, global_ptr, stride_gt, T)[:, None]
    visible = visible & (distance <= ahead)
    visible = visible & (rows < Tq)[:, None] & unpadded(cols, Tk, padding_ptr, stride_ps)[None, :]
    if mask_ptr is not None:
        offsets = rows.to(tl.int64)[:, None] * stride_mt + cols.to(tl.int64)[None, :] * stride_ms
        visible = visible & (tl.load(mask_ptr + offsets, mask=visible, other=0) != 0)
    return visible


@triton.jit
def any_visible(visible, AXIS: tl.constexpr):
    """Which columns (AXIS 0) or rows (AXIS 1) of a tile have something visible.

    What is visible to nothing may be NaN, and 0 * NaN is NaN in a product: such rows of an operand are to be
    zeroed.
    """
    return tl.max(visible.to(tl.int32), axis=AXIS) > 0


# ------------------------------------------------------------------------------------ scores


@triton.jit
def cap(score, softcap):
    """softcap * tanh(score / softcap)."""
    return softcap * tanh(score / softcap)


@triton.jit
def cap_slope(capped, softcap):
    """The derivative of `cap`, from its value."""
    ratio = capped / softcap
    return 1.0 - ratio * ratio


@triton.jit
def bias_tile(rows, cols, Tq, Tk, bias_ptr, stride_bt, stride_bs):
    """bias[rows, cols] in float32; zero beyond Tq and Tk."""
    offsets = rows.to(tl.int64)[:, None] * stride_bt + cols.to(tl.int64)[None, :] * stride_bs
    inside = (rows < Tq)[:, None] & (cols < Tk)[None, :]
    return tl.load(bias_ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def distance_tile(rows, cols, Tq, Tk, distance_ptr, TESTED: tl.constexpr):
    """distance_bias[cols - rows + Tq - 1], of dense rows, in float32; beyond Tq, Tk any of its numbers or 0.

    TESTED: whether places beyond the row are left out, or moved into it; it decides about the registers.
    """
    # Fewer than 2 * FAR, so 32 bits hold them, and take half the registers of 64.
    distances = cols[None, :] - rows[:, None] + (Tq - 1)
    if TESTED:
        inside = (distances >= 0) & (distances < Tq + Tk - 1)
        found = tl.load(distance_ptr + distances, mask=inside, other=0.0)
    else:
        found = tl.load(distance_ptr + clip(distances, 0, Tq + Tk - 2))
    return found.to(tl.float32)


@triton.jit
def scores_in_base_2(
    product, rows, cols, Tq, Tk, scale, softcap, bias_ptr, stride_bt, stride_bs, distance_ptr,
    HAS_SOFTCAP: tl.constexpr, BACKWARD: tl.constexpr = False,
):  # fmt: skip
    """log2(e) * score of a tile q_i . k_j, float32, so that exp(score) is exp2 of it."""
    if HAS_SOFTCAP:
        scores = cap(product * scale, softcap) * LOG2E
    else:
        scores = product * (scale * LOG2E)
    if bias_ptr is not None:
        scores += bias_tile(rows, cols, Tq, Tk, bias_ptr, stride_bt, stride_bs) * LOG2E
    if distance_ptr is not None:
        scores += distance_tile(rows, cols, Tq, Tk, distance_ptr, not BACKWARD) * LOG2E
    return scores


# ------------------------------------------------------------------------------------ dropout


@triton.jit
def keeps(words, threshold):
    """Whether random uint32 words are kept: word >= threshold + 2**31 as unsigned numbers.

    threshold is round(dropout_p * 2**32), at most 2**32 - 1, less 2**31: a signed number of 32 bits.
    """
    return (words.to(tl.int32, bitcast=True) ^ (-2147483648)) >= threshold


@triton.jit
def kept_tile(seed, head, rows, first_col, step, threshold, CLASSES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which probabilities of queries `rows` and keys first_col + step * (0 ... BLOCK_N - 1) dropout keeps.

    To (i, j) belongs word j % 4 of Philox4x32-10 with the key `seed` (int64) and the counter (j // 4, i,
    head, 0), head = b * H + h. CLASSES says whether step may differ from 1; without, first_col is a multiple
    of 4 and one block of four words serves four keys.
    """
    if CLASSES:
        cols = (first_col + step * tl.arange(0, BLOCK_N))[None, :]
        word0, word1, word2, word3 = tl.philox(seed, cols // 4, rows[:, None], head, 0)
        words = tl.where(cols % 2 == 0, word0, word1)
        words = tl.where(cols % 4 < 2, words, tl.where(cols % 2 == 0, word2, word3))
    else:
        blocks = (first_col // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
        word0, word1, word2, word3 = tl.philox(seed, blocks, rows[:, None], head, 0)
        pairs = tl.join(tl.join(word0, word2), tl.join(word1, word3))  # [BLOCK_M, BLOCK_N // 4, 2, 2]
        words = tl.reshape(pairs, [rows.shape[0], BLOCK_N])
    return keeps(words, threshold)
