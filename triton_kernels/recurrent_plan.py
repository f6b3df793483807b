"""From tensors to launches of the resident and the pointwise kernels of the recurrent family.

Plans need shapes, strides and dtypes only, so meta tensors do: the compile audit builds the same launches as
a call. Legend: see recurrent_tiles.
"""

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from . import recurrent_tiles
from .launch import Launch
from .recurrent_pointwise import recurrent_step_backward_kernel, recurrent_step_forward_kernel
from .recurrent_products import GATES
from .recurrent_resident import recurrent_resident_forward_kernel
from .recurrent_resident_backward import recurrent_resident_backward_kernel
from .recurrent_tuning import Tile, tuning

MODES = {
    "lstm": recurrent_tiles.LSTM.value,
    "gru": recurrent_tiles.GRU.value,
    "rnn_tanh": recurrent_tiles.RNN_TANH.value,
    "rnn_relu": recurrent_tiles.RNN_RELU.value,
}
# The narrowest product that tensor cores take, and the units that one program of a step has at most.
NARROWEST, WIDEST_STEP = 16, 256


@dataclass(frozen=True)
class Layer:
    """What is known of a call without its data.

    Args:
        mode: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        dtype: of the input and the weights.
        precision: of float32 products, "ieee" or "tf32".
        steps, batch, rows: T, B, N.
        hidden_size, proj_size: H, P; 0 where there is no projection.
        directions: 1 or 2.
        packed: whether sequences differ in length.
        capturing: whether a CUDA graph is being captured.
        architecture: "sm_90", "gfx942", ...; "default" without a GPU.
    """

    mode: str
    dtype: torch.dtype
    precision: str
    steps: int
    batch: int
    rows: int
    hidden_size: int
    proj_size: int
    directions: int
    packed: bool
    capturing: bool
    architecture: str

    @property
    def cell(self) -> str:
        return self.mode.partition("_")[0]

    @property
    def gates(self) -> int:
        return GATES[self.mode]

    def tile(self, kernel: str) -> Tile | None:
        """The tile of a kernel; None where it does not reach this hidden size."""
        product = "16" if self.dtype != torch.float32 else self.precision
        product = "none" if kernel.startswith("step") else product
        return tuning(self.architecture).tile(kernel, self.cell, product, self.hidden_size)


def precision_on(architecture: str, dtype: torch.dtype, wanted: str) -> str:
    """The precision of products: only float32 on NVIDIA's tensor cores has a choice of "tf32"."""
    return wanted if dtype == torch.float32 and architecture.startswith("sm_") else "ieee"


def refusals_of_resident(layer: Layer, direction: str) -> list[str]:
    """Why the resident kernel of a direction ("forward" or "backward") does not take a layer."""
    reasons = []
    if layer.proj_size:
        reasons.append(f"proj_size={layer.proj_size}, needs none")
    if layer.tile(f"resident_{direction}") is None:
        kind = f"{layer.mode}, {layer.dtype}, {layer.architecture}"
        reasons.append(f"hidden_size={layer.hidden_size}, its weight does not stay on chip ({kind})")
    if layer.packed and layer.capturing:
        reasons.append("packed sequences in a CUDA graph, needs lengths on the host at every replay")
    return reasons


