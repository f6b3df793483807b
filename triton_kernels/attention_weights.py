"""The probabilities of attention, from queries, keys and the log-sum-exp of the forward.

    P[b, h, i, j] = exp(score[i, j] - lse_i), dropped out,      mean[b, i, j] = sum_h P[b, h, i, j] / H

A program holds one tile of the result in registers and adds the heads to it one after another, so that the
mean never takes the memory of every head.

Legend: see attention_mask and attention_tiles; `group` H / Hk.
"""

import triton
import triton.language as tl

from .attention_mask import (
    LOG2E,
    holds_global,
    kept_tile,
    key_tiles,
    scores_in_base_2,
    visible_tile,
)
from .attention_tiles import load_piece

UNSPECIALIZED = [
    "H", "heads", "Tq", "Tk", "T", "row_blocks", "col_blocks", "left", "right", "ahead", "dilation",
    "query_offset", "global_tokens", "threshold",
]  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_weights_kernel(
    q_ptr, k_ptr, lse_ptr, mask_ptr, bias_ptr, distance_ptr, padding_ptr, global_ptr, seed_ptr, weights_ptr,
    H, heads, group, Tq, Tk, T, row_blocks, col_blocks,
    scale, softcap, threshold, keep_scale,
    left, right, ahead, dilation, step, query_offset, global_tokens,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_lb, stride_lh, stride_lt,
    stride_mb, stride_mh, stride_mt, stride_ms,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_rb, stride_rh,
    stride_pb, stride_ps, stride_gb, stride_gt,
    D: tl.constexpr, LATTICE: tl.constexpr, CLASSES: tl.constexpr, HAS_GLOBAL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr,
):  # fmt: skip
    """The mean of P over `heads` heads (1, or all H), for BLOCK_M queries and BLOCK_N keys.

    Grid: (B * H / heads * row_blocks * col_blocks,), key tiles of a query tile adjacent. q (B, H, Tq, D) and
    k (B, Hk, Tk, D) in fp32, fp16 or bf16, any strides; lse (B, H, Tq) fp32, any strides; weights
    (B, H / heads, Tq, Tk) contiguous. Masks as in attention_forward_kernel, but the tiles hold neighbours
    (step is 1), because every weight is written, also those that a window makes zero. Sums in fp32.
    """
    stride_qt = stride_qt // ALIGN * ALIGN
    stride_kt = stride_kt // ALIGN * ALIGN
    col_block = tl.program_id(0) % col_blocks
    row_block = tl.program_id(0) // col_blocks % row_blocks
    image = (tl.program_id(0) // col_blocks // row_blocks).to(tl.int64)
    b = image * heads // H
    first_head = image * heads % H
    start = col_block * BLOCK_N
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = start + tl.arange(0, BLOCK_N)
    exist_q, exist_k = rows < Tq, cols < Tk
    if padding_ptr is not None:
        padding_ptr += b * stride_pb
    if global_ptr is not None:
        global_ptr += b * stride_gb

    sees_all = False
    if HAS_GLOBAL:
        sees_all = holds_global(rows + query_offset, exist_q, global_tokens, global_ptr, stride_gt, T)
    first = row_block * BLOCK_M + query_offset
    last = tl.minimum(row_block * BLOCK_M + BLOCK_M, Tq) - 1 + query_offset
    begin, outside, lo, full_lo, full_hi, hi, end = key_tiles(
        first, last, Tk, left, right, ahead, step, global_tokens, sees_all,
        HAS_GLOBAL, global_ptr is not None, True, BLOCK_N,
    )  # fmt: skip
    heads_to_add = tl.where((start >= begin and start < outside) or (start >= lo and start < end), heads, 0)

    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    added = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for number in range(0, heads_to_add):
        h = first_head + number
        q_rows = b * stride_qb + h * stride_qh + rows.to(tl.int64) * stride_qt
        k_rows = b * stride_kb + h // group * stride_kh + cols.to(tl.int64) * stride_kt
        q = load_piece(q_ptr, q_rows, exist_q, stride_qd, D, 0, BLOCK_D)
        k = load_piece(k_ptr, k_rows, exist_k, stride_kd, D, 0, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if REST_D > 0:
            q_rest = load_piece(q_ptr, q_rows, exist_q, stride_qd, D, BLOCK_D, REST_D)
            k_rest = load_piece(k_ptr, k_rows, exist_k, stride_kd, D, BLOCK_D, REST_D)
            scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision=PRECISION)
        own_mask_ptr, own_bias_ptr, own_distance_ptr = mask_ptr, bias_ptr, distance_ptr
        if mask_ptr is not None:
            own_mask_ptr = mask_ptr + b * stride_mb + h * stride_mh
        if bias_ptr is not None:
            own_bias_ptr = bias_ptr + b * stride_bb + h * stride_bh
        if distance_ptr is not None:
            own_distance_ptr = distance_ptr + b * stride_rb + h * stride_rh
        scores = scores_in_base_2(
            scores, rows, cols, Tq, Tk, scale, softcap, own_bias_ptr, stride_bt, stride_bs,
            own_distance_ptr, HAS_SOFTCAP,
        )  # fmt: skip
        visible = visible_tile(
            rows, cols, Tq, Tk, left, right, ahead, dilation, query_offset,
            own_mask_ptr, stride_mt, stride_ms, padding_ptr, stride_ps,
            global_tokens, global_ptr, stride_gt, T, LATTICE, HAS_GLOBAL,
        )  # fmt: skip
        lse_offsets = b * stride_lb + h * stride_lh + rows.to(tl.int64) * stride_lt
        lse = tl.load(lse_ptr + lse_offsets, mask=exist_q, other=0.0)
        # A row that sees nothing has lse = -inf, and -inf - -inf is NaN.
        lse = tl.where(lse == float("-inf"), 0.0, lse) * LOG2E
        p = tl.where(visible, tl.math.exp2(scores - lse[:, None]), 0.0)
        if HAS_DROPOUT:
            kept = kept_tile(seed, (b * H + h).to(tl.int32), rows, start, step, threshold, CLASSES, BLOCK_N)
            p = tl.where(kept, p * keep_scale, 0.0)
        added += p

    offsets = image * Tq * Tk + rows.to(tl.int64)[:, None] * Tk + cols[None, :]
    inside = exist_q[:, None] & exist_k[None, :]
    tl.store(weights_ptr + offsets, (added / heads).to(weights_ptr.dtype.element_ty), mask=inside)
