"""The memory of attention: nothing of Tq * Tk is ever whole, whatever is asked for."""

from __future__ import annotations

import pytest
import torch

import pyarch
from tests.attention_functions import CPU, drawn, ours, stock
from tests.test_recurrent_memory import peak

OPERATOR = "attention"
T, HEADS = 1024, 8
ONE_SCORE_MATRIX = T * T * 4
OPTIONS = {
    "plain": {},
    "causal": dict(is_causal=True),
    "window": dict(window=(100, 0), dilation=2, global_tokens=3),
    "padding": dict(key_padding_mask=torch.arange(T).expand(1, T) > 900),
    "bool mask": dict(attn_mask=torch.ones(1, 1, T, 1, dtype=torch.bool)),
    "dropout": dict(dropout_p=0.3),
    "distance bias": dict(distance_bias=torch.randn(HEADS, 2 * T - 1)),
    "softcap, sinks": dict(softcap=3.0, sinks=torch.zeros(HEADS)),
}
cpu_alone = pytest.mark.parametrize("backend", [CPU])


@pytest.mark.unpoisoned
@cpu_alone
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention_memory_of_training_holds_no_scores(backend, options):
    """Forward and backward stay below one head's matrix of scores."""
    leaves = [each.requires_grad_() for each in drawn(T, T, batch=1, heads=HEADS, dim=16)]

    def train():
        out = ours(*leaves, **options)
        return out, torch.autograd.grad(out.sum(), leaves)

    with pyarch.backend(backend):
        train()
        held = peak(train)
    assert held < ONE_SCORE_MATRIX, f"{held / 2**20:.1f} MiB"


@pytest.mark.unpoisoned
@cpu_alone
def test_attention_memory_of_a_bias_is_its_gradients(backend):
    """A learned bias that all queries share costs no matrix, where torch holds one for every head."""
    tensors = [*drawn(T, T, batch=1, heads=HEADS, dim=16), torch.randn(HEADS, 1, T)]
    leaves = [each.requires_grad_() for each in tensors]

    def train(function):
        out = function(*leaves)
        return out, torch.autograd.grad(out.sum(), leaves)

    with pyarch.backend(backend):
        train(ours)
        held = peak(lambda: train(ours))
    assert held < ONE_SCORE_MATRIX < peak(lambda: train(stock))


@pytest.mark.unpoisoned
@cpu_alone
def test_attention_memory_of_a_learned_bias_of_distances_is_linear(backend):
    """Four times the tokens of a window take four times the memory, gradients included, and no matrix."""

    def held(tokens: int) -> int:
        tensors = [*drawn(tokens, tokens, batch=1, heads=HEADS, dim=16), torch.randn(HEADS, 2 * tokens - 1)]
        leaves = [each.requires_grad_() for each in tensors]

        def train():
            out = ours(*leaves[:3], window=(64, 64), distance_bias=leaves[3])
            return out, torch.autograd.grad(out.sum(), leaves)

        train()
        return peak(train)

    with pyarch.backend(backend):
        some, many = held(T), held(4 * T)
    assert some < ONE_SCORE_MATRIX and many < 4.1 * some, f"{some / 2**20:.1f} and {many / 2**20:.1f} MiB"


@pytest.mark.unpoisoned
@cpu_alone
def test_attention_memory_of_averaged_weights_does_not_grow_with_the_heads(backend):
    """B * T * S and not B * H * T * S: one matrix for the result, less than another one while it is made.

    Further heads cost what their keys and values take when packed, far from a matrix each.
    """

    def held(heads: int) -> int:
        tensors = drawn(T, T, batch=1, heads=heads, dim=16)
        with pyarch.backend(backend):
            return peak(lambda: ours(*tensors, return_weights="mean"))

    few, many = held(HEADS), held(2 * HEADS)
    assert ONE_SCORE_MATRIX <= few < 2 * ONE_SCORE_MATRIX, f"{few / 2**20:.1f} MiB"
    assert many - few < ONE_SCORE_MATRIX, f"{(many - few) / 2**20:.1f} MiB"


@pytest.mark.unpoisoned
def test_attention_memory_is_measured():
    """The ruler sees the whole matrices that the reference makes."""
    tensors = drawn(T, T, batch=1, heads=2, dim=16)
    with pyarch.backend("reference"):
        assert peak(lambda: ours(*tensors)) > 2 * ONE_SCORE_MATRIX
