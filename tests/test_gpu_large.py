"""Tensors of more than 2^31 elements: an offset in 32 bits would wrap and read or write elsewhere.

The far end of each result is held to torch on a slice that holds all it depends on. Each body takes its
sizes; small ones are rehearsed on the CPU. The tests run one after another in one worker (xdist_group, with
--dist loadgroup) and each names the memory that it needs.
"""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F

from pyarch import ops
from pyarch.ops import scaled_dot_product_attention as attend
from tests.gpu_calls import BF16, FP32, on_gpu

BEYOND = 2**31
# bfloat16 results of a sum of few products of drawn numbers, beside float32: a few roundings of 2^-8.
CLOSE = dict(rtol=2e-2, atol=5e-2)
TAIL = 64


@pytest.fixture
def gpu_memory(request):
    """Skip where the GPU has less than the test's `gib`; hand all memory back before and after."""
    needed, there = request.param, torch.cuda.get_device_properties(0).total_memory >> 30
    if there < needed:
        pytest.skip(f"GPU of {there} GiB, needs {needed}")
    free()
    yield
    free()


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def large(gib: int):
    """Mark a test that needs so many GiB of one GPU."""

    def mark(test):
        for each in (
            pytest.mark.parametrize("gpu_memory", [gib], indirect=True),
            pytest.mark.usefixtures("gpu_memory"),
            pytest.mark.xdist_group("large"),
            pytest.mark.unpoisoned,
        ):
            test = each(test)
        return on_gpu(test)

    return mark


def drawn(*shape: int, device: str) -> torch.Tensor:
    return torch.empty(shape, dtype=BF16, device=device).normal_()


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
    """(2, 64, S, S) channels last, 3x3: the last corner."""
    x = torch.empty(2, 64, size, size, dtype=BF16, device=device, memory_format=torch.channels_last).normal_()
    w = drawn(64, 1, 3, 3, device=device)
    out = ops.depthwise_conv(x, w, padding=1)
    corner = F.conv2d(x[1:, :, -9:, -9:].float(), w.float(), padding=1, groups=64)[..., -8:, -8:]
    torch.testing.assert_close(out[1:, :, -8:, -8:].float(), corner, **CLOSE)


@large(60)
def test_gpu_conv_of_more_than_2_31_elements():
    length = BEYOND // 8 + 1000
    assert 8 * length > BEYOND
    hold_conv_rows("cuda", length)


@large(40)
def test_gpu_conv_channels_last_of_more_than_2_31_elements():
    assert 2 * 64 * 4097 * 4097 > BEYOND
    hold_conv_images("cuda", 4097)


# ------------------------------------------------------------------------------------ attention


def hold_attention(device: str, heads: int, tokens: int, dim: int, window: int = 64) -> None:
    """Causal with a window: the last queries of the last head, and the gradients of the last keys."""
    query, key, value = (drawn(2, heads, tokens, dim, device=device).requires_grad_() for _ in range(3))
    out = attend(query, key, value, is_causal=True, window=(window, 0))
    grad = drawn(*out.shape, device=device)
    ours = torch.autograd.grad(out, (query, key, value), grad)
    # Queries of the last `window` keys see 2 windows back at most, and no later query sees these keys.
    end = slice(-2 * window, None)
    leaves = [each.detach()[1:, -1:, end].float().requires_grad_() for each in (query, key, value)]
    small = attend(*leaves, is_causal=True, window=(window, 0))
    last = slice(-window // 2, None)
    expected = torch.autograd.grad(small, leaves, grad[1:, -1:, end].float())
    torch.testing.assert_close(out[1:, -1:, last].float(), small[:, :, last], **CLOSE)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine[1:, -1:, last].float(), theirs[:, :, last], **CLOSE)


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


def hold_sequences(device: str, tokens: int, dim: int, window: int = 64) -> None:
    """Two sequences, (N, 8, D): the end of the second."""
    query, key, value = (drawn(tokens, 8, dim, device=device) for _ in range(3))
    ends = torch.tensor([0, 77, tokens], dtype=torch.int32, device=device)
    out = ops.attention_varlen(query, key, value, ends, is_causal=True, window=(window, 0))
    query, key, value = (
        each[-2 * window :, 7:].transpose(0, 1)[None].float() for each in (query, key, value)
    )
    small = attend(query, key, value, is_causal=True, window=(window, 0))
    torch.testing.assert_close(out[-window:, 7].float(), small[0, 0, -window:], **CLOSE)


@large(90)
def test_gpu_attention_of_more_than_2_31_elements():
    tokens = 2**20 + 72
    assert 2 * 8 * tokens * 128 > BEYOND
    hold_attention("cuda", 8, tokens, 128)


@large(40)
def test_gpu_attention_on_a_cache_of_more_than_2_31_elements():
    places = 2**20 + 72
    assert 2 * 8 * places * 128 > BEYOND
    hold_cache("cuda", places, 128)


@large(50)
def test_gpu_attention_of_sequences_of_more_than_2_31_elements():
    tokens = 2**21 + 72
    assert tokens * 8 * 128 > BEYOND
    hold_sequences("cuda", tokens, 128)


# ------------------------------------------------------------------------------------ recurrence


def hold_recurrence(device: str, steps: int, batch: int, hidden: int) -> None:
    """rnn_tanh: the last sequence, forward and backward, as if it were alone."""
    x = drawn(steps, batch, 4, device=device).requires_grad_()
    params = [
        drawn(hidden, width, device=device) * scale for width, scale in ((4, 0.5), (hidden, hidden**-0.5 / 2))
    ]
    out, _ = ops.rnn(x, None, params)
    grad = drawn(*out.shape, device=device)
    (ours,) = torch.autograd.grad(out, x, grad)
    alone = x.detach()[:, -1:].to(FP32).requires_grad_()
    expected, _ = torch.rnn_tanh(
        alone,
        alone.new_zeros(1, 1, hidden),
        [each.float() for each in params],
        False,
        1,
        0.0,
        True,
        False,
        False,
    )
    (theirs,) = torch.autograd.grad(expected, alone, grad[:, -1:].float())
    torch.testing.assert_close(out[:, -1:].float(), expected, **CLOSE)
    torch.testing.assert_close(ours[:, -1:].float(), theirs, rtol=5e-2, atol=1e-1)


@large(60)
def test_gpu_recurrence_of_more_than_2_31_elements():
    assert 512 * 65_560 * 64 > BEYOND
    hold_recurrence("cuda", 512, 65_560, 64)


# ------------------------------------------------------------------------------------ rehearsals


@pytest.mark.parametrize(
    ("body", "sizes"),
    [
        (hold_conv_rows, (300,)),
        (hold_conv_images, (17,)),
        (hold_attention, (2, 300, 16)),
        (hold_cache, (200, 16)),
        (hold_sequences, (300, 16)),
        (hold_recurrence, (9, 5, 16)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_gpu_large_rehearsed(body, sizes):
    body("cpu", *sizes)
