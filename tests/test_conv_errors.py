"""Bad calls of depthwise convolution raise what torch raises, type and text, whatever backend is asked for.

Wrong types of an argument are the one exception: the functional form promises the type of the error alone.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyarch
from pyarch.ops import depthwise_conv
from tests.conv_cases import CPU_BACKENDS, Case, native_kernels, need

OPERATOR = "depthwise_conv"
STOCK = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
OURS = {1: pyarch.nn.Conv1d, 2: pyarch.nn.Conv2d, 3: pyarch.nn.Conv3d}
FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
each_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)
ones = torch.ones


def failure_of(run) -> tuple[type, str]:
    """The type and text of what `run` raises."""
    with pytest.raises(Exception) as raised:  # noqa: B017
        run()
    return raised.type, str(raised.value)


# ------------------------------------------------------------------------------------ the functional form

# name: input, weight, bias, settings
FUNCTIONAL = {
    "channels that do not divide the weights": (ones(1, 7, 5, 5), ones(8, 1, 3, 3), None, {}),
    "channels more than the weights": (ones(1, 9, 5, 5), ones(8, 1, 3, 3), None, {}),
    "no weight": (ones(1, 8, 5, 5), ones(0, 1, 3, 3), None, {}),
    "no channel": (ones(1, 0, 5, 5), ones(8, 1, 3, 3), None, {}),
    "weight of two groups": (ones(1, 8, 5, 5), ones(8, 2, 3, 3), None, {}),
    "kernel too large, 1-D": (ones(1, 8, 5), ones(8, 1, 7), None, {}),
    "kernel too large, 2-D": (ones(1, 8, 5, 5), ones(8, 1, 7, 7), None, {}),
    "kernel too large, 3-D": (ones(1, 8, 5, 5, 2), ones(8, 1, 3, 3, 3), None, {}),
    "kernel too large, padded": (ones(1, 8, 5, 5), ones(8, 1, 9, 9), None, {"padding": 1}),
    "kernel too large, dilated": (ones(1, 8, 5, 5), ones(8, 1, 3, 3), None, {"dilation": 3}),
    "kernel too large, unbatched": (ones(8, 5, 5), ones(8, 1, 7, 7), None, {}),
    "no column": (ones(1, 8, 5, 0), ones(8, 1, 3, 3), None, {}),
    "weight of another dtype": (ones(1, 8, 5, 5), ones(8, 1, 3, 3).double(), None, {}),
    "input of another dtype": (ones(1, 8, 5, 5).bfloat16(), ones(8, 1, 3, 3), None, {}),
    "integer input": (ones(1, 8, 5, 5).int(), ones(8, 1, 3, 3), None, {}),
    "bias of another dtype": (ones(1, 8, 5, 5), ones(8, 1, 3, 3), ones(8).half(), {}),
    "bias too short": (ones(1, 8, 5, 5), ones(8, 1, 3, 3), ones(7), {}),
    "bias of two dimensions": (ones(1, 8, 5, 5), ones(8, 1, 3, 3), ones(8, 1), {}),
    "bias of no dimension": (ones(1, 8, 5, 5), ones(8, 1, 3, 3), ones(()), {}),
    "input of five dimensions": (ones(1, 1, 8, 5, 5), ones(8, 1, 3, 3), None, {}),
    "input of two dimensions": (ones(8, 5), ones(8, 1, 3, 3), None, {}),
    "input of one dimension": (ones(5), ones(8, 1, 3), None, {}),
    "weight of two dimensions": (ones(1, 8, 5), ones(8, 1), None, {}),
    "weight of six dimensions": (ones(1, 8, 5), ones(8, 1, 1, 1, 1, 1), None, {}),
    "unknown padding": (ones(1, 8, 5, 5), ones(8, 1, 3, 3), None, {"padding": "full"}),
    "same with a stride": (ones(1, 8, 5, 5), ones(8, 1, 3, 3), None, {"padding": "same", "stride": 2}),
    "negative padding": (ones(1, 8, 5, 5), ones(8, 1, 3, 3), None, {"padding": -1}),
    "one negative padding": (ones(1, 8, 5, 5), ones(8, 1, 3, 3), None, {"padding": (1, -1)}),
    "stride 0": (ones(1, 8, 5, 5), ones(8, 1, 3, 3), None, {"stride": 0}),
    "stride -1": (ones(1, 8, 5, 5), ones(8, 1, 3, 3), None, {"stride": (1, -1)}),
    "dilation 0": (ones(1, 8, 5, 5), ones(8, 1, 3, 3), None, {"dilation": 0}),
    "too many strides": (ones(1, 8, 5, 5), ones(8, 1, 3, 3), None, {"stride": (1, 1, 1)}),
    "too many paddings": (ones(1, 8, 5, 5), ones(8, 1, 3, 3), None, {"padding": (1, 1, 1)}),
    "paddings of a pair, 1-D": (ones(1, 8, 5), ones(8, 1, 3), None, {"padding": (1, 1)}),
    "too few dilations": (ones(1, 8, 5, 5, 5), ones(8, 1, 3, 3, 3), None, {"dilation": (1, 1)}),
    "no stride": (ones(1, 8, 5, 5), ones(8, 1, 3, 3), None, {"stride": ()}),
}


def by_function(input, weight, bias, settings):
    """torch.nn.functional.convNd with the groups that our function reads from the input."""
    dimensions = weight.dim() - 2
    groups = input.shape[-dimensions - 1] if input.dim() > dimensions > 0 else 1
    return FUNCTIONS[min(max(dimensions, 1), 3)](input, weight, bias, groups=groups, **settings)


@pytest.mark.parametrize("call", FUNCTIONAL.values(), ids=FUNCTIONAL)
@each_backend
def test_conv_errors_of_the_function_are_torchs(backend, call):
    *tensors, settings = call
    expected = failure_of(lambda: by_function(*call))
    with pyarch.backend(backend):
        assert failure_of(lambda: depthwise_conv(*tensors, **settings)) == expected


@pytest.mark.parametrize(
    "input, settings",
    [([1.0], {}), (None, {}), (ones(1, 8, 5, 5), {"stride": 1.5}), (ones(1, 8, 5, 5), {"padding": 0.5})],
)
def test_conv_errors_of_wrong_types_are_type_errors(input, settings):
    with pytest.raises(TypeError):
        F.conv2d(input, ones(8, 1, 3, 3), groups=8, **settings)
    with pytest.raises(TypeError):
        depthwise_conv(input, ones(8, 1, 3, 3), **settings)


@pytest.mark.parametrize("bias", [1, [1.0] * 8])
def test_conv_errors_of_a_bias_that_is_no_tensor_are_torchs(bias):
    def run(function):
        return failure_of(lambda: function(ones(1, 8, 5, 5), ones(8, 1, 3, 3), bias))

    (kind, text), (found, ours) = run(F.conv2d), run(depthwise_conv)
    assert found is kind is TypeError and ours.partition(" - got")[0] == text.partition(" - got")[0]


def test_conv_errors_a_weight_that_is_no_tensor():
    with pytest.raises(TypeError, match=r"argument 'weight' \(position 2\) must be Tensor, not list"):
        depthwise_conv(ones(1, 8, 5), [[[1.0]]] * 8)


def test_conv_errors_the_texts_users_know():
    """The two texts that the library most often meets, so that a change in torch's words is seen."""
    kind, text = failure_of(lambda: OURS[2](8, 8, 3, groups=8)(ones(1, 7, 5, 5)))
    assert kind is RuntimeError and text == (
        "Given groups=8, weight of size [8, 1, 3, 3], expected input[1, 7, 5, 5] to have 8 channels, "
        "but got 7 channels instead"
    )
    kind, text = failure_of(lambda: OURS[2](8, 8, 7, groups=8)(ones(1, 8, 5, 5)))
    assert kind is RuntimeError and text == (
        "Calculated padded input size per channel: (5 x 5). Kernel size: (7 x 7). "
        "Kernel size can't be greater than actual input size"
    )


