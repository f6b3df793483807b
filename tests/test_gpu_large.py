"""Tensors of more than 2^31 elements: an offset in 32 bits would wrap and read or write elsewhere.

The far end of each result is held to torch on a slice that holds all it depends on. Each body takes its
sizes; small ones are rehearsed on the CPU. Each test names the memory that it needs, and one runs at a time,
whichever process has it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyarch import ops
from pyarch.ops import scaled_dot_product_attention as attend
from tests.gpu_calls import BF16
from tests.gpu_large import BEYOND, CLOSE, drawn, hold_layer, large

TAIL = 64

# ------------------------------------------------------------------------------------ convolution


def hold_conv_rows(device: str, length: int) -> None:
    """(2, 4, L), causal, 4 taps: the last positions of the last channel, forward and backward."""
    x, w = drawn(2, 4, length, device=device).requires_grad_(), drawn(4, 1, 4, device=device)
    out = ops.depthwise_conv(x, w, padding=3)
    grad = drawn(*out.shape, device=device)
    (ours,) = torch.autograd.grad(out, x, grad)
    end = x.detach()[1:, 3:, -TAIL - 3 :].float()
    torch.testing.assert_close(
        out[1:, 3:, -TAIL:].float(), F.conv1d(end, w[3:].float(), padding=3)[..., -TAIL:], **CLOSE
    )
    expected = F.conv_transpose1d(grad[1:, 3:, -TAIL - 3 :].float(), w[3:].float())[..., -TAIL - 3 : -3]
    torch.testing.assert_close(ours[1:, 3:, -TAIL + 3 :].float(), expected[..., 3:], **CLOSE)


def hold_conv_images(device: str, size: int) -> None:
    """(2, 64, S, S) channels last, 3x3: the last corner, from which alone gradients come."""
    x = torch.empty(2, 64, size, size, dtype=BF16, device=device, memory_format=torch.channels_last).normal_()
    w = drawn(64, 1, 3, 3, device=device).requires_grad_()
    out = ops.depthwise_conv(x.requires_grad_(), w, padding=1)
    grad = torch.zeros_like(out)
    grad[1:, :, -8:, -8:] = drawn(1, 64, 8, 8, device=device)
    of_x, of_w = torch.autograd.grad(out, (x, w), grad)
    corner, taps = (each.detach().float().requires_grad_() for each in (x[1:, :, -10:, -10:], w))
    small = F.conv2d(corner, taps, padding=1, groups=64)[..., -8:, -8:]
    theirs = torch.autograd.grad(small, (corner, taps), grad[1:, :, -8:, -8:].float())
    torch.testing.assert_close(out[1:, :, -8:, -8:].float(), small, **CLOSE)
    torch.testing.assert_close(of_x[1:, :, -9:, -9:].float(), theirs[0][..., -9:, -9:], **CLOSE)
    torch.testing.assert_close(of_w.float(), theirs[1], **CLOSE)


@large(30)
def test_gpu_conv_of_more_than_2_31_elements():
    length = BEYOND // 8 + 1000
    assert 8 * length > BEYOND
    hold_conv_rows("cuda", length)


@large(30)
def test_gpu_conv_channels_last_of_more_than_2_31_elements():
    assert 2 * 64 * 4097 * 4097 > BEYOND
    hold_conv_images("cuda", 4097)


# ------------------------------------------------------------------------------------ attention


def hold_end_of_window(ours, leaves, grad, window: int) -> None:
    """Hold (out, gradients of query, key and value) to a causal window over the last tokens of one head.

    `ours` have the last half window of the tokens, (window / 2, D); `leaves` and `grad` two windows,
    (2 * window, D). Queries of the half window see no further back, and no other query sees its keys.
    """
    leaves = [each.detach()[None, None].float().requires_grad_() for each in leaves]
    small = attend(*leaves, is_causal=True, window=(window, 0))
    expected = torch.autograd.grad(small, leaves, grad[None, None].float())
    for mine, theirs in zip(ours, (small, *expected), strict=True):
        torch.testing.assert_close(mine.float(), theirs[0, 0, -(window // 2) :], **CLOSE)


def hold_attention(device: str, heads: int, tokens: int, dim: int, window: int = 64) -> None:
    """Causal with a window: the last queries of the last head, and the gradients of the last keys."""
    leaves = [drawn(2, heads, tokens, dim, device=device).requires_grad_() for _ in range(3)]
    out = attend(*leaves, is_causal=True, window=(window, 0))
    grad = drawn(*out.shape, device=device)
    ours = out, *torch.autograd.grad(out, leaves, grad)
    end, last = slice(-2 * window, None), slice(-(window // 2), None)
    hold_end_of_window(
        [each[1, -1, last] for each in ours], [each[1, -1, end] for each in leaves], grad[1, -1, end], window
    )


def hold_sequences(device: str, tokens: int, dim: int, window: int = 64) -> None:
    """Two sequences, (N, 8, D): the end of the second."""
    leaves = [drawn(tokens, 8, dim, device=device).requires_grad_() for _ in range(3)]
    ends = torch.tensor([0, 77, tokens], dtype=torch.int32, device=device)
    out = ops.attention_varlen(*leaves, ends, is_causal=True, window=(window, 0))
    grad = drawn(*out.shape, device=device)
    ours = out, *torch.autograd.grad(out, leaves, grad)
    end, last = slice(-2 * window, None), slice(-(window // 2), None)
    hold_end_of_window(
        [each[last, 7] for each in ours], [each[end, 7] for each in leaves], grad[end, 7], window
    )


def hold_cache(device: str, places: int, dim: int) -> None:
    """One query on a cache (2, 8, S, D): the last entry's last head. Its few highest scores decide."""
    query = 6 * drawn(2, 16, 1, dim, device=device)
    keys, values = (drawn(2, 8, places, dim, device=device) for _ in range(2))
    with torch.no_grad():
        out = ops.attention_decode(query, keys, values, lengths=places)
    scores = (keys[1, 7].float() @ query[1, 15, 0].float()) * dim**-0.5
    expected = torch.softmax(scores, 0) @ values[1, 7].float()
    assert expected.abs().max() > 0.2
    torch.testing.assert_close(out[1, 15, 0].float(), expected, **CLOSE)


