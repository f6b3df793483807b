"""`pyarch.ops.depthwise_conv` and its layers are torch's: values, strides, fakes, edges of every argument."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import pyarch
from pyarch import dispatch
from pyarch.ops import conv, depthwise_conv
from tests.conv_cases import (
    CHANNELS_LAST,
    CONVOLUTIONS,
    CPU_BACKENDS,
    Case,
    channels_last,
    contiguous,
    expanded,
    sliced,
    transposed,
)

OPERATOR = "depthwise_conv"
each_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)


@pytest.fixture(autouse=True)
def the_backend_runs_here(request):
    """Skip, quoting the refusal, where the asked backend cannot run on this machine."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend")
    if name == "cpu" and (problem := pyarch.native.serving()[1]):
        pytest.skip(problem)


def leaves(*tensors):
    return [t if t is None else t.detach().requires_grad_() for t in tensors]


def same_values(ours, stock):
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def agree(ours, stock):
    """Equal within rounding, and in the same memory."""
    same_values(ours, stock)
    assert ours.stride() == stock.stride(), f"strides {ours.stride()}, torch gives {stock.stride()}"


def compare(backend, input, weight, bias, **settings):
    """Hold our function to torch's: output and gradients, and the strides of output and input gradient."""
    nd = weight.dim() - 2
    mine, theirs = leaves(input, weight, bias), leaves(input, weight, bias)
    stock = CONVOLUTIONS[nd](*theirs, groups=input.shape[-nd - 1], **settings)
    grad = torch.randn_like(stock)
    with pyarch.backend(backend):
        ours = depthwise_conv(*mine, **settings)
        ours.backward(grad)
    stock.backward(grad)
    agree(ours, stock)
    agree(mine[0].grad, theirs[0].grad)
    for my, their in zip(mine[1:], theirs[1:], strict=True):
        if my is not None:
            same_values(my.grad, their.grad)


# ------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@each_backend
def test_conv_without_a_batch(backend, dimensions):
    compare(backend, torch.randn(3, *[9] * dimensions), torch.randn(6, 1, *[3] * dimensions), torch.randn(6))


@pytest.mark.parametrize("shape", [(0, 3, 9), (0, 3, 9, 9), (0, 3, 5, 5, 5)], ids=str)
@each_backend
def test_conv_with_no_sample(backend, shape):
    nd = len(shape) - 2
    compare(backend, torch.randn(shape), torch.randn(6, 1, *[3] * nd), torch.randn(6), padding=1, stride=2)


@pytest.mark.parametrize("kernel", [(2,), (4,), (2, 3), (4, 4), (1, 2), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2, 3])
@each_backend
def test_conv_same_padding(backend, kernel, dilation):
    input = torch.randn(2, 3, *[13] * len(kernel))
    compare(backend, input, torch.randn(3, 1, *kernel), None, padding="same", dilation=dilation)


@each_backend
def test_conv_valid_padding(backend):
    compare(backend, torch.randn(2, 3, 9, 9), torch.randn(3, 1, 3, 3), None, padding="valid", stride=2)


@pytest.mark.parametrize("settings", [dict(stride=[2]), dict(padding=(1,)), dict(dilation=[2, 1])], ids=str)
@each_backend
def test_conv_settings_of_one_element_serve_every_dimension(backend, settings):
    compare(backend, torch.randn(2, 3, 9, 9), torch.randn(3, 1, 3, 3), torch.randn(3), **settings)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same"], ids=str)
@each_backend
def test_conv_padding_modes(backend, mode, padding):
    input, weight = leaves(torch.randn(2, 3, 8, 9), torch.randn(6, 1, 4, 3))
    layer = torch.nn.Conv2d(3, 6, (4, 3), padding=padding, padding_mode=mode, groups=3, bias=False)
    expected = torch.func.functional_call(layer, {"weight": weight}, input)
    with pyarch.backend(backend):
        ours = depthwise_conv(input, weight, padding=padding, padding_mode=mode)
        grad = torch.randn_like(ours)
        gradients = torch.autograd.grad(ours, (input, weight), grad)
    agree(ours, expected)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, (input, weight), grad), strict=True):
        agree(mine, theirs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
@each_backend
def test_conv_computes_the_gradients_asked_for_and_no_other(backend, wanted):
    tensors = [torch.randn(2, 3, 9), torch.randn(3, 1, 3), torch.randn(3)]
    mine, theirs = ([t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)] for _ in range(2))
    asked = []
    with pyarch.backend(backend), dispatch.recording(lambda op, call, _: asked.append((op.name, call.needs))):
        depthwise_conv(*mine, padding=1).square().sum().backward()
    F.conv1d(*theirs, padding=1, groups=3).square().sum().backward()
    assert asked[-1] == ("depthwise_conv_backward", tuple(i in wanted for i in range(3)))
    for i, (my, their) in enumerate(zip(mine, theirs, strict=True)):
        assert (my.grad is not None) == (i in wanted)
        if my.grad is not None:
            agree(my.grad, their.grad)


