"""Depthwise convolution on Triton: the host side of the operator's forward and backward.

The kernels are in conv_forward, conv_backward and conv_backward_split; conv_plan decides which run, and how.
"""

import torch
from torch import Tensor

from .conv_geometry import window_of
from .conv_plan import plan_backward, plan_forward
from .tuning import architecture_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def empty_like_layout(shape: tuple[int, ...], like: Tensor, channels_last: bool) -> Tensor:
    """An uninitialised tensor in the operator's output format."""
    layout = CHANNELS_LAST[len(shape)] if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    padding_mode: str,
    channels_last: bool,
) -> Tensor:
    """y[n, c, o] = bias[c] + sum_k weight[c, k] * x[n, c // m, o * stride - padding + k * dilation].

    Args:
        input: (N, C, *spatial), one to three spatial dimensions, any strides; float32, float16 or bfloat16.
        weight: (C * m, 1, *kernel), any strides, the input's dtype.
        bias: (C * m,) or None.
        stride, dilation: one number per spatial dimension.
        padding: (before, after) per spatial dimension.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        channels_last: whether the output is channels-last (two and three dimensions) rather than contiguous.

    Returns:
        (N, C * m, *out), freshly allocated; sums in float32, rounded once.

    Raises:
        NotImplementedError: a dtype without a kernel, or 2**31 or more strips of positions.
    """
    need_dtype(input)
    window = window_of(weight, stride, padding, dilation, padding_mode)
    shape = (input.shape[0], weight.shape[0], *window.output_size(tuple(input.shape[2:])))
    output = empty_like_layout(shape, input, channels_last)
    bias = None if bias is None else bias.contiguous()
    if output.numel() > 0:
        architecture = architecture_of(input.device)
        for launch in plan_forward(input, weight, bias, output, window, channels_last, architecture):
            launch.run(input.device)
    return output


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    padding_mode: str,
    channels_last: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (input, weight, bias) of `forward`; None where not needed. Bitwise repeatable.

    Args:
        grad_output: (N, C * m, *out), any strides, also expanded ones.
        needs: which of the three gradients to compute. The other arguments are those of `forward`.

    Returns:
        grad_input in the output's memory format, grad_weight and grad_bias contiguous.

    Raises:
        NotImplementedError: a dtype without a kernel, or 2**31 or more strips of positions.
    """
    need_dtype(input)
    window = window_of(weight, stride, padding, dilation, padding_mode)
    grad_input = empty_like_layout(tuple(input.shape), input, channels_last) if needs[0] else None
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if needs[1] else None
    grad_bias = torch.empty(weight.shape[0], dtype=weight.dtype, device=weight.device) if needs[2] else None
    grads = (grad_input, grad_weight, grad_bias)
    if weight.shape[0] > 0:
        architecture = architecture_of(input.device)
        for launch in plan_backward(grad_output, input, weight, grads, window, channels_last, architecture):
            launch.run(input.device)
    return grads


def need_dtype(input: Tensor) -> None:
    if input.dtype not in DTYPES:
        raise NotImplementedError(f"dtype={input.dtype}, needs float32, float16 or bfloat16")