def hold_weights(device: str, tokens: int, dim: int) -> None:
    """Probabilities (1, 2, T, T) of two heads: the last queries of the last. Few keys have them."""
    query = 6 * drawn(1, 2, tokens, dim, device=device)
    key, value = (drawn(1, 2, tokens, dim, device=device) for _ in range(2))
    with torch.no_grad():
        _, weights = attend(query, key, value, return_weights="heads")
    expected = torch.softmax((query[0, 1, -8:].float() @ key[0, 1].float().T) * dim**-0.5, -1)
    assert expected.amax(1).min() > 0.05
    torch.testing.assert_close(weights[0, 1, -8:].float(), expected, rtol=2e-2, atol=1e-4)


def hold_bias(device: str, tokens: int, dim: int) -> None:
    """A bias (2, T, T) and its gradient: the last queries of the last head."""
    query, key, value = (drawn(1, 2, tokens, dim, device=device) for _ in range(3))
    bias = (3 * drawn(2, tokens, tokens, device=device)).requires_grad_()
    out = attend(query, key, value, bias=bias)
    grad = drawn(*out.shape, device=device)
    (ours,) = torch.autograd.grad(out, bias, grad)
    rows = bias.detach()[1, -8:].float().requires_grad_()
    scores = (query[0, 1, -8:].float() @ key[0, 1].float().T) * dim**-0.5
    expected = torch.softmax(scores + rows, -1) @ value[0, 1].float()
    (theirs,) = torch.autograd.grad(expected, rows, grad[0, 1, -8:].float())
    assert theirs.abs().amax(1).min() > 0.05
    torch.testing.assert_close(out[0, 1, -8:].float(), expected, **CLOSE)
    torch.testing.assert_close(ours[1, -8:].float(), theirs, rtol=5e-2, atol=1e-2)


@large(50)
def test_gpu_attention_of_more_than_2_31_elements():
    tokens = 2**20 + 72
    assert 2 * 8 * tokens * 128 > BEYOND
    hold_attention("cuda", 8, tokens, 128)


@large(50)
def test_gpu_attention_of_sequences_of_more_than_2_31_elements():
    tokens = 2**21 + 72
    assert tokens * 8 * 128 > BEYOND
    hold_sequences("cuda", tokens, 128)


@large(20)
def test_gpu_attention_on_a_cache_of_more_than_2_31_elements():
    places = 2**20 + 72
    assert 2 * 8 * places * 128 > BEYOND
    hold_cache("cuda", places, 128)


@large(20)
def test_gpu_attention_weights_of_more_than_2_31_elements():
    assert 2 * 32_800**2 > BEYOND
    hold_weights("cuda", 32_800, 16)


@large(30)
def test_gpu_attention_bias_of_more_than_2_31_elements():
    assert 2 * 32_800**2 > BEYOND
    hold_bias("cuda", 32_800, 16)


# ------------------------------------------------------------------------------------ recurrence


@large(50)
def test_gpu_recurrence_of_more_than_2_31_elements():
    assert 512 * 65_560 * 64 > BEYOND
    hold_layer("cuda", "rnn_tanh", 512, 65_560, 64)


@large(50)
@pytest.mark.parametrize("mode", ["lstm", "gru"])
def test_gpu_resident_gates_of_more_than_2_31_elements(mode):
    assert 2 * 64 * 65_600 * 4 * 64 > BEYOND
    hold_layer("cuda", mode, 64, 65_600, 64, 2, "resident")


@large(50)
@pytest.mark.parametrize("mode", ["lstm", "gru"])
def test_gpu_gates_by_steps_of_more_than_2_31_elements(mode):
    """A single direction: the rows of its last step lie beyond."""
    assert 8 * 64_800 * 4 * 1040 > BEYOND
    hold_layer("cuda", mode, 8, 64_800, 1040, 1, "step")


# ------------------------------------------------------------------------------------ rehearsals


@pytest.mark.parametrize(
    ("body", "sizes"),
    [
        (hold_conv_rows, (300,)),
        (hold_conv_images, (17,)),
        (hold_attention, (2, 300, 16)),
        (hold_cache, (200, 16)),
        (hold_sequences, (300, 16)),
        (hold_weights, (200, 16)),
        (hold_bias, (200, 16)),
        (hold_layer, ("rnn_tanh", 9, 5, 16)),
        (hold_layer, ("lstm", 9, 5, 16, 2)),
        (hold_layer, ("gru", 9, 5, 40)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_gpu_large_rehearsed(body, sizes):
    body("cpu", *sizes)
