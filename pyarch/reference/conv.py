"""Depthwise convolution in plain torch: the meaning that every kernel is held to.

    output[n, o, i] = bias[o] + sum_t weight[o, 0, t] * input[n, o // m, source(p)]
    p = i * stride + t * dilation - before

over all taps t of a 1-D to 3-D kernel. `source` maps a padded position to an input position by the padding
mode; in mode "zeros" a position outside reads 0. The sums run in float32 for 16-bit inputs and in the input's
dtype otherwise.

Legend: N batch, C input channels, m depth multiplier, O = C*m output channels, t a tap, `before`/`after` the
padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
_MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(dimensions: int, channels_last: bool) -> torch.memory_format:
    """The memory format of an output or input gradient with `dimensions` dimensions."""
    return _MEMORY_FORMATS[dimensions] if channels_last else torch.contiguous_format


def output_sizes(
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """The output's spatial sizes; `padding` holds (before, after) for each dimension."""
    return tuple(
        (size + before + after - d * (k - 1) - 1) // s + 1
        for size, k, s, before, after, d in zip(
            sizes, kernel, stride, padding[::2], padding[1::2], dilation, strict=True
        )
    )


def source_positions(size: int, before: int, after: int, mode: str) -> Tensor:
    """Map padded positions -before .. size+after-1 of one dimension to input positions (not for "zeros")."""
    positions = torch.arange(-before, size + after)
    if mode == "replicate":
        return positions.clamp(0, size - 1)
    if mode == "circular":
        return positions % size
    positions = positions.abs()
    return torch.where(positions < size, positions, 2 * (size - 1) - positions)


def pad(input: Tensor, padding: Sequence[int], mode: str) -> Tensor:
    """Pad the spatial dimensions; `padding` holds (before, after) for each, first dimension first."""
    pairs = list(zip(padding[::2], padding[1::2], strict=True))
    if mode == "zeros":
        return functional.pad(input, [amount for pair in reversed(pairs) for amount in pair])
    for dimension, (before, after) in enumerate(pairs, start=2):
        index = source_positions(input.shape[dimension], before, after, mode)
        input = input.index_select(dimension, index.to(input.device))
    return input


def unpad(grad: Tensor, shape: Sequence[int], padding: Sequence[int], mode: str) -> Tensor:
    """The adjoint of `pad`: every padded position's gradient goes to the position it was read from."""
    pairs = list(zip(padding[::2], padding[1::2], strict=True))
    for dimension, (before, after) in enumerate(pairs, start=2):
        size = shape[dimension]
        if mode == "zeros":
            grad = grad.narrow(dimension, before, size)
            continue
        index = source_positions(size, before, after, mode).to(grad.device)
        folded = grad.new_zeros([*grad.shape[:dimension], size, *grad.shape[dimension + 1 :]])
        grad = folded.index_add(dimension, index, grad)
    return grad


def taps(
    kernel: Sequence[int], outputs: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Yield each tap with the window of the padded input it multiplies, one element an output."""
    for tap in itertools.product(*map(range, kernel)):
        window = tuple(
            slice(t * d, t * d + s * (count - 1) + 1, s)
            for t, d, s, count in zip(tap, dilation, stride, outputs, strict=True)
        )
        yield tap, (..., *window)


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
    """Convolve `input` (N, C, *spatial) with `weight` (C*m, 1, *kernel); see the head of this file.

    Args:
        input: (N, C, *spatial), 1 to 3 spatial dimensions, any floating or complex dtype.
        weight: (C*m, 1, *kernel), same dtype.
        bias: (C*m,) or None.
        stride, dilation: one integer a spatial dimension.
        padding: (before, after) for each spatial dimension, first dimension first.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        channels_last: memory format of the output.

    Returns:
        (N, C*m, *outputs) in the input's dtype.
    """
    kernel = weight.shape[2:]
    padded = _widen(pad(input, padding, padding_mode)).repeat_interleave(_multiplier(input, weight), 1)
    outputs = output_sizes(input.shape[2:], kernel, stride, padding, dilation)
    wide_weight = _widen(weight)
    result = padded.new_zeros(*padded.shape[:2], *outputs)
    for tap, window in taps(kernel, outputs, stride, dilation):
        result = result + _per_channel(wide_weight[(slice(None), 0, *tap)], result) * padded[window]
    if bias is not None:
        result = result + _per_channel(_widen(bias), result)
    return result.to(input.dtype).contiguous(memory_format=memory_format(input.dim(), channels_last))


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
    """The gradients of `forward` for input, weight and bias, each None where `needs` says so."""
    kernel = weight.shape[2:]
    multiplier = _multiplier(input, weight)
    padded = _widen(pad(input, padding, padding_mode)).repeat_interleave(multiplier, 1)
    grad, wide_weight = _widen(grad_output), _widen(weight)
    grad_padded, grad_weight = torch.zeros_like(padded), torch.zeros_like(wide_weight)
    every_sample_and_position = [0, *range(2, grad.dim())]
    for tap, window in taps(kernel, grad.shape[2:], stride, dilation):
        position = (slice(None), 0, *tap)
        grad_padded[window] += _per_channel(wide_weight[position].conj(), grad) * grad
        grad_weight[position] = (grad * padded[window].conj()).sum(every_sample_and_position)
    grad_input = unpad(grad_padded, input.shape, padding, padding_mode)
    grad_input = grad_input.unflatten(1, (-1, multiplier)).sum(2)
    target_format = memory_format(input.dim(), channels_last)
    return (
        grad_input.to(input.dtype).contiguous(memory_format=target_format) if needs[0] else None,
        grad_weight.to(weight.dtype) if needs[1] else None,
        grad.sum(every_sample_and_position).to(weight.dtype) if needs[2] else None,
    )


def _multiplier(input: Tensor, weight: Tensor) -> int:
    return weight.shape[0] // input.shape[1]


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """View (O,) so that it broadcasts over (N, O, *spatial)."""
    return values.view(1, -1, *[1] * (like.dim() - 2))
