"""The Triton kernels of depthwise convolution: by interpreter on a CPU, compiled on a GPU.

Both hold forward and gradients to float64 on the same table of cases. The interpreter shows the logic
(masks, tails, strides) in float32 and float16; it computes bfloat16 wrongly and shows neither races nor
speed.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.compare import check
from tests.gpu_calls import full_precision

pytest.importorskip("triton", reason="Triton is not installed")

from pyarch.triton_kernels import conv, conv_geometry, conv_plan, tuning  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(not INTERPRETED, reason="interpreter tests run with TRITON_INTERPRET=1")
no_gpu = INTERPRETED or not torch.cuda.is_available()
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Case:
    """One problem. `layout`: nchw, nhwc, nlc (a transposed view), sliced (misaligned, gaps between rows and
    columns)."""

    input: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    multiplier: int = 1
    mode: str = "zeros"
    layout: str = "nchw"
    bias: bool = True

    @property
    def arguments(self) -> tuple[list[int], list[int], list[int], str]:
        dims = len(self.kernel)
        each = [list(v) if isinstance(v, tuple) else [v] * dims for v in (self.stride, self.dilation)]
        padding = list(self.padding) if isinstance(self.padding, tuple) else [self.padding] * (2 * dims)
        return each[0], padding, each[1], self.mode

    @property
    def channels_last(self) -> bool:
        return self.layout == "nhwc"

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The same values in the case's layout."""
        if self.layout == "nhwc":
            return tensor.contiguous(memory_format=FORMATS[tensor.dim()])
        if self.layout == "nlc":
            return tensor.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "sliced":
            gaps = torch.full(
                (*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), float("nan"), device=tensor.device
            )
            view = gaps.to(tensor.dtype)[..., 1::2]
            return view.copy_(tensor)
        return tensor


CASES = {
    "causal k4": Case((2, 3, 33), (4,), padding=(3, 0)),
    "causal k4, padded both sides": Case((2, 3, 16), (4,), padding=3),
    "one position": Case((2, 3, 1), (3,), padding=1),
    "shorter than the kernel": Case((2, 3, 5), (9,), padding=4),
    "k31": Case((2, 2, 40), (31,), padding=15),
    "k31 transposed": Case((1, 8, 24), (31,), padding=15, layout="nlc"),
    "k4 transposed": Case((2, 16, 16), (4,), padding=(3, 0), layout="nlc"),
    "dilation beyond the size": Case((2, 3, 20), (3,), padding=24, dilation=24),
    "dilation too wide to unroll": Case((1, 2, 24), (3,), padding=70, dilation=70),
    "long row, stride 2": Case((1, 2, 48), (11,), stride=2, padding=5),
    "stride beyond the kernel": Case((2, 3, 32), (2,), stride=5),
    "stride 8": Case((2, 3, 33), (3,), stride=8, padding=1),
    "1-D sliced": Case((2, 3, 17), (3,), padding=1, layout="sliced"),
    "1-D multiplier 3": Case((2, 3, 16), (3,), padding=1, multiplier=3),
    "3x3": Case((2, 3, 5, 16), (3, 3), padding=1),
    "3x3, 31 channels": Case((1, 31, 3, 8), (3, 3), padding=1),
    "3x3, 33 channels nhwc": Case((1, 33, 3, 5), (3, 3), padding=1, layout="nhwc"),
    "3x3 nhwc": Case((2, 16, 5, 6), (3, 3), padding=1, layout="nhwc"),
    "3x3, one channel": Case((2, 1, 7, 9), (3, 3), padding=1, bias=False),
    "3x3, one channel nhwc": Case((2, 1, 7, 8), (3, 3), padding=1, layout="nhwc"),
    "3x3, height 1": Case((2, 2, 1, 9), (3, 3), padding=1),
    "3x3, width 1": Case((2, 2, 9, 1), (3, 3), padding=1),
    "3x3 stride 2": Case((2, 2, 9, 16), (3, 3), stride=2, padding=1),
    "3x3 stride 2 nhwc": Case((2, 8, 8, 9), (3, 3), stride=2, padding=1, layout="nhwc"),
    "3x3 stride 3": Case((2, 2, 9, 15), (3, 3), stride=3, padding=1),
    "3x3 dilation 2": Case((2, 2, 8, 16), (3, 3), padding=2, dilation=2),
    "3x3 multiplier 3 nhwc": Case((1, 4, 5, 6), (3, 3), padding=1, multiplier=3, layout="nhwc"),
    "everything asymmetric": Case((2, 2, 9, 14), (2, 5), (2, 1), (0, 2, 3, 1), (3, 2)),
    "everything asymmetric nhwc": Case((2, 8, 9, 14), (2, 5), (1, 2), (0, 2, 3, 1), (3, 2), layout="nhwc"),
    "small map, 7x7": Case((2, 2, 7, 7), (7, 7), padding=3),
    "7x7": Case((1, 1, 4, 8), (7, 7), padding=3),
    "7x7 nhwc": Case((1, 8, 7, 7), (7, 7), padding=3, layout="nhwc"),
    "11x11": Case((1, 1, 6, 8), (11, 11), padding=5),
    "2-D sliced": Case((1, 2, 4, 9), (3, 3), padding=1, layout="sliced"),
    "3x3x3": Case((1, 2, 3, 4, 8), (3, 3, 3), padding=1),
    "3x3x3 nhwc": Case((1, 8, 3, 4, 5), (3, 3, 3), padding=1, layout="nhwc"),
    "reflect": Case((1, 2, 5, 8), (3, 4), padding=(1, 2, 2, 1), mode="reflect"),
    "reflect, stride 2 nhwc": Case((1, 8, 5, 7), (3, 3), stride=2, padding=1, mode="reflect", layout="nhwc"),
    "replicate": Case((1, 2, 5, 8), (3, 4), padding=(1, 2, 2, 1), mode="replicate"),
    "replicate beyond the size": Case((2, 2, 3), (5,), padding=(4, 5), mode="replicate"),
    "circular": Case((1, 2, 4, 5), (3, 4), padding=(1, 2, 2, 1), mode="circular"),
    "circular by the whole size": Case((2, 2, 6), (4,), padding=6, dilation=2, mode="circular"),
    "circular, tiles away from the borders": Case((1, 1, 300), (3,), padding=1, mode="circular"),
    "circular, multiplier 2": Case((1, 2, 8), (3,), padding=1, multiplier=2, mode="circular"),
}


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, case: Case) -> Tensor:
    """Torch's operator on an explicitly padded input."""
    stride, padding, dilation, mode = case.arguments
    pairs = [padding[2 * i : 2 * i + 2] for i in reversed(range(len(case.kernel)))]
    widths = list(itertools.chain.from_iterable(pairs))
    padded = F.pad(input, widths, mode="constant" if mode == "zeros" else mode) if any(widths) else input
    operator = (F.conv1d, F.conv2d, F.conv3d)[len(case.kernel) - 1]
    return operator(padded, weight, bias, stride, 0, dilation, input.shape[1])