def power_of_two_above(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def resident_launch(layer: Layer, kernel_name: str, kernel, arguments: dict) -> Launch:
    """A resident kernel over all batch tiles and directions."""
    tile = layer.tile(kernel_name)
    align = gcd(layer.hidden_size, NARROWEST)
    # Copies behind the arithmetic are of at least 4 bytes, and odd rows' addresses take many registers.
    stages = tile.stages if align >= 4 else 1
    tiles = -(-layer.batch // tile.block_b)
    sizes = dict(T=layer.steps, B=layer.batch, N=layer.rows, H=layer.hidden_size, tiles=tiles)
    return Launch(
        kernel=kernel,
        grid=tiles * layer.directions,
        arguments=arguments | sizes,
        constants=dict(
            MODE=MODES[layer.mode], DIRECTIONS=layer.directions, PRECISION=layer.precision,
            BLOCK_B=tile.block_b, BLOCK_H=max(power_of_two_above(layer.hidden_size), NARROWEST),
            STAGES=stages, ALIGN=align,
        ),
        options=tile.options(),
    )  # fmt: skip


def plan_resident_forward(
    layer: Layer, xg: Tensor, w: Tensor, b_hn: Tensor | None, states: tuple[Tensor, Tensor | None],
    index: tuple[Tensor, Tensor] | None, results: tuple[Tensor | None, ...],
) -> Launch:  # fmt: skip
    """The one launch of the resident forward; results are (output, h_n, c_n, gates, cells)."""
    starts, lengths = index or (None, None)
    names = ("output_ptr", "h_n_ptr", "c_n_ptr", "gates_ptr", "cells_ptr")
    arguments = dict(
        xg_ptr=xg, w_ptr=w, b_hn_ptr=b_hn, h0_ptr=states[0], c0_ptr=states[1],
        starts_ptr=starts, lengths_ptr=lengths, **dict(zip(names, results, strict=True)),
    )  # fmt: skip
    return resident_launch(layer, "resident_forward", recurrent_resident_forward_kernel, arguments)


def plan_resident_backward(
    layer: Layer, incoming: tuple[Tensor | None, ...], w: Tensor, states: tuple[Tensor, Tensor | None],
    index: tuple[Tensor, Tensor] | None, saved: tuple[Tensor | None, ...], results: tuple[Tensor | None, ...],
) -> Launch:  # fmt: skip
    """The one launch of the resident backward.

    Args:
        incoming: gradients of output (N, D*H), h_n and c_n, each or None.
        saved: (output, gates, cells), None where the cell has none.
        results: (dpre, grad_h0, grad_c0), the last two None where not needed.
    """
    starts, lengths = index or (None, None)
    grad_output = incoming[0]
    strides = (0, 0) if grad_output is None else grad_output.stride()
    arguments = dict(
        grad_output_ptr=grad_output, grad_h_n_ptr=incoming[1], grad_c_n_ptr=incoming[2],
        w_ptr=w, h0_ptr=states[0], c0_ptr=states[1], starts_ptr=starts, lengths_ptr=lengths,
        output_ptr=saved[0], gates_ptr=saved[1], cells_ptr=saved[2],
        dpre_ptr=results[0], grad_h0_ptr=results[1], grad_c0_ptr=results[2],
        stride_gn=strides[0], stride_gp=strides[1],
    )  # fmt: skip
    return resident_launch(layer, "resident_backward", recurrent_resident_backward_kernel, arguments)


def step_launch(layer: Layer, kernel_name: str, kernel, rows: int, arguments: dict) -> Launch:
    """A pointwise kernel over the rows of one step."""
    tile = layer.tile(kernel_name)
    block_h = min(power_of_two_above(layer.hidden_size), WIDEST_STEP)
    column_tiles = -(-layer.hidden_size // block_h)
    sizes = dict(rows=rows, H=layer.hidden_size, column_tiles=column_tiles)
    return Launch(
        kernel=kernel,
        grid=-(-rows // tile.block_b) * column_tiles,
        arguments=arguments | sizes,
        constants=dict(MODE=MODES[layer.mode], BLOCK_B=tile.block_b, BLOCK_H=block_h),
        options=tile.options(),
    )


def plan_step_forward(
    layer: Layer, xg: Tensor, hg: Tensor, biases: tuple[Tensor | None, Tensor | None],
    carry: Tensor | None, state: Tensor, output: Tensor | None, saved: tuple[Tensor | None, Tensor | None],
) -> Launch:  # fmt: skip
    """The launch that ends one step; `saved` are its rows of gates and cells."""
    arguments = dict(
        xg_ptr=xg, hg_ptr=hg, b_ih_ptr=biases[0], b_hh_ptr=biases[1], carry_ptr=carry, state_ptr=state,
        output_ptr=output, gates_ptr=saved[0], cells_ptr=saved[1],
        stride_xg=xg.stride(0), stride_output=0 if output is None else output.stride(0),
    )  # fmt: skip
    return step_launch(layer, "step_forward", recurrent_step_forward_kernel, xg.shape[0], arguments)


def plan_step_backward(
    layer: Layer, grad_output: Tensor | None, dh: Tensor, carry: Tensor | None,
    before: Tensor | None, start: Tensor | None, output: Tensor | None,
    saved: tuple[Tensor | None, Tensor | None], dpre: Tensor,
) -> Launch:  # fmt: skip
    """The launch that begins one step of the backward; `before` holds the rows that have a step before."""
    strides = (0, 0) if grad_output is None else grad_output.stride()
    arguments = dict(
        grad_output_ptr=grad_output, dh_ptr=dh, carry_ptr=carry, before_ptr=before, start_ptr=start,
        output_ptr=output, gates_ptr=saved[0], cells_ptr=saved[1], dpre_ptr=dpre,
        followers=0 if before is None else before.shape[0], stride_gn=strides[0], stride_gp=strides[1],
        stride_before=0 if before is None else before.stride(0),
        stride_output=0 if output is None else output.stride(0),
    )  # fmt: skip
    return step_launch(layer, "step_backward", recurrent_step_backward_kernel, dpre.shape[0], arguments)
