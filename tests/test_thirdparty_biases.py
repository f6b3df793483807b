"""T5's relative bias as transformers computes it, from the weight of its own layer."""

from __future__ import annotations

import pytest
import torch

from pyarch.ops import t5_bias
from pyarch.ops.attention_biases import t5_buckets
from tests.test_attention_biases import matrix

transformers = pytest.importorskip(
    "transformers", reason="transformers not installed, needs pip install -e .[transformers]"
)
from transformers.models.t5.modeling_t5 import T5Attention  # noqa: E402

pytestmark = pytest.mark.thirdparty

OPERATOR = "attention"
each_direction = pytest.mark.parametrize("bidirectional", [False, True], ids=["decoder", "encoder"])


@each_direction
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 200), (64, 128), (8, 20)])
def test_thirdparty_t5_buckets(bidirectional, buckets, max_distance):
    """Every distance up to far beyond the last, exactly: at a border one rounding decides."""
    distance = torch.arange(-5000, 5001)
    found = t5_buckets(distance, buckets, bidirectional=bidirectional, max_distance=max_distance)
    expected = T5Attention._relative_position_bucket(distance, bidirectional, buckets, max_distance)
    assert torch.equal(found, expected)
    assert found.unique().numel() == buckets - bidirectional


@each_direction
def test_thirdparty_t5_bias(bidirectional):
    """The decoder with three tokens of a cache before it."""
    config = transformers.T5Config(d_model=16, d_kv=4, num_heads=4, is_decoder=not bidirectional)
    layer = T5Attention(config, has_relative_attention_bias=True)
    past = 0 if bidirectional else 3
    expected = layer.compute_bias(9, 9 + past, past_seen_tokens=past)
    table = layer.relative_attention_bias.weight
    found = t5_bias(table, 9, 9 + past, bidirectional=bidirectional, query_offset=past)
    assert torch.equal(matrix(found, 9, 9 + past), expected)
