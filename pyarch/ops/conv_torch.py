"""Depthwise convolution on torch's own operators: what our kernels are measured against and fall back to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pyarch.reference.conv import Gradients, memory_format, pad, unpad

_STOCK = (functional.conv1d, functional.conv2d, functional.conv3d)


def convolve_stock(input, weight, bias, stride, padding, dilation, groups, padding_mode="zeros") -> Tensor:
    """torch.nn.ConvNd's own computation, its errors and gradients included; `padding` in torch's notation."""
    if padding_mode == "zeros" or padding == "valid":
        return _convolution(weight)(input, weight, bias, stride, padding, dilation, groups)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        pairs = [part for total in totals for part in (total // 2, total - total // 2)]
    else:
        pairs = [amount for amount in padding for _ in range(2)]
    return convolve_pairs(input, weight, bias, stride, pairs, dilation, groups, padding_mode)


def convolve_pairs(input, weight, bias, stride, pairs, dilation, groups, padding_mode="zeros") -> Tensor:
    """The same with (before, after) for each dimension; a padded copy only where torch needs one."""
    if padding_mode == "zeros" and pairs[::2] == pairs[1::2]:
        return _convolution(weight)(input, weight, bias, stride, pairs[::2], dilation, groups)
    last_dimension_first = [
        amount for pair in zip(pairs[-2::-2], pairs[::-2], strict=True) for amount in pair
    ]
    mode = "constant" if padding_mode == "zeros" else padding_mode
    padded = functional.pad(input, last_dimension_first, mode=mode)
    return _convolution(weight)(padded, weight, bias, stride, 0, dilation, groups)


def _convolution(weight: Tensor):
    return _STOCK[min(max(weight.dim() - 3, 0), 2)]


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
    output = convolve_pairs(input, weight, bias, stride, padding, dilation, input.shape[1], padding_mode)
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
