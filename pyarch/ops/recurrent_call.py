"""What is known of a recurrent layer's call before it runs, and which backend may run it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pyarch import hardware
from pyarch.dispatch import Backend, Op, accepts_all
from pyarch.ops.kernel_refusals import cpu_refusals, cuda_refusals, triton_refusals
from pyarch.ops.recurrent_measured import forward_concessions
from pyarch.reference.recurrent import GATES


class RecurrentCall(NamedTuple):
    """What a backend may ask about a layer's call; forward and backward share it.

    Args:
        mode: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        steps, batch, rows: T, B and N, which is T B or the packed total.
        proj_size: P of an lstm with projection, else 0.
        directions: 1 or 2.
        bias: whether there are biases.
        packed: whether the input is packed, with `batch_sizes`.
        save: whether a backward will follow.
        cell: whether a cell asks for its one step.
    """

    device: str
    architecture: str
    dtype: torch.dtype
    mode: str
    steps: int
    batch: int
    rows: int
    input_size: int
    hidden_size: int
    proj_size: int
    directions: int
    bias: bool
    packed: bool
    save: bool
    cell: bool = False

    @property
    def gates(self) -> int:
        return GATES[self.mode]


def describe(
    mode: str,
    input: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    save: bool,
    cell: bool = False,
) -> RecurrentCall:
    """The metadata of one layer's call on these tensors."""
    shapes = input.shape, h0.shape, weights[0].shape, weights[1].shape, len(weights)
    return _described(
        mode,
        input.device,
        input.dtype,
        *shapes,
        None if batch_sizes is None else len(batch_sizes),
        save,
        cell,
    )


@lru_cache(maxsize=4096)
def _described(
    mode, device, dtype, input, h0, w_ih, w_hh, weights, packed_steps, save, cell
) -> RecurrentCall:
    directions, batch, width = h0
    count = weights // directions
    return RecurrentCall(
        device=device.type,
        architecture=hardware.architecture(device),
        dtype=dtype,
        mode=mode,
        steps=input[0] if packed_steps is None else packed_steps,
        batch=batch,
        rows=input[0] * batch if packed_steps is None else input[0],
        input_size=w_ih[1],
        hidden_size=w_hh[0] // GATES[mode],
        proj_size=width if count in (3, 5) else 0,
        directions=directions,
        bias=count >= 4,
        packed=packed_steps is not None,
        save=save,
        cell=cell,
    )


# -------------------------------------------------------------------------------- a whole stack


def count_of_weights(weights: Sequence[Tensor], num_layers: int, bidirectional: bool) -> int:
    """Parameters of one direction of one layer."""
    return len(weights) // (num_layers * (2 if bidirectional else 1))


def fits(
    mode: str,
    input: Sequence[int],
    states: Sequence[Sequence[int]],
    weights: Sequence[Sequence[int]],
    num_layers: int,
    bidirectional: bool,
    packed: bool,
) -> bool:
    """Whether shapes of input, states and weights make a stack that the kernels can run."""
    per_direction, directions = (2, 3, 4, 5) if mode == "lstm" else (2, 4), 2 if bidirectional else 1
    count = len(weights) // (num_layers * directions)
    if len(weights) != count * num_layers * directions or count not in per_direction:
        return False
    if len(states) != (2 if mode == "lstm" else 1) or len(input) != (2 if packed else 3):
        return False
    if not packed and input[0] < 1:
        return False
    if any(len(shape) != 3 for shape in states) or any(len(shape) != 2 for shape in weights[:2]):
        return False
    gates, width = weights[1]
    batch = states[0][1] if packed else input[1]
    hidden = gates // GATES[mode]
    if hidden < 1 or input[-1] < 1 or width < 1 or gates != hidden * GATES[mode]:
        return False
    if count in (2, 4) and width != hidden:
        return False
    expected_states = [(num_layers * directions, batch, size) for size in (width, hidden)[: len(states)]]
    if any(tuple(shape) != expected for shape, expected in zip(states, expected_states, strict=True)):
        return False
    biases, projection = [(gates,)] * 2 if count >= 4 else [], [(width, hidden)] if count in (3, 5) else []
    sizes = [input[-1]] + [directions * width] * (num_layers - 1)
    expected = [
        shape
        for size in sizes
        for _ in range(directions)
        for shape in ((gates, size), (gates, width), *biases, *projection)
    ]
    return all(tuple(shape) == wanted for shape, wanted in zip(weights, expected, strict=True))


remembered_fits = lru_cache(maxsize=4096)(fits)


# -------------------------------------------------------------------------------- backends


FORWARD = Op(
    "recurrent_forward",
    (
        Backend("triton", "pyarch.triton_kernels.recurrent:forward", triton_refusals),
        Backend("cuda", "pyarch.cuda_kernels.recurrent:forward", cuda_refusals),
        Backend("cpu", "pyarch.ops.recurrent_cpu:forward", cpu_refusals, forward_concessions),
        Backend("torch", "pyarch.ops.recurrent_torch:forward", accepts_all),
        Backend("reference", "pyarch.reference.recurrent:forward", accepts_all),
    ),
)
BACKWARD = Op(
    "recurrent_backward",
    (
        Backend("triton", "pyarch.triton_kernels.recurrent:backward", triton_refusals),
        Backend("cuda", "pyarch.cuda_kernels.recurrent:backward", cuda_refusals),
        Backend("cpu", "pyarch.ops.recurrent_cpu:backward", cpu_refusals),
        Backend("torch", "pyarch.ops.recurrent_torch:backward", accepts_all),
        Backend("reference", "pyarch.reference.recurrent:backward", accepts_all),
    ),
)
