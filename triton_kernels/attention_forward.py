"""Forward of attention: one pass over the visible keys of a query tile, with no score in memory.

    out_i = sum_j P[i, j] v_j,    P[i, j] = exp(score[i, j] - lse_i),    lse_i = log sum_j exp(score[i, j])

The softmax is online: with the running maximum m (`highest`) and sum l
(`total`) of a row, a tile of keys gives

    m' = max(m, max_j score_j),    l' = l exp(m - m') + sum_j exp(score_j - m'),    and acc like l

(Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv:1805.02867; Dao et al.,
"FlashAttention", 2022, arXiv:2205.14135; Dao, "FlashAttention-2", 2023, arXiv:2307.08691), in base 2 with the
scale folded in. Tiles that every query sees whole come first and test nothing but padding; tiles at the edges
of the pattern test each score; tiles beyond it are not visited. A sink is a score without a value: m and l
begin with it (Xiao et al., 2023, arXiv:2309.17453).

With sequences of unequal length (attention_sequences) the batch is 1, and a program takes its sequence for
the whole: Tq, Tk and positions are the sequence's.

Legend: see attention_mask and attention_tiles; Dv the width of values, `group` H / Hk.
"""

import triton
import triton.language as tl

from .attention_mask import (
    LOG2E,
    any_visible,
    edge_count,
    edge_start,
    holds_global,
    kept_tile,
    key_tiles,
    residue_of,
    scores_in_base_2,
    shift_of,
    units_of,
    unpadded,
    visible_tile,
)
from .attention_sequences import sequence_bounds, sequence_tile
from .attention_softmax import online_softmax, weight_and_lse
from .attention_tiles import load_piece, store_piece

