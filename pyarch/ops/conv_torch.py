"""Depthwise convolution on torch's own operators: what our kernels are measured against and fall back to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pyarch.reference.conv import Gradients, memory_format, pad, unpad

_STOCK = (functional.conv1d, functional.conv2d, functional.conv3d)


def convolve_stock(input, weight, bias, stride, padding, dilation, groups, padding_mode="zeros") -> Tensor:
    """torch.nn.ConvNd's own computation, its errors and gradients included.

    `padding` is torch's notation (a string, or one integer a dimension), or (before, after) for each dimension.
    """
    convolution = _STOCK[min(max(weight.dim() - 3, 0), 2)]
    if isinstance(padding, str):
        if padding_mode == "zeros" or padding == "valid":
            return convolution(input, weight, bias, stride, padding, dilation, groups)
        totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        padding = [part for total in totals for part in (total // 2, total - total // 2)]
    elif len(padding) == len(stride):
        if padding_mode == "zeros":
            return convolution(input, weight, bias, stride, padding, dilation, groups)
        padding = [amount for amount in padding for _ in range(2)]
    elif padding_mode == "zeros" and padding[::2] == padding[1::2]:
        return convolution(input, weight, bias, stride, padding[::2], dilation, groups)
    last_dimension_first = [
        amount for before, after in zip(padding[-2::-2], padding[::-2], strict=True) for amount in (before, after)
    ]
    mode = "constant" if padding_mode == "zeros" else padding_mode
    padded = functional.pad(input, last_dimension_first, mode=mode)
    return convolution(padded, weight, bias, stride, 0, dilation, groups)


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
    output = convolve_stock(input, weight, bias, stride, padding, dilation, input.shape[1], padding_mode)
    return output.contiguous(memory_format=memory_format(input.dim(), channels_last))


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
    folds = padding_mode != "zeros" or padding[::2] != padding[1::2]
    padded = pad(input, padding, padding_mode) if folds else input
    grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_output,
        padded,
        weight,
        [weight.shape[0]],
        stride,
        [0] * len(stride) if folds else padding[::2],
        dilation,
        False,
        [0] * len(stride),
        input.shape[1],
        list(needs),
    )
    if needs[0]:
        if folds:
            grad_input = unpad(grad_input, input.shape, padding, padding_mode)
        grad_input = grad_input.contiguous(memory_format=memory_format(input.dim(), channels_last))
    return (
        grad_input if needs[0] else None,
        grad_weight.contiguous() if needs[1] else None,
        grad_bias if needs[2] else None,
    )
