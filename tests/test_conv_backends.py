"""Every backend of depthwise convolution that takes CPU tensors, held to float64 by the tolerance rule.

The C++ kernels run once for each instruction set that this CPU has.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pyarch.ops import conv, conv_cpu
from pyarch.reference.conv import memory_format
from tests.conv_cases import (
    CASES,
    DTYPES,
    Case,
    by_torch,
    channels_last,
    check_all,
    contiguous,
    every_kernels,
    in_double,
    misaligned,
    native_kernels,
    refusals,
    sliced,
)

OPERATOR = "depthwise_conv"
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
NEEDS = [needs for needs in itertools.product((False, True), repeat=3) if any(needs) and not all(needs)]
SOME = (
    "causal k4",
    "k31",
    "everything asymmetric",
    "7x7",
    "NHWC 3x3",
    "NHWC multiplier 3",
    "3x3x3",
    "circular",
)
some_cases = pytest.mark.parametrize("case", [CASES[name] for name in SOME], ids=SOME)


def skip_refused_backward(backend, case, tensors):
    if reasons := refusals(conv.BACKWARD, backend.name, case.call(*tensors[:2])):
        pytest.skip("; ".join(reasons))


@native_kernels
def test_conv_backends_serve_the_instruction_set_they_name(backend, monkeypatch):
    backend.serve(monkeypatch)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        conv_cpu.forward(torch.randn(1, 2, 5), torch.randn(2, 1, 3), None, [1], [0, 0], [1])
    assert f"pyarch_cpu_{backend.instruction_set}.depthwise_conv_forward.default" in seen


@each_dtype
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@every_kernels
def test_conv_backends_forward_and_gradients(backend, case, dtype, monkeypatch):
    backend.serve(monkeypatch)
    tensors = case.tensors(dtype)
    skip_refused_backward(backend, case, tensors)
    results = backend.both(case, *tensors)
    check_all(case, tensors, results)
    layout = memory_format(len(case.input), conv.is_channels_last(*tensors[:2]))
    output, grad_input, grad_weight, grad_bias = results
    assert output.is_contiguous(memory_format=layout) and grad_input.is_contiguous(memory_format=layout)
    assert grad_weight.is_contiguous() and (grad_bias is None or grad_bias.is_contiguous())


@each_dtype
@some_cases
@native_kernels
def test_conv_backends_large_values(backend, case, dtype, monkeypatch):
    """Inputs of ten thousand: float16 overflows where torch's does and nowhere else."""
    backend.serve(monkeypatch)
    tensors = case.tensors(dtype, scale=1e4 if dtype != torch.float16 else 300.0)
    check_all(case, tensors, backend.both(case, *tensors))


@pytest.mark.parametrize("needs", NEEDS, ids=str)
@some_cases
@every_kernels
def test_conv_backends_only_the_gradients_asked_for(backend, case, needs, monkeypatch):
    backend.serve(monkeypatch)
    input, weight, bias, grad = tensors = case.tensors(torch.float32)
    gradients = backend.backward(case, grad, input, weight, needs)
    assert [gradient is not None for gradient in gradients] == list(needs)
    check_all(case, tensors, (None, *gradients))


# ------------------------------------------------------------------------------------ NaN


NAN_CASES = {
    "1-D": Case((2, 3, 65), (5,), padding=2),
    "1-D wide kernel": Case((1, 2, 130), (31,), padding=15),
    "1-D stride 3": Case((2, 3, 67), (2,), stride=3, padding=1),
    "2-D": Case((2, 3, 19, 35), (3, 3), padding=1),
    "2-D stride 2, dilation 3": Case((1, 3, 30, 40), (3, 3), 2, 3, 3),
    "7x7": Case((1, 2, 28, 28), (7, 7), padding=3),
    "NHWC": Case((2, 33, 12, 13), (3, 3), padding=1, layout=channels_last),
    "NHWC stride 2, multiplier 2": Case((1, 5, 12, 13), (3, 3), 2, 1, multiplier=2, layout=channels_last),
    "NHWC 7x7": Case((1, 20, 14, 15), (7, 7), padding=3, layout=channels_last),
    "3-D": Case((1, 2, 6, 7, 20), (3, 3, 3), padding=1),
    "circular": Case((1, 2, 9, 20), (3, 3), padding=1, mode="circular"),
    "reflect NHWC": Case((1, 17, 9, 8), (3, 3), padding=1, mode="reflect", layout=channels_last),
    "between NaN": Case((2, 3, 11, 21), (3, 3), padding=1, layout=sliced, grad_layout=sliced),
}


