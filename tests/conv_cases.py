"""Depthwise convolutions as data, the backends of this machine, and torch's own answer to a case."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyarch import hardware, native
from pyarch.ops import conv
from pyarch.tolerance import scale
from tests.compare import check

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("output", "grad_input", "grad_weight", "grad_bias")


# ------------------------------------------------------------------------------------ layouts


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=CHANNELS_LAST[tensor.dim()])


def transposed(tensor: Tensor) -> Tensor:
    """(N, C, L) as a view of (N, L, C)."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def sliced(tensor: Tensor) -> Tensor:
    """The same values one element past an aligned address, with NaN between rows and columns."""
    gaps = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), float("nan")).to(tensor.dtype)
    return gaps[..., 1::2].copy_(tensor)


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, contiguous, one element past an aligned address."""
    return (
        torch.full((tensor.numel() + 1,), float("nan")).to(tensor.dtype)[1:].view(tensor.shape).copy_(tensor)
    )


def expanded(tensor: Tensor) -> Tensor:
    """One value everywhere, every stride 0: the gradient of a sum."""
    return tensor.flatten()[0].expand(tensor.shape)


# ------------------------------------------------------------------------------------ cases


@dataclass(frozen=True)
class Case:
    """One problem: input (N, C, *spatial); padding one integer, or (before, after) for each dimension."""

    input: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    multiplier: int = 1
    mode: str = "zeros"
    layout: callable = contiguous
    grad_layout: callable = contiguous
    bias: bool = True

    def each(self, value) -> list[int]:
        return list(value) if isinstance(value, tuple) else [value] * len(self.kernel)

    @property
    def pairs(self) -> list[int]:
        return (
            list(self.padding) if isinstance(self.padding, tuple) else [self.padding] * 2 * len(self.kernel)
        )

    @property
    def settings(self) -> tuple[list[int], list[int], list[int], str]:
        """stride, padding pairs, dilation, mode, as backends take them."""
        return self.each(self.stride), self.pairs, self.each(self.dilation), self.mode

    def tensors(self, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Input, weight, bias and the output's gradient."""
        outputs = self.input[1] * self.multiplier
        input = self.layout((scale * torch.randn(self.input)).to(dtype))
        weight = torch.randn(outputs, 1, *self.kernel).to(dtype)
        bias = torch.randn(outputs).to(dtype) if self.bias else None
        sizes = conv.output_sizes(self.input[2:], self.kernel, *self.settings[:3])
        grad = self.grad_layout((scale * torch.randn(self.input[0], outputs, *sizes)).to(dtype))
        return input, weight, bias, grad

    def call(self, input: Tensor, weight: Tensor) -> conv.ConvCall:
        return conv.describe(input, weight, *self.settings)


