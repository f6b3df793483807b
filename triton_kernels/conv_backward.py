"""Backward of depthwise convolution, in one pass over x and dy, without atomics.

With o = (q + P - k * D) / S, where that division is exact and o is an output position, and q running over
the padded positions that read input index i (only q = i under "zeros"):

    dx[i] = sum_q sum_k w[k] * dy[o(q, k)]         dw[k] = sum_i sum_q x[i] * dy[o(q, k)]         db = sum_o
    dy[o]

Both sums visit the same (q, k, o), so one load of dy serves dx and dw. Strips run over input columns; a
window of dy slides over them in registers as in the forward. dw and db are summed in fp32 in two
fixed-order stages: every program sums the tiles it walks in registers and writes one partial, then a second
kernel adds the partials in order.

Three kernels divide the work by the number of taps: the fused kernel keeps one register tile per tap; where
these would not fit, one kernel computes dx with taps in loops and another dw with one group of taps a
program. Papers: see conv_forward. Legend: see conv_tiles.
"""

import triton
import triton.language as tl

from .conv_forward import load_taps
from .conv_tiles import (
    ZEROS,
    channel_lanes,
    dividend_index,
    load_columns,
    load_strip,
    pack,
    padded_image,
    store_columns,
    strip_positions,
    zero_columns,
)


