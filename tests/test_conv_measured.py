"""Calls measured to be slower on our CPU forward: `auto` leaves them to torch, a request by name does not."""

from __future__ import annotations

import pytest
import torch

import pyarch
from pyarch import dispatch
from pyarch.ops import conv
from pyarch.ops.conv_measured import SLOWER, forward_concessions

OPERATOR = "depthwise_conv"


def call(
    channels: int, size: int, kernel: int, stride: int = 1, channels_last: bool = False
) -> conv.ConvCall:
    return conv.ConvCall(
        device="cpu",
        architecture="avx512",
        dtype=torch.float32,
        input_shape=(8, channels, size, size),
        weight_shape=(channels, 1, kernel, kernel),
        stride=(stride, stride),
        padding=(kernel // 2,) * 4,
        dilation=(1, 1),
        channels_last=channels_last,
    )


@pytest.mark.parametrize(
    ("described", "conceded"),
    [
        (call(96, 56, 3, channels_last=True), True),
        (call(96, 56, 7, channels_last=True), False),
        (call(96, 56, 3), False),
        (call(96, 56, 7), False),
        (call(96, 56, 3, stride=2), True),
        (call(96, 56, 3, stride=2)._replace(dtype=torch.bfloat16), False),
        (call(96, 56, 3, channels_last=True)._replace(dtype=torch.float16), False),
        (call(96, 14, 7), True),
        (call(16, 14, 7), False),
        (call(96, 7, 3, channels_last=True)._replace(input_shape=(1, 96, 7, 7)), False),
        (call(384, 8, 13, stride=2, channels_last=True), True),
    ],
)
def test_conv_concedes_where_torch_was_measured_faster(described, conceded):
    reasons = list(forward_concessions(described))
    assert bool(reasons) == conceded
    assert all("of torch, see benchmarks/results" in reason for reason in reasons)


def test_conv_concedes_nothing_on_a_gpu():
    assert not list(forward_concessions(call(96, 56, 3, channels_last=True)._replace(device="cuda")))


def test_conv_gives_one_reason_a_call():
    assert len(list(forward_concessions(call(8, 40, 3, channels_last=True)))) == 1
    assert len(SLOWER) == len(set(SLOWER))


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_conv_forward_left_to_torch_keeps_our_backward(backend):
    refusals = next(each for each in conv.FORWARD.backends if each.name == "cpu").refusals
    reasons = list(refusals(call(32, 12, 3, channels_last=True)))
    if reasons:
        pytest.skip(reasons[0])
    layer = pyarch.nn.Conv2d(32, 32, 3, padding=1, groups=32)
    input = torch.randn(8, 32, 12, 12).contiguous(memory_format=torch.channels_last).requires_grad_()
    used = []
    with (
        pyarch.backend(backend),
        dispatch.recording(lambda op, _, chosen: used.append((op.name, chosen.name))),
    ):
        layer(input).sum().backward()
    forward = "torch" if backend == "auto" else "cpu"
    assert used == [("depthwise_conv_forward", forward), ("depthwise_conv_backward", "cpu")]
