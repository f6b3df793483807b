"""Depthwise convolution, 1-D to 3-D: checks, backends, registration, autograd, public function.

The public function hands whatever no kernel of ours computes (float64, complex, forward-mode and functorch
transforms, bad input) to torch's own operator, whose results and error texts are then the user's. Everything
else becomes one opaque operator for torch.compile, inside which the backend is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from pyarch import hardware
from pyarch.dispatch import Backend, Op, Reasons, Verdict, accepts_all, requested_backend
from pyarch.ops.conv_measured import backward_concessions, forward_concessions
from pyarch.ops.conv_torch import convolve_pairs, convolve_stock
from pyarch.ops.kernel_refusals import KERNEL_DTYPES, cpu_refusals, cuda_refusals, triton_refusals
from pyarch.ops.plain_calls import Decisions, is_ordinary, under_transform
from pyarch.reference.conv import memory_format, output_sizes

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


# -------------------------------------------------------------------------------- metadata of a call


class ConvCall(NamedTuple):
    """What a backend may ask about a call; forward and backward share it. Sizes in elements."""

    device: str
    architecture: str
    dtype: torch.dtype
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str = "zeros"
    channels_last: bool = False
    needs: tuple[bool, bool, bool] = (True, True, True)

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.weight_shape[2:]

    @property
    def outputs(self) -> tuple[int, ...]:
        return output_sizes(self.input_shape[2:], self.kernel, self.stride, self.padding, self.dilation)


def _looks_channels_last(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """torch's own rule for strides: ascending over channels, innermost to outermost position, batch."""
    smallest = 0
    for dimension in (1, *range(len(shape) - 1, 1, -1), 0):
        if shape[dimension] == 0 or stride[dimension] < smallest:
            return False
        if dimension == 0 and smallest == stride[1]:
            return False
        smallest = stride[dimension] * max(shape[dimension], 1)
    return stride[1] != 0


def is_channels_last(input: Tensor, weight: Tensor, looks=_looks_channels_last) -> bool:
    """Whether torch gives this convolution's output in channels-last order: input or weight is in it."""
    return input.dim() != 3 and (looks(input.shape, input.stride()) or looks(weight.shape, weight.stride()))


# For tensors of a real call, whose sizes are plain integers; traced ones are symbols that cannot be hashed.
_remembered_looks = lru_cache(maxsize=4096)(_looks_channels_last)


# -------------------------------------------------------------------------------- backends


def _torch_backward_refusals(call: ConvCall) -> Reasons:
    # oneDNN's kernel for this case, seen from a width of about 30 on, leaves parts of the gradient unwritten.
    wrong_layout = call.channels_last and len(call.kernel) == 2 and call.dtype == torch.bfloat16
    if (
        call.device == "cpu"
        and wrong_layout
        and call.dilation[0] > 1
        and call.stride[0] == 1
        and call.needs[1]
    ):
        yield "torch 2.13 gives wrong bfloat16 weight gradients for channels_last with dilated rows on a CPU"


FORWARD = Op(
    "depthwise_conv_forward",
    (
        Backend("triton", "pyarch.triton_kernels.conv:forward", triton_refusals),
        Backend("cuda", "pyarch.cuda_kernels.conv:forward", cuda_refusals),
        Backend("cpu", "pyarch.ops.conv_cpu:forward", cpu_refusals, forward_concessions),
        Backend("torch", "pyarch.ops.conv_torch:forward", accepts_all),
        Backend("reference", "pyarch.reference.conv:forward", accepts_all),
    ),
)
BACKWARD = Op(
    "depthwise_conv_backward",
    (
        Backend("triton", "pyarch.triton_kernels.conv:backward", triton_refusals),
        Backend("cuda", "pyarch.cuda_kernels.conv:backward", cuda_refusals),
        Backend("cpu", "pyarch.ops.conv_cpu:backward", cpu_refusals, backward_concessions),
        Backend("torch", "pyarch.ops.conv_torch:backward", _torch_backward_refusals),
        Backend("reference", "pyarch.reference.conv:backward", accepts_all),
    ),
)


# -------------------------------------------------------------------------------- registration