@triton.jit
def slide_backward(
    dx, dw, x, x_valid, dy_ptr, dy_row, row_valid, first, OW, stride_yw, taps,
    GROUP: tl.constexpr, TW: tl.constexpr, COUNT: tl.constexpr, ACCESS: tl.constexpr, PHASED: tl.constexpr,
    SW: tl.constexpr, DW: tl.constexpr, PW: tl.constexpr, NEED_DX: tl.constexpr, NEED_DW: tl.constexpr,
):  # fmt: skip
    """Add GROUP adjacent taps of one row: dx[t] += w[u] * dy[o] and dw[u] += x[t] * dy[o].

    first is the padded position of column 0 less the first tap's reach, without PW. PHASED: the stride
    divides it, so the compiler knows which columns of dy meet which (t, u); otherwise every z = SW * o is
    tried and masked.
    """
    STEP: tl.constexpr = SW if PHASED else 1
    BEGIN: tl.constexpr = -((GROUP * DW - DW - PW) // STEP) // COUNT
    END: tl.constexpr = ((TW - 1 + PW) // STEP) // COUNT + 1
    for chunk in tl.static_range(BEGIN, END):
        if PHASED:
            column = first // SW + chunk * COUNT
            columns, valid = load_columns(
                dy_ptr, dy_row, row_valid, column, OW, stride_yw, COUNT, ACCESS, ZEROS
            )
        else:
            column, exact = dividend_index(first + chunk, OW, SW)
            columns, valid = load_columns(
                dy_ptr, dy_row, row_valid & exact, column, OW, stride_yw, 1, ACCESS, ZEROS
            )
        for u in tl.static_range(GROUP):
            for t in tl.static_range(TW):
                # z = t + PW - u * DW is STEP times the column's place in this chunk.
                if (t + PW - u * DW) % STEP == 0 and (t + PW - u * DW) // STEP // COUNT == chunk:
                    g = columns[(t + PW - u * DW) // STEP % COUNT]
                    if NEED_DX:
                        dx = dx[:t] + (tl.fma(g, taps[u], dx[t]),) + dx[t + 1 :]
                    if NEED_DW:
                        # A select, not a product with 0: x may hold NaN where no output reads it.
                        added = tl.where(valid & x_valid[t], tl.fma(x[t], g, dw[u]), dw[u])
                        dw = dw[:u] + (added,) + dw[u + 1 :]
    return dx, dw


@triton.jit
def dy_row_of(
    dy_image, valid, q_d, q_h, kd, kh, OD, OH, stride_yd, stride_yh,
    SD: tl.constexpr, SH: tl.constexpr, DD: tl.constexpr, DH: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr,
):  # fmt: skip
    """The row of dy that tap row (kd, kh) ties to padded row (q_d, q_h), and whether there is one."""
    od, d_exact = dividend_index(q_d + PD - kd * DD, OD, SD)
    oh, h_exact = dividend_index(q_h + PH - kh * DH, OH, SH)
    return dy_image + od.to(tl.int64) * stride_yd + oh.to(tl.int64) * stride_yh, valid & d_exact & h_exact


@triton.jit
def image_count(
    d, h, w, D, H, W,
    IMAGES: tl.constexpr, REACH_D: tl.constexpr, REACH_H: tl.constexpr, REACH_W: tl.constexpr,
):  # fmt: skip
    """How many images the tile needs: all where a position lies within reach of a border, else one."""
    near = w < 0
    if REACH_D > 0:
        near = near | (d <= REACH_D) | (d >= D - 1 - REACH_D)
    if REACH_H > 0:
        near = near | (h <= REACH_H) | (h >= H - 1 - REACH_H)
    if REACH_W > 0:
        near = near | (w <= REACH_W) | (w >= W - 1 - REACH_W)
    return tl.where(tl.max(tl.max(near.to(tl.int32), 1), 0) > 0, IMAGES, 1)


@triton.jit
def padded_position(
    d, h, w, image, D, H, W,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    AD: tl.constexpr, AH: tl.constexpr, AW: tl.constexpr,
    IMAGES_H: tl.constexpr, IMAGES_W: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Padded position number `image` (of all dimensions' combinations) that reads index (d, h, w)."""
    q_d, d_exists = padded_image(d, image // (IMAGES_H * IMAGES_W), D, PD, AD, MODE)
    q_h, h_exists = padded_image(h, image // IMAGES_W % IMAGES_H, H, PH, AH, MODE)
    q_w, w_exists = padded_image(w, image % IMAGES_W, W, PW, AW, MODE)
    return q_d, q_h, q_w, d_exists & h_exists & w_exists


@triton.jit
def depthwise_conv_backward_kernel(
    dy_ptr, x_ptr, w_ptr, dx_ptr, partial_ptr,
    total, strips, blocks, tiles, chunk_tiles, C, D, H, W, OD, OH, OW, GD, GH,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw,
    stride_dn, stride_dc, stride_dd, stride_dh, stride_dw,
    stride_wc, stride_wk,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DD: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    AD: tl.constexpr, AH: tl.constexpr, AW: tl.constexpr,
    MODE: tl.constexpr, IMAGES_D: tl.constexpr, IMAGES_H: tl.constexpr, IMAGES_W: tl.constexpr,
    C_LAST: tl.constexpr, PHASED: tl.constexpr, VECTOR: tl.constexpr,
    X_ACCESS: tl.constexpr, X_COUNT: tl.constexpr, Y_ACCESS: tl.constexpr, Y_COUNT: tl.constexpr,
    DX_ACCESS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, TW: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DW: tl.constexpr, NEED_DB: tl.constexpr,
):  # fmt: skip
    """dx, and one fp32 partial of dw and db, for few taps and depth multiplier 1 (equations: file head).

    A program walks `chunk_tiles` tiles of BLOCK_P strips for BLOCK_C channels: it writes their dx, and at
    the end its partial[chunk, c, tap], where tap KD*KH*KW is db. Strips run over max(input, output) rows
    and columns (GD, GH, strips), so that each dy is met once for db. Grid: (chunks * channel blocks,);
    `blocks` is the number that runs fastest. Residuals: x and w, as saved by the caller. Tensors fp32, fp16
    or bf16; sums in fp32.
    """
    fast = tl.program_id(0) % blocks
    slow = tl.program_id(0) // blocks
    chunk = slow if C_LAST else fast
    TAPS: tl.constexpr = KD * KH * KW
    ROWS: tl.constexpr = BLOCK_P if C_LAST else BLOCK_C
    LANES: tl.constexpr = BLOCK_C if C_LAST else BLOCK_P
    IMAGES: tl.constexpr = IMAGES_D * IMAGES_H * IMAGES_W
    c, c_valid = channel_lanes(fast if C_LAST else slow, C, BLOCK_C, VECTOR, C_LAST)
    w_channel = w_ptr + c.to(tl.int64) * stride_wc
    x_channel = c.to(tl.int64) * stride_xc
    dy_channel = c.to(tl.int64) * stride_yc

    dw = zero_columns(ROWS, LANES, TAPS if NEED_DW else 1)
    db = tl.zeros([ROWS, LANES], tl.float32)
    for tile in range(chunk * chunk_tiles, tl.minimum(chunk * chunk_tiles + chunk_tiles, tiles)):
        n, d, h, strip, p_valid = strip_positions(tile, total, GD, GH, strips, BLOCK_P, C_LAST)
        valid = p_valid & (d < D) & (h < H) & c_valid
        column = strip * TW
        dy_image = dy_channel + n.to(tl.int64) * stride_yn

        dx = zero_columns(ROWS, LANES, TW)
        x = dx
        x_valid = (valid,)
        if NEED_DW:
            x_row = x_channel + n.to(tl.int64) * stride_xn
            x_row = x_row + d.to(tl.int64) * stride_xd + h.to(tl.int64) * stride_xh
            x, x_valid = load_strip(x_ptr, x_row, valid, column, W, stride_xw, TW, X_COUNT, X_ACCESS)
        if NEED_DX or NEED_DW:
            images = 1
            if IMAGES > 1:
                images = image_count(d, h, column, D, H, W, IMAGES, PD + AD, PH + AH, PW + AW)
            for image in range(images):
                q_d, q_h, q_w, exists = padded_position(
                    d, h, column, image, D, H, W, PD, PH, PW, AD, AH, AW, IMAGES_H, IMAGES_W, MODE
                )
                for row in tl.static_range(KD * KH):
                    dy_row, row_valid = dy_row_of(
                        dy_image, valid & exists, q_d, q_h, row // KH, row % KH, OD, OH, stride_yd, stride_yh,
                        SD, SH, DD, DH, PD, PH,
                    )  # fmt: skip
                    taps = load_taps(w_channel + row * KW * stride_wk, c_valid, stride_wk, KW)
                    dx, dw_row = slide_backward(
                        dx, dw[row * KW : row * KW + KW], x, x_valid, dy_ptr, dy_row, row_valid,
                        q_w, OW, stride_yw, taps,
                        KW, TW, Y_COUNT, Y_ACCESS, PHASED, SW, DW, PW, NEED_DX, NEED_DW,
                    )  # fmt: skip
                    if NEED_DW:
                        dw = dw[: row * KW] + dw_row + dw[row * KW + KW :]
        if NEED_DX:
            dx_row = n.to(tl.int64) * stride_dn + c.to(tl.int64) * stride_dc
            dx_row = dx_row + d.to(tl.int64) * stride_dd + h.to(tl.int64) * stride_dh
            store_columns(dx, dx_ptr, dx_row, valid, column, W, stride_dw, TW, DX_ACCESS)
        if NEED_DB:
            own_row = dy_image + d.to(tl.int64) * stride_yd + h.to(tl.int64) * stride_yh
            own_valid = p_valid & (d < OD) & (h < OH) & c_valid
            own, _ = load_strip(dy_ptr, own_row, own_valid, column, OW, stride_yw, TW, Y_COUNT, Y_ACCESS)
            for t in tl.static_range(TW):
                db += own[t]

    offsets = (chunk.to(tl.int64) * C + c) * (TAPS + 1)
    if NEED_DW:
        store_sums(dw, partial_ptr, offsets, c_valid, TAPS, TAPS, C_LAST)
    if NEED_DB:
        store_sums((db,), partial_ptr + TAPS, offsets, c_valid, 1, 1, C_LAST)


@triton.jit
def store_sums(tiles, base_ptr, offsets, c_valid, limit, COUNT: tl.constexpr, C_LAST: tl.constexpr):
    """Sum COUNT tiles over positions and store the first `limit` sums of channel c from base_ptr +
    offsets[c] on."""
    AT_ONCE: tl.constexpr = 8 if COUNT > 4 else 4 if COUNT > 2 else COUNT
    ROWS: tl.constexpr = tiles[0].shape[0]
    LANES: tl.constexpr = tiles[0].shape[1]
    CHANNELS: tl.constexpr = LANES if C_LAST else ROWS
    channel_offsets = tl.reshape(offsets, [CHANNELS, 1])
    channel_valid = tl.reshape(c_valid, [CHANNELS, 1])
    tiles = tiles + zero_columns(ROWS, LANES, (AT_ONCE - COUNT) % AT_ONCE)
    for start in tl.static_range(0, COUNT, AT_ONCE):
        # Packed, so that one exchange between threads serves all of them.
        sums = tl.sum(pack(tiles[start : start + AT_ONCE], ROWS, LANES, AT_ONCE), 0 if C_LAST else 1)
        number = start + tl.arange(0, AT_ONCE)[None, :]
        tl.store(base_ptr + channel_offsets + number, sums, mask=channel_valid & (number < limit))
