"""Backward of depthwise convolution for many taps or a depth multiplier: dx and dw in kernels of their own.

Equations, images and the two-stage sums: see conv_backward. Legend: see conv_tiles.
"""

import triton
import triton.language as tl

from .conv_backward import dy_row_of, image_count, padded_position, slide_backward, store_sums
from .conv_forward import load_taps
from .conv_tiles import channel_lanes, load_strip, store_columns, strip_positions, zero_columns


@triton.jit
def depthwise_conv_backward_input_kernel(
    dy_ptr, w_ptr, dx_ptr,
    total, strips, fast_blocks, tap_rows, C, D, H, W, OD, OH, OW,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw,
    stride_dn, stride_dc, stride_dd, stride_dh, stride_dw,
    stride_wc, stride_wk,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DD: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    AD: tl.constexpr, AH: tl.constexpr, AW: tl.constexpr,
    MODE: tl.constexpr, IMAGES_D: tl.constexpr, IMAGES_H: tl.constexpr, IMAGES_W: tl.constexpr,
    MULTIPLIER: tl.constexpr, C_LAST: tl.constexpr, PHASED: tl.constexpr, VECTOR: tl.constexpr,
    Y_ACCESS: tl.constexpr, Y_COUNT: tl.constexpr, DX_ACCESS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, TW: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dx[n, c, i] = sum over the multiplier's output channels, images q of i, and taps k of w[k] * dy[o(q,
    k)].

    A program computes BLOCK_P strips of TW input columns for BLOCK_C input channels; tap rows and groups of
    GROUP taps run in loops. Grid: (position blocks * channel blocks,), fast_blocks of them fastest.
    Residuals: w. dy, w, dx: fp32, fp16 or bf16; sums in fp32, rounded once.
    """
    fast = tl.program_id(0) % fast_blocks
    slow = tl.program_id(0) // fast_blocks
    IMAGES: tl.constexpr = IMAGES_D * IMAGES_H * IMAGES_W
    FULL: tl.constexpr = KW // GROUP
    REST: tl.constexpr = KW % GROUP
    c, c_valid = channel_lanes(fast if C_LAST else slow, C, BLOCK_C, VECTOR, C_LAST)
    n, d, h, strip, p_valid = strip_positions(slow if C_LAST else fast, total, D, H, strips, BLOCK_P, C_LAST)
    valid = p_valid & c_valid
    column = strip * TW
    images = 1
    if IMAGES > 1:
        images = image_count(d, h, column, D, H, W, IMAGES, PD + AD, PH + AH, PW + AW)

    dx = zero_columns(BLOCK_P if C_LAST else BLOCK_C, BLOCK_C if C_LAST else BLOCK_P, TW)
    unused = (dx[0],)
    for j in range(MULTIPLIER):
        dy_channel = (c * MULTIPLIER + j).to(tl.int64)
        dy_image = n.to(tl.int64) * stride_yn + dy_channel * stride_yc
        w_channel = w_ptr + dy_channel * stride_wc
        for image in range(images):
            q_d, q_h, q_w, exists = padded_position(
                d, h, column, image, D, H, W, PD, PH, PW, AD, AH, AW, IMAGES_H, IMAGES_W, MODE
            )
            for row in range(tap_rows):
                dy_row, row_valid = dy_row_of(
                    dy_image, valid & exists, q_d, q_h, row // KH, row % KH, OD, OH, stride_yd, stride_yh,
                    SD, SH, DD, DH, PD, PH,
                )  # fmt: skip
                w_row = w_channel + row * KW * stride_wk
                for group in range(FULL):
                    taps = load_taps(w_row + group * GROUP * stride_wk, c_valid, stride_wk, GROUP)
                    dx, _ = slide_backward(
                        dx, unused, unused, unused, dy_ptr, dy_row, row_valid,
                        q_w - group * GROUP * DW, OW, stride_yw, taps,
                        GROUP, TW, Y_COUNT, Y_ACCESS, PHASED, SW, DW, PW, True, False,
                    )  # fmt: skip
                if REST > 0:
                    taps = load_taps(w_row + FULL * GROUP * stride_wk, c_valid, stride_wk, REST)
                    dx, _ = slide_backward(
                        dx, unused, unused, unused, dy_ptr, dy_row, row_valid,
                        q_w - FULL * GROUP * DW, OW, stride_yw, taps,
                        REST, TW, Y_COUNT, Y_ACCESS, PHASED, SW, DW, PW, True, False,
                    )  # fmt: skip

    dx_row = n.to(tl.int64) * stride_dn + c.to(tl.int64) * stride_dc
    dx_row = dx_row + d.to(tl.int64) * stride_dd + h.to(tl.int64) * stride_dh
    store_columns(dx, dx_ptr, dx_row, valid, column, W, stride_dw, TW, DX_ACCESS)


@triton.jit
def depthwise_conv_backward_weight_kernel(
    dy_ptr, x_ptr, partial_ptr,
    total, strips, blocks, chunks, tiles, chunk_tiles, C, D, H, W, OD, OH, OW, GD, GH,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DD: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    AD: tl.constexpr, AH: tl.constexpr, AW: tl.constexpr,
    MODE: tl.constexpr, IMAGES_D: tl.constexpr, IMAGES_H: tl.constexpr, IMAGES_W: tl.constexpr,
    MULTIPLIER: tl.constexpr, C_LAST: tl.constexpr, PHASED: tl.constexpr, VECTOR: tl.constexpr,
    X_ACCESS: tl.constexpr, X_COUNT: tl.constexpr, Y_ACCESS: tl.constexpr, Y_COUNT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, TW: tl.constexpr, GROUP: tl.constexpr,
    NEED_DW: tl.constexpr, NEED_DB: tl.constexpr,
):  # fmt: skip
    """One fp32 partial of dw for GROUP adjacent taps, and of db (equations: conv_backward).

    A program walks `chunk_tiles` tiles of BLOCK_P strips for BLOCK_C output channels and one group of taps,
    and writes partial[chunk, c, tap]; the programs of group 0 also sum db. C counts output channels. Grid:
    (channel blocks * chunks * groups,); channel blocks run fastest, then chunks. Residuals: x.
    """
    blocks_done = tl.program_id(0) // blocks
    chunk = blocks_done % chunks
    group = blocks_done // chunks
    GROUPS_W: tl.constexpr = (KW + GROUP - 1) // GROUP
    ROWS: tl.constexpr = BLOCK_P if C_LAST else BLOCK_C
    LANES: tl.constexpr = BLOCK_C if C_LAST else BLOCK_P
    IMAGES: tl.constexpr = IMAGES_D * IMAGES_H * IMAGES_W
    row = group // GROUPS_W
    first_tap = group % GROUPS_W * GROUP
    c, c_valid = channel_lanes(tl.program_id(0) % blocks, C, BLOCK_C, VECTOR, C_LAST)
    x_channel = (c // MULTIPLIER).to(tl.int64) * stride_xc
    dy_channel = c.to(tl.int64) * stride_yc

    dw = zero_columns(ROWS, LANES, GROUP)
    db = tl.zeros([ROWS, LANES], tl.float32)
    for tile in range(chunk * chunk_tiles, tl.minimum(chunk * chunk_tiles + chunk_tiles, tiles)):
        n, d, h, strip, p_valid = strip_positions(tile, total, GD, GH, strips, BLOCK_P, C_LAST)
        valid = p_valid & (d < D) & (h < H) & c_valid
        column = strip * TW
        dy_image = dy_channel + n.to(tl.int64) * stride_yn
        if NEED_DW:
            x_row = x_channel + n.to(tl.int64) * stride_xn
            x_row = x_row + d.to(tl.int64) * stride_xd + h.to(tl.int64) * stride_xh
            x, x_valid = load_strip(x_ptr, x_row, valid, column, W, stride_xw, TW, X_COUNT, X_ACCESS)
            images = 1
            if IMAGES > 1:
                images = image_count(d, h, column, D, H, W, IMAGES, PD + AD, PH + AH, PW + AW)
            for image in range(images):
                q_d, q_h, q_w, exists = padded_position(
                    d, h, column, image, D, H, W, PD, PH, PW, AD, AH, AW, IMAGES_H, IMAGES_W, MODE
                )
                dy_row, row_valid = dy_row_of(
                    dy_image, valid & exists, q_d, q_h, row // KH, row % KH, OD, OH, stride_yd, stride_yh,
                    SD, SH, DD, DH, PD, PH,
                )  # fmt: skip
                _, dw = slide_backward(
                    x, dw, x, x_valid, dy_ptr, dy_row, row_valid, q_w - first_tap * DW, OW, stride_yw, x,
                    GROUP, TW, Y_COUNT, Y_ACCESS, PHASED, SW, DW, PW, False, True,
                )  # fmt: skip
        if NEED_DB:
            own_row = dy_image + d.to(tl.int64) * stride_yd + h.to(tl.int64) * stride_yh
            own_valid = p_valid & (d < OD) & (h < OH) & c_valid & (group == 0)
            own, _ = load_strip(dy_ptr, own_row, own_valid, column, OW, stride_yw, TW, Y_COUNT, Y_ACCESS)
            for t in tl.static_range(TW):
                db += own[t]

    TAPS: tl.constexpr = KD * KH * KW
    offsets = (chunk.to(tl.int64) * C + c) * (TAPS + 1)
    if NEED_DW:
        store_sums(dw, partial_ptr + row * KW + first_tap, offsets, c_valid, KW - first_tap, GROUP, C_LAST)
    if NEED_DB:
        store_sums((db,), partial_ptr + TAPS, offsets, c_valid & (group == 0), 1, 1, C_LAST)


@triton.jit
def depthwise_conv_sum_partials_kernel(
    partial_ptr, dw_ptr, db_ptr, chunks, C, TAPS, BLOCK: tl.constexpr, BLOCK_CHUNKS: tl.constexpr
):
    """dw[c, tap] = sum over chunks of partial[chunk, c, tap] in fp32, rounded once; tap TAPS is db[c].

    A program sums BLOCK columns (c, tap) of the partials, BLOCK_CHUNKS rows at a time, always in the same
    order. Grid: (ceil(C * (TAPS + 1) / BLOCK),). dw_ptr or db_ptr is None where that gradient is not
    needed.
    """
    flat = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = flat // (TAPS + 1)
    tap = flat % (TAPS + 1)
    dw_wanted = (c < C) & (tap < TAPS)
    db_wanted = (c < C) & (tap == TAPS)
    if dw_ptr is None:
        wanted = db_wanted
    elif db_ptr is None:
        wanted = dw_wanted
    else:
        wanted = c < C
    row = tl.arange(0, BLOCK_CHUNKS)[:, None]
    total = tl.zeros([BLOCK_CHUNKS, BLOCK], tl.float32)
    for first in range(0, chunks, BLOCK_CHUNKS):
        pointers = partial_ptr + (first + row).to(tl.int64) * C * (TAPS + 1) + flat[None, :]
        total += tl.load(pointers, mask=(first + row < chunks) & wanted[None, :], other=0.0)
    gradient = tl.sum(total, 0)
    if dw_ptr is not None:
        tl.store(dw_ptr + c * TAPS + tap, gradient.to(dw_ptr.dtype.element_ty), mask=dw_wanted)
    if db_ptr is not None:
        tl.store(db_ptr + c, gradient.to(db_ptr.dtype.element_ty), mask=db_wanted)
