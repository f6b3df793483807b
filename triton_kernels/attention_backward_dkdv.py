"""Gradients of attention's keys and values, without atomics.

    dv[j] = sum_i dropout(P)[i, j] dout[i]        dk[j] = scale * sum_i dproduct[i, j] q[i]

summed over the queries of every head that reads the key's. P, dproduct and what may be NaN: see
attention_backward_tiles. A program owns a tile of keys and walks the queries that see it, so that each sum is
made in one place and in one order; tiles of queries that see none of its keys are never visited (ranges,
residue classes: attention_mask). The products are computed transposed, [BLOCK_N, BLOCK_M], which leaves
dropout(P)^T and dproduct^T in the registers where the next product takes them.

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
from .attention_tiles import load_piece, store_piece


@triton.jit
def add_queries(
    dk, dv, k, v, unit, query_class, keys, q_rows, do_rows, lse_ptr, delta_ptr,
    sizes, window, tests, scores, dropout,
    LATTICE: tl.constexpr, HAS_GLOBAL: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    CLASSES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, TESTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add what the queries of units unit ... unit + BLOCK_M - 1 give to dk and dv.

    k, v: [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]. The tuples are those that the kernel makes.
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
        seed, head, threshold, keep_scale,
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
    mask_ptr, bias_ptr, distance_ptr, padding_ptr, global_ptr, seed_ptr,
    H, group, Tq, Tk, T, tiles,
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
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key head (equations: file head).

    Grid: (B * Hk * step * tiles,), where every residue class of keys has `tiles` tiles, fastest. The heads
    that read the key head follow each other. q, k, v, dout fp32, fp16 or bf16, any strides; lse and delta
    (B, H, Tq) fp32, contiguous; mask, padding, global_mask uint8 or None, broadcast dimensions with stride 0.
    Sums in fp32; P and dproduct are rounded to the inputs' type where they enter a product.
    """
    # Shows the compiler that ALIGN divides the strides of rows, so that they are read in vectors of so many.
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
    first = tile % tiles * BLOCK_N
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

    k = load_piece(
        k_ptr + b * stride_kb + hk * stride_kh, cols.to(tl.int64) * stride_kt, exist, stride_kd, D, 0, BLOCK_D
    )
    v = load_piece(
        v_ptr + b * stride_vb + hk * stride_vh,
        cols.to(tl.int64) * stride_vt,
        exist,
        stride_vd,
        DV,
        0,
        BLOCK_DV,
    )
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(group):
        h = hk * group + member
        head = b * H + h
        q_rows = (q_ptr + b * stride_qb + h * stride_qh, stride_qt, stride_qd)
        do_rows = (do_ptr + b * stride_yb + h * stride_yh, stride_yt, stride_yd)
        head_mask_ptr, head_bias_ptr = mask_ptr, bias_ptr
        head_distance_ptr, head_delta_ptr = distance_ptr, delta_ptr
        if mask_ptr is not None:
            head_mask_ptr = mask_ptr + b * stride_mb + h * stride_mh
        if delta_ptr is not None:
            head_delta_ptr = delta_ptr + head * Tq
        if bias_ptr is not None:
            head_bias_ptr = bias_ptr + b * stride_bb + h * stride_bh
        if distance_ptr is not None:
            head_distance_ptr = distance_ptr + b * stride_rb + h * stride_rh
        sizes = (Tq, Tk)
        window = (left, right, ahead, dilation, query_offset)
        tests = (
            head_mask_ptr, stride_mt, stride_ms, padding_ptr, stride_ps,
            global_tokens, global_ptr, stride_gt, T,
        )  # fmt: skip
        scores = (scale, softcap, head_bias_ptr, stride_bt, stride_bs, head_distance_ptr)
        dropout = (seed, head.to(tl.int32), threshold, keep_scale)
        for number in tl.range(edges, num_stages=1):
            unit = edge_start(number, begin, outside, lo, full_lo, full_hi, BLOCK_M)
            wanted = True
            if SPREAD:
                rows = query_residue + step * (unit + tl.arange(0, BLOCK_M))
                sees_all = holds_global(
                    rows + query_offset, rows < Tq, global_tokens, global_ptr, stride_gt, T
                )
                wanted = seen_by_all | sees_all | ((unit >= lo) & (unit < hi))
            if wanted:
                dk, dv = add_queries(
                    dk, dv, k, v, unit, (query_residue, step), (first_col, cols), q_rows, do_rows,
                    lse_ptr + head * Tq, head_delta_ptr, sizes, window, tests, scores, dropout,
                    LATTICE, HAS_GLOBAL, HAS_SOFTCAP, HAS_DROPOUT, CLASSES, D, DV,
                    NEED_DK, NEED_DV, True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
        for unit in tl.range(full_lo, full_hi, BLOCK_M):
            dk, dv = add_queries(
                dk, dv, k, v, unit, (query_residue, step), (first_col, cols), q_rows, do_rows,
                lse_ptr + head * Tq, head_delta_ptr, sizes, window, tests, scores, dropout,
                LATTICE, HAS_GLOBAL, HAS_SOFTCAP, HAS_DROPOUT, CLASSES, D, DV,
                NEED_DK, NEED_DV, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip

    # Full tiles did not test for padding: what they gave to a padded key ends here.
    if NEED_DK:
        dk = tl.where(exist[:, None], dk * scale, 0.0)
        store_piece(
            dk_ptr + b * stride_dkb + hk * stride_dkh,
            dk,
            cols.to(tl.int64) * stride_dkt,
            cols < Tk,
            stride_dkd,
            D,
            0,
            BLOCK_D,
        )
    if NEED_DV:
        dv = tl.where(exist[:, None], dv, 0.0)
        store_piece(
            dv_ptr + b * stride_dvb + hk * stride_dvh,
            dv,
            cols.to(tl.int64) * stride_dvt,
            cols < Tk,
            stride_dvd,
            DV,
            0,
            BLOCK_DV,
        )
