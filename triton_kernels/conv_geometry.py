"""Geometry of a depthwise convolution on the host: window, tensors as the kernels see them, access modes,
blocks.

Legend: see conv_tiles.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from . import conv_tiles
from .tuning import Tile

MODES = {
    "zeros": conv_tiles.ZEROS.value,
    "reflect": conv_tiles.REFLECT.value,
    "replicate": conv_tiles.REPLICATE.value,
    "circular": conv_tiles.CIRCULAR.value,
}
SCATTERED = conv_tiles.SCATTERED.value
CHANNELS = conv_tiles.CHANNELS.value
WIDTH = conv_tiles.WIDTH.value
PACKED = conv_tiles.PACKED.value

# Rows of up to this many taps are unrolled whole.
SHORT_ROW = 8
# A window wider than this many columns is not unrolled: its taps run one at a time.
WINDOW = 64


@dataclass(frozen=True)
class Window:
    """Kernel geometry in three dimensions (D, H, W); missing ones have one tap and no padding."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    mode: int

    @property
    def taps(self) -> int:
        return prod(self.kernel)

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Output size (any number of dimensions, the last ones) for an input of that size."""
        skip = 3 - len(size)
        return tuple(
            (
                size[i]
                + self.before[i + skip]
                + self.after[i + skip]
                - self.dilation[i + skip] * (self.kernel[i + skip] - 1)
                - 1
            )
            // self.stride[i + skip]
            + 1
            for i in range(len(size))
        )

    def constants(self) -> dict[str, int]:
        """The kernels' constants that every one of them takes."""
        names = {"K": self.kernel, "S": self.stride, "D": self.dilation, "P": self.before}
        return {f"{k}{dim}": values[i] for k, values in names.items() for i, dim in enumerate("DHW")} | {
            "MODE": self.mode
        }

    def image_constants(self) -> dict[str, int]:
        """Padding after, and how many padded positions may read one index, for each dimension."""
        constants = {f"A{dim}": self.after[i] for i, dim in enumerate("DHW")}
        for i, dim in enumerate("DHW"):
            padding = self.before[i] + self.after[i]
            images = 1 + padding if self.mode == MODES["replicate"] else 3
            constants[f"IMAGES_{dim}"] = 1 if padding == 0 or self.mode == MODES["zeros"] else images
        return constants


def window_of(
    weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], padding_mode: str
) -> Window:
    """Bring the canonical arguments to three dimensions."""
    kernel = tuple(weight.shape[2:])
    ones = (1,) * (3 - len(kernel))
    zeros = (0,) * (3 - len(kernel))
    return Window(
        kernel=ones + kernel,
        stride=ones + tuple(stride),
        dilation=ones + tuple(dilation),
        before=zeros + tuple(padding[0::2]),
        after=zeros + tuple(padding[1::2]),
        mode=MODES[padding_mode] if any(padding) else MODES["zeros"],
    )


@dataclass(frozen=True)
class Image:
    """A tensor (N, C, D, H, W) as the kernels see it; dimensions of size 1 have stride 0."""

    tensor: Tensor
    size: tuple[int, ...]
    strides: tuple[int, ...]

    def strides_named(self, letter: str) -> dict[str, int]:
        return {f"stride_{letter}{dim}": stride for dim, stride in zip("ncdhw", self.strides, strict=True)}

    def aligned(self, count: int, dim: int) -> bool:
        """Whether vectors of `count` elements along that dimension never straddle its end and start
        aligned."""
        others = [stride for i, stride in enumerate(self.strides) if i != dim]
        multiples = all(number % count == 0 for number in (self.size[dim], *others))
        return (
            self.strides[dim] == 1
            and multiples
            and self.tensor.data_ptr() % (count * self.tensor.element_size()) == 0
        )


def image_of(tensor: Tensor) -> Image:
    missing = 5 - tensor.dim()
    size = (*tensor.shape[:2], *(1,) * missing, *tensor.shape[2:])
    strides = (*tensor.stride()[:2], *(0,) * missing, *tensor.stride()[2:])
    return Image(
        tensor, size, tuple(0 if n == 1 else stride for n, stride in zip(size, strides, strict=True))
    )