def operands(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    channels = case.input[1] * case.multiplier
    input = case.laid_out(torch.randn(case.input, device=device).to(dtype))
    weight = torch.randn(channels, 1, *case.kernel, device=device).to(dtype)
    return input, weight, torch.randn(channels, device=device).to(dtype) if case.bias else None


def with_gradients(
    case: Case, tensors: tuple[Tensor | None, ...], grad: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Torch's output and gradients computed in a dtype."""
    leaves = [None if tensor is None else tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    output = convolve(*leaves, case)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [output.detach(), *torch.autograd.grad(output, wanted, grad.to(dtype))]


def hold_to_reference(
    case: Case, dtype: torch.dtype, device: str, needs: tuple[bool, ...] = (True, True, True)
) -> None:
    """Compare output and gradients with float64, torch's own float32 results rounded to the dtype beside
    them."""
    input, weight, bias = operands(case, dtype, device)
    output = conv.forward(input, weight, bias, *case.arguments, case.channels_last)
    grad = torch.randn(output.shape, device=device).to(dtype)
    grad = grad.contiguous(memory_format=FORMATS[grad.dim()]) if case.channels_last else grad
    needs = (*needs[:2], needs[2] and case.bias)
    gradients = conv.backward(grad, input, weight, *case.arguments, case.channels_last, needs)
    assert [gradient is not None for gradient in gradients] == list(needs)

    references = with_gradients(case, (input, weight, bias), grad, torch.float64)
    stocks = [result.to(dtype) for result in with_gradients(case, (input, weight, bias), grad, torch.float32)]
    scale = max(reference.abs().max().item() for reference in references[1:])
    check("output", output, stocks[0], references[0])
    for name, ours, stock, reference in zip(
        ("input", "weight", "bias"), gradients, stocks[1:], references[1:], strict=False
    ):
        if ours is not None:
            check(f"gradient of {name}", ours, stock, reference, scale)
    layout = FORMATS[output.dim()] if case.channels_last else torch.contiguous_format
    assert output.is_contiguous(memory_format=layout)
    assert gradients[0] is None or gradients[0].is_contiguous(memory_format=layout)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_conv_matches_float64_by_interpreter(name, dtype):
    hold_to_reference(CASES[name], dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(no_gpu, reason="no CUDA GPU")
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
@pytest.mark.parametrize("name", CASES)
def test_conv_matches_float64_on_gpu(name, dtype):
    with full_precision():
        hold_to_reference(CASES[name], dtype, "cuda")


LARGE_CASES = {
    "causal k4": Case((3, 513, 2048), (4,), padding=(3, 0)),
    "k31": Case((2, 256, 1000), (31,), padding=15),
    "3x3": Case((8, 96, 56, 56), (3, 3), padding=1),
    "3x3 nhwc": Case((8, 96, 56, 56), (3, 3), padding=1, layout="nhwc"),
    "3x3 stride 2": Case((4, 144, 56, 56), (3, 3), stride=2, padding=1),
    "7x7": Case((4, 96, 56, 56), (7, 7), padding=3),
    "7x7 nhwc": Case((4, 96, 56, 56), (7, 7), padding=3, layout="nhwc"),
    "7x7 on a small map": Case((8, 768, 7, 7), (7, 7), padding=3),
    "31x31": Case((2, 64, 28, 28), (31, 31), padding=15),
    "31x31 nhwc": Case((2, 64, 28, 28), (31, 31), padding=15, layout="nhwc"),
    "3x3x3": Case((2, 64, 16, 16, 16), (3, 3, 3), padding=1),
    "more rows than one grid dimension holds": Case((70_000, 1, 16), (3,), padding=1),
}


@pytest.mark.gpu
@pytest.mark.skipif(no_gpu, reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LARGE_CASES)
def test_conv_matches_float64_on_gpu_at_real_sizes(name, dtype):
    with full_precision():
        hold_to_reference(LARGE_CASES[name], dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(no_gpu, reason="no CUDA GPU")
@pytest.mark.parametrize("name", ["k31", "3x3 nhwc", "31x31"])
def test_conv_repeats_bitwise_on_gpu(name):
    case = LARGE_CASES[name]
    input, weight, bias = operands(case, torch.bfloat16, "cuda")
    grad = torch.randn_like(conv.forward(input, weight, bias, *case.arguments, case.channels_last))
    runs = [
        conv.backward(grad, input, weight, *case.arguments, case.channels_last, (True, True, True))
        for _ in range(3)
    ]
    for again in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], again, strict=True))


@interpreter
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("name", ["3x3", "7x7 nhwc"])
def test_conv_computes_only_the_gradients_asked_for(name, needs):
    hold_to_reference(CASES[name], torch.float32, "cpu", needs)


@interpreter
@pytest.mark.parametrize("name", ["causal k4", "3x3 nhwc", "small map, 7x7"])
def test_conv_takes_an_expanded_gradient(name):
    case = CASES[name]
    input, weight, bias = operands(case, torch.float32, "cpu")
    grad = torch.tensor(1.5).expand(
        conv.forward(input, weight, bias, *case.arguments, case.channels_last).shape
    )
    gradients = conv.backward(grad, input, weight, *case.arguments, case.channels_last, (True, True, True))
    references = with_gradients(case, (input, weight, bias), grad, torch.float64)[1:]
    stocks = with_gradients(case, (input, weight, bias), grad, torch.float32)[1:]
    for ours, stock, reference in zip(gradients, stocks, references, strict=True):
        check(name, ours, stock, reference)


@interpreter
@pytest.mark.parametrize("name", ["causal k4", "3x3 nhwc", "7x7 nhwc"])
def test_conv_of_an_empty_batch(name):
    case = CASES[name]
    input, weight, bias = operands(case, torch.float32, "cpu")
    output = conv.forward(input[:0], weight, bias, *case.arguments, case.channels_last)
    expected = convolve(input[:0], weight, bias, case)
    assert output.shape == expected.shape
    grads = conv.backward(output, input[:0], weight, *case.arguments, case.channels_last, (True, True, True))
    assert grads[0].shape == input[:0].shape
    assert torch.equal(grads[1], torch.zeros_like(weight))
    assert torch.equal(grads[2], torch.zeros_like(bias))


@interpreter
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("stride", [1, 5])
def test_conv_reads_nothing_around_a_view(layout, stride):
    case = Case((2, 8, 8, 8), (3, 3), stride=stride, padding=1, layout=layout)
    input, weight, bias = operands(case, torch.float32, "cpu")
    around = case.laid_out(torch.full((2, 8, 16, 24), float("nan")))
    view = around[:, :, 4:12, 8:16].copy_(input)
    output = conv.forward(view, weight, bias, *case.arguments, case.channels_last)
    assert torch.equal(output, conv.forward(input, weight, bias, *case.arguments, case.channels_last))
    grad = torch.full((2, 8, *(n + 8 for n in output.shape[2:])), float("nan"))[:, :, 4:-4, 4:-4]
    grad.copy_(torch.randn(output.shape))
    gradients = conv.backward(grad, view, weight, *case.arguments, case.channels_last, (True, True, True))
    assert all(gradient.isfinite().all() for gradient in gradients)


@interpreter
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(("stride", "place"), [(1, (0, 0)), (1, (7, 3)), (5, (2, 2)), (5, (5, 0))])
def test_conv_nan_reaches_what_reads_it_and_nothing_else(layout, stride, place):
    case = Case((1, 4, 8, 8), (3, 3), stride=stride, padding=1, layout=layout)
    input, weight, bias = operands(case, torch.float32, "cpu")
    input[0, 1, place[0], place[1]] = float("nan")
    output = conv.forward(input, weight, bias, *case.arguments, case.channels_last)
    grad = torch.randn(output.shape)
    gradients = conv.backward(grad, input, weight, *case.arguments, case.channels_last, (True, True, True))
    expected = with_gradients(case, (input, weight, bias), grad, torch.float64)
    for ours, reference in zip((output, *gradients), expected, strict=True):
        assert torch.equal(ours.isnan(), reference.isnan())


@interpreter
def test_conv_of_more_rows_than_a_grid_dimension_holds():
    case = Case((66_000, 1, 1), (1,))
    input, weight, bias = operands(case, torch.float32, "cpu")
    output = conv.forward(input, weight, bias, *case.arguments, False)
    check(
        "output",
        output,
        convolve(input, weight, bias, case),
        convolve(*(t.double() for t in (input, weight, bias)), case),
    )


def test_conv_refuses_a_dtype_without_a_kernel():
    input = torch.zeros(1, 2, 8, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="dtype=torch.float64, needs float32, float16 or bfloat16"):
        conv.forward(input, input.new_zeros(2, 1, 3), None, [1], [1, 1], [1], "zeros", False)


@pytest.mark.parametrize(
    ("size", "taps"), [((8, 256, 1000), (31,)), ((8, 4096, 4096), (4,)), ((128, 96, 56, 56), (7, 7))]
)
def test_conv_partial_sums_stay_small(size, taps):
    input = torch.empty(size, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(size[1], 1, *taps, dtype=torch.bfloat16, device="meta")
    padding = [n // 2 for n in taps for _ in range(2)]
    window = conv_geometry.window_of(weight, [1] * len(taps), padding, [1] * len(taps), "zeros")
    grad = torch.empty((*size[:2], *window.output_size(size[2:])), dtype=torch.bfloat16, device="meta")
    grads = (torch.empty_like(input), torch.empty_like(weight), None)
    first, second = conv_plan.plan_backward(grad, input, weight, grads, window, False, "sm_90")
    partial = first.arguments["partial_ptr"]
    assert first.constants["NEED_DX"] and second.arguments["partial_ptr"] is partial
    assert partial.numel() * 4 <= max(0.1 * input.numel() * 2, 1 << 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema: needs 1"),
        ({"architectures": {}}, 'architectures: needs an object with "default"'),
        ({"architectures": {"default": {"rows": []}}}, "default.measured_on: needs a device name or null"),
        (
            {"architectures": {"default": {"measured_on": None, "rows": [{}]}}},
            r"default.rows\[0\]: needs exactly",
        ),
    ],
)
def test_conv_tile_table_errors_name_the_place(change, message):
    with pytest.raises(ValueError, match=message):
        tuning.check_table({"schema": 1, "architectures": {}} | change, "conv.json")


def test_conv_tile_table_needs_powers_of_two():
    row = dict(
        kernel="forward", layout="channels_last", bits=16, taps_up_to=None, lanes=100, channels=64, columns=4
    )
    row |= dict(group=4, num_warps=4, num_stages=2, max_registers=None)
    table = {"schema": 1, "architectures": {"default": {"measured_on": None, "rows": [row]}}}
    with pytest.raises(ValueError, match=r"default.rows\[0\].lanes: needs a power of two, not 100"):
        tuning.check_table(table, "conv.json")