CASES = {
    "causal k4": Case((2, 3, 33), (4,), padding=(3, 0)),
    "causal k4 long": Case((2, 5, 1000), (4,), padding=(3, 0)),
    "k31": Case((2, 3, 127), (31,), padding=15),
    "k31 long": Case((1, 2, 1000), (31,), padding=15),
    "k31 without padding": Case((1, 3, 65), (31,)),
    "k31 many rows": Case((2, 13, 300), (31,), padding=15),
    "k7 many rows, uneven": Case((3, 16, 77), (7,), padding=(6, 0), bias=False),
    "k9 many rows in stretches": Case((1, 16, 2100), (9,)),
    "L 1": Case((3, 33, 1), (3,), padding=1),
    "L below the kernel": Case((2, 3, 5), (9,), padding=4),
    "L 63, dilation 3": Case((2, 3, 63), (5,), padding=6, dilation=3),
    "dilation beyond the size": Case((2, 3, 20), (3,), padding=24, dilation=24),
    "stride beyond the kernel": Case((2, 3, 65), (2,), stride=5),
    "stride 3, dilation 2": Case((2, 3, 64), (4,), stride=3, padding=(5, 2), dilation=2),
    "kernel 1": Case((2, 31, 65), (1,)),
    "1-D multiplier 3": Case((2, 3, 40), (3,), padding=1, multiplier=3),
    "1-D transposed": Case((2, 33, 24), (4,), padding=(3, 0), layout=transposed),
    "1-D sliced": Case((2, 3, 65), (3,), padding=1, layout=sliced, grad_layout=sliced),
    "1-D misaligned": Case((2, 3, 65), (7,), padding=3, layout=misaligned, grad_layout=misaligned),
    "1-D expanded gradient": Case((2, 3, 65), (3,), padding=1, grad_layout=expanded),
    "1-D padding past every tap": Case((1, 3, 8), (3,), padding=(6, 9)),
    "3x3": Case((2, 3, 14, 63), (3, 3), padding=1),
    "3x3 one channel": Case((2, 1, 7, 9), (3, 3), padding=1, bias=False),
    "3x3 31 channels": Case((1, 31, 9, 17), (3, 3), padding=1),
    "3x3 H 1": Case((2, 3, 1, 65), (3, 3), padding=1),
    "3x3 W 1": Case((2, 3, 65, 1), (3, 3), padding=1),
    "3x3 stride 2": Case((2, 3, 33, 34), (3, 3), stride=2, padding=1),
    "3x3 dilation 2": Case((2, 3, 20, 40), (3, 3), padding=2, dilation=2),
    "5x5": Case((1, 3, 20, 36), (5, 5), padding=2),
    "7x7": Case((2, 3, 28, 28), (7, 7), padding=3),
    "7x7 small map": Case((2, 3, 7, 7), (7, 7), padding=3),
    "13x13 on 14x14": Case((1, 2, 14, 14), (13, 13), padding=6),
    "2-D multiplier 3": Case((2, 3, 9, 20), (3, 3), padding=1, multiplier=3),
    "2-D expanded gradient": Case((2, 3, 9, 20), (3, 3), padding=1, grad_layout=expanded),
    "2-D sliced": Case((2, 3, 9, 20), (3, 3), padding=1, layout=sliced, grad_layout=sliced),
    "2-D misaligned": Case(
        (2, 3, 9, 20), (5, 3), padding=(2, 2, 1, 1), layout=misaligned, grad_layout=misaligned
    ),
    "2-D channels-last gradient": Case((2, 17, 9, 20), (3, 3), padding=1, grad_layout=channels_last),
    "everything asymmetric": Case((2, 3, 19, 44), (2, 5), (2, 1), (0, 2, 3, 1), (3, 2)),
    "stride beyond the kernel, 2-D": Case((2, 3, 17, 33), (2, 2), stride=(3, 5)),
    "NHWC 3x3": Case((2, 33, 14, 15), (3, 3), padding=1, layout=channels_last, grad_layout=channels_last),
    "NHWC 3x3 three channels": Case((2, 3, 14, 15), (3, 3), padding=1, layout=channels_last),
    "NHWC 3x3 H 1": Case((2, 16, 1, 15), (3, 3), padding=1, layout=channels_last),
    "NHWC 3x3 W 1": Case((2, 16, 15, 1), (3, 3), padding=1, layout=channels_last, grad_layout=channels_last),
    "NHWC 3x3 stride 2": Case((2, 48, 13, 14), (3, 3), stride=2, padding=1, layout=channels_last),
    "NHWC 3x3 dilation 2": Case((2, 31, 9, 35), (3, 3), padding=2, dilation=2, layout=channels_last),
    "NHWC 5x5": Case((1, 64, 9, 10), (5, 5), padding=2, layout=channels_last, grad_layout=channels_last),
    "NHWC 7x7": Case((2, 40, 14, 14), (7, 7), padding=3, layout=channels_last, grad_layout=channels_last),
    "NHWC 7x7 small map": Case((2, 33, 4, 5), (7, 7), padding=3, layout=channels_last),
    "NHWC 13x13": Case((1, 17, 14, 14), (13, 13), padding=6, layout=channels_last),
    "NHWC multiplier 3": Case((2, 5, 9, 10), (3, 3), padding=1, multiplier=3, layout=channels_last),
    "NHWC expanded gradient": Case((2, 33, 6, 7), (3, 3), layout=channels_last, grad_layout=expanded),
    "NHWC asymmetric": Case((2, 20, 19, 14), (2, 5), (1, 2), (0, 2, 3, 1), (3, 2), layout=channels_last),
    "3x3x3": Case((1, 3, 5, 8, 18), (3, 3, 3), padding=1),
    "3x3x3 NDHWC": Case(
        (1, 33, 4, 5, 6), (3, 3, 3), padding=1, layout=channels_last, grad_layout=channels_last
    ),
    "3-D without padding": Case((1, 3, 9, 9, 9), (3, 3, 3), multiplier=2),
    "3-D even kernel": Case((2, 3, 13, 13, 13), (2, 3, 4), padding=(0, 1, 1, 1, 1, 2)),
    "3-D stride 2": Case((2, 3, 6, 7, 19), (3, 3, 3), stride=2, padding=1),
    "3-D asymmetric": Case((1, 3, 7, 8, 20), (1, 2, 3), (2, 1, 1), (1, 0, 0, 2, 1, 1), (1, 2, 3)),
    "3-D multiplier 3 NDHWC": Case((1, 3, 4, 5, 6), (2, 3, 1), multiplier=3, layout=channels_last),
    "reflect": Case((2, 3, 9, 20), (3, 4), padding=(1, 2, 2, 1), mode="reflect"),
    "reflect NHWC, stride 2": Case((1, 33, 9, 8), (3, 3), 2, 1, mode="reflect", layout=channels_last),
    "reflect by size - 1": Case((2, 3, 6), (4,), padding=5, mode="reflect"),
    "replicate": Case((2, 3, 9, 20), (3, 4), padding=(1, 2, 2, 1), mode="replicate"),
    "replicate beyond the size": Case((2, 3, 3), (5,), padding=(7, 5), mode="replicate"),
    "replicate 3-D": Case((1, 2, 3, 4, 18), (3, 3, 3), padding=1, mode="replicate"),
    "circular": Case((2, 3, 9, 20), (3, 4), padding=(1, 2, 2, 1), mode="circular"),
    "circular NHWC": Case((1, 33, 9, 8), (3, 3), padding=1, mode="circular", layout=channels_last),
    "circular by the whole size": Case((2, 3, 6), (4,), padding=6, dilation=2, mode="circular"),
    "circular multiplier 2": Case((1, 3, 40), (3,), padding=1, multiplier=2, mode="circular"),
}