_library = torch.library.Library("pyarch", "FRAGMENT")
_library.define(
    "depthwise_conv_forward(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, str padding_mode, str backend) -> Tensor"
)
_library.define(
    "depthwise_conv_backward(Tensor grad_output, Tensor input, Tensor weight, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, str padding_mode, bool[3] needs, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)


def describe(input, weight, stride, padding, dilation, padding_mode, needs=(True, True, True)) -> ConvCall:
    """The metadata of a call on these tensors."""
    return ConvCall(
        input.device.type,
        hardware.architecture(input.device),
        input.dtype,
        input.shape,
        weight.shape,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        padding_mode,
        is_channels_last(input, weight, _remembered_looks),
        tuple(needs),
    )


def _forward(input, weight, bias, stride, padding, dilation, padding_mode, backend):
    call = describe(input, weight, stride, padding, dilation, padding_mode)
    run = FORWARD.choose(call, backend).run
    return run(input, weight, bias, stride, padding, dilation, padding_mode, call.channels_last)


def _backward(grad_output, input, weight, stride, padding, dilation, padding_mode, needs, backend):
    call = describe(input, weight, stride, padding, dilation, padding_mode, needs)
    run = BACKWARD.choose(call, backend).run
    grads = run(
        grad_output, input, weight, stride, padding, dilation, padding_mode, call.channels_last, needs
    )
    return tuple(input.new_empty(0) if grad is None else grad for grad in grads)


def _forward_fake(input, weight, bias, stride, padding, dilation, padding_mode, backend):
    outputs = output_sizes(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return torch.empty(
        (input.shape[0], weight.shape[0], *outputs),
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format(input.dim(), is_channels_last(input, weight)),
    )


def _backward_fake(grad_output, input, weight, stride, padding, dilation, padding_mode, needs, backend):
    def like(source, layout):
        return torch.empty(source, dtype=input.dtype, device=input.device, memory_format=layout)

    layout = memory_format(input.dim(), is_channels_last(input, weight))
    return (
        like(input.shape if needs[0] else (0,), layout if needs[0] else torch.contiguous_format),
        like(weight.shape if needs[1] else (0,), torch.contiguous_format),
        like(weight.shape[:1] if needs[2] else (0,), torch.contiguous_format),
    )


_library.impl("depthwise_conv_forward", _forward, "CompositeExplicitAutograd")
_library.impl("depthwise_conv_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("pyarch::depthwise_conv_forward", _forward_fake, lib=_library)
torch.library.register_fake("pyarch::depthwise_conv_backward", _backward_fake, lib=_library)
_forward_op = torch.ops.pyarch.depthwise_conv_forward.default
_backward_op = torch.ops.pyarch.depthwise_conv_backward.default


# -------------------------------------------------------------------------------- autograd


class _DepthwiseConv(torch.autograd.Function):
    """Saves input and weight; the backward is chosen on its own, and differentiable through torch's."""

    @staticmethod
    def forward(ctx, input, weight, bias, stride, padding, dilation, padding_mode, backend):
        ctx.save_for_backward(input, weight, bias)
        ctx.settings = stride, padding, dilation, padding_mode
        ctx.backend = backend
        return _forward_op(input, weight, bias, stride, padding, dilation, padding_mode, backend)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            grads = _differentiable_backward(grad_output, (input, weight, bias), ctx.settings, needs)
        else:
            grads = _backward_op(grad_output, input, weight, *ctx.settings, needs, ctx.backend)
        wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return *wanted, None, None, None, None, None


def _differentiable_backward(grad_output, tensors, settings, needs):
    """The same gradients as a graph of torch's own operators, so that they can be differentiated again."""
    stride, padding, dilation, padding_mode = settings
    with torch.enable_grad():
        output = convolve_pairs(*tensors, stride, padding, dilation, tensors[0].shape[1], padding_mode)
    wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
    grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True))
    return tuple(next(grads) if need else None for need in needs)


# -------------------------------------------------------------------------------- public function


def depthwise_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    padding_mode: str = "zeros",
) -> Tensor:
    """Convolve every channel with its own kernels, as torch.nn.functional.conv1d, 2d or 3d with groups=C.

    output[n, o, i] = bias[o] + sum_t weight[o, 0, t] * input[n, o // m, i * stride + t * dilation - padding]

    Args:
        input: (N, C, *spatial) or (C, *spatial); float32, bfloat16 and float16 run on our kernels, other
            dtypes on torch's own operator. Any strides; channels-last input gives channels-last output.
        weight: (C*m, 1, *kernel), m the depth multiplier. Its dimensions say whether this is 1-D, 2-D or 3-D.
        bias: (C*m,) or None.
        stride, dilation: one integer, or one a spatial dimension.
        padding: likewise, or "valid" or "same" (an odd total puts the extra element behind).
        padding_mode: "zeros", "reflect", "replicate" or "circular".

    Returns:
        (N, C*m, *outputs) or (C*m, *outputs) in the input's dtype.

    Raises:
        RuntimeError, ValueError, TypeError: as torch's own operator, in its words.
        NotImplementedError: a backend asked for by name refuses the call.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"depthwise_conv(): argument 'weight' (position 2) must be Tensor, not {type(weight).__name__}"
        )
    dimensions = weight.dim() - 2
    is_sized = isinstance(input, Tensor) and input.dim() > dimensions > 0
    channels = input.shape[-dimensions - 1] if is_sized else 1
    return convolve(
        input,
        weight,
        bias,
        _each(stride, dimensions),
        padding if isinstance(padding, str) else _each(padding, dimensions),
        _each(dilation, dimensions),
        channels,
        padding_mode,
        requested_backend(),
    )


def convolve(input, weight, bias, stride, padding, dilation, groups, padding_mode, backend) -> Tensor:
    """`depthwise_conv` on settings already spelled out for every dimension, as a module holds them."""
    as_torch_takes_it = stride, padding, dilation, groups, padding_mode
    if not (isinstance(input, Tensor) and (bias is None or isinstance(bias, Tensor))):
        return convolve_stock(input, weight, bias, *as_torch_takes_it)
    trains = _wants_gradients(input, weight, bias)
    like = None if trains else _likeness(input, weight, bias, as_torch_takes_it, backend)
    if like in _decided:
        run, settings = _decided[like]
        return run(input, weight, bias, *settings)
    if torch.is_autocast_enabled(input.device.type):
        input, weight, bias = _autocast(input, weight, bias)
    pairs = settled_padding(input, weight, bias, *as_torch_takes_it)
    if pairs is None:
        return convolve_stock(input, weight, bias, *as_torch_takes_it)
    if input.dim() == weight.dim() - 1:
        return convolve(input.unsqueeze(0), weight, bias, *as_torch_takes_it, backend).squeeze(0)
    settings = stride, pairs, dilation, padding_mode
    if trains:
        return _DepthwiseConv.apply(input, weight, bias, *settings, backend)
    if like is None:
        return _forward_op(input, weight, bias, *settings, backend)
    call = describe(input, weight, *settings)
    chosen = FORWARD.choose(call, backend)
    by_torch = convolve_stock, as_torch_takes_it
    by_kernel = chosen.run, (*settings, call.channels_last)
    run, settings = _decided.remember(like, by_torch if chosen.name == "torch" else by_kernel)
    return run(input, weight, bias, *settings)


_decided = Decisions()
_KIND = attrgetter("shape", "dtype", "device", "layout")


def _likeness(input, weight, bias, settings, backend) -> tuple | None:
    """What a plain eager call without gradients has in common with those that are decided as it is.

    None for any other call. The types of the settings tell 1 from 1.0, which torch refuses.
    """
    present = (input, weight) if bias is None else (input, weight, bias)
    if not is_ordinary(present) or torch.jit.is_tracing():
        return None
    if input.device.type == "meta" or not input.layout == weight.layout == torch.strided:
        return None
    stride, padding, dilation, _, _ = settings
    types = tuple(map(type, (*stride, *padding, *dilation)))
    return backend, settings, types, input.stride(), weight.stride(), tuple(map(_KIND, present))


def _wants_gradients(input, weight, bias) -> bool:
    return torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )


def explain(
    input, weight, bias, stride, padding, dilation, groups, padding_mode
) -> dict[str, tuple[Verdict, ...]]:
    """What every backend says of a call, for "forward" and "backward", by the arguments of `convolve`."""
    pairs = settled_padding(input, weight, bias, stride, padding, dilation, groups, padding_mode)
    if pairs is None:
        kind = f"{input.dtype} input {tuple(input.shape)} on weight {tuple(weight.shape)}, groups={groups}"
        only_stock = (Verdict("torch", (), (f"{kind}: torch's own operator runs it directly",)),)
        return {"forward": only_stock, "backward": only_stock}
    batch = input if input.dim() == weight.dim() else input.unsqueeze(0)
    call = describe(batch, weight, stride, pairs, dilation, padding_mode)
    return {"forward": FORWARD.explain(call), "backward": BACKWARD.explain(call)}


def settled_padding(
    input, weight, bias, stride, padding, dilation, groups, padding_mode
) -> tuple[int, ...] | None:
    """The padding as (before, after) for each dimension, when the opaque operator carries the call.

    None says that it is not: torch's own operator then computes it or raises in its own words.
    """
    compiling = torch.compiler.is_compiling()
    if input.dtype not in KERNEL_DTYPES or not _same_kind(input, weight, bias):
        return None
    if not compiling and under_transform():
        return None
    bias_shape = None if bias is None else bias.shape
    settings = input.shape, weight.shape, bias_shape, stride, padding, dilation, groups, padding_mode
    if compiling or torch.SymInt in map(type, input.shape):
        return _pairs_when_valid(*settings)
    return _pairs_when_valid_cached(tuple(map(type, (*stride, *padding, *dilation))), *settings)


def _pairs_when_valid(
    input_shape, weight_shape, bias_shape, stride, padding, dilation, groups, padding_mode
) -> tuple[int, ...] | None:
    if not _shapes_agree(input_shape, weight_shape, bias_shape, groups):
        return None
    kernel = weight_shape[2:]
    sizes = (*stride, *dilation, *(() if isinstance(padding, str) else padding))
    if not all(map(_is_size, map(type, sizes))):
        return None
    if isinstance(padding, str):
        if padding not in ("valid", "same") or (padding == "same" and any(s != 1 for s in stride)):
            return None
    elif len(padding) != len(kernel) or any(p < 0 for p in padding):
        return None
    if not len(stride) == len(dilation) == len(kernel) or padding_mode not in PADDING_MODES:
        return None
    pairs = padding_pairs(padding, kernel, dilation)
    fits = all(
        s > 0
        and d > 0
        and _pads(size, max(before, after), padding_mode)
        and size + before + after > d * (k - 1)
        for size, k, s, d, before, after in zip(
            input_shape[-len(kernel) :], kernel, stride, dilation, pairs[::2], pairs[1::2], strict=True
        )
    )
    return pairs if fits else None


def _is_size(kind: type) -> bool:
    """Whether torch reads values of a class as whole numbers: int's and numpy's, but no bool."""
    return kind in (int, torch.SymInt) or (kind is not bool and issubclass(kind, Integral))


@lru_cache(maxsize=4096)
def _pairs_when_valid_cached(types, *settings):
    """`_pairs_when_valid`, once for each call it has met; `types` tells 1 from 1.0."""
    return _pairs_when_valid(*settings)


def padding_pairs(padding, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Spell torch's padding out as (before, after) for each dimension; "same" puts an odd element behind."""
    if padding == "valid":
        return (0,) * (2 * len(kernel))
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple(part for total in totals for part in (total // 2, total - total // 2))
    return tuple(amount for amount in padding for _ in range(2))


def _each(value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    if not isinstance(value, Sequence):
        return (value,) * dimensions
    return tuple(value) * dimensions if len(value) == 1 else tuple(value)


def _autocast(input, weight, bias):
    target = torch.get_autocast_dtype(input.device.type)

    def cast(tensor):
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(target)

    return cast(input), cast(weight), cast(bias)


def _same_kind(input, weight, bias) -> bool:
    return (
        weight.dtype == input.dtype
        and weight.device == input.device
        and input.layout == weight.layout == torch.strided
        and (bias is None or (bias.dtype == input.dtype and bias.device == input.device))
    )


def _shapes_agree(input_shape, weight_shape, bias_shape, groups) -> bool:
    dimensions = len(weight_shape) - 2
    return (
        1 <= dimensions <= 3
        and len(input_shape) in (dimensions + 1, dimensions + 2)
        and all(size > 0 for size in input_shape)
        and all(size > 0 for size in weight_shape)
        and input_shape[-dimensions - 1] == groups
        and weight_shape[1] == 1
        and weight_shape[0] % groups == 0
        and (bias_shape is None or (len(bias_shape) == 1 and bias_shape[0] == weight_shape[0]))
    )


def _pads(size: int, amount: int, padding_mode: str) -> bool:
    limit = {"reflect": size - 1, "circular": size}.get(padding_mode)
    return limit is None or amount <= limit