def test_conv_without_grad_mode_records_nothing():
    input, weight = leaves(torch.randn(2, 3, 9), torch.randn(3, 1, 3))
    with torch.no_grad():
        assert not depthwise_conv(input, weight).requires_grad
    with torch.inference_mode():
        assert depthwise_conv(input, weight).is_inference()
    assert not depthwise_conv(input.detach(), weight.detach()).requires_grad
    assert depthwise_conv(input.detach(), weight).requires_grad


def test_conv_saves_its_inputs_and_nothing_more():
    """What a layer keeps for its backward is what stock keeps: input, weight and the bias, not a copy."""
    input, weight, bias = leaves(torch.randn(2, 3, 9), torch.randn(3, 1, 3), torch.randn(3))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        depthwise_conv(input, weight, bias)
    assert set(kept) <= {input.data_ptr(), weight.data_ptr(), bias.data_ptr()}


def test_conv_backward_twice_needs_the_graph_kept():
    input, weight = leaves(torch.randn(2, 3, 9), torch.randn(3, 1, 3))
    loss = depthwise_conv(input, weight).square().sum()
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_conv_notices_an_input_changed_before_the_backward():
    input, weight = torch.randn(2, 3, 9), torch.randn(3, 1, 3, requires_grad=True)
    loss = depthwise_conv(input, weight).sum()
    input.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------------------------------------ memory

LAYOUTS = {
    "1-D": (torch.randn(2, 5, 9), (3,), contiguous, contiguous),
    "1-D transposed": (torch.randn(2, 5, 9), (3,), transposed, contiguous),
    "1-D sliced": (torch.randn(2, 5, 9), (3,), sliced, contiguous),
    "2-D": (torch.randn(2, 5, 9, 8), (3, 3), contiguous, contiguous),
    "2-D NHWC": (torch.randn(2, 5, 9, 8), (3, 3), channels_last, contiguous),
    "2-D NHWC both": (torch.randn(2, 5, 9, 8), (3, 3), channels_last, channels_last),
    "2-D NHWC weight": (torch.randn(2, 5, 9, 8), (3, 3), contiguous, channels_last),
    "2-D sliced": (torch.randn(2, 5, 9, 8), (3, 3), sliced, contiguous),
    "2-D sliced input, NHWC weight": (torch.randn(2, 5, 9, 8), (3, 3), sliced, channels_last),
    "2-D expanded": (torch.randn(2, 5, 9, 8), (3, 3), expanded, contiguous),
    "2-D one channel": (torch.randn(2, 1, 9, 8), (3, 3), contiguous, contiguous),
    "2-D one channel NHWC": (torch.randn(2, 1, 9, 8), (3, 3), channels_last, contiguous),
    "2-D one pixel": (torch.randn(2, 5, 1, 1), (1, 1), contiguous, contiguous),
    "2-D one pixel NHWC": (torch.randn(2, 5, 1, 1), (1, 1), channels_last, contiguous),
    "2-D one row NHWC": (torch.randn(2, 5, 1, 9), (1, 3), channels_last, contiguous),
    "2-D one sample NHWC": (torch.randn(1, 5, 9, 8), (3, 3), channels_last, contiguous),
    "2-D kernel 1 NHWC weight": (torch.randn(2, 5, 9, 8), (1, 1), contiguous, channels_last),
    "3-D": (torch.randn(2, 5, 4, 5, 6), (3, 3, 3), contiguous, contiguous),
    "3-D NDHWC": (torch.randn(2, 5, 4, 5, 6), (3, 3, 3), channels_last, contiguous),
    "3-D NDHWC weight": (torch.randn(2, 5, 4, 5, 6), (3, 3, 3), contiguous, channels_last),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def laid_out(layout):
    values, kernel, of_input, of_weight = layout
    return of_input(values), of_weight(torch.randn(values.shape[1], 1, *kernel)), torch.randn(values.shape[1])


@each_layout
@each_backend
def test_conv_strides_are_torchs(backend, layout):
    compare(backend, *laid_out(layout))


@each_layout
def test_conv_fakes_have_the_strides_of_real_results(layout):
    input, weight, bias = laid_out(layout)
    settings = [1] * (weight.dim() - 2), [1] * 2 * (weight.dim() - 2), [1] * (weight.dim() - 2), "zeros"
    forward, backward = torch.ops.pyarch.depthwise_conv_forward, torch.ops.pyarch.depthwise_conv_backward
    needs = [True, True, True]
    output = forward(input, weight, bias, *settings, "auto")
    real = output, *backward(torch.randn_like(output), input, weight, *settings, needs, "auto")
    with FakeTensorMode() as mode:
        input, weight, bias = (mode.from_tensor(t) for t in (input, weight, bias))
        output = forward(input, weight, bias, *settings, "auto")
        fake = output, *backward(torch.empty_like(output), input, weight, *settings, needs, "auto")
    assert [(t.shape, t.stride(), t.dtype) for t in fake] == [(t.shape, t.stride(), t.dtype) for t in real]


@pytest.mark.parametrize(
    "shape", [(2, 5, 9, 8), (1, 1, 9, 8), (2, 5, 1, 1), (2, 5, 4, 5, 6), (2, 1, 1, 1, 1)], ids=str
)
@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced, expanded])
def test_conv_knows_channels_last_as_torch_does(shape, layout):
    tensor = layout(torch.randn(shape))
    ours = conv.is_channels_last(tensor, torch.zeros(shape[1], 1, *[2] * (len(shape) - 2)))
    stock = torch._prims_common.suggest_memory_format(tensor) == CHANNELS_LAST[len(shape)]
    assert ours == (stock and tensor.stride() != (0,) * len(shape))


