"""Gradient of a bias that depends on distance alone, without atomics and without a matrix.

    ddistance[b', h', r] = sum of ds[b, h, i, j] over j - i + Tq - 1 = r and all (b, h) that read it

ds: see attention_backward_tiles. Square tiles on one diagonal of tiles hold the same distances at the same
places, so a program owns such a diagonal, adds its tiles to each other and sums what it has along diagonals
once, at the end. Two neighbouring diagonals of tiles share distances: each writes its own sums, and these are
added in order.

Legend: see attention_backward_tiles. BLOCK_M = BLOCK_N, called BLOCK.
"""

import triton
import triton.language as tl

from .attention_backward_bias import add_readers
from .attention_backward_tiles import UNSPECIALIZED
from .attention_mask import holds_global, key_tiles


@triton.jit
def diagonal_sums(tile, BLOCK: tl.constexpr):
    """sums[c] = sum over i of tile[i, i + c - (BLOCK - 1)], [2 * BLOCK]; the last is zero."""
    columns = tl.arange(0, BLOCK)[:, None] + tl.arange(0, 2 * BLOCK)[None, :] - (BLOCK - 1)
    inside = (columns >= 0) & (columns < BLOCK)
    # Every column twice: with a source narrower than its index AMD's compiler fails where rows are few.
    doubled = tl.reshape(tl.join(tile, tile), [BLOCK, 2 * BLOCK])
    moved = tl.gather(doubled, tl.where(inside, 2 * columns, 0), 1)  # [BLOCK, 2 * BLOCK]
    return tl.sum(tl.where(inside, moved, 0.0), 0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_distance_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, sum_ptr,
    mask_ptr, bias_ptr, distance_ptr, padding_ptr, global_ptr, seed_ptr,
    H, group, Tq, Tk, T,
    bias_batches, bias_heads, shared_heads, tiles_m, tiles_n, readers, readers_each,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_yb, stride_yh, stride_yt, stride_yd,
    stride_mb, stride_mh, stride_mt, stride_ms,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_rb, stride_rh,
    stride_pb, stride_ps, stride_gb, stride_gt,
    scale, softcap, left, right, ahead, dilation, query_offset, global_tokens, threshold, keep_scale,
    LATTICE: tl.constexpr, HAS_GLOBAL: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The sums of ds along one diagonal of tiles, over `readers_each` of its readers (equation: file head).

    A reader is a batch and a head that share the bias. Grid: (parts * B' * H' * diagonals,), the last one
    fastest, from the last queries and first keys on. sums (parts, B', H', diagonals, 2 * BLOCK) fp32,
    contiguous. Other types: as attention_backward_dq_kernel; tiles: as attention_backward_bias_kernel.
    """
    # Shows the compiler that ALIGN divides the strides of rows, so that they are read in vectors of so many.
    stride_qt = stride_qt // ALIGN * ALIGN
    stride_kt = stride_kt // ALIGN * ALIGN
    stride_vt = stride_vt // ALIGN * ALIGN
    stride_yt = stride_yt // ALIGN * ALIGN
    diagonals = tiles_m + tiles_n - 1
    diagonal = tl.program_id(0) % diagonals
    plane = tl.program_id(0) // diagonals
    bias_h = plane % bias_heads
    bias_b = plane // bias_heads % bias_batches
    part = plane // bias_heads // bias_batches
    tile_m = tl.maximum(tiles_m - 1 - diagonal, 0)
    tile_n = tl.maximum(diagonal - (tiles_m - 1), 0)
    tiles = tl.minimum(tiles_m - tile_m, tiles_n - tile_n)

    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for visit in range(
        part * readers_each * tiles, tl.minimum(part * readers_each + readers_each, readers) * tiles
    ):
        reader = visit // tiles
        b = (bias_b + reader // shared_heads).to(tl.int64)
        h = (bias_h + reader % shared_heads).to(tl.int64)
        head, hk = b * H + h, h // group
        first = (tile_m + visit % tiles) * BLOCK_M
        own = (tile_n + visit % tiles) * BLOCK_N
        rows = first + tl.arange(0, BLOCK_M)
        reader_mask_ptr, reader_bias_ptr = mask_ptr, bias_ptr
        reader_padding_ptr, reader_global_ptr = padding_ptr, global_ptr
        if mask_ptr is not None:
            reader_mask_ptr = mask_ptr + b * stride_mb + h * stride_mh
        if bias_ptr is not None:
            reader_bias_ptr = bias_ptr + b * stride_bb + h * stride_bh
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
        visited = ((own >= begin) & (own < outside)) | ((own >= lo) & (own < end))
        tests = (
            reader_mask_ptr, stride_mt, stride_ms, reader_padding_ptr, stride_ps,
            global_tokens, reader_global_ptr, stride_gt, T,
        )  # fmt: skip
        total = add_readers(
            total, rows, own, tl.where(visited, own + BLOCK_N, own),
            (q_ptr + b * stride_qb + h * stride_qh, stride_qt, stride_qd),
            (do_ptr + b * stride_yb + h * stride_yh, stride_yt, stride_yd),
            (k_ptr + b * stride_kb + hk * stride_kh, stride_kt, stride_kd),
            (v_ptr + b * stride_vb + hk * stride_vh, stride_vt, stride_vd),
            lse_ptr + head * Tq, delta_ptr + head * Tq,
            (Tq, Tk), (left, right, ahead, dilation, query_offset), tests,
            (
                scale, softcap, reader_bias_ptr, stride_bt, stride_bs,
                distance_ptr + b * stride_rb + h * stride_rh,
            ),
            (seed, head.to(tl.int32), threshold, keep_scale),
            LATTICE, HAS_GLOBAL, HAS_SOFTCAP, HAS_DROPOUT, D, DV,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    sum_ptr += tl.program_id(0).to(tl.int64) * (2 * BLOCK_N)
    tl.store(sum_ptr + tl.arange(0, 2 * BLOCK_N), diagonal_sums(total, BLOCK_N))
