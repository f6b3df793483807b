"""Depthwise convolution on the C++ CPU kernels: allocation and layout, then one native call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyarch import native
from pyarch.reference.conv import Gradients, memory_format, output_sizes


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
    outputs = output_sizes(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    output = torch.empty((input.shape[0], weight.shape[0], *outputs), dtype=input.dtype, memory_format=layout)
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


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    padding_mode: str = "zeros",
    channels_last: bool = False,
    needs: Sequence[bool] = (True, True, True),
) -> Gradients:
    """Arguments and result as `pyarch.reference.conv.backward`."""
    layout = memory_format(input.dim(), channels_last)

    def gradient(shape, needed, memory_format=torch.contiguous_format):
        return torch.empty(shape, dtype=input.dtype, memory_format=memory_format) if needed else None

    grads = (
        gradient(input.shape, needs[0], layout),
        gradient(weight.shape, needs[1]),
        gradient(weight.shape[:1], needs[2]),
    )
    native.operators().depthwise_conv_backward(
        *grads,
        grad_output.contiguous(memory_format=layout),
        input.contiguous(memory_format=layout),
        weight.contiguous(),
        stride,
        padding,
        dilation,
        padding_mode,
        channels_last,
    )
    return grads
