"""Where torch's own CPU kernels were measured to be faster: `auto` leaves it the call and `explain` says so.

The figures are medians over the shapes of `python -m benchmarks conv --sweep --backend cpu` that fall into a
region, ours against torch in one run, on a Zen 5 and on an Emerald Rapids, whose AMX names the second table.
They hold for the forward pass, some for the backward too, in float32 and bfloat16: torch's float16 was not
measured, and takes minutes to prepare a row of 15 taps where oneDNN finds AVX512-FP16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from pyarch.ops.measured import ANY, NO_LIMIT, Bounds, within


class Slower(NamedTuple):
    """A region of calls, each bound inclusive, and how our speed compares there. None matches everything."""

    speed: str
    channels_last: bool
    dimensions: Bounds
    largest_kernel: Bounds
    channels: Bounds = ANY
    output_width: Bounds = ANY
    strided: bool | None = None
    dilated: bool | None = None
    dtype: torch.dtype | None = None
    backward: bool = False


# Multiply-adds. Below, the call itself is what takes the time, and ours is the shorter.
SMALLEST = 200_000
MEASURED = (torch.float32, torch.bfloat16)
# Slower on both machines.
STRIDED_AND_DILATED = Slower(
    "over 4 shapes 0.72x of torch",
    False,
    (2, 2),
    (2, 7),
    channels=(48, NO_LIMIT),
    output_width=(1, 15),
    strided=True,
    dilated=True,
)
STRIDED_AND_WIDE = Slower(
    "over 2 shapes 0.78x of torch",
    False,
    (2, 2),
    (5, 7),
    channels=(128, NO_LIMIT),
    output_width=(1, 17),
    strided=True,
    dilated=False,
    dtype=torch.float32,
)
ZEN_5 = (
    Slower("over 20 shapes 0.80x of torch", True, (2, 2), (1, 4), channels=(16, NO_LIMIT)),
    Slower("over 1 shape 0.56x of torch", True, (3, 3), (1, 4), channels=(16, NO_LIMIT), dilated=False),
    Slower("over 1 shape 0.53x of torch", True, (2, 2), (1, 4), channels=(1, 15)),
    Slower("over 4 shapes 0.60x of torch", True, (3, 3), (1, 5), channels=(1, 15)),
    Slower(
        "over 6 shapes 0.80x of torch",
        True,
        (2, 3),
        (5, 31),
        channels=(16, NO_LIMIT),
        output_width=(1, 14),
        strided=True,
        dilated=False,
    ),
    STRIDED_AND_DILATED,
    STRIDED_AND_WIDE,
    Slower(
        "over 3 shapes (0.55 to 1.10) 1.00x of torch",
        False,
        (3, 3),
        (3, 7),
        channels=(48, NO_LIMIT),
        output_width=(1, 15),
        dilated=False,
    ),
)
EMERALD_RAPIDS = (
    Slower("over 3 shapes 0.56x of torch", True, (3, 3), (5, 7), channels=(1, 15), backward=True),
    Slower("over 1 shape 0.70x of torch", True, (3, 3), (1, 1), channels=(16, NO_LIMIT)),
    Slower("over 4 shapes (0.70 to 1.19) 0.80x of torch", True, (2, 2), (4, 4), output_width=(25, NO_LIMIT)),
    STRIDED_AND_DILATED._replace(speed="over 4 shapes 0.58x of torch"),
    STRIDED_AND_WIDE._replace(speed="over 2 shapes 0.72x of torch"),
    Slower(
        "over 3 shapes 0.89x of torch",
        False,
        (3, 3),
        (5, 7),
        channels=(96, NO_LIMIT),
        output_width=(1, 10),
        dilated=False,
        dtype=torch.float32,
    ),
    Slower(
        "over 1 shape 0.67x of torch",
        False,
        (1, 1),
        (7, 7),
        channels=(256, NO_LIMIT),
        output_width=(1, 8),
        strided=True,
        dilated=False,
        dtype=torch.bfloat16,
    ),
)
# By architecture; others are taken for a Zen 5.
SLOWER = {"amx": EMERALD_RAPIDS}


def forward_concessions(call) -> Iterator[str]:
    """The measured reason, if any, to leave the forward of a `ConvCall` on a CPU to torch."""
    yield from _concessions(call, SLOWER.get(call.architecture, ZEN_5))


def backward_concessions(call) -> Iterator[str]:
    """The same of its backward."""
    regions = SLOWER.get(call.architecture, ZEN_5)
    yield from _concessions(call, [region for region in regions if region.backward])


def _concessions(call, regions: Sequence[Slower]) -> Iterator[str]:
    work = math.prod((call.input_shape[0], call.weight_shape[0], *call.outputs, *call.kernel))
    if call.device != "cpu" or work < SMALLEST or call.dtype not in MEASURED:
        return
    kernel, width = max(call.kernel), call.outputs[-1]
    for region in regions:
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
