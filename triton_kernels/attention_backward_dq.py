"""Gradient of attention's queries.

    dq[i] = scale * sum_j dproduct[i, j] k[j]

dproduct and what may be NaN: see attention_backward_tiles. A program owns a tile of queries and walks the
keys that they see, as the forward does, so that each sum is made in one place and in one order (ranges,
residue classes: attention_mask). Sequences of unequal length: as in attention_forward.

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
    key_tiles,
    residue_of,
    shift_of,
    units_of,
    unpadded,
    visible_tile,
)
from .attention_sequences import sequence_bounds, sequence_tile
from .attention_tiles import load_piece, store_piece


@triton.jit
def add_keys(
    dq, q, do, lse, delta, rows, unit, key_class, k_rows, v_rows, sizes, window, tests, scores, dropout,
    LATTICE: tl.constexpr, HAS_GLOBAL: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    CLASSES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    TESTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add what the keys of units unit ... unit + BLOCK_N - 1 give to dq, without scale.

    q, do: [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]. The tuples are those that the kernel makes.
    """
    residue, step = key_class
    Tq, Tk = sizes
    left, right, ahead, dilation, query_offset = window
    mask_ptr, stride_mt, stride_ms, padding_ptr, stride_ps, global_tokens, global_ptr, stride_gt, T = tests
    scale, softcap, bias_ptr, stride_bt, stride_bs, distance_ptr = scores
    seed, head, threshold, keep_scale = dropout
    k_ptr, stride_kt, stride_kd = k_rows
    v_ptr, stride_vt, stride_vd = v_rows

    first_col = residue + step * unit
    cols = first_col + step * tl.arange(0, BLOCK_N)
    exist = None
    visible = None
    alive = None
    if TESTED:
        visible = visible_tile(
            rows, cols, Tq, Tk, left, right, ahead, dilation, query_offset,
            mask_ptr, stride_mt, stride_ms, padding_ptr, stride_ps, global_tokens, global_ptr, stride_gt, T,
            LATTICE, HAS_GLOBAL,
        )  # fmt: skip
        exist = any_visible(visible, 0)
    elif padding_ptr is not None:
        exist = unpadded(cols, Tk, padding_ptr, stride_ps)
        alive = exist[None, :]
    k = load_piece(k_ptr, cols.to(tl.int64) * stride_kt, exist, stride_kd, D, 0, BLOCK_D)
    v = load_piece(v_ptr, cols.to(tl.int64) * stride_vt, exist, stride_vd, DV, 0, BLOCK_DV)
    product = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    _, _, dproduct = score_gradients(
        product, dp, lse, delta, visible, alive, rows, cols, first_col, step, Tq, Tk,
        scale, softcap, bias_ptr, stride_bt, stride_bs, distance_ptr,
        seed, head, threshold, keep_scale,
        HAS_SOFTCAP, HAS_DROPOUT, TESTED, CLASSES,
    )  # fmt: skip
    return tl.dot(dproduct.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    mask_ptr, bias_ptr, distance_ptr, padding_ptr, global_ptr, seed_ptr, starts_q_ptr, starts_k_ptr,
    H, group, Tq, Tk, T, tiles, sequences,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_yb, stride_yh, stride_yt, stride_yd,
    stride_dqb, stride_dqh, stride_dqt, stride_dqd,
    stride_mb, stride_mh, stride_mt, stride_ms,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_rb, stride_rh,
    stride_pb, stride_ps, stride_gb, stride_gt,
    scale, softcap, left, right, ahead, dilation, step, query_offset, global_tokens, threshold, keep_scale,
    LATTICE: tl.constexpr, CLASSES: tl.constexpr, HAS_GLOBAL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, AT_END: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head (equation: file head).

    Grid: (B * H * step * tiles,), where every residue class of queries has `tiles` tiles, fastest and the
    last first, because with causality those take longest; with starts (H * slots,). q, k, v, dout fp32, fp16
    or bf16, any strides; lse and delta (B, H, Tq) fp32, contiguous; mask, padding, global_mask uint8 or None,
    broadcast dimensions with stride 0. Sums in fp32; dproduct is rounded to the inputs' type in its product.
    """
    # Shows the compiler that ALIGN divides the strides of rows, so that they are read in vectors of so many.
    stride_qt = stride_qt // ALIGN * ALIGN
    stride_kt = stride_kt // ALIGN * ALIGN
    stride_vt = stride_vt // ALIGN * ALIGN
    stride_yt = stride_yt // ALIGN * ALIGN
    SPREAD: tl.constexpr = global_ptr is not None
    ALL_EDGE: tl.constexpr = LATTICE or mask_ptr is not None
    tile = tl.program_id(0) % (tiles * step)
    head = (tl.program_id(0) // (tiles * step)).to(tl.int64)
    b, h = head // H, head % H
    hk = h // group
    query_residue = tile // tiles
    number = tiles - 1 - tile % tiles

    q_ptr += b * stride_qb + h * stride_qh
    do_ptr += b * stride_yb + h * stride_yh
    k_ptr += b * stride_kb + hk * stride_kh
    v_ptr += b * stride_vb + hk * stride_vh
    lse_ptr += head * Tq
    delta_ptr += head * Tq
    begin_q = 0
    if starts_q_ptr is not None:
        sequence, number = sequence_tile(number, starts_q_ptr, sequences, BLOCK_M)
        begin_q, Tq = sequence_bounds(sequence, starts_q_ptr)
        begin_k, Tk = sequence_bounds(sequence, starts_k_ptr)
        q_ptr += begin_q * stride_qt
        do_ptr += begin_q * stride_yt
        k_ptr += begin_k * stride_kt
        v_ptr += begin_k * stride_vt
        lse_ptr += begin_q
        delta_ptr += begin_q
        if AT_END:
            query_offset = Tk - Tq
        # A tile behind its sequence has no keys to visit.
        Tk = tl.where(number * BLOCK_M < Tq, Tk, 0)
    first = number * BLOCK_M
    rows = query_residue + step * (first + tl.arange(0, BLOCK_M))
    exist = rows < Tq
    last = tl.minimum(first + BLOCK_M, units_of(Tq, query_residue, step)) - 1
    residue = residue_of(query_residue + query_offset, step)
    shift = shift_of(query_residue, residue, query_offset, step)

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
    sees_all = False
    if HAS_GLOBAL:
        sees_all = holds_global(rows + query_offset, exist, global_tokens, global_ptr, stride_gt, T)
    begin, outside, lo, full_lo, full_hi, hi, end = key_tiles(
        first + shift, last + shift, units_of(Tk, residue, step), left, right, ahead, step,
        global_tokens, sees_all, HAS_GLOBAL, SPREAD, ALL_EDGE, BLOCK_N,
    )  # fmt: skip
    edges = edge_count(begin, outside, lo, full_lo, full_hi, end, BLOCK_N)

    lse, delta = load_residuals(lse_ptr, delta_ptr, rows, exist)
    if bias_ptr is not None or distance_ptr is not None:
        readable = exist & (lse < float("inf"))
    else:
        readable = exist
    q = load_piece(q_ptr, rows.to(tl.int64) * stride_qt, exist, stride_qd, D, 0, BLOCK_D)
    do = load_piece(do_ptr, rows.to(tl.int64) * stride_yt, readable, stride_yd, DV, 0, BLOCK_DV)
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    k_rows = (k_ptr, stride_kt, stride_kd)
    v_rows = (v_ptr, stride_vt, stride_vd)
    sizes = (Tq, Tk)
    window = (left, right, ahead, dilation, query_offset)
    tests = (mask_ptr, stride_mt, stride_ms, padding_ptr, stride_ps, global_tokens, global_ptr, stride_gt, T)
    scores = (scale, softcap, bias_ptr, stride_bt, stride_bs, distance_ptr)
    dropout = (seed, head.to(tl.int32), threshold, keep_scale)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for number in tl.range(edges, num_stages=1):
        unit = edge_start(number, begin, outside, lo, full_lo, full_hi, BLOCK_N)
        wanted = True
        if SPREAD:
            cols = residue + step * (unit + tl.arange(0, BLOCK_N))
            seen_by_all = holds_global(cols, cols < Tk, global_tokens, global_ptr, stride_gt, T)
            wanted = sees_all | seen_by_all | ((unit >= lo) & (unit < hi))
        if wanted:
            dq = add_keys(
                dq, q, do, lse, delta, rows, unit, (residue, step), k_rows, v_rows,
                sizes, window, tests, scores, dropout,
                LATTICE, HAS_GLOBAL, HAS_SOFTCAP, HAS_DROPOUT, CLASSES, D, DV,
                True, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    for unit in tl.range(full_lo, full_hi, BLOCK_N):
        dq = add_keys(
            dq, q, do, lse, delta, rows, unit, (residue, step), k_rows, v_rows,
            sizes, window, tests, scores, dropout,
            LATTICE, HAS_GLOBAL, HAS_SOFTCAP, HAS_DROPOUT, CLASSES, D, DV,
            False, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    dq_ptr += b * stride_dqb + h * stride_dqh
    own = begin_q + rows.to(tl.int64)
    store_piece(dq_ptr, dq * scale, own * stride_dqt, exist, stride_dqd, D, 0, BLOCK_D)