def reads(case, index):
    """Which outputs have input element `index` in their window, found by convolving a lone one with ones."""
    case = dataclasses.replace(case, layout=contiguous, bias=False)
    marked, weight, _, grad = case.tensors(torch.float64)
    marked.zero_()[index] = 1
    return in_double(case, (marked, torch.ones_like(weight), None, grad))[0] > 0


@each_dtype
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("case", NAN_CASES.values(), ids=NAN_CASES)
@native_kernels
def test_conv_backends_nan_of_the_input_reaches_its_readers_only(backend, case, place, dtype, monkeypatch):
    backend.serve(monkeypatch)
    input, weight, bias, grad = case.tensors(dtype)
    at = {"first": 0, "middle": None, "last": -1}[place]
    index = tuple(size // 2 if at is None else at % size for size in case.input)
    input[index] = float("nan")
    output, grad_input, grad_weight, grad_bias = backend.both(case, input, weight, bias, grad)
    expected = reads(case, index)
    assert expected.any() and torch.equal(output.isnan(), expected)
    assert not grad_input.isnan().any() and not grad_bias.isnan().any()
    channels = torch.arange(weight.shape[0]) // case.multiplier == index[1]
    assert not grad_weight[~channels].isnan().any()
    if place == "middle" and not any(s > 1 for s in case.each(case.stride)):
        assert grad_weight[channels].isnan().all()


@each_dtype
@pytest.mark.parametrize("case", NAN_CASES.values(), ids=NAN_CASES)
@native_kernels
def test_conv_backends_nan_of_the_gradient_reaches_its_readers_only(backend, case, dtype, monkeypatch):
    backend.serve(monkeypatch)
    input, weight, bias, grad = case.tensors(dtype)
    index = tuple(size // 2 for size in grad.shape)
    grad[index] = float("nan")
    grad_input, grad_weight, grad_bias = backend.backward(case, grad, input, weight)
    marked = torch.zeros(grad.shape, dtype=torch.float64)
    marked[index] = 1
    touched = in_double(case, (input, torch.ones_like(weight), bias, marked))[1] > 0
    assert touched.any() and torch.equal(grad_input.isnan(), touched)
    own = torch.arange(weight.shape[0]) == index[1]
    assert torch.equal(grad_weight.flatten(1).isnan().any(1), own) and torch.equal(grad_bias.isnan(), own)


CORNERS = {
    "k4": Case((1, 2, 40), (4,), padding=3),
    "k3 dilation 5": Case((1, 2, 9), (3,), padding=7, dilation=5),
    "3x3": Case((1, 2, 7, 33), (3, 3), padding=1),
    "3x3 without padding": Case((1, 2, 30, 17), (3, 3)),
    "3x3 dilation 2": Case((1, 2, 9, 18), (3, 3), padding=2, dilation=2),
    "3x3 stride 2": Case((1, 2, 9, 36), (3, 3), stride=2, padding=1),
    "5x5": Case((1, 2, 33, 18), (5, 5), padding=2),
}


@each_dtype
@pytest.mark.parametrize("place", [(0, 0), (0, -1), (-1, 0), (-1, -1)], ids=str)
@pytest.mark.parametrize("case", CORNERS.values(), ids=CORNERS)
@native_kernels
def test_conv_backends_nan_in_a_corner_reaches_the_taps_that_read_it(
    backend, case, place, dtype, monkeypatch
):
    """Kernels that read the planes themselves meet it beside lanes that are masked off."""
    backend.serve(monkeypatch)
    input, weight, bias, grad = case.tensors(dtype)
    index = (0, 1, *place[-len(case.kernel) :])
    input[index] = float("nan")
    output, grad_input, grad_weight, _ = backend.both(case, input, weight, bias, grad)
    assert torch.equal(output.isnan(), reads(case, index)) and not grad_input.isnan().any()
    alone = torch.zeros(case.input, dtype=torch.float64)
    alone[index] = 1
    taps = in_double(case, (alone, weight, bias, torch.ones_like(grad)))[2] > 0
    assert taps.any() and torch.equal(grad_weight.isnan(), taps)


# ------------------------------------------------------------------------------------ sizes


@each_dtype
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda layout: layout.__name__)
@native_kernels
def test_conv_backends_more_planes_than_65535(backend, layout, dtype, monkeypatch):
    backend.serve(monkeypatch)
    case = Case((257, 256, 2, 3), (3, 3), padding=1, layout=layout)
    assert case.input[0] * case.input[1] > 65535
    tensors = case.tensors(dtype)
    check_all(case, tensors, backend.both(case, *tensors))


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 2, 20000), (31,), padding=15),
        Case((1, 40, 31, 150), (31, 31), padding=15),
        Case((1, 16, 40, 90), (31, 31), padding=15, layout=channels_last),
        Case((1, 96, 57, 56), (7, 7), padding=3),
        Case((1, 96, 56, 57), (7, 7), padding=3, layout=channels_last),
        Case((1, 2, 24, 40, 40), (3, 3, 3), padding=1),
        Case((1, 2, 20001), (4,), padding=(3, 0)),
        Case((1, 2, 90, 150), (3, 3), padding=1),
        Case((1, 2, 91, 75), (3, 3), 2, 1),
        Case((1, 2, 90, 75), (3, 3), 1, 2, 2),
    ],
    ids="long row|31x31|31x31 NHWC|7x7|7x7 NHWC|3-D|k4|3x3|3x3 stride 2|3x3 dilation 2".split("|"),
)
@native_kernels
def test_conv_backends_problems_of_several_parts(backend, case, monkeypatch):
    """Planes cut into parts, channels cut into groups, more tasks than threads."""
    backend.serve(monkeypatch)
    tensors = case.tensors(torch.float32)
    check_all(case, tensors, backend.both(case, *tensors))