# ------------------------------------------------------------------------------------ torch's answers


def by_torch(case: Case, input, weight, bias, grad) -> tuple[Tensor | None, ...]:
    """Output and gradients of torch's own operator through its own autograd, in the tensors' dtype."""
    stride, pairs, dilation, mode = case.settings
    leaves = [t.detach().requires_grad_() for t in (input, weight, bias) if t is not None]
    padded, amount = leaves[0], pairs[::2]
    if mode != "zeros" or pairs[::2] != pairs[1::2]:
        backwards = [n for pair in zip(pairs[-2::-2], pairs[::-2], strict=True) for n in pair]
        padded = F.pad(leaves[0], backwards, mode="constant" if mode == "zeros" else mode)
        amount = 0
    convolution = CONVOLUTIONS[len(case.kernel)]
    output = convolution(padded, leaves[1], *(leaves[2:] or [None]), stride, amount, dilation, case.input[1])
    grads = torch.autograd.grad(output, leaves, grad)
    return output.detach(), *grads, *([None] if bias is None else [])


def in_double(case: Case, tensors) -> tuple[Tensor | None, ...]:
    """The float64 truth, of torch's operator on upcast contiguous tensors."""
    return by_torch(case, *(t if t is None else t.double().contiguous() for t in tensors))


def by_stock(case: Case, tensors) -> tuple[Tensor | None, ...]:
    """What the tolerance rule compares with: torch in the dtype, or in float32 where torch is wrong."""
    input, weight = tensors[:2]
    if not list(refusals(conv.BACKWARD, "torch", case.call(input, weight))):
        return by_torch(case, *tensors)
    wide = by_torch(case, *(t if t is None else t.float() for t in tensors))
    return tuple(t if t is None else t.to(input.dtype) for t in wide)


