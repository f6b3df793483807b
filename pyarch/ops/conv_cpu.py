"""Depthwise convolution on the C++ CPU kernels: allocation and layout, then one native call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyarch import native
from pyarch.reference.conv import Gradients, memory_format


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    padding_mode: str = "zeros",
    channels_last: bool = False,
) -> Tensor:
    """Arguments and result as `pyarch.reference.conv.forward`."""
    layout = memory_format(input.dim(), channels_last)
    outputs = _output_sizes(input, weight, stride, padding, dilation)
    output = torch.empty(
        (input.shape[0], weight.shape[0], *outputs), dtype=input.dtype, memory_format=layout
    )
    native.operators().depthwise_conv_forward(
        output,
        input.contiguous(memory_format=layout),
        weight.contiguous(),
        bias if bias is None else bias.contiguous(),
        stride,
        padding,
        dilation,
        padding_mode,
        channels_last,
    )
    return output