def power_of_two_above(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def columns_channels_first(limit: int, images: tuple[Image, ...], width: int) -> int:
    """Columns a strip when columns are adjacent: the most that align the rows of all images, else of the
    first; where nothing is aligned, few enough to leave little of the last strip empty."""
    for aligned in (images, images[:1]):
        count = limit
        while count > 1:
            if all(image.aligned(count, 4) for image in aligned):
                return count
            count //= 2
    return min(limit, power_of_two_above(width)) if width <= limit else min(limit, 4)


def columns_channels_last(limit: int, width: int) -> int:
    """Columns a strip when channels are adjacent: the most that leave under an eighth of the strips'
    columns empty."""
    count = min(limit, power_of_two_above(width))
    while count > 1 and -(-width // count) * count > width * 9 / 8:
        count //= 2
    return count


def vector_of(c_last: bool, channels: int, dtype: torch.dtype) -> int:
    """Elements in 16 bytes where whole such vectors of channels can be had, else 1."""
    vector = 16 // dtype.itemsize
    return vector if c_last and channels % vector == 0 else 1


def access_of(image: Image, c_last: bool, vector: int, count: int) -> tuple[int, int]:
    """(ACCESS, COUNT) for loads of `count` adjacent columns of an image."""
    if c_last and vector > 1 and image.aligned(vector, 1):
        return CHANNELS, 1
    if count > 1 and image.aligned(count, 4):
        return WIDTH, count
    return SCATTERED, 1


def store_access_of(image: Image, c_last: bool, vector: int, columns: int) -> int:
    """ACCESS for stores of whole strips."""
    access, _ = access_of(image, c_last, vector, columns)
    if access == SCATTERED and columns > 1 and image.strides[4] == 1:
        return PACKED
    return access


def blocks_of(tile: Tile, c_last: bool, channels: int, strips_per_image: int, total: int) -> tuple[int, int]:
    """(BLOCK_P, BLOCK_C): small maps pack more channels, few channels more positions."""
    if c_last:
        block_c = min(tile.channels, power_of_two_above(channels))
        while block_c > 16 and -(-channels // block_c) * block_c > channels * 9 / 8:
            block_c //= 2
        return min(tile.lanes // block_c, power_of_two_above(total)), block_c
    block_c = min(
        tile.channels,
        power_of_two_above(channels),
        max(1, tile.lanes // power_of_two_above(strips_per_image)),
    )
    return min(tile.lanes // block_c, power_of_two_above(total)), block_c


def group_of(tile: Tile, window: Window) -> int:
    """Taps of a row unrolled together: all of a short row, `tile.group` of a long one."""
    if window.kernel[2] <= SHORT_ROW and (window.kernel[2] - 1) * window.dilation[2] <= WINDOW:
        return window.kernel[2]
    group = min(tile.group, power_of_two_above(window.kernel[2]))
    while group > 1 and (group - 1) * window.dilation[2] > WINDOW:
        group //= 2
    return group


def need_int32(total: int, grid: int) -> None:
    if max(total, grid) >= 2**31:
        raise NotImplementedError(f"strips={total} and programs={grid}, each needs fewer than 2**31")


def packed_weight(weight: Tensor, c_last: bool) -> tuple[Tensor, dict[str, int]]:
    """Weights with taps (or, for channels-last tiles, channels) adjacent, and their strides."""
    flat = weight.reshape(weight.shape[0], -1)
    flat = flat.t().contiguous().t() if c_last else flat.contiguous()
    return flat, {"stride_wc": flat.stride(0), "stride_wk": flat.stride(1)}


def channels_adjacent(image: Image) -> bool:
    return image.size[1] > 1 and image.strides[1] == 1 and image.strides[4] != 1


def options_of(tile: Tile) -> dict[str, int]:
    """The launch options of a tile; maxnreg only where the table has one, because AMD's compiler knows
    none."""
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return options if tile.max_registers is None else options | {"maxnreg": tile.max_registers}
