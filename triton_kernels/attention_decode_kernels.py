"""Attention of a few new queries on a cache of keys and values: several programs share the keys of one head.

Query t of a batch entry stands at p = position + t and sees keys p - left <= j <= p. A head has too few
queries to fill a GPU, so the keys that an entry's queries see are divided into `splits` stretches of whole
tiles. Each gives

    m = max_j score_j,    l = sum_j exp2(score_j - m),    acc = sum_j exp2(score_j - m) v_j

and a second kernel adds the stretches up in one order, with M the largest m and the sink:

    l = sum_s exp2(m_s - M) l_s + exp2(sink - M),    out = sum_s exp2(m_s - M) acc_s / l

(Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference", 2023.) The query heads of a group
stand one behind the other in the rows of a tile and read keys and values once.

Legend: B, H query heads, Hk key heads, Tq new queries, S places of the cache, D, Dv; `group` H / Hk; rows
(b, hk, member of the group, t); tiles [BLOCK_M rows, BLOCK_N keys].
"""

import triton
import triton.language as tl

from .attention_mask import LOG2E, scores_in_base_2, tiles_within, visible_tile
from .attention_softmax import exponent_base, online_softmax, weight_and_lse
from .attention_tiles import load_piece, store_piece


@triton.jit(do_not_specialize=["Hk", "group", "Tq", "S", "row_tiles", "splits", "left"])
def attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, acc_ptr, highest_ptr, total_ptr,
    Hk, group, Tq, S, row_tiles, splits, left, scale, softcap,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    HAS_SOFTCAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """m, l and acc of BLOCK_M rows of one key head over one stretch of keys (equations: file head).

    Grid: (B * Hk * row_tiles * splits,), the stretches of a row adjacent. q (B, H, Tq, D), k (B, Hk, S, D), v
    (B, Hk, S, Dv) in one of fp32, fp16, bf16, any strides; positions (B,) int32; acc (rows, splits, Dv),
    highest and total (rows, splits), fp32 contiguous, -inf and zeros where a stretch is empty. Keys that no
    query sees are not read. Sums in fp32; P is rounded to v's type in its product.
    """
    # Shows the compiler that ALIGN divides strides, so that rows are read in vectors of so many.
    stride_kt = stride_kt // ALIGN * ALIGN
    stride_vt = stride_vt // ALIGN * ALIGN
    split = tl.program_id(0) % splits
    kv_head = (tl.program_id(0) // splits // row_tiles).to(tl.int64)
    b, hk = kv_head // Hk, kv_head % Hk
    members = tl.program_id(0) // splits % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    exist = members < group * Tq
    position = tl.load(positions_ptr + b)
    # A row that is none stands behind every query and sees nothing.
    queries = tl.where(exist, members % Tq, Tq)

    lo, _, _, hi = tiles_within(position, position + Tq - 1, S, left, 0, BLOCK_N)
    each = ((hi - lo) // BLOCK_N + splits - 1) // splits * BLOCK_N
    begin = lo + split * each
    end = tl.minimum(begin + each, hi)

    heads = hk * group + members // Tq
    q_rows = heads * stride_qh + queries.to(tl.int64) * stride_qt
    q = load_piece(q_ptr + b * stride_qb, q_rows, exist, stride_qd, D, 0, BLOCK_D)
    k_ptr += (b * stride_kb + hk * stride_kh) // ALIGN * ALIGN
    v_ptr += (b * stride_vb + hk * stride_vh) // ALIGN * ALIGN
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(begin, end, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        seen = (cols < S) & (cols >= position - left) & (cols < position + Tq)
        k = load_piece(k_ptr, cols.to(tl.int64) * stride_kt, seen, stride_kd, D, 0, BLOCK_D)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        scores = scores_in_base_2(
            product, queries, cols, Tq, S, scale, softcap, None, 0, 0, None, HAS_SOFTCAP
        )
        visible = visible_tile(
            queries, cols, Tq, S, left, 0, 0, 1, position, None, 0, 0, None, 0, 0, None, 0, 0, False, False
        )
        p, rescale, highest, total = online_softmax(
            tl.where(visible, scores, float("-inf")), 1.0, highest, total
        )
        v = load_piece(v_ptr, cols.to(tl.int64) * stride_vt, seen, stride_vd, DV, 0, BLOCK_DV)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)

    parts = (kv_head * group * Tq + members) * splits + split
    store_piece(acc_ptr, acc, parts * DV, exist, 1, DV, 0, BLOCK_DV)
    tl.store(highest_ptr + parts, highest, mask=exist)
    tl.store(total_ptr + parts, total, mask=exist)


@triton.jit(do_not_specialize=["H", "Tq", "splits"])
def attention_combine_kernel(
    acc_ptr, highest_ptr, total_ptr, sinks_ptr, out_ptr, lse_ptr,
    H, Tq, splits,
    DV: tl.constexpr, MOST_SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """out and lse of one row from its stretches (equations: file head).

    Grid: (B * H * Tq,). acc, highest and total as attention_decode_kernel leaves them, at most MOST_SPLITS
    splits, of which BLOCK_S are read at a time; sinks (H,) fp32, fp16 or bf16, or None; out (B, H, Tq, Dv)
    and lse (B, H, Tq) contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    first = row * splits
    numbers = tl.arange(0, MOST_SPLITS)
    highest = tl.load(highest_ptr + first + numbers, mask=numbers < splits, other=float("-inf"))
    total = tl.load(total_ptr + first + numbers, mask=numbers < splits, other=0.0)
    peak = tl.max(highest, 0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + row // Tq % H).to(tl.float32) * LOG2E
        peak = tl.maximum(peak, sink)
    base = exponent_base(peak)
    total = tl.sum(tl.math.exp2(highest - base) * total, 0)
    if sinks_ptr is not None:
        total += tl.math.exp2(sink - base)
    weight, lse = weight_and_lse(peak, total, 1.0)
    tl.store(lse_ptr + row, lse)

    acc = tl.zeros([BLOCK_DV], tl.float32)
    for start in range(0, splits, BLOCK_S):
        parts = start + tl.arange(0, BLOCK_S)
        exist = parts < splits
        highest_of_part = tl.load(highest_ptr + first + parts, mask=exist, other=float("-inf"))
        part = load_piece(acc_ptr, (first + parts) * DV, exist, 1, DV, 0, BLOCK_DV)
        acc += tl.sum(part * tl.math.exp2(highest_of_part - base)[:, None], 0)
    columns = tl.arange(0, BLOCK_DV)
    out = (acc * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * DV + columns, out, mask=columns < DV)
