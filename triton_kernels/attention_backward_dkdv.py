"""Gradients of attention's keys and values, without atomics.

    dv[j] = sum_i dropout(P)[i, j] dout[i]        dk[j] = scale * sum_i dproduct[i, j] q[i]

summed over the queries of every head that reads the key's. P, dproduct and what may be NaN: see
attention_backward_tiles. A program owns a tile of keys and walks the queries that see it, so that each sum is
made in one place and in one order; tiles of queries that see none of its keys are never visited (ranges,
residue classes: attention_mask). The products are computed transposed, [BLOCK_N, BLOCK_M], which leaves
dropout(P)^T and dproduct^T in the registers where the next product takes them. Sequences of unequal length:
as in attention_forward, but a program finds its sequence by the keys.

Legend: see attention_backward_tiles; Hk key and value heads.
"""

import triton
import triton.language as tl

from .attention_backward_tiles import UNSPECIALIZED, load_residuals, score_gradients
from .attention_mask import (
    any_visible,
    edge_count,
    edge_start,
    holds_global,
    query_tiles,
    residue_of,
    shift_of,
    units_of,
    unpadded,
    visible_tile,
)
from .attention_sequences import sequence_bounds, sequence_tile
from .attention_tiles import load_piece, store_piece


@triton.jit
def add_queries(
    dk, dv, k, v, member, heads, unit, query_class, keys, q_rows, do_rows, lse_ptr, delta_ptr,
    sizes, window, tests, scores, dropout,
    LATTICE: tl.constexpr, HAS_GLOBAL: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    CLASSES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, TESTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add what the queries of units unit ... unit + BLOCK_M - 1 of a head give to dk and dv.

    k, v: [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]. member: the head's number in its group, at whose first head
    the pointers stand. The tuples are those that the kernel makes.
    """
    query_residue, step = query_class
    first_col, cols = keys
    Tq, Tk = sizes
    left, right, ahead, dilation, query_offset = window
    mask_ptr, stride_mt, stride_ms, padding_ptr, stride_ps, global_tokens, global_ptr, stride_gt, T = tests
    scale, softcap, bias_ptr, stride_bt, stride_bs, distance_ptr = scores
    seed, head, threshold, keep_scale = dropout
    q_ptr, stride_qt, stride_qd = q_rows
    do_ptr, stride_yt, stride_yd = do_rows
    residuals, stride_qh, stride_yh, stride_mh, stride_bh, stride_rh = heads

    q_ptr += member * stride_qh
    do_ptr += member * stride_yh
    lse_ptr += member * residuals
    if delta_ptr is not None:
        delta_ptr += member * residuals
    if mask_ptr is not None:
        mask_ptr += member * stride_mh
    if bias_ptr is not None:
        bias_ptr += member * stride_bh
    if distance_ptr is not None:
        distance_ptr += member * stride_rh
    rows = query_residue + step * (unit + tl.arange(0, BLOCK_M))
    exist = None
    visible = None
    if TESTED:
        exist = rows < Tq
    lse, delta = load_residuals(lse_ptr, delta_ptr, rows, exist)
    if TESTED:
        visible = visible_tile(
            rows, cols, Tq, Tk, left, right, ahead, dilation, query_offset,
            mask_ptr, stride_mt, stride_ms, padding_ptr, stride_ps, global_tokens, global_ptr, stride_gt, T,
            LATTICE, HAS_GLOBAL,
        )  # fmt: skip
        exist = any_visible(visible, 1)
    if bias_ptr is not None or distance_ptr is not None:
        seeing = lse < float("inf")
        exist = exist & seeing if TESTED else seeing
    q = load_piece(q_ptr, rows.to(tl.int64) * stride_qt, exist, stride_qd, D, 0, BLOCK_D)
    do = load_piece(do_ptr, rows.to(tl.int64) * stride_yt, exist, stride_yd, DV, 0, BLOCK_DV)
    product = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    dp = product
    if NEED_DK:
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    used, _, dproduct = score_gradients(
        tl.trans(product), tl.trans(dp), lse, delta, visible, None, rows, cols, first_col, step, Tq, Tk,
        scale, softcap, bias_ptr, stride_bt, stride_bs, distance_ptr,
        seed, (head + member).to(tl.int32), threshold, keep_scale,
        HAS_SOFTCAP, HAS_DROPOUT, TESTED, CLASSES,
    )  # fmt: skip
    if NEED_DV:
        dv = tl.dot(tl.trans(used).to(do.dtype), do, dv, input_precision=PRECISION)
    if NEED_DK:
        dk = tl.dot(tl.trans(dproduct).to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    mask_ptr, bias_ptr, distance_ptr, padding_ptr, global_ptr, seed_ptr, starts_q_ptr, starts_k_ptr,
    H, group, Tq, Tk, T, tiles, sequences,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_yb, stride_yh, stride_yt, stride_yd,
    stride_dkb, stride_dkh, stride_dkt, stride_dkd,
    stride_dvb, stride_dvh, stride_dvt, stride_dvd,
    stride_mb, stride_mh, stride_mt, stride_ms,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_rb, stride_rh,
    stride_pb, stride_ps, stride_gb, stride_gt,
    scale, softcap, left, right, ahead, dilation, step, query_offset, global_tokens, threshold, keep_scale,
    LATTICE: tl.constexpr, CLASSES: tl.constexpr, HAS_GLOBAL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, AT_END: tl.constexpr, GROUPED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key head (equations: file head).

    Grid: (B * Hk * step * tiles,), where every residue class of keys has `tiles` tiles, fastest; with starts
    (Hk * slots,). The heads that read the key head follow each other; GROUPED: there are several. q, k, v,
    dout fp32, fp16 or bf16, any strides; lse and delta (B, H, Tq) fp32, contiguous; mask, padding and
    global_mask uint8 or None, broadcast dimensions with stride 0. Sums in fp32; P and dproduct are rounded to
    the inputs' type where they enter a product.
    """
    # Shows the compiler that ALIGN divides strides, so that rows are read in vectors of so many.
    stride_qh = stride_qh // ALIGN * ALIGN
    stride_yh = stride_yh // ALIGN * ALIGN
    stride_qt = stride_qt // ALIGN * ALIGN
    stride_kt = stride_kt // ALIGN * ALIGN
    stride_vt = stride_vt // ALIGN * ALIGN
    stride_yt = stride_yt // ALIGN * ALIGN
    SPREAD: tl.constexpr = global_ptr is not None
    ALL_EDGE: tl.constexpr = LATTICE or mask_ptr is not None
    tile = tl.program_id(0) % (tiles * step)
    kv_head = (tl.program_id(0) // (tiles * step)).to(tl.int64)
    b, hk = kv_head // (H // group), kv_head % (H // group)
    residue = tile // tiles
    number = tile % tiles

    k_ptr += b * stride_kb + hk * stride_kh
    v_ptr += b * stride_vb + hk * stride_vh
    residuals = Tq
    begin_k = 0
    if starts_q_ptr is not None:
        sequence, number = sequence_tile(number, starts_k_ptr, sequences, BLOCK_N)
        begin_q, Tq = sequence_bounds(sequence, starts_q_ptr)
        begin_k, Tk = sequence_bounds(sequence, starts_k_ptr)
        q_ptr += begin_q * stride_qt
        do_ptr += begin_q * stride_yt
        k_ptr += begin_k * stride_kt
        v_ptr += begin_k * stride_vt
        lse_ptr += begin_q
        if delta_ptr is not None:
            delta_ptr += begin_q
        if AT_END:
            query_offset = Tk - Tq
        # A tile behind its sequence has no queries to visit.
        Tq = tl.where(number * BLOCK_N < Tk, Tq, 0)
    first = number * BLOCK_N
    first_col = residue + step * first
    cols = first_col + step * tl.arange(0, BLOCK_N)
    # A class whose keys have ended before this tile reaches nothing.
    last = tl.minimum(first + BLOCK_N, units_of(Tk, residue, step)) - 1
    query_residue = residue_of(residue - query_offset, step)
    shift = shift_of(query_residue, residue, query_offset, step)

    if padding_ptr is not None:
        padding_ptr += b * stride_pb
    if global_ptr is not None:
        global_ptr += b * stride_gb
    exist = unpadded(cols, Tk, padding_ptr, stride_ps)
    seen_by_all = False
    if HAS_GLOBAL:
        seen_by_all = holds_global(cols, exist, global_tokens, global_ptr, stride_gt, T)
    begin, outside, lo, full_lo, full_hi, hi, end = query_tiles(
        first, last, units_of(Tq, query_residue, step), shift, left, right, ahead, step,
        global_tokens, seen_by_all, HAS_GLOBAL, SPREAD, ALL_EDGE, BLOCK_M,
    )  # fmt: skip
    edges = edge_count(begin, outside, lo, full_lo, full_hi, end, BLOCK_M)

    k = load_piece(k_ptr, cols.to(tl.int64) * stride_kt, exist, stride_kd, D, 0, BLOCK_D)
    v = load_piece(v_ptr, cols.to(tl.int64) * stride_vt, exist, stride_vd, DV, 0, BLOCK_DV)
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # One loop over the heads and their tiles: of two, one in the other, the compiler spills registers.
    q_ptr += (b * stride_qb + hk * group * stride_qh) // ALIGN * ALIGN
    do_ptr += (b * stride_yb + hk * group * stride_yh) // ALIGN * ALIGN
    first_head = b * H + hk * group
    lse_ptr += first_head * residuals
    if delta_ptr is not None:
        delta_ptr += first_head * residuals
    if mask_ptr is not None:
        mask_ptr += b * stride_mb + hk * group * stride_mh
    if bias_ptr is not None:
        bias_ptr += b * stride_bb + hk * group * stride_bh
    if distance_ptr is not None:
        distance_ptr += b * stride_rb + hk * group * stride_rh
    heads = (residuals, stride_qh, stride_yh, stride_mh, stride_bh, stride_rh)
    q_rows = (q_ptr, stride_qt, stride_qd)
    do_rows = (do_ptr, stride_yt, stride_yd)
    sizes = (Tq, Tk)
    window = (left, right, ahead, dilation, query_offset)
    tests = (mask_ptr, stride_mt, stride_ms, padding_ptr, stride_ps, global_tokens, global_ptr, stride_gt, T)
    scores = (scale, softcap, bias_ptr, stride_bt, stride_bs, distance_ptr)
    dropout = (seed, first_head, threshold, keep_scale)
    for turn in tl.range(edges * group, num_stages=1):
        if GROUPED:
            member = (turn // edges).to(tl.int64)
            number = turn % edges
        else:
            member = 0
            number = turn
        unit = edge_start(number, begin, outside, lo, full_lo, full_hi, BLOCK_M)
        wanted = True
        if SPREAD:
            rows = query_residue + step * (unit + tl.arange(0, BLOCK_M))
            sees_all = holds_global(rows + query_offset, rows < Tq, global_tokens, global_ptr, stride_gt, T)
            wanted = seen_by_all | sees_all | ((unit >= lo) & (unit < hi))
        if wanted:
            dk, dv = add_queries(
                dk, dv, k, v, member, heads, unit, (query_residue, step), (first_col, cols), q_rows, do_rows,
                lse_ptr, delta_ptr, sizes, window, tests, scores, dropout,
                LATTICE, HAS_GLOBAL, HAS_SOFTCAP, HAS_DROPOUT, CLASSES, D, DV,
                NEED_DK, NEED_DV, True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    tiles_each = (full_hi - full_lo) // BLOCK_M
    for turn in tl.range(tiles_each * group):
        if GROUPED:
            member = (turn // tiles_each).to(tl.int64)
            number = turn % tiles_each
        else:
            member = 0
            number = turn
        dk, dv = add_queries(
            dk, dv, k, v, member, heads, full_lo + number * BLOCK_M, (query_residue, step), (first_col, cols),
            q_rows, do_rows, lse_ptr, delta_ptr, sizes, window, tests, scores, dropout,
            LATTICE, HAS_GLOBAL, HAS_SOFTCAP, HAS_DROPOUT, CLASSES, D, DV,
            NEED_DK, NEED_DV, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip

    own = begin_k + cols.to(tl.int64)
    # Full tiles did not test for padding: what they gave to a padded key ends here.
    if NEED_DK:
        dk = tl.where(exist[:, None], dk * scale, 0.0)
        dk_ptr += b * stride_dkb + hk * stride_dkh
        store_piece(dk_ptr, dk, own * stride_dkt, cols < Tk, stride_dkd, D, 0, BLOCK_D)
    if NEED_DV:
        dv = tl.where(exist[:, None], dv, 0.0)
        dv_ptr += b * stride_dvb + hk * stride_dvh
        store_piece(dv_ptr, dv, own * stride_dvt, cols < Tk, stride_dvd, DV, 0, BLOCK_DV)
