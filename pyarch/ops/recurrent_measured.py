"""Where torch's own CPU kernels were measured to be faster: `auto` leaves it the call and `explain` says so.

The figures are medians over the shapes of `python -m benchmarks recurrent --sweep` that fall into a region,
ours against torch in one run, kept in benchmarks/results. A layer left to torch runs there forward and
backward, so `training` tells the two measurements apart.
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
SLOWER = (
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


def forward_concessions(call) -> Iterator[str]:
    """The measured reason, if any, to leave a `RecurrentCall` on a CPU to torch."""
    if call.device != "cpu":
        return
    multiply_adds = call.batch * call.gates * call.hidden_size * (call.input_size + call.hidden_size)
    for region in SLOWER:
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
