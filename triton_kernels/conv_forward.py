"""Forward of depthwise convolution: y[n, c, o] = bias[c] + sum_k w[c, k] * x[n, c // m, o * stride -
padding + k * dilation].

Depthwise (channel-wise) convolution: Laurent Sifre, "Rigid-motion scattering for image classification", PhD
thesis, Ecole Polytechnique, 2014; its use in networks: Francois Chollet, "Xception", 2017,
arXiv:1610.02357.

A row of KW taps is a window that slides over the strip's columns in registers: one column loaded serves up to
min(TW, KW) products. Rows of taps (kd, kh) are visited one after another. Few rows are unrolled; many (31 x
31) run in a loop at run time, and so do groups of GROUP taps in a row, so that a kernel's code stays short
for any kernel size. Legend: see conv_tiles.
"""

import triton
import triton.language as tl

from .conv_tiles import channel_lanes, load_columns, source_index, store_columns, strip_positions


@triton.jit
def load_taps(w_row, channel_valid, stride_wk, GROUP: tl.constexpr):
    """GROUP adjacent taps of each channel in fp32."""
    taps = ()
    for u in tl.static_range(GROUP):
        taps = taps + (tl.load(w_row + u * stride_wk, mask=channel_valid, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def slide_forward(
    acc, x_ptr, x_row, row_valid, first, W, stride_xw, w_row, channel_valid, stride_wk,
    GROUP: tl.constexpr, TW: tl.constexpr, COUNT: tl.constexpr, ACCESS: tl.constexpr, MODE: tl.constexpr,
    SW: tl.constexpr, DW: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    """acc[t] += sum_u w[u] * x[first + t * SW + u * DW - PW] for GROUP taps, loading each column once."""
    taps = load_taps(w_row, channel_valid, stride_wk, GROUP)
    BEGIN: tl.constexpr = (-PW) // COUNT
    END: tl.constexpr = ((TW - 1) * SW + (GROUP - 1) * DW - PW) // COUNT + 1
    for chunk in tl.static_range(BEGIN, END):
        chunk_first = first + chunk * COUNT
        columns, _ = load_columns(x_ptr, x_row, row_valid, chunk_first, W, stride_xw, COUNT, ACCESS, MODE)
        for u in tl.static_range(GROUP):
            for t in tl.static_range(TW):
                if t * SW + u * DW - PW >= chunk * COUNT and t * SW + u * DW - PW < (chunk + 1) * COUNT:
                    added = tl.fma(columns[t * SW + u * DW - PW - chunk * COUNT], taps[u], acc[t])
                    acc = acc[:t] + (added,) + acc[t + 1 :]
    return acc


@triton.jit
def forward_row(
    acc, x_ptr, x_image, valid, first_d, first_h, first, D, H, W, stride_xd, stride_xh, stride_xw,
    w_channel, channel_valid, stride_wk, row,
    KH: tl.constexpr, KW: tl.constexpr, GROUP: tl.constexpr, TW: tl.constexpr, COUNT: tl.constexpr,
    ACCESS: tl.constexpr, MODE: tl.constexpr, SW: tl.constexpr, DD: tl.constexpr, DH: tl.constexpr,
    DW: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    """Add one row (kd, kh) of taps to every output of the strips."""
    d, d_inside = source_index(first_d + (row // KH) * DD, D, MODE)
    h, h_inside = source_index(first_h + (row % KH) * DH, H, MODE)
    row_valid = valid & d_inside & h_inside
    x_row = x_image + d.to(tl.int64) * stride_xd + h.to(tl.int64) * stride_xh
    w_row = w_channel + row * KW * stride_wk
    FULL: tl.constexpr = KW // GROUP
    REST: tl.constexpr = KW % GROUP
    if FULL == 1:
        acc = slide_forward(
            acc, x_ptr, x_row, row_valid, first, W, stride_xw, w_row, channel_valid, stride_wk,
            GROUP, TW, COUNT, ACCESS, MODE, SW, DW, PW,
        )  # fmt: skip
    else:
        for group in range(FULL):
            acc = slide_forward(
                acc, x_ptr, x_row, row_valid, first + group * GROUP * DW, W, stride_xw,
                w_row + group * GROUP * stride_wk, channel_valid, stride_wk,
                GROUP, TW, COUNT, ACCESS, MODE, SW, DW, PW,
            )  # fmt: skip
    if REST > 0:
        acc = slide_forward(
            acc, x_ptr, x_row, row_valid, first + FULL * GROUP * DW, W, stride_xw,
            w_row + FULL * GROUP * stride_wk, channel_valid, stride_wk,
            REST, TW, COUNT, ACCESS, MODE, SW, DW, PW,
        )  # fmt: skip
    return acc


@triton.jit
def depthwise_conv_forward_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr,
    total, strips, fast_blocks, tap_rows, C, D, H, W, OD, OH, OW,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw,
    stride_wc, stride_wk,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DD: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    MODE: tl.constexpr, MULTIPLIER: tl.constexpr, C_LAST: tl.constexpr,
    X_ACCESS: tl.constexpr, X_COUNT: tl.constexpr, Y_ACCESS: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, TW: tl.constexpr, GROUP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """y[n, c, o] = bias[c] + sum_k w[c, k] * x[n, c // MULTIPLIER, o * S - P + k * D], padding folded into
    indexing.

    A program computes BLOCK_P strips of TW columns for BLOCK_C output channels.
    Grid: (position blocks * channel blocks,); the blocks adjacent in memory run fastest (fast_blocks of
    them). C counts output channels, total counts strips (N * OD * OH * strips). Residuals: none. x, w,
    bias, y: fp32, fp16 or bf16; products and sums in fp32, rounded once.
    """
    fast = tl.program_id(0) % fast_blocks
    slow = tl.program_id(0) // fast_blocks
    c, c_valid = channel_lanes(fast if C_LAST else slow, C, BLOCK_C, VECTOR, C_LAST)
    n, d, h, strip, p_valid = strip_positions(
        slow if C_LAST else fast, total, OD, OH, strips, BLOCK_P, C_LAST
    )
    valid = p_valid & c_valid
    x_channel = (c // MULTIPLIER).to(tl.int64) * stride_xc
    x_image = n.to(tl.int64) * stride_xn + x_channel
    w_channel = w_ptr + c.to(tl.int64) * stride_wc

    if bias_ptr is None:
        start = tl.zeros(valid.shape, tl.float32)
    else:
        bias = tl.load(bias_ptr + c, mask=c_valid, other=0.0).to(tl.float32)
        start = tl.zeros(valid.shape, tl.float32) + bias
    acc = ()
    for _ in tl.static_range(TW):
        acc = acc + (start,)

    first_d = d * SD - PD
    first_h = h * SH - PH
    first = strip * TW * SW
    if UNROLL:
        for row in tl.static_range(KD * KH):
            acc = forward_row(
                acc, x_ptr, x_image, valid, first_d, first_h, first, D, H, W, stride_xd, stride_xh, stride_xw,
                w_channel, c_valid, stride_wk, row,
                KH, KW, GROUP, TW, X_COUNT, X_ACCESS, MODE, SW, DD, DH, DW, PW,
            )  # fmt: skip
    else:
        for row in range(tap_rows):
            acc = forward_row(
                acc, x_ptr, x_image, valid, first_d, first_h, first, D, H, W, stride_xd, stride_xh, stride_xw,
                w_channel, c_valid, stride_wk, row,
                KH, KW, GROUP, TW, X_COUNT, X_ACCESS, MODE, SW, DD, DH, DW, PW,
            )  # fmt: skip

    y_row = n.to(tl.int64) * stride_yn + c.to(tl.int64) * stride_yc
    y_row = y_row + d.to(tl.int64) * stride_yd + h.to(tl.int64) * stride_yh
    store_columns(acc, y_ptr, y_row, valid, strip * TW, OW, stride_yw, TW, Y_ACCESS)
