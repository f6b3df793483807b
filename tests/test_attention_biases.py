"""The biases of ALiBi and T5: published formulas, gradients, and attention with them as with a matrix."""

from __future__ import annotations

import math

import pytest
import torch

import pyarch
from pyarch.ops import alibi_bias, alibi_slopes, t5_bias
from pyarch.ops.attention_biases import t5_buckets
from tests.attention_functions import close, drawn, each_backend, ours, outcome, stock

OPERATOR = "attention"
QUERIES, KEYS, HEADS = 9, 11, 3


def matrix(bias: torch.Tensor, queries: int = QUERIES, keys: int = KEYS) -> torch.Tensor:
    """(1, H, Tq, Tk), a query after the other."""
    return torch.stack([bias[..., queries - 1 - i : queries - 1 - i + keys] for i in range(queries)], -2)


def published_slopes(heads: int) -> list[float]:
    """Written out as the paper's code does, recursion and all."""
    if math.log2(heads).is_integer():
        start = 2 ** (-(2 ** -(math.log2(heads) - 3)))
        return [start * start**head for head in range(heads)]
    below = 2 ** math.floor(math.log2(heads))
    return published_slopes(below) + published_slopes(2 * below)[0::2][: heads - below]


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 31, 112])
def test_attention_alibi_slopes_are_the_papers(heads):
    torch.testing.assert_close(alibi_slopes(heads), torch.tensor(published_slopes(heads)))


def test_attention_alibi_slopes_of_eight_heads():
    assert alibi_slopes(8).tolist() == [2**-head for head in range(1, 9)]


@pytest.mark.parametrize("query_offset", [0, 5, -3])
def test_attention_alibi_bias_is_its_formula(query_offset):
    found = matrix(alibi_bias(HEADS, QUERIES, KEYS, query_offset=query_offset))
    slopes = published_slopes(HEADS)
    for head in range(HEADS):
        for i in range(QUERIES):
            expected = torch.tensor([-slopes[head] * abs(j - i - query_offset) for j in range(KEYS)])
            torch.testing.assert_close(found[0, head, i], expected)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (64, 1000), (5, 9)])
def test_attention_t5_buckets_are_the_papers(bidirectional, buckets, max_distance):
    """A bucket for each near distance, then logarithmic ones, the last of which has no end."""
    one_way = buckets // 2 if bidirectional else buckets
    exact = one_way // 2
    distance = torch.arange(-3 * max_distance, 3 * max_distance + 1)
    found = t5_buckets(distance, buckets, bidirectional=bidirectional, max_distance=max_distance)
    for step, bucket in zip(distance.tolist(), found.tolist(), strict=True):
        back = abs(step) if bidirectional else max(-step, 0)
        first = one_way if bidirectional and step > 0 else 0
        if back < exact:
            assert bucket == first + back
        elif back >= max_distance:
            assert bucket == first + one_way - 1
        else:
            place = exact + math.log(back / exact) / math.log(max_distance / exact) * (one_way - exact)
            border = abs(place - round(place)) < 1e-5
            assert bucket - first in ({round(place) - 1, round(place)} if border else {math.floor(place)})


def test_attention_t5_bias_looks_its_buckets_up():
    table = torch.randn(32, HEADS)
    found = matrix(t5_bias(table, QUERIES, KEYS, bidirectional=True, query_offset=2))
    for i in range(QUERIES):
        distance = torch.arange(KEYS) - i - 2
        expected = table[t5_buckets(distance, 32, bidirectional=True)].T
        assert torch.equal(found[0, :, i], expected)


@pytest.mark.parametrize("queries, keys", [(0, 0), (0, 5), (5, 0), (1, 1)])
def test_attention_biases_of_few_tokens(queries, keys):
    count = max(queries + keys - 1, 0)
    assert alibi_bias(2, queries, keys).shape == (1, 2, count)
    assert t5_bias(torch.ones(32, 2), queries, keys, bidirectional=False).shape == (1, 2, count)


