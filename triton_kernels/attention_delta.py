"""What every query's probabilities have in common in attention's backward: delta.

    delta[i] = sum_d dout[i, d] * out[i, d] - dlse[i] = sum_j P[i, j] dropout(dP)[i, j] - dlse[i]

The sum over the width stands in for one over the keys (Dao et al., 2022, arXiv:2205.14135, appendix B.4).

Legend: B, H, Tq as in torch's SDPA, Dv width of values.
"""

import triton
import triton.language as tl

from .attention_tiles import load_piece


@triton.jit(do_not_specialize=["H", "Tq", "tiles"])
def attention_delta_kernel(
    out_ptr, do_ptr, dlse_ptr, delta_ptr,
    H, Tq, tiles,
    stride_ob, stride_oh, stride_ot, stride_od,
    stride_yb, stride_yh, stride_yt, stride_yd,
    stride_lb, stride_lh, stride_lt,
    DV: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """delta of BLOCK_M queries of one head.

    Grid: (B * H * tiles,), tiles of one head adjacent. out and dout (B, H, Tq, Dv) in fp32, fp16 or bf16, any
    strides; dlse (B, H, Tq) fp32, any strides, or None; delta (B, H, Tq) fp32, contiguous. Sums in fp32.
    """
    # Shows the compiler that ALIGN divides the strides of rows, so that they are read in vectors of so many.
    stride_ot = stride_ot // ALIGN * ALIGN
    stride_yt = stride_yt // ALIGN * ALIGN
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // H, head % H
    rows = (tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    exist = rows < Tq
    out_ptr += b * stride_ob + h * stride_oh
    do_ptr += b * stride_yb + h * stride_yh
    out = load_piece(out_ptr, rows * stride_ot, exist, stride_od, DV, 0, BLOCK_DV).to(tl.float32)
    do = load_piece(do_ptr, rows * stride_yt, exist, stride_yd, DV, 0, BLOCK_DV).to(tl.float32)
    # A query that sees nothing has zeros for out, and its dout may be NaN.
    delta = tl.sum(tl.where(out == 0.0, 0.0, out * do), 1)
    if dlse_ptr is not None:
        dlse_ptr += b * stride_lb + h * stride_lh
        delta -= tl.load(dlse_ptr + rows * stride_lt, mask=exist, other=0.0)
    tl.store(delta_ptr + head * Tq + rows, delta, mask=exist)
