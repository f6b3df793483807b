"""The reference of depthwise convolution: torch's meaning, and written-out gradients that are autograd's."""

from __future__ import annotations

import pytest
import torch

from pyarch.reference import conv as reference
from tests.conv_cases import Case, Kernels, by_torch, channels_last, in_double

OPERATOR = "depthwise_conv"
pytestmark = pytest.mark.operator(OPERATOR, "reference")

# Small enough for numeric second derivatives.
SMALL = {
    "1-D": Case((2, 2, 6), (3,), padding=1),
    "1-D asymmetric": Case((2, 2, 7), (3,), stride=2, padding=(3, 1), dilation=2, multiplier=2),
    "1-D reflect": Case((1, 2, 5), (3,), padding=(2, 1), mode="reflect"),
    "1-D replicate": Case((1, 2, 3), (4,), padding=(4, 5), mode="replicate", multiplier=3),
    "1-D circular": Case((1, 2, 4), (3,), padding=4, mode="circular"),
    "2-D": Case((2, 2, 4, 5), (3, 3), padding=1),
    "2-D asymmetric": Case((1, 2, 5, 6), (2, 3), (2, 1), (0, 2, 3, 1), (3, 2), multiplier=2),
    "2-D stride beyond the kernel": Case((1, 2, 7, 7), (2, 2), stride=3),
    "2-D reflect": Case((1, 2, 4, 4), (3, 2), (1, 2), (1, 2, 2, 1), mode="reflect"),
    "2-D replicate": Case((1, 2, 3, 4), (3, 2), padding=(1, 2, 2, 1), mode="replicate"),
    "2-D circular": Case((1, 2, 3, 4), (3, 2), padding=(1, 2, 2, 1), mode="circular", multiplier=2),
    "2-D channels last": Case((1, 3, 4, 4), (3, 3), padding=1, layout=channels_last, bias=False),
    "3-D": Case((1, 2, 3, 4, 4), (2, 3, 3), padding=1),
    "3-D asymmetric": Case(
        (1, 2, 4, 4, 5), (2, 1, 3), (2, 1, 1), (1, 0, 0, 1, 2, 1), (1, 2, 2), multiplier=2
    ),
    "3-D reflect": Case((1, 1, 3, 3, 3), (2, 2, 2), padding=1, mode="reflect"),
    "3-D replicate": Case((1, 1, 2, 3, 3), (2, 2, 2), padding=1, mode="replicate"),
    "3-D circular": Case((1, 1, 2, 3, 3), (2, 2, 2), padding=1, mode="circular"),
}
each_case = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)


def leaves_of(case, dtype=torch.float64):
    """Differentiable input, weight and bias (where there is one), and the output's gradient."""
    *leaves, grad = case.tensors(dtype)
    return [leaf.requires_grad_() for leaf in leaves if leaf is not None], grad


def forward_of(case):
    last = case.layout is channels_last

    def forward(input, weight, bias=None):
        return reference.forward(input, weight, bias, *case.settings, last)

    return forward


@each_case
def test_conv_reference_forward_is_torchs(case):
    tensors = case.tensors(torch.float64)
    torch.testing.assert_close(forward_of(case)(*tensors[:3]), in_double(case, tensors)[0])


@each_case
def test_conv_reference_forward_gradcheck(case):
    leaves, _ = leaves_of(case)
    assert torch.autograd.gradcheck(forward_of(case), leaves)


@each_case
def test_conv_reference_forward_gradgradcheck(case):
    leaves, _ = leaves_of(case)
    assert torch.autograd.gradgradcheck(forward_of(case), leaves)


@each_case
def test_conv_reference_backward_is_autograds(case):
    leaves, grad = leaves_of(case)
    output = forward_of(case)(*leaves)
    expected = torch.autograd.grad(output, leaves, grad)
    written = reference.backward(grad, leaves[0], leaves[1], *case.settings, case.layout is channels_last)
    for ours, autograds in zip(written, expected, strict=case.bias):
        torch.testing.assert_close(ours, autograds)


@each_case
def test_conv_reference_backward_is_torchs(case):
    tensors = case.tensors(torch.float64)
    results = Kernels("reference").both(case, *tensors)
    for ours, torchs in zip(results, by_torch(case, *tensors), strict=True):
        assert (ours is None) == (torchs is None)
        if ours is not None:
            torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_conv_reference_complex(mode):
    case = Case((1, 2, 5), (3,), padding=(2, 1), multiplier=2, mode=mode)
    leaves, grad = leaves_of(case, torch.complex128)
    assert torch.autograd.gradcheck(forward_of(case), leaves)
    expected = torch.autograd.grad(forward_of(case)(*leaves), leaves, grad)
    for ours, autograds in zip(reference.backward(grad, *leaves[:2], *case.settings), expected, strict=True):
        torch.testing.assert_close(ours, autograds)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_conv_reference_positions_are_torchs_padding(mode):
    before, after = (6, 6) if mode == "circular" else (5, 4)
    values = torch.arange(6.0).view(1, 1, 6)
    padded = torch.nn.functional.pad(values, (before, after), mode=mode)
    assert reference.source_positions(6, before, after, mode).tolist() == padded.flatten().tolist()


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_conv_reference_unpad_is_the_adjoint_of_pad(mode):
    padding = (2, 1, 3, 2)
    small = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    padded = reference.pad(small, padding, mode)
    large = torch.randn_like(padded)
    inner = (reference.unpad(large, small.shape, padding, mode) * small).sum()
    torch.testing.assert_close((large * padded).sum(), inner)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conv_reference_sums_in_float32(dtype):
    """A thousand ones would stop at 256 or 2048 if the sum were kept in 16 bit."""
    input, weight = torch.ones(1, 1, 3000, dtype=dtype), torch.ones(1, 1, 3000, dtype=dtype)
    assert reference.forward(input, weight, None, [1], [0, 0], [1]).item() == torch.tensor(3000.0).to(dtype)