@pytest.mark.parametrize(
    "grad", [expanded, sliced, channels_last, torch.zeros_like], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
@each_backend
def test_conv_gradients_of_any_layout_are_taken(backend, layout, grad):
    input, weight = leaves(layout(torch.randn(2, 33, 9, 8)), torch.randn(33, 1, 3, 3))
    stock = F.conv2d(input, weight, groups=33)
    cotangent = grad(torch.randn(stock.shape))
    with pyarch.backend(backend):
        ours = torch.autograd.grad(depthwise_conv(input, weight), (input, weight), cotangent)
    expected = torch.autograd.grad(stock, (input, weight), cotangent.clone())
    agree(ours[0], expected[0])
    same_values(ours[1], expected[1])


# ------------------------------------------------------------------------------------ other dtypes


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128], ids=str)
@each_backend
def test_conv_other_dtypes_run_on_torch(backend, dtype):
    input, weight = leaves(torch.randn(2, 3, 9, dtype=dtype), torch.randn(6, 1, 3, dtype=dtype))
    seen = []
    with pyarch.backend(backend), dispatch.recording(lambda *decision: seen.append(decision)):
        ours = depthwise_conv(input, weight, padding=1)
    stock = F.conv1d(input, weight, padding=1, groups=3)
    assert torch.equal(ours, stock) and not seen
    grad = torch.randn_like(ours)
    gradients = [torch.autograd.grad(output, (input, weight), grad) for output in (ours, stock)]
    assert all(torch.equal(*each) for each in zip(*gradients, strict=True))


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_conv_integers_run_on_torch(mode):
    input, weight = torch.arange(24).view(1, 3, 8), torch.tensor([[[1, 2, 3]]] * 3)
    expected = F.conv1d(F.pad(input, (2, 2), mode=mode), weight, groups=3)
    assert torch.equal(depthwise_conv(input, weight, padding=2, padding_mode=mode), expected)


# ------------------------------------------------------------------------------------ decisions for a GPU

GPU = conv.ConvCall(
    "cuda", "sm_90", torch.bfloat16, (8, 64, 56, 56), (64, 1, 7, 7), (1, 1), (3, 3, 3, 3), (1, 1)
)


@pytest.fixture
def triton_here(monkeypatch):
    monkeypatch.setattr(pyarch.hardware, "triton_version", lambda: "3.6.0")


@pytest.mark.parametrize("op", [conv.FORWARD, conv.BACKWARD], ids=lambda op: op.name)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_conv_a_gpu_runs_triton(op, architecture, triton_here):
    assert op.choose(GPU._replace(architecture=architecture)).name == "triton"


@pytest.mark.parametrize("op", [conv.FORWARD, conv.BACKWARD], ids=lambda op: op.name)
def test_conv_a_gpu_says_why_not(op, triton_here):
    verdicts = {verdict.backend: verdict.reason for verdict in op.explain(GPU)}
    assert verdicts["triton"] == verdicts["torch"] == verdicts["reference"] == ""
    assert verdicts["cuda"] == "CUDA C++ kernels not written yet, triton serves GPUs"
    assert verdicts["cpu"] == "device cuda, needs cpu"


def test_conv_a_gpu_without_triton_falls_back_and_says_so(monkeypatch):
    monkeypatch.setattr(pyarch.hardware, "triton_version", lambda: None)
    monkeypatch.setattr(dispatch, "fallbacks", type(dispatch.fallbacks)())
    with pytest.warns(RuntimeWarning, match="Triton not installed, needs triton >= 3.6"):
        assert conv.FORWARD.choose(GPU._replace(input_shape=(1, 64, 33, 33))).name == "torch"
    assert sum(dispatch.fallbacks.values()) == 1


def test_conv_a_gpu_refuses_double_on_our_kernels(triton_here):
    reason = "dtype torch.float64, needs float32, bfloat16 or float16"
    verdicts = {v.backend: v.reason for v in conv.FORWARD.explain(GPU._replace(dtype=torch.float64))}
    assert verdicts["triton"] == reason and verdicts["cpu"].endswith(reason) and verdicts["torch"] == ""


def test_conv_outputs_of_a_call():
    assert GPU.outputs == (56, 56)
    assert Case((1, 2, 9, 10), (3, 2), (2, 1), (1, 0, 2, 3), (1, 4)).call(
        torch.zeros(1, 2, 9, 10), torch.zeros(2, 1, 3, 2)
    ).outputs == (4, 11)
