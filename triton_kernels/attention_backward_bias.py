"""Gradient of attention's bias, summed over the dimensions that the bias is broadcast along, without atomics.

    dbias[b', h', i', j'] = sum over all (b, h, i, j) that read bias[b', h', i', j'] of ds[b, h, i, j]

ds: see attention_backward_tiles. A program owns a tile of the bias and walks all that reads it, in one order.
Where few tiles are read by many, several programs share a tile's readers, each writes a partial sum, and the
partial sums are added in order.

Legend: see attention_backward_tiles. Every query reads a bias of one row, every key one of one column.
"""

import triton
import triton.language as tl

from .attention_backward_tiles import UNSPECIALIZED, load_residuals, score_gradients
from .attention_mask import holds_global, key_tiles, visible_tile
from .attention_tiles import load_piece


@triton.jit
def add_readers(
    total, rows, begin, end, q_rows, do_rows, k_rows, v_rows, lse_ptr, delta_ptr,
    sizes, window, tests, scores, dropout,
    LATTICE: tl.constexpr, HAS_GLOBAL: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add ds of queries `rows` and the key tiles begin ... end - 1. The tuples are those of the kernel."""
    Tq, Tk = sizes
    left, right, ahead, dilation, query_offset = window
    mask_ptr, stride_mt, stride_ms, padding_ptr, stride_ps, global_tokens, global_ptr, stride_gt, T = tests
    scale, softcap, bias_ptr, stride_bt, stride_bs, distance_ptr = scores
    seed, head, threshold, keep_scale = dropout
    q_ptr, stride_qt, stride_qd = q_rows
    do_ptr, stride_yt, stride_yd = do_rows
    k_ptr, stride_kt, stride_kd = k_rows
    v_ptr, stride_vt, stride_vd = v_rows
    for first_col in range(begin, end, BLOCK_N):
        # Loaded inside the loop, which takes one turn at most but for a bias of one column, and often none.
        exist = rows < Tq
        lse, delta = load_residuals(lse_ptr, delta_ptr, rows, exist)
        exist = exist & (lse < float("inf"))
        q = load_piece(q_ptr, rows.to(tl.int64) * stride_qt, exist, stride_qd, D, 0, BLOCK_D)
        do = load_piece(do_ptr, rows.to(tl.int64) * stride_yt, exist, stride_yd, DV, 0, BLOCK_DV)
        cols = first_col + tl.arange(0, BLOCK_N)
        k = load_piece(k_ptr, cols.to(tl.int64) * stride_kt, cols < Tk, stride_kd, D, 0, BLOCK_D)
        v = load_piece(v_ptr, cols.to(tl.int64) * stride_vt, cols < Tk, stride_vd, DV, 0, BLOCK_DV)
        visible = visible_tile(
            rows, cols, Tq, Tk, left, right, ahead, dilation, query_offset,
            mask_ptr, stride_mt, stride_ms, padding_ptr, stride_ps, global_tokens, global_ptr, stride_gt, T,
            LATTICE, HAS_GLOBAL,
        )  # fmt: skip
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        _, ds, _ = score_gradients(
            product, dp, lse, delta, visible, None, rows, cols, first_col, 1, Tq, Tk,
            scale, softcap, bias_ptr, stride_bt, stride_bs, distance_ptr,
            seed, head, threshold, keep_scale,
            HAS_SOFTCAP, HAS_DROPOUT, True, False,
        )  # fmt: skip
        total += ds
    return total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_bias_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, sum_ptr,
    mask_ptr, bias_ptr, distance_ptr, padding_ptr, global_ptr, seed_ptr,
    H, group, Tq, Tk, T,
    bias_batches, bias_heads, shared_heads, tiles_m, tiles_n, walked_m, readers, readers_each,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_yb, stride_yh, stride_yt, stride_yd,
    stride_mb, stride_mh, stride_mt, stride_ms,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_rb, stride_rh,
    stride_pb, stride_ps, stride_gb, stride_gt,
    stride_sn, stride_sb, stride_sh, stride_st, stride_ss,
    scale, softcap, left, right, ahead, dilation, query_offset, global_tokens, threshold, keep_scale,
    LATTICE: tl.constexpr, HAS_GLOBAL: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    ONE_ROW: tl.constexpr, ONE_COLUMN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The sum of ds over `readers_each` readers of one tile of the bias (equation: file head).

    A reader is a batch and a head that share the tile's plane and, with ONE_ROW, one of `walked_m` query
    tiles; with ONE_COLUMN it takes all key tiles in turn. Grid: (parts * B' * H' * tiles_m * tiles_n,), the
    last fastest. sums (parts, B', H', Tq', Tk') in fp32 or, of one part, the bias's type, any strides. Tiles
    hold adjacent positions, also of a dilated window. Other types: as attention_backward_dq_kernel.
    """
    # Shows the compiler that ALIGN divides the strides of rows, so that they are read in vectors of so many.
    stride_qt = stride_qt // ALIGN * ALIGN
    stride_kt = stride_kt // ALIGN * ALIGN
    stride_vt = stride_vt // ALIGN * ALIGN
    stride_yt = stride_yt // ALIGN * ALIGN
    tile_n = tl.program_id(0) % tiles_n
    tile_m = tl.program_id(0) // tiles_n % tiles_m
    plane = tl.program_id(0) // tiles_n // tiles_m
    bias_h = plane % bias_heads
    bias_b = plane // bias_heads % bias_batches
    part = plane // bias_heads // bias_batches

    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    sizes = (Tq, Tk)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for reader in range(part * readers_each, tl.minimum(part * readers_each + readers_each, readers)):
        member = reader // walked_m
        b = (bias_b + member // shared_heads).to(tl.int64)
        h = (bias_h + member % shared_heads).to(tl.int64)
        head, hk = b * H + h, h // group
        first = (reader % walked_m if ONE_ROW else tile_m) * BLOCK_M
        rows = first + tl.arange(0, BLOCK_M)
        reader_mask_ptr, reader_distance_ptr = mask_ptr, distance_ptr
        reader_padding_ptr, reader_global_ptr = padding_ptr, global_ptr
        if distance_ptr is not None:
            reader_distance_ptr = distance_ptr + b * stride_rb + h * stride_rh
        if mask_ptr is not None:
            reader_mask_ptr = mask_ptr + b * stride_mb + h * stride_mh
        if padding_ptr is not None:
            reader_padding_ptr = padding_ptr + b * stride_pb
        if global_ptr is not None:
            reader_global_ptr = global_ptr + b * stride_gb
        sees_all = False
        if HAS_GLOBAL:
            sees_all = holds_global(
                rows + query_offset, rows < Tq, global_tokens, reader_global_ptr, stride_gt, T
            )
        begin, outside, lo, _, _, _, end = key_tiles(
            first + query_offset, tl.minimum(first + BLOCK_M, Tq) - 1 + query_offset, Tk,
            left, right, ahead, 1, global_tokens, sees_all,
            HAS_GLOBAL, global_ptr is not None, True, BLOCK_N,
        )  # fmt: skip
        if not ONE_COLUMN:
            own = tile_n * BLOCK_N
            visited = ((own >= begin) & (own < outside)) | ((own >= lo) & (own < end))
            begin = own
            end = tl.where(visited, own + BLOCK_N, own)
        tests = (
            reader_mask_ptr, stride_mt, stride_ms, reader_padding_ptr, stride_ps,
            global_tokens, reader_global_ptr, stride_gt, T,
        )  # fmt: skip
        total = add_readers(
            total, rows, begin, end,
            (q_ptr + b * stride_qb + h * stride_qh, stride_qt, stride_qd),
            (do_ptr + b * stride_yb + h * stride_yh, stride_yt, stride_yd),
            (k_ptr + b * stride_kb + hk * stride_kh, stride_kt, stride_kd),
            (v_ptr + b * stride_vb + hk * stride_vh, stride_vt, stride_vd),
            lse_ptr + head * Tq, delta_ptr + head * Tq,
            sizes, (left, right, ahead, dilation, query_offset), tests,
            (
                scale, softcap, bias_ptr + b * stride_bb + h * stride_bh, stride_bt, stride_bs,
                reader_distance_ptr,
            ),
            (seed, head.to(tl.int32), threshold, keep_scale),
            LATTICE, HAS_GLOBAL, HAS_SOFTCAP, HAS_DROPOUT, D, DV,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip

    bias_rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    bias_cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_exist, cols_exist = bias_rows < Tq, bias_cols < Tk
    if ONE_ROW:
        total = tl.sum(total, 0, keep_dims=True)
        bias_rows = tl.arange(0, 1)
        rows_exist = bias_rows == 0
    if ONE_COLUMN:
        total = tl.sum(total, 1, keep_dims=True)
        bias_cols = tl.arange(0, 1)
        cols_exist = bias_cols == 0
    sum_ptr += part.to(tl.int64) * stride_sn + bias_b.to(tl.int64) * stride_sb
    sum_ptr += bias_h.to(tl.int64) * stride_sh
    offsets = bias_rows.to(tl.int64)[:, None] * stride_st + bias_cols.to(tl.int64)[None, :] * stride_ss
    tl.store(
        sum_ptr + offsets,
        total.to(sum_ptr.dtype.element_ty),
        mask=rows_exist[:, None] & cols_exist[None, :],
    )
