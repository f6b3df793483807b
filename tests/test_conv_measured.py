"""Calls measured to be slower on our CPU forward: `auto` leaves them to torch, a request by name does not."""

from __future__ import annotations

import pytest
import torch

import pyarch
from pyarch import dispatch
from pyarch.ops import conv
from pyarch.ops.conv_measured import (
    EMERALD_RAPIDS,
    ZEN_5,
    _concessions,
    backward_concessions,
    forward_concessions,
)

OPERATOR = "depthwise_conv"


def call(
    channels: int,
    size: int,
    kernel: int,
    stride: int = 1,
    channels_last: bool = False,
    dilation: int = 1,
    dimensions: int = 2,
) -> conv.ConvCall:
    return conv.ConvCall(
        device="cpu",
        architecture="avx512",
        dtype=torch.float32,
        input_shape=(8, channels, *(size,) * dimensions),
        weight_shape=(channels, 1, *(kernel,) * dimensions),
        stride=(stride,) * dimensions,
        padding=(kernel // 2,) * 2 * dimensions,
        dilation=(dilation,) * dimensions,
        channels_last=channels_last,
    )


@pytest.mark.parametrize(
    ("described", "zen", "emerald_rapids"),
    [
        (call(96, 56, 3, channels_last=True), True, False),
        (call(96, 56, 4, channels_last=True), True, True),
        (call(96, 56, 7, channels_last=True), False, False),
        (call(96, 56, 3), False, False),
        (call(96, 56, 7), False, False),
        (call(96, 56, 3, stride=2), False, False),
        (call(96, 14, 7), False, False),
        (call(192, 14, 7, stride=2), True, True),
        (call(192, 14, 7, stride=2)._replace(dtype=torch.bfloat16), False, False),
        (call(192, 14, 7, stride=2)._replace(dtype=torch.float16), False, False),
        (call(256, 28, 3, stride=2, dilation=3), True, True),
        (call(16, 28, 3, stride=2, dilation=3), False, False),
        (call(96, 7, 3, channels_last=True)._replace(input_shape=(1, 96, 7, 7)), False, False),
        (call(384, 8, 13, stride=2, channels_last=True), True, False),
        (call(8, 20, 5, channels_last=True, dimensions=3), True, True),
    ],
)
def test_conv_concedes_where_torch_was_measured_faster(described, zen, emerald_rapids):
    for architecture, conceded in (("avx512", zen), ("avx512_bf16", zen), ("amx", emerald_rapids)):
        reasons = list(forward_concessions(described._replace(architecture=architecture)))
        assert bool(reasons) == conceded, (architecture, reasons)
        assert all("of torch, see benchmarks/results" in reason for reason in reasons)


def test_conv_concedes_a_backward_only_where_that_was_measured_too():
    both, forward = call(8, 20, 5, channels_last=True, dimensions=3), call(192, 14, 7, stride=2)
    for described, conceded in ((both, True), (forward, False)):
        described = described._replace(architecture="amx")
        assert list(forward_concessions(described))
        assert bool(list(backward_concessions(described))) == conceded


def test_conv_concedes_nothing_on_a_gpu():
    assert not list(forward_concessions(call(96, 56, 4, channels_last=True)._replace(device="cuda")))


@pytest.mark.parametrize("regions", [ZEN_5, EMERALD_RAPIDS])
def test_conv_gives_one_reason_a_call(regions):
    described = call(8, 20, 5, channels_last=True, dimensions=3)
    assert len(list(_concessions(described, regions * 2))) == 1


@pytest.mark.parametrize("regions", [ZEN_5, EMERALD_RAPIDS])
def test_conv_regions_are_each_there_once(regions):
    assert len(regions) == len(set(regions))


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_conv_forward_left_to_torch_keeps_our_backward(backend):
    refusals = next(each for each in conv.FORWARD.backends if each.name == "cpu").refusals
    reasons = list(refusals(call(128, 14, 7, stride=2)))
    if reasons:
        pytest.skip(reasons[0])
    layer = pyarch.nn.Conv2d(128, 128, 7, stride=2, padding=3, groups=128)
    input = torch.randn(8, 128, 14, 14, requires_grad=True)
    used = []
    with (
        pyarch.backend(backend),
        dispatch.recording(lambda op, _, chosen: used.append((op.name, chosen.name))),
    ):
        layer(input).sum().backward()
    forward = "torch" if backend == "auto" else "cpu"
    assert used == [("depthwise_conv_forward", forward), ("depthwise_conv_backward", "cpu")]