MAKERS = {
    "alibi": (lambda: alibi_slopes(HEADS), lambda made: alibi_bias(made, QUERIES, KEYS, query_offset=2)),
    "t5": (
        lambda: torch.randn(32, HEADS),
        lambda made: t5_bias(made, QUERIES, KEYS, bidirectional=True, query_offset=2),
    ),
}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
@each_backend
def test_attention_with_a_bias_of_distances_is_torchs_with_its_matrix(backend, maker):
    """Results, and gradients down to the slopes or the table."""
    learned, make = maker
    leaves = [*drawn(QUERIES, KEYS, heads=HEADS), learned()]
    with pyarch.backend(backend):
        found = outcome(lambda q, k, v, made: ours(q, k, v, distance_bias=make(made)), leaves)
    expected = outcome(lambda q, k, v, made: stock(q, k, v, matrix(make(made))), leaves)
    assert all(each.any() for each in expected)
    close(found, expected)


@pytest.mark.parametrize("leading", [(), (3,), (2, 2, 3)], ids=str)
@each_backend
def test_attention_distance_bias_has_the_querys_leading_dimensions(backend, leading):
    """Of two, three and five dimensions, with the bias's leading ones given or missing."""
    query, key, value = (torch.randn(*leading, length, 8) for length in (QUERIES, KEYS, KEYS))
    given = [torch.randn(QUERIES + KEYS - 1), torch.randn(*leading, QUERIES + KEYS - 1)]
    for bias in given:
        with pyarch.backend(backend):
            found = outcome(lambda *made: ours(*made[:3], distance_bias=made[3]), [query, key, value, bias])
        expected = outcome(lambda *made: stock(*made[:3], matrix(made[3])), [query, key, value, bias])
        close(found, expected)


def test_attention_distance_bias_adds_to_the_others():
    tensors, bias = drawn(QUERIES, KEYS), torch.randn(HEADS, QUERIES, KEYS)
    of_distance, mask = torch.randn(1, HEADS, QUERIES + KEYS - 1), torch.randn(QUERIES, KEYS)
    found = ours(*tensors, mask, bias=bias, distance_bias=of_distance)
    close(found, stock(*tensors, mask + bias + matrix(of_distance)))


def test_attention_distance_bias_keeps_its_dtype_under_autocast():
    """A bias of large distances would lose them in 16 bits."""
    tensors = drawn(QUERIES, KEYS)
    bias = (alibi_bias(HEADS, QUERIES, KEYS) - 1000.3).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(*tensors, distance_bias=bias)
    assert found.dtype == torch.bfloat16
    found.float().square().sum().backward()
    assert bias.grad.dtype == torch.float32 and bias.grad.any()


ERRORS = {
    "no heads": (lambda: alibi_slopes(0), "heads must be at least 1, got 0"),
    "slopes of two dimensions": (
        lambda: alibi_bias(torch.ones(2, 2), 3, 3),
        "(heads,), got torch.float32 (2, 2)",
    ),
    "slopes of integers": (lambda: alibi_bias(torch.ones(2).long(), 3, 3), "floating and (heads,)"),
    "negative length": (lambda: alibi_bias(2, -1, 3), "at least 0, got -1 and 3"),
    "no table": (lambda: t5_bias(torch.ones(32), 3, 3, bidirectional=True), "(buckets, heads), got"),
    "few buckets": (
        lambda: t5_bias(torch.ones(3, 2), 3, 3, bidirectional=True),
        "buckets must be at least 4",
    ),
    "small max_distance": (
        lambda: t5_bias(torch.ones(32, 2), 3, 3, bidirectional=False, max_distance=16),
        "more than the 16 distances",
    ),
}


@pytest.mark.parametrize("call, words", ERRORS.values(), ids=ERRORS)
def test_attention_biases_refuse(call, words):
    with pytest.raises(ValueError) as raised:
        call()
    assert words in str(raised.value)
