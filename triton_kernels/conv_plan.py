"""From tensors to launches of the depthwise-convolution kernels: which kernels, which tiles, how memory is
accessed.

Plans need shapes, strides and alignment only, so meta tensors do: the compile audit builds the same
launches as a call. Legend: see conv_tiles.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .conv_backward import depthwise_conv_backward_kernel
from .conv_backward_split import (
    depthwise_conv_backward_input_kernel,
    depthwise_conv_backward_weight_kernel,
    depthwise_conv_sum_partials_kernel,
)
from .conv_forward import depthwise_conv_forward_kernel
from .conv_geometry import (
    MODES,
    SCATTERED,
    WIDTH,
    WINDOW,
    Image,
    Window,
    access_of,
    blocks_of,
    channels_adjacent,
    columns_channels_first,
    columns_channels_last,
    group_of,
    image_of,
    need_int32,
    options_of,
    packed_weight,
    store_access_of,
    vector_of,
)
from .launch import Launch
from .tuning import Tile, tuning

# Products of one strip, times adjacent channels, unrolled in straight code; above, rows of taps run in a
# loop.
UNROLLED = 300
# Loads of dy unrolled in the fused backward; above, its compilation takes tens of seconds.
FUSED_LOADS = 64
# Partial sums of dw may take this share of the input's bytes, or this many bytes, whichever is more.
PARTIAL_SHARE = 0.1
PARTIAL_BYTES = 1 << 20
# Columns (tap, channel) and rows that one program of the second stage adds at a time.
SUM_BLOCK, SUM_ROWS = 128, 8

# dx, dw and db to fill; None where not needed.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def forward_columns(tile: Tile, window: Window, x: Image, y: Image, c_last: bool, vector: int) -> int:
    """Columns a strip; one where a large stride leaves the columns of a strip nothing to share."""
    if window.stride[2] > 4:
        return 1
    if not c_last:
        return columns_channels_first(tile.columns, (x, y), y.size[4])
    if y.strides[4] == 1 and y.size[4] > 1:
        # Channels are adjacent in x alone: y is written in whole vectors of columns.
        return columns_channels_first(16 // x.tensor.element_size(), (y,), y.size[4])
    return columns_channels_last(tile.columns, y.size[4])


def plan_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor,
    window: Window,
    channels_last: bool,
    architecture: str,
) -> list[Launch]:
    """The one launch of the forward."""
    x, y = image_of(input), image_of(output)
    channels = y.size[1]
    c_last = channels_last or channels_adjacent(x)
    multiplier = channels // x.size[1]
    layout = "channels_last" if c_last else "channels_first"
    tile = tuning("conv", architecture).tile("forward", layout, 8 * input.element_size(), window.taps)
    vector = vector_of(c_last, channels, input.dtype)
    columns = forward_columns(tile, window, x, y, c_last, vector)
    group = group_of(tile, window)

    x_access, x_count = access_of(x, c_last, vector if multiplier == 1 else 1, columns)
    grouped = group < window.kernel[2]
    if x_access == WIDTH and (
        window.mode != MODES["zeros"] or (grouped and group * window.dilation[2] % x_count)
    ):
        x_access, x_count = SCATTERED, 1

    strips = -(-y.size[4] // columns)
    per_image = prod(y.size[2:4]) * strips
    total = y.size[0] * per_image
    block_p, block_c = blocks_of(tile, c_last, channels, per_image, total)
    position_blocks, channel_blocks = -(-total // block_p), -(-channels // block_c)
    need_int32(total, position_blocks * channel_blocks)
    flat_weight, weight_strides = packed_weight(weight, c_last)
    return [
        Launch(
            kernel=depthwise_conv_forward_kernel,
            grid=position_blocks * channel_blocks,
            arguments=dict(
                x_ptr=input, w_ptr=flat_weight, bias_ptr=bias, y_ptr=output,
                total=total, strips=strips, fast_blocks=channel_blocks if c_last else position_blocks,
                tap_rows=window.kernel[0] * window.kernel[1], C=channels,
                **dict(zip(("D", "H", "W", "OD", "OH", "OW"), x.size[2:] + y.size[2:], strict=True)),
                **x.strides_named("x"), **y.strides_named("y"), **weight_strides,
            ),
            constants=window.constants() | dict(
                MULTIPLIER=multiplier, C_LAST=c_last, X_ACCESS=x_access, X_COUNT=x_count,
                Y_ACCESS=store_access_of(y, c_last, vector, columns), VECTOR=vector,
                BLOCK_P=block_p, BLOCK_C=block_c, TW=columns, GROUP=group,
                UNROLL=not grouped and window.taps * columns * vector <= UNROLLED,
            ),
            options=options_of(tile),
        )
    ]  # fmt: skip


@dataclass(frozen=True)
class BackwardTile:
    """What the three backward kernels decide alike: the tile, and how it meets dy."""

    tile: Tile
    c_last: bool
    vector: int
    columns: int
    group: int
    phased: bool
    y_access: int
    y_count: int

    def constants(self) -> dict[str, int]:
        return dict(
            C_LAST=self.c_last, PHASED=self.phased, VECTOR=self.vector,
            Y_ACCESS=self.y_access, Y_COUNT=self.y_count, TW=self.columns,
        )  # fmt: skip


def backward_columns(tile: Tile, window: Window, c_last: bool, image: Image, width: int) -> int:
    """Columns a strip: a multiple of a small power-of-two stride, so that dy's columns are known when
    compiled."""
    if window.mode != MODES["zeros"]:
        return 1
    columns = (
        columns_channels_last(tile.columns, width)
        if c_last
        else columns_channels_first(tile.columns, (image,), width)
    )
    stride = window.stride[2]
    return max(columns, stride) if stride in (2, 4, 8) else columns


def backward_tile(
    kernel: str,
    window: Window,
    y: Image,
    image: Image,
    c_last: bool,
    multiplier: int,
    architecture: str,
    whole_rows: bool,
) -> BackwardTile:
    """Decide the tile of one backward kernel whose strips run over `image` (x or dx) and maybe also over
    dy."""
    layout = "channels_last" if c_last else "channels_first"
    tile = tuning("conv", architecture).tile(kernel, layout, 8 * y.tensor.element_size(), window.taps)
    stride, dilation, taps = window.stride[2], window.dilation[2], window.kernel[2]
    columns = backward_columns(tile, window, c_last, image, max(image.size[4], y.size[4]))
    group = taps if whole_rows else group_of(tile, window)
    grouped = group < taps
    divides = (
        columns % stride == 0
        and window.mode == MODES["zeros"]
        and not (grouped and group * dilation % stride)
    )
    phased = stride == 1 or divides
    vector = vector_of(c_last, image.size[1], y.tensor.dtype)
    y_vector = vector if multiplier == 1 or kernel == "backward_weight" else 1
    access, count = access_of(y, c_last, y_vector, columns // stride if phased else 1)
    if access == WIDTH and grouped and group * dilation % (stride * count):
        access, count = SCATTERED, 1
    return BackwardTile(tile, c_last, vector, columns, group, phased, access, count)


def fits_fused(
    window: Window, y: Image, image: Image, c_last: bool, multiplier: int, architecture: str
) -> bool:
    """Whether the fused kernel is affordable: a register tile per tap, and straight code for all of dy's
    loads."""
    limit = tuning("conv", architecture).fused_taps["channels_last" if c_last else "channels_first"]
    reach = (window.kernel[2] - 1) * window.dilation[2]
    if multiplier > 1 or window.taps > limit or reach > WINDOW:
        return False
    part = backward_tile("backward", window, y, image, c_last, multiplier, architecture, whole_rows=True)
    return window.kernel[0] * window.kernel[1] * -(-(part.columns + reach) // part.y_count) <= FUSED_LOADS


def chunks_of(
    tiles: int, other_blocks: int, taps: int, channels: int, input: Tensor, programs: int
) -> tuple[int, int]:
    """(chunks, tiles a chunk): enough programs, while the partials stay a small share of the input."""
    row_bytes = 4 * (taps + 1) * channels
    affordable = max(int(PARTIAL_SHARE * input.numel() * input.element_size()), PARTIAL_BYTES) // row_bytes
    chunks = max(1, min(programs // max(other_blocks, 1), affordable, tiles))
    chunk_tiles = -(-tiles // chunks)
    return max(1, -(-tiles // max(chunk_tiles, 1))), chunk_tiles


def sizes_of(x: Image, y: Image) -> dict[str, int]:
    return dict(zip(("D", "H", "W", "OD", "OH", "OW"), x.size[2:] + y.size[2:], strict=True))


def plan_backward_input(
    grad_output: Tensor,
    weight: Tensor,
    grad_input: Tensor,
    window: Window,
    channels_last: bool,
    architecture: str,
) -> Launch:
    """dx alone."""
    y, dx = image_of(grad_output), image_of(grad_input)
    channels = dx.size[1]
    multiplier = y.size[1] // channels
    part = backward_tile(
        "backward_input", window, y, dx, channels_last, multiplier, architecture, whole_rows=False
    )
    strips = -(-dx.size[4] // part.columns)
    per_image = prod(dx.size[2:4]) * strips
    total = dx.size[0] * per_image
    block_p, block_c = blocks_of(part.tile, part.c_last, channels, per_image, total)
    position_blocks, channel_blocks = -(-total // block_p), -(-channels // block_c)
    need_int32(total, position_blocks * channel_blocks)
    flat_weight, weight_strides = packed_weight(weight, part.c_last)
    return Launch(
        kernel=depthwise_conv_backward_input_kernel,
        grid=position_blocks * channel_blocks,
        arguments=dict(
            dy_ptr=grad_output, w_ptr=flat_weight, dx_ptr=grad_input,
            total=total, strips=strips, fast_blocks=channel_blocks if part.c_last else position_blocks,
            tap_rows=window.kernel[0] * window.kernel[1], C=channels,
            **sizes_of(dx, y), **y.strides_named("y"), **dx.strides_named("d"), **weight_strides,
        ),
        constants=window.constants() | window.image_constants() | part.constants() | dict(
            MULTIPLIER=multiplier, DX_ACCESS=store_access_of(dx, part.c_last, part.vector, part.columns),
            BLOCK_P=block_p, BLOCK_C=block_c, GROUP=part.group,
        ),
        options=options_of(part.tile),
    )  # fmt: skip


def plan_backward_sums(
    grad_output: Tensor, input: Tensor, weight: Tensor, grads: Gradients,
    window: Window, channels_last: bool, architecture: str, fused: bool,
) -> list[Launch]:  # fmt: skip
    """dw and db in two stages; with dx in the same pass when `fused` and wanted."""
    grad_input, grad_weight, grad_bias = grads
    x, y = image_of(input), image_of(grad_output)
    channels = y.size[1]
    multiplier = channels // x.size[1]
    dx = x if grad_input is None else image_of(grad_input)
    kernel = "backward" if fused else "backward_weight"
    strips_image = dx if fused else x
    part = backward_tile(
        kernel, window, y, strips_image, channels_last, multiplier, architecture, whole_rows=fused
    )
    vector = vector_of(part.c_last, channels, input.dtype)
    x_access, x_count = access_of(x, part.c_last, vector if multiplier == 1 else 1, part.columns)
    # db meets every dy once only where strips cover dy as well as x.
    covered = [max(a, b) if grad_bias is not None else a for a, b in zip(x.size[2:], y.size[2:], strict=True)]
    strips = -(-covered[2] // part.columns)
    per_image = covered[0] * covered[1] * strips
    total = x.size[0] * per_image
    block_p, block_c = blocks_of(part.tile, part.c_last, channels, per_image, total)
    tiles, channel_blocks = -(-total // block_p), -(-channels // block_c)
    groups = 1
    if not fused and grad_weight is not None:
        groups = window.kernel[0] * window.kernel[1] * -(-window.kernel[2] // part.group)
    programs = tuning("conv", architecture).programs
    chunks, chunk_tiles = chunks_of(tiles, channel_blocks * groups, window.taps, channels, input, programs)
    need_int32(total, channel_blocks * chunks * groups)
    partial = torch.empty(chunks, channels, window.taps + 1, dtype=torch.float32, device=input.device)

    arguments = dict(
        dy_ptr=grad_output, x_ptr=input, partial_ptr=partial,
        total=total, strips=strips, tiles=tiles, chunk_tiles=chunk_tiles, C=channels,
        **sizes_of(x, y), GD=covered[0], GH=covered[1], **x.strides_named("x"), **y.strides_named("y"),
    )  # fmt: skip
    constants = window.constants() | window.image_constants() | part.constants()
    constants |= dict(
        VECTOR=vector, X_ACCESS=x_access, X_COUNT=x_count, BLOCK_P=block_p, BLOCK_C=block_c,
        NEED_DW=grad_weight is not None, NEED_DB=grad_bias is not None,
    )  # fmt: skip
    if fused:
        flat_weight, weight_strides = packed_weight(weight, part.c_last)
        first = Launch(
            kernel=depthwise_conv_backward_kernel,
            grid=channel_blocks * chunks,
            arguments=arguments
            | dict(w_ptr=flat_weight, dx_ptr=grad_input, blocks=channel_blocks if part.c_last else chunks)
            | dx.strides_named("d")
            | weight_strides,
            constants=constants
            | dict(
                DX_ACCESS=store_access_of(dx, part.c_last, vector, part.columns),
                NEED_DX=grad_input is not None,
            ),
            options=options_of(part.tile),
        )
    else:
        first = Launch(
            kernel=depthwise_conv_backward_weight_kernel,
            grid=channel_blocks * chunks * groups,
            arguments=arguments | dict(blocks=channel_blocks, chunks=chunks),
            constants=constants | dict(MULTIPLIER=multiplier, GROUP=part.group),
            options=options_of(part.tile),
        )
    return [first, plan_sum_partials(partial, grad_weight, grad_bias)]


def plan_sum_partials(partial: Tensor, grad_weight: Tensor | None, grad_bias: Tensor | None) -> Launch:
    """The second stage of dw and db."""
    chunks, channels, taps_and_bias = partial.shape
    return Launch(
        kernel=depthwise_conv_sum_partials_kernel,
        grid=-(-taps_and_bias * channels // SUM_BLOCK),
        arguments=dict(
            partial_ptr=partial, dw_ptr=grad_weight, db_ptr=grad_bias,
            chunks=chunks, C=channels, TAPS=taps_and_bias - 1,
        ),
        constants=dict(BLOCK=SUM_BLOCK, BLOCK_CHUNKS=SUM_ROWS),
        options=dict(num_warps=4, num_stages=2),
    )  # fmt: skip


def plan_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, grads: Gradients,
    window: Window, channels_last: bool, architecture: str,
) -> list[Launch]:  # fmt: skip
    """The launches that fill the gradients (dx, dw, db) that are not None."""
    grad_input, grad_weight, grad_bias = grads
    multiplier = weight.shape[0] // input.shape[1]
    strips_image = image_of(input if grad_input is None else grad_input)
    fused = fits_fused(window, image_of(grad_output), strips_image, channels_last, multiplier, architecture)
    sums = grad_weight is not None or grad_bias is not None
    launches = []
    if grad_input is not None and not (fused and sums):
        launches.append(
            plan_backward_input(grad_output, weight, grad_input, window, channels_last, architecture)
        )
    if sums:
        launches += plan_backward_sums(
            grad_output, input, weight, grads, window, channels_last, architecture, fused
        )  # fmt: skip
    return launches
