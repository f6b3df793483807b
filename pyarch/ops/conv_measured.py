"""Where torch's own CPU forward was measured to be faster: `auto` leaves it the call and `explain` says so.

The figures are medians over the shapes of `python -m benchmarks conv --sweep` that fall into a region, ours
against torch in one run, kept in benchmarks/results; the last one is a case of the table, not of the sweep.
They hold for the forward pass only, in float32 and bfloat16: torch's float16 was not measured, and takes
minutes to prepare a row of 15 taps where oneDNN finds AVX512-FP16. The backward has no such regions yet: at
stride 2 with small kernels it is slightly slower than torch's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from pyarch.ops.measured import ANY, NO_LIMIT, within


class Slower(NamedTuple):
    """A region of calls, each bound inclusive, and how our speed compares there. None matches everything."""

    channels_last: bool
    dimensions: tuple[int, int]
    largest_kernel: tuple[int, int]
    channels: tuple[int, float]
    output_width: tuple[int, float]
    strided: bool | None
    dilated: bool | None
    dtype: torch.dtype | None
    speed: str


# Multiply-adds. Below, the call itself is what takes the time, and ours is the shorter.
SMALLEST = 200_000
MEASURED = (torch.float32, torch.bfloat16)
SLOWER = (
    Slower(True, (2, 2), (1, 4), (16, NO_LIMIT), ANY, None, None, None, "over 20 shapes 0.80x of torch"),
    Slower(True, (3, 3), (1, 4), (16, NO_LIMIT), ANY, None, False, None, "over 1 shape 0.56x of torch"),
    Slower(True, (2, 2), (1, 4), (1, 15), ANY, None, None, None, "over 1 shape 0.53x of torch"),
    Slower(True, (3, 3), (1, 5), (1, 15), ANY, None, None, None, "over 4 shapes 0.60x of torch"),
    Slower(True, (2, 3), (5, 31), (16, NO_LIMIT), (1, 14), True, False, None, "over 6 shapes 0.80x of torch"),
    Slower(False, (2, 2), (3, 7), (48, NO_LIMIT), (1, 15), None, None, None, "over 7 shapes 0.72x of torch"),
    Slower(
        False,
        (3, 3),
        (3, 7),
        (48, NO_LIMIT),
        (1, 15),
        None,
        False,
        None,
        "over 3 shapes (0.55 to 1.10) 1.00x of torch",
    ),
    Slower(
        False, (2, 2), (5, 7), (48, NO_LIMIT), (16, 31), None, False, None, "over 4 shapes 0.79x of torch"
    ),
    Slower(
        False,
        (2, 2),
        (2, 5),
        (48, NO_LIMIT),
        (16, NO_LIMIT),
        True,
        False,
        torch.float32,
        "over 1 shape 0.79x of torch",
    ),
)


def forward_concessions(call) -> Iterator[str]:
    """The measured reason, if any, to leave a `ConvCall` on a CPU to torch."""
    work = math.prod((call.input_shape[0], call.weight_shape[0], *call.outputs, *call.kernel))
    if call.device != "cpu" or work < SMALLEST or call.dtype not in MEASURED:
        return
    kernel, width = max(call.kernel), call.outputs[-1]
    for region in SLOWER:
        if (
            call.channels_last == region.channels_last
            and within(len(call.kernel), region.dimensions)
            and within(kernel, region.largest_kernel)
            and within(call.input_shape[1], region.channels)
            and within(width, region.output_width)
            and region.strided in (None, max(call.stride) > 1)
            and region.dilated in (None, max(call.dilation) > 1)
            and region.dtype in (None, call.dtype)
        ):
            layout = "channels-last" if call.channels_last else "contiguous"
            yield (
                f"{layout} kernel {kernel}, {call.input_shape[1]} channels, output width {width}: "
                f"measured {region.speed}, see benchmarks/results"
            )
            return