# ------------------------------------------------------------------------------------ modules

# name: dimensions, settings, input
MODULES = {
    "channels, 1-D": (1, {}, ones(1, 7, 9)),
    "channels, 2-D": (2, {}, ones(1, 7, 9, 9)),
    "channels, 3-D": (3, {}, ones(1, 7, 9, 9, 9)),
    "channels, unbatched": (2, {}, ones(7, 9, 9)),
    "channels, reflected": (2, {"padding": 1, "padding_mode": "reflect"}, ones(1, 7, 9, 9)),
    "no channel": (2, {}, ones(1, 0, 9, 9)),
    "dimensions, 1-D": (1, {}, ones(1, 1, 8, 9)),
    "dimensions, 2-D": (2, {}, ones(8, 9)),
    "dimensions, 3-D": (3, {}, ones(1, 8, 9)),
    "dimensions, circular": (2, {"padding": 1, "padding_mode": "circular"}, ones(1, 1, 8, 9, 9)),
    "kernel too large, 1-D": (1, {}, ones(1, 8, 2)),
    "kernel too large, 2-D": (2, {}, ones(2, 8, 9, 2)),
    "kernel too large, 3-D": (3, {"dilation": 2}, ones(1, 8, 9, 4, 9)),
    "kernel too large, replicated": (
        2,
        {"padding": 1, "padding_mode": "replicate", "dilation": 4},
        ones(1, 8, 6, 6),
    ),
    "reflect pads too much, 1-D": (1, {"padding": 4, "padding_mode": "reflect"}, ones(1, 8, 4)),
    "reflect pads too much, 2-D": (2, {"padding": (1, 9), "padding_mode": "reflect"}, ones(1, 8, 9, 9)),
    "reflect pads too much, 3-D": (3, {"padding": 2, "padding_mode": "reflect"}, ones(1, 8, 9, 9, 2)),
    "circular pads too much": (2, {"padding": 10, "padding_mode": "circular"}, ones(1, 8, 9, 9)),
    "negative padding": (2, {"padding": -1}, ones(1, 8, 9, 9)),
    "negative circular padding": (2, {"padding": -5, "padding_mode": "circular"}, ones(1, 8, 9, 9)),
    "stride 0": (2, {"stride": 0}, ones(1, 8, 9, 9)),
    "dilation 0": (2, {"dilation": 0}, ones(1, 8, 9, 9)),
    "stride of a float": (2, {"stride": 1.5}, ones(1, 8, 9, 9)),
    "padding of a float": (2, {"padding": 0.5}, ones(1, 8, 9, 9)),
    "stride of nothing": (2, {"stride": None}, ones(1, 8, 9, 9)),
    "stride of a truth": (1, {"stride": True}, ones(1, 8, 9)),
    "stride of a text": (2, {"stride": "x"}, ones(1, 8, 9, 9)),
    "padding of nothing": (1, {"padding": None}, ones(1, 8, 9)),
    "padding of a truth": (2, {"padding": True}, ones(1, 8, 9, 9)),
    "dilation of nothing": (3, {"dilation": None}, ones(1, 8, 9, 9, 9)),
    "dilation of a truth": (2, {"dilation": True}, ones(1, 8, 9, 9)),
    "strides of another dimension": (2, {"stride": (1, 1, 1)}, ones(1, 8, 9, 9)),
    "paddings of another dimension": (1, {"padding": (1, 1)}, ones(1, 8, 9)),
    "double": (2, {}, ones(1, 8, 9, 9).double()),
    "bfloat16": (2, {}, ones(1, 8, 9, 9).bfloat16()),
    "integers": (2, {}, ones(1, 8, 9, 9).long()),
    "complex": (2, {}, ones(1, 8, 9, 9) + 0j),
    "a list": (2, {}, [1.0]),
    "None": (2, {}, None),
    "no row": (2, {}, ones(1, 8, 0, 9)),
    "no sample, no column": (2, {}, ones(0, 8, 9, 0)),
}