# ------------------------------------------------------------------------------------ repeatability


@pytest.mark.parametrize("threads", [1, 2])
@each_dtype
@some_cases
@native_kernels
def test_conv_backends_repeat_bit_by_bit(backend, case, dtype, threads, monkeypatch):
    backend.serve(monkeypatch)
    torch.set_num_threads(threads)
    tensors = case.tensors(dtype)
    once = backend.both(case, *tensors)
    for again in (backend.both(case, *tensors) for _ in range(3)):
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True) if a is not None)


@some_cases
@native_kernels
def test_conv_backends_do_not_depend_on_the_threads(backend, case, monkeypatch):
    backend.serve(monkeypatch)
    tensors = case.tensors(torch.float32)
    alone = backend.both(case, *tensors)
    torch.set_num_threads(2)
    together = backend.both(case, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True) if a is not None)


# ------------------------------------------------------------------------------------ drawn at random


@st.composite
def drawn_cases(draw):
    """Any problem of at most 3 dimensions, a few thousand elements, every setting at once."""
    dims = draw(st.integers(1, 3))
    several = st.tuples
    mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"]))
    sizes = draw(several(*[st.integers(1, 70 // dims**2)] * dims))
    padding = [
        draw(st.integers(0, {"reflect": min(size - 1, 5), "circular": min(size, 5)}.get(mode, 5)))
        for size in sizes
        for _ in range(2)
    ]
    kernel, dilation = [], []
    for size, before, after in zip(sizes, padding[::2], padding[1::2], strict=True):
        dilation.append(draw(st.integers(1, 3)))
        kernel.append(draw(st.integers(1, max(1, min((size + before + after - 1) // dilation[-1] + 1, 9)))))
    return Case(
        (draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3, 5, 16, 17, 33])), *sizes),
        tuple(kernel),
        draw(several(*[st.integers(1, 4)] * dims)),
        tuple(padding),
        tuple(dilation),
        draw(st.sampled_from([1, 1, 1, 2, 3])),
        mode,
        draw(st.sampled_from([contiguous, sliced, channels_last] if dims > 1 else [contiguous, sliced])),
        draw(st.sampled_from([contiguous, sliced])),
        draw(st.booleans()),
    )


def check_drawn(backend, dtype, case, seed):
    with pytest.MonkeyPatch.context() as patch:
        backend.serve(patch)
        torch.manual_seed(seed)
        tensors = case.tensors(dtype)
        assume(any(t.any() for t in in_double(case, tensors)[1:] if t is not None))
        check_all(case, tensors, backend.both(case, *tensors))


@each_dtype
@native_kernels
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(case=drawn_cases(), seed=st.integers(0, 2**16))
def test_conv_backends_drawn(backend, dtype, case, seed):
    check_drawn(backend, dtype, case, seed)


@st.composite
def drawn_in_place(draw):
    """Small kernels, whose planes are read where they are: every border, vectors and tails of all widths."""
    if draw(st.booleans()):
        sizes, kernel, stride = (draw(st.integers(1, 70)),), (draw(st.integers(2, 4)),), 1
    else:
        kernel = (draw(st.sampled_from([3, 3, 5, 7])),) * 2
        sizes = (draw(st.integers(1, 33)), draw(st.integers(1, 40)))
        stride = draw(st.sampled_from([1, 2])) if kernel == (3, 3) else 1
    dilation = tuple(draw(st.integers(1, 3)) if stride == 1 else 1 for _ in sizes)
    padding = [draw(st.integers(0, 9)) for _ in sizes for _ in range(2)]
    for i, size in enumerate(sizes):
        missing = dilation[i] * (kernel[i] - 1) + 1 - size - padding[2 * i] - padding[2 * i + 1]
        padding[2 * i + 1] += max(0, missing)
    return Case(
        (draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3, 17])), *sizes),
        kernel,
        stride,
        tuple(padding),
        dilation,
        layout=draw(st.sampled_from([contiguous, misaligned, sliced])),
        grad_layout=draw(st.sampled_from([contiguous, misaligned, sliced])),
        bias=draw(st.booleans()),
    )


@each_dtype
@native_kernels
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(case=drawn_in_place(), seed=st.integers(0, 2**16))
def test_conv_backends_drawn_small_kernels(backend, dtype, case, seed):
    check_drawn(backend, dtype, case, seed)


# ------------------------------------------------------------------------------------ torch's own defect


DEFECT = Case((1, 16, 12, 56), (3, 3), padding=(2, 2, 1, 1), dilation=(2, 1), layout=channels_last)


def test_conv_torch_loses_the_weight_gradient_of_dilated_channels_last_bfloat16():
    """Why the `torch` backend refuses it. Delete refusal and test with the first torch that mends it."""
    tensors = DEFECT.tensors(torch.bfloat16)
    exact = in_double(DEFECT, tensors)[2]
    errors = [
        (by_torch(DEFECT, *tensors)[2].double() - exact).abs().max() / exact.abs().max() for _ in range(3)
    ]
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert not max(errors) < 0.1, "torch computes it rightly now"
    assert list(refusals(conv.BACKWARD, "torch", DEFECT.call(*tensors[:2])))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float16},
        {"dtype": torch.float32},
        {"channels_last": False},
        {"dilation": (1, 2)},
        {"stride": (2, 1)},
        {"needs": (True, False, True)},
        {"device": "cuda"},
    ],
    ids=str,
)
def test_conv_torch_refuses_that_weight_gradient_only(change):
    call = DEFECT.call(*DEFECT.tensors(torch.bfloat16)[:2])
    assert refusals(conv.BACKWARD, "torch", call) and not refusals(
        conv.BACKWARD, "torch", call._replace(**change)
    )
    assert not refusals(conv.FORWARD, "torch", call)


def test_conv_auto_never_takes_that_weight_gradient_from_torch():
    input, weight, _, _ = DEFECT.tensors(torch.bfloat16)
    call = DEFECT.call(input, weight)
    assert conv.BACKWARD.choose(call).name in ("cpu", "reference")