# Whatever these are, one compilation serves.
UNSPECIALIZED = [
    "H", "Tq", "Tk", "T", "blocks", "sequences", "left", "right", "ahead", "dilation", "query_offset",
    "global_tokens", "threshold",
]  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, distance_ptr, padding_ptr, global_ptr, sinks_ptr,
    seed_ptr, out_ptr, lse_ptr, starts_q_ptr, starts_k_ptr,
    H, group, Tq, Tk, T, blocks, sequences,
    scale, softcap, threshold, keep_scale,
    left, right, ahead, dilation, step, query_offset, global_tokens,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_ob, stride_oh, stride_ot, stride_od,
    stride_mb, stride_mh, stride_mt, stride_ms,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_rb, stride_rh,
    stride_pb, stride_ps, stride_gb, stride_gt,
    D: tl.constexpr, DV: tl.constexpr, LATTICE: tl.constexpr, CLASSES: tl.constexpr,
    HAS_GLOBAL: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    FOLDED: tl.constexpr, AT_END: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, REST_DV: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j P[i, j] v_j and lse_i of BLOCK_M queries of one head and residue class.

    Grid: (B * H * blocks,), the query tiles of a head adjacent, last ones first, because with causality they
    take longest. q (B, H, Tq, D), k (B, Hk, Tk, D), v (B, Hk, Tk, Dv) and out (B, H, Tq, Dv) in one of fp32,
    fp16, bf16, any strides; lse (B, H, Tq) fp32 contiguous. mask (uint8) and bias (B, H, Tq, Tk) and distance
    (B, H, Tq + Tk - 1) by broadcast strides, padding (B, Tk) and global (B, T) uint8, sinks (H,), seed one
    int64; each or None. starts of queries and keys (sequences + 1,) int32, or None; AT_END: each sequence's
    last query stands at its last key. FOLDED: scores are q k^T times a positive number, so that their maximum
    may be scaled after it is found. Pieces of D: BLOCK_D and REST_D, of Dv: BLOCK_DV and REST_DV. Sums in
    fp32; P is rounded to v's type in its product.
    """
    # Shows the compiler that ALIGN divides strides, so that rows are read in vectors of so many.
    stride_qt = stride_qt // ALIGN * ALIGN
    stride_kt = stride_kt // ALIGN * ALIGN
    stride_vt = stride_vt // ALIGN * ALIGN
    head = (tl.program_id(0) // blocks).to(tl.int64)
    number = blocks - 1 - tl.program_id(0) % blocks
    b, h = head // H, head % H

    q_ptr += (b * stride_qb + h * stride_qh) // ALIGN * ALIGN
    k_ptr += (b * stride_kb + h // group * stride_kh) // ALIGN * ALIGN
    v_ptr += (b * stride_vb + h // group * stride_vh) // ALIGN * ALIGN
    out_ptr += b * stride_ob + h * stride_oh
    lse_ptr += head * Tq
    if starts_q_ptr is not None:
        sequence, number = sequence_tile(number, starts_q_ptr, sequences, BLOCK_M)
        begin_q, Tq = sequence_bounds(sequence, starts_q_ptr)
        begin_k, Tk = sequence_bounds(sequence, starts_k_ptr)
        q_ptr += begin_q * stride_qt
        k_ptr += begin_k * stride_kt
        v_ptr += begin_k * stride_vt
        out_ptr += begin_q * stride_ot
        lse_ptr += begin_q
        if AT_END:
            query_offset = Tk - Tq
        # A tile behind its sequence has no keys to visit.
        Tk = tl.where(number * BLOCK_M < Tq, Tk, 0)
    if mask_ptr is not None:
        mask_ptr += b * stride_mb + h * stride_mh
    if bias_ptr is not None:
        bias_ptr += b * stride_bb + h * stride_bh
    if distance_ptr is not None:
        distance_ptr += b * stride_rb + h * stride_rh
    if padding_ptr is not None:
        padding_ptr += b * stride_pb
    if global_ptr is not None:
        global_ptr += b * stride_gb

    query_residue = number % step
    key_residue = residue_of(query_residue + query_offset, step)
    shift = shift_of(query_residue, key_residue, query_offset, step)
    begin_m = number // step * BLOCK_M
    rows = query_residue + step * (begin_m + tl.arange(0, BLOCK_M))
    exist = rows < Tq
    first = begin_m + shift
    last = tl.minimum(begin_m + BLOCK_M, units_of(Tq, query_residue, step)) - 1 + shift
    sees_all = False
    if HAS_GLOBAL:
        sees_all = holds_global(rows + query_offset, exist, global_tokens, global_ptr, stride_gt, T)
    ALL_EDGE: tl.constexpr = LATTICE or mask_ptr is not None
    begin, outside, lo, full_lo, full_hi, hi, end = key_tiles(
        first, last, units_of(Tk, key_residue, step), left, right, ahead, step, global_tokens, sees_all,
        HAS_GLOBAL, global_ptr is not None, ALL_EDGE, BLOCK_N,
    )  # fmt: skip
    edges = edge_count(begin, outside, lo, full_lo, full_hi, end, BLOCK_N)

    q_rows = rows.to(tl.int64) * stride_qt
    q = load_piece(q_ptr, q_rows, exist, stride_qd, D, 0, BLOCK_D)
    if REST_D > 0:
        q_rest = load_piece(q_ptr, q_rows, exist, stride_qd, D, BLOCK_D, REST_D)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if REST_DV > 0:
        acc_rest = tl.zeros([BLOCK_M, REST_DV], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
        highest = tl.zeros([BLOCK_M], tl.float32) + sink
        total += tl.where(sink == float("-inf"), 0.0, 1.0)
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    # Phase 0 visits the full tiles, phase 1 the edges.
    for PHASE in tl.static_range(1 if ALL_EDGE else 0, 2):
        tiles = edges if PHASE == 1 else (full_hi - full_lo) // BLOCK_N
        for tile in range(0, tiles):
            if PHASE == 1:
                start = edge_start(tile, begin, outside, lo, full_lo, full_hi, BLOCK_N)
            else:
                start = full_lo + tile * BLOCK_N
            units = start + tl.arange(0, BLOCK_N)
            cols = key_residue + step * units
            exist_k = None
            if PHASE == 1 or padding_ptr is not None:
                exist_k = unpadded(cols, Tk, padding_ptr, stride_ps)
            # Away from the window there may be a global token or none.
            if PHASE == 0 or global_ptr is None or (
                sees_all
                or (start >= lo and start < hi)
                or holds_global(cols, exist_k, global_tokens, global_ptr, stride_gt, T)
            ):  # fmt: skip
                k_rows = cols.to(tl.int64) * stride_kt
                k = load_piece(k_ptr, k_rows, exist_k, stride_kd, D, 0, BLOCK_D)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
                if REST_D > 0:
                    k_rest = load_piece(k_ptr, k_rows, exist_k, stride_kd, D, BLOCK_D, REST_D)
                    scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision=PRECISION)

                seen = exist_k
                if PHASE == 0 and FOLDED:
                    factor = scale * LOG2E
                else:
                    factor = 1.0
                    scores = scores_in_base_2(
                        scores,
                        rows,
                        cols,
                        Tq,
                        Tk,
                        scale,
                        softcap,
                        bias_ptr,
                        stride_bt,
                        stride_bs,
                        distance_ptr,
                        HAS_SOFTCAP,
                    )
                    if PHASE == 1:
                        visible = visible_tile(
                            rows, cols, Tq, Tk, left, right, ahead, dilation, query_offset,
                            mask_ptr, stride_mt, stride_ms, padding_ptr, stride_ps,
                            global_tokens, global_ptr, stride_gt, T, LATTICE, HAS_GLOBAL,
                        )  # fmt: skip
                        scores = tl.where(visible, scores, float("-inf"))
                        # A value that no query sees may be NaN, and 0 * NaN is NaN: such values are not read.
                        if ALL_EDGE or HAS_GLOBAL:
                            seen = any_visible(visible, 0)
                        else:
                            front = tl.minimum(right, ahead) // step
                            seen = exist_k & (units >= first - left // step) & (units <= last + front)
                    elif padding_ptr is not None:
                        scores = tl.where(exist_k[None, :], scores, float("-inf"))

                p, rescale, highest, total = online_softmax(scores, factor, highest, total)
                if HAS_DROPOUT:
                    first_col = key_residue + step * start
                    kept = kept_tile(
                        seed, (b * H + h).to(tl.int32), rows, first_col, step, threshold, CLASSES, BLOCK_N
                    )
                    p = tl.where(kept, p, 0.0)

                v_rows = cols.to(tl.int64) * stride_vt
                v = load_piece(v_ptr, v_rows, seen, stride_vd, DV, 0, BLOCK_DV)
                acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
                if REST_DV > 0:
                    v_rest = load_piece(v_ptr, v_rows, seen, stride_vd, DV, BLOCK_DV, REST_DV)
                    acc_rest = tl.dot(
                        p.to(v.dtype), v_rest, acc_rest * rescale[:, None], input_precision=PRECISION
                    )

    weight, lse = weight_and_lse(highest, total, keep_scale)
    out_rows = rows.to(tl.int64) * stride_ot
    store_piece(out_ptr, acc * weight[:, None], out_rows, exist, stride_od, DV, 0, BLOCK_DV)
    if REST_DV > 0:
        store_piece(out_ptr, acc_rest * weight[:, None], out_rows, exist, stride_od, DV, BLOCK_DV, REST_DV)
    tl.store(lse_ptr + rows, lse, mask=exist)