@pytest.mark.parametrize("call", MODULES.values(), ids=MODULES)
@each_backend
def test_conv_errors_of_modules_are_torchs(backend, call):
    dimensions, settings, input = call
    stock = STOCK[dimensions](8, 8, 3, groups=8, **settings)
    ours = OURS[dimensions](8, 8, 3, groups=8, **settings)
    expected = failure_of(lambda: stock(input))
    with pyarch.backend(backend):
        assert failure_of(lambda: ours(input)) == expected


CONSTRUCTIONS = {
    "groups that do not divide": dict(groups=3),
    "no group": dict(groups=0),
    "unknown padding": dict(groups=8, padding="full"),
    "same with a stride": dict(groups=8, padding="same", stride=2),
    "unknown padding mode": dict(groups=8, padding_mode="mirror"),
    "negative kernel": dict(groups=8, kernel_size=-3),
    "unknown argument": dict(groups=8, fused=True),
}


@pytest.mark.parametrize("settings", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_conv_errors_of_constructors_are_torchs(dimensions, settings):
    settings = {"in_channels": 8, "out_channels": 8, "kernel_size": 3, **settings}
    expected = failure_of(lambda: STOCK[dimensions](**settings))
    kind, text = failure_of(lambda: OURS[dimensions](**settings))
    assert (kind, text) == expected


def test_conv_errors_meta_weight():
    """A weight without storage and a real input: torch answers, whatever it says."""
    stock, ours = (cls(8, 8, 3, groups=8, device="meta") for cls in (STOCK[2], OURS[2]))
    assert ours(ones(1, 8, 9, 9)).device == stock(ones(1, 8, 9, 9)).device


# ------------------------------------------------------------------------------------ warnings, refusals


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@each_backend
def test_conv_same_with_an_even_kernel_makes_no_copy_to_warn_of(backend, dimensions):
    """torch warns that it "may require a zero-padded copy"; ours is folded into indices."""
    input, settings = ones(1, 8, *[9] * dimensions), dict(groups=8, padding="same")
    stock, ours = STOCK[dimensions](8, 8, 4, **settings), OURS[dimensions](8, 8, 4, **settings)
    ours.load_state_dict(stock.state_dict())
    torch.set_warn_always(True)
    try:
        with pytest.warns(UserWarning, match="may require a zero-padded copy"):
            expected = stock(input)
        with pyarch.backend(backend), warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(ours(input), expected)
    finally:
        torch.set_warn_always(False)


@pytest.mark.parametrize(
    "backend, words", [("triton", "needs a GPU"), ("cuda", "CUDA C\\+\\+ kernels not written yet")]
)
def test_conv_a_backend_asked_for_by_name_refuses_aloud(backend, words, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    layer = OURS[2](8, 8, 3, groups=8)
    with pyarch.backend(backend), pytest.raises(NotImplementedError, match=words) as raised:
        layer(ones(1, 8, 9, 9))
    assert f"depthwise_conv_forward: backend '{backend}' refuses this call" in str(raised.value)


def test_conv_the_backward_refuses_aloud_too():
    """torch computes this gradient wrongly, so that even by name it does not."""
    case = Case((1, 16, 8, 40), (3, 3), padding=2, dilation=2)
    input, weight, bias, grad = case.tensors(torch.bfloat16)
    input = input.contiguous(memory_format=torch.channels_last)
    with pyarch.backend("torch"):
        output = depthwise_conv(input, weight.requires_grad_(), bias, padding=2, dilation=2)
        with pytest.raises(NotImplementedError, match="depthwise_conv_backward: backend 'torch' refuses"):
            output.backward(grad)


@native_kernels
def test_conv_the_cpu_backend_without_its_library_says_how_to_build_it(backend, monkeypatch):
    reason = f"C++ CPU extension for {backend.instruction_set} not built, build it with: ..."
    monkeypatch.setattr(pyarch.native, "serving", lambda: (None, reason))
    layer = OURS[1](5, 5, 3, groups=5, bias=False)
    with pyarch.backend("cpu"), pytest.raises(NotImplementedError) as raised:
        layer(ones(1, 5, 9 + len(backend.instruction_set)))
    assert reason in str(raised.value)


def test_conv_a_call_that_cpu_can_run_is_run_by_it():
    """The errors above are not raised because nothing runs at all."""
    with pyarch.backend("reference"):
        need("reference", Case((1, 8, 9, 9), (3, 3)).call(ones(1, 8, 9, 9), ones(8, 1, 3, 3)))
        assert torch.equal(depthwise_conv(ones(1, 8, 9, 9), ones(8, 1, 3, 3)), torch.full((1, 8, 7, 7), 9.0))
