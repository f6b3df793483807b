"""Where torch's own CPU kernels were measured to be faster: `auto` leaves it the call and `explain` says so.

The figures are medians over the shapes of `benchmarks recurrent --sweep --backend cpu` that fall into
a region, ours against torch in one run, on a Zen 5 and on an Emerald Rapids, whose AMX names the second table
and on whose tiles both multiply bfloat16. A layer left to torch runs there forward and backward, so
`training` tells the two measurements apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from pyarch.ops.measured import ANY, NO_LIMIT, Bounds, within


class Slower(NamedTuple):
    """A region of calls, each bound inclusive, and how our speed compares there. None matches everything."""

    speed: str
    cell: bool
    modes: tuple[str, ...]
    steps: Bounds = ANY
    batch: Bounds = ANY
    hidden_size: Bounds = ANY
    multiply_adds: Bounds = ANY  # of a step
    packed: bool | None = None
    training: bool | None = None
    dtype: torch.dtype | None = None


RNN = ("rnn_tanh", "rnn_relu")
ALL_MODES = ("lstm", "gru", *RNN)
ZEN_5 = (
    Slower(
        "over 5 shapes 0.96x of torch",
        False,
        ("lstm",),
        steps=(32, NO_LIMIT),
        batch=(16, NO_LIMIT),
        hidden_size=(128, NO_LIMIT),
        packed=False,
        training=False,
    ),
    Slower(
        "over 8 shapes 0.56x of torch (0.79x in training)",
        True,
        ALL_MODES,
        multiply_adds=(0, 600_000),
        dtype=torch.float32,
    ),
    Slower(
        "over 1 shape 0.47x of torch (0.57x in training)",
        True,
        RNN,
        multiply_adds=(0, 20_000),
        dtype=torch.bfloat16,
    ),
    Slower(
        "over 6 shapes 0.88x of torch (0.88x in training)",
        True,
        ALL_MODES,
        batch=(16, NO_LIMIT),
        hidden_size=(512, NO_LIMIT),
        dtype=torch.bfloat16,
    ),
)

EMERALD_RAPIDS = (
    Slower("over 21 shapes 0.64x of torch (0.73x in training)", True, ALL_MODES, dtype=torch.float32),
    Slower(
        "over 12 shapes 0.50x of torch (0.56x in training)",
        True,
        ALL_MODES,
        batch=(16, NO_LIMIT),
        dtype=torch.bfloat16,
    ),
    Slower(
        "over 1 shape 0.42x of torch (0.51x in training)",
        True,
        RNN,
        multiply_adds=(0, 20_000),
        dtype=torch.bfloat16,
    ),
    Slower(
        "over 6 shapes 0.75x of torch (0.79x in training)",
        False,
        RNN,
        steps=(1, 1),
        dtype=torch.float32,
    ),
    Slower(
        "over 4 shapes 0.84x of torch",
        False,
        ("gru",),
        steps=(1, 1),
        batch=(16, NO_LIMIT),
        training=False,
        dtype=torch.float32,
    ),
    Slower(
        "over 1 shape 0.78x of torch (0.90x in training)",
        False,
        ("lstm",),
        steps=(16, NO_LIMIT),
        batch=(64, NO_LIMIT),
        hidden_size=(512, NO_LIMIT),
        packed=False,
        dtype=torch.float32,
    ),
)
# By architecture; others are taken for a Zen 5.
SLOWER = {"amx": EMERALD_RAPIDS}


def forward_concessions(call) -> Iterator[str]:
    """The measured reason, if any, to leave a `RecurrentCall` on a CPU to torch."""
    if call.device != "cpu":
        return
    multiply_adds = call.batch * call.gates * call.hidden_size * (call.input_size + call.hidden_size)
    for region in SLOWER.get(call.architecture, ZEN_5):
        if (
            call.cell == region.cell
            and call.mode in region.modes
            and not call.proj_size
            and within(call.steps, region.steps)
            and within(call.batch, region.batch)
            and within(call.hidden_size, region.hidden_size)
            and within(multiply_adds, region.multiply_adds)
            and region.packed in (None, call.packed)
            and region.training in (None, call.save)
            and region.dtype in (None, call.dtype)
        ):
            what = f"{call.mode} cell" if call.cell else f"{call.mode} with {call.steps} steps"
            yield (
                f"{what}, batch {call.batch}, {call.hidden_size} hidden units: "
                f"measured {region.speed}, see benchmarks/results"
            )
            return