def check_all(case: Case, tensors, results) -> None:
    """Hold an output and its gradients (None where not asked for) to the tolerance rule.

    Torch may be right by luck on a sum of few elements, so one float32 rounding of the sum of absolute terms
    counts as torch's error too.
    """
    truth, stock = in_double(case, tensors), by_stock(case, tensors)
    absolute = in_double(case, [t if t is None else t.abs() for t in tensors])
    largest = max(largest_of(t) for t in truth[1:] if t is not None)
    assert largest > 0, "every gradient is zero, the case proves nothing"
    for name, ours, torchs, exact, terms in zip(NAMES, results, stock, truth, absolute, strict=True):
        if ours is not None:
            layer_scale = 0.0 if name == "output" else largest
            noise = torch.finfo(torch.float32).eps * largest_of(terms) / (scale(exact, layer_scale) or 1.0)
            check(name, ours, torchs, exact, layer_scale, noise)


def largest_of(tensor: Tensor) -> float:
    return tensor.abs().max().item()


# ------------------------------------------------------------------------------------ backends


@dataclass(frozen=True)
class Kernels:
    """A backend that can take CPU tensors; `cpu` stands once for each instruction set."""

    name: str
    instruction_set: str | None = None

    def __str__(self) -> str:
        return f"{self.name}-{self.instruction_set}" if self.instruction_set else self.name

    def serve(self, monkeypatch) -> None:
        """Make this the one that the backend's name stands for, or skip with what is missing."""
        if self.instruction_set is None:
            return
        if (problem := native.load(self.instruction_set)) is not None:
            pytest.skip(problem)
        operators = native.operators(self.instruction_set)
        monkeypatch.setattr(native, "serving", lambda: (self.instruction_set, ""))
        monkeypatch.setattr(native, "operators", lambda instruction_set=None: operators)

    def forward(self, case: Case, input, weight, bias) -> Tensor:
        last = conv.is_channels_last(input, weight)
        return backend_of(conv.FORWARD, self.name).run(input, weight, bias, *case.settings, last)

    def backward(
        self, case: Case, grad, input, weight, needs=(True, True, True)
    ) -> tuple[Tensor | None, ...]:
        last = conv.is_channels_last(input, weight)
        return backend_of(conv.BACKWARD, self.name).run(grad, input, weight, *case.settings, last, needs)

    def both(self, case: Case, input, weight, bias, grad) -> tuple[Tensor | None, ...]:
        """Output and gradients; the bias has one only where there is a bias."""
        output = self.forward(case, input, weight, bias)
        return output, *self.backward(case, grad, input, weight, (True, True, bias is not None))


# Each with kernels of its own: what adds no convolution to another would run those twice.
NATIVE = [Kernels("cpu", name) for name in hardware.CPU_INSTRUCTION_SETS if name not in native.ADDS_TO]
EVERY_KERNELS = [*NATIVE, Kernels("torch"), Kernels("reference")]
every_kernels = pytest.mark.parametrize("backend", EVERY_KERNELS, ids=str)
native_kernels = pytest.mark.parametrize("backend", NATIVE, ids=str)
CPU_BACKENDS = ("auto", "cpu", "torch", "reference")


def backend_of(op, name: str):
    return next(each for each in op.backends if each.name == name)


def refusals(op, name: str, call) -> tuple[str, ...]:
    return tuple(backend_of(op, name).refusals(call))


def need(name: str, call) -> None:
    """Skip, quoting the refusals, where a backend cannot run a call on this machine."""
    if name != "auto" and (reasons := refusals(conv.FORWARD, name, call)):
        pytest.skip("; ".join(reasons))
