"""T5 beyond what every model must do: the buckets, the published sizes and formulas, what it may see."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from pyarch.models import t5
from tests.model_cases import KERNELS, need, running, swap, tiny, trained, unseen

OPERATOR = "attention"
# The small models of T5 and of T5 1.1.
SMALL = replace(t5.REAL, vocabulary=32_128, heads=8, hidden=2048, layers=6, gated=False)
SMALL_1_1 = replace(t5.REAL, vocabulary=32_128, layers=8)


def parameters(config: t5.Config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in t5.build(config).parameters())


# ------------------------------------------------------------------------------------------ buckets


@pytest.mark.parametrize("buckets, farthest", ((32, 128), (8, 16), (32, 64)))
@pytest.mark.parametrize("both_sides", (True, False))
def test_t5_buckets_are_the_papers(buckets, farthest, both_sides):
    distances = torch.arange(-3 * farthest, 3 * farthest + 1)
    found = t5.bucket(distances, buckets, farthest, both_sides).tolist()
    own = buckets // 2 if both_sides else buckets
    for distance, bucket in zip(distances.tolist(), found, strict=True):
        first = own if both_sides and distance > 0 else 0
        far = abs(distance) if both_sides else max(0, -distance)
        exact = own // 2
        if far < exact:
            assert bucket == first + far
            continue
        octave = exact + math.log(far / exact) / math.log(farthest / exact) * (own - exact)
        # Where a bucket begins at a whole number, rounding decides.
        allowed = {math.floor(octave - 1e-5), math.floor(octave + 1e-5)}
        assert bucket - first in {min(each, own - 1) for each in allowed}


def test_t5_buckets_by_hand():
    """Of 32 for both sides, up to 128."""
    distances = torch.tensor([0, -1, -7, -8, -11, -12, -16, -90, -91, -127, -5000, 1, 7, 8, 200])
    expected = [0, 1, 7, 8, 8, 9, 10, 14, 15, 15, 15, 17, 23, 24, 31]
    assert t5.bucket(distances, 32, 128, both_sides=True).tolist() == expected


def test_t5_bias_is_that_of_the_distance():
    torch.manual_seed(0)
    bias = t5.RelativeBias(replace(t5.TINY, buckets=32, farthest=128), both_sides=True)
    table = bias.table.weight
    values = bias(7)
    assert values.shape == (1, 4, 7, 7)
    for query in range(7):
        for key in range(7):
            row = key - query + 16 if key > query else query - key
            assert torch.equal(values[0, :, query, key], table[row])


# ------------------------------------------------------------------------------------------ the model


def test_t5_has_the_published_parameters():
    assert parameters(SMALL) == 60_506_624
    # T5 1.1 predicts by a matrix of its own.
    assert parameters(SMALL_1_1) + 32_128 * 512 == 76_961_152


@pytest.mark.parametrize("gated", (True, False))
def test_t5_is_the_published_formula(gated):
    """transformers' T5 with the same weights gives the same scores, from its buckets to its tied head."""
    transformers = pytest.importorskip("transformers")
    config = replace(t5.TINY, gated=gated, layers=2)
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=config.vocabulary,
            d_model=config.width,
            d_kv=config.features,
            d_ff=config.hidden,
            num_layers=config.layers,
            num_heads=config.heads,
            relative_attention_num_buckets=config.buckets,
            relative_attention_max_distance=config.farthest,
            feed_forward_proj="gated-gelu" if gated else "relu",
            decoder_start_token_id=t5.BEGIN,
            dropout_rate=0.0,
            tie_word_embeddings=True,
        )
    ).eval()
    torch.manual_seed(0)
    model = t5.build(config)
    theirs.load_state_dict(published_names(model), strict=True)
    (source, lengths, previous), _ = t5.batch(config, seed=1)
    mask = ~t5.beyond(lengths, source.shape[1])
    with torch.no_grad():
        wanted = theirs(input_ids=source, attention_mask=mask.long(), decoder_input_ids=previous).logits
        torch.testing.assert_close(model(source, lengths, previous), wanted)


def published_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model under the names of transformers' T5."""
    gated = model.encoder[0].feed.gate is not None
    feed = {"gate": "wi_0", "first": "wi_1", "last": "wo"} if gated else {"first": "wi", "last": "wo"}
    projections = {"query": "q", "key": "k", "value": "v", "out": "o"}
    tables = {"encoder": model.encoder_bias, "decoder": model.decoder_bias}
    names = {f"{name}.weight": model.embedding.weight for name in ("shared", "lm_head")}
    for half, bias in tables.items():
        layers = getattr(model, half)
        names[f"{half}.embed_tokens.weight"] = model.embedding.weight
        names[f"{half}.final_layer_norm.weight"] = getattr(model, f"{half}_norm").weight
        names[f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = bias.table.weight
        for i, layer in enumerate(layers):
            parts = [("SelfAttention", layer.attention_norm, layer.attention, projections)]
            if half == "decoder":
                parts.append(("EncDecAttention", layer.memory_norm, layer.memory_attention, projections))
            parts.append(("DenseReluDense", layer.feed_norm, layer.feed, feed))
            for j, (kind, norm, part, renamed) in enumerate(parts):
                place = f"{half}.block.{i}.layer.{j}"
                names[f"{place}.layer_norm.weight"] = norm.weight
                names |= {
                    f"{place}.{kind}.{theirs}.weight": getattr(part, ours).weight
                    for ours, theirs in renamed.items()
                }
    return names


@pytest.mark.parametrize("backend", ("stock", *KERNELS))
def test_t5_sees_no_later_word_and_no_padding(backend):
    need(backend)
    model, ((source, lengths, previous), _) = tiny("t5"), unseen("t5")
    if backend != "stock":
        swap("t5", model)
    later = previous.clone()
    later[:, 2] = t5.WORDS + (later[:, 2] - t5.WORDS + 1) % 8
    padding = t5.beyond(lengths, source.shape[1])
    other = torch.where(padding, t5.GAP + (source - t5.GAP + 1) % 9, source)
    assert not torch.equal(other, source)
    with running("t5", "auto" if backend == "stock" else backend):
        before, after = model(source, lengths, previous), model(source, lengths, later)
        unpadded = model(other, lengths, previous)
    torch.testing.assert_close(after[:, :2], before[:, :2])
    assert not torch.allclose(after[:, 2], before[:, 2], atol=1e-3)
    torch.testing.assert_close(unpadded, before)


def test_t5_scores_begin_of_order_one():
    """Without scaling, by the smaller weights of the queries."""
    torch.manual_seed(0)
    attention = t5.build(replace(t5.TINY, width=256, features=64)).encoder[0].attention
    x = torch.randn(1, 50, 256)
    q, k = (project(x).unflatten(2, (4, 64)).transpose(1, 2) for project in (attention.query, attention.key))
    assert (q @ k.transpose(2, 3)).std().item() == pytest.approx(1.0, rel=0.15)


def test_t5_texts_count_on_over_the_gap():
    (source, lengths, previous), target = unseen("t5")
    for row in range(len(source)):
        text = source[row, : lengths[row]].tolist()
        gap = text.index(t5.GAP)
        assert 0 < gap < len(text) - 1
        assert target[row, -1] == t5.END
        missing = target[row, :-1].tolist()
        whole = text[:gap] + missing + text[gap + 1 :]
        first = whole[0] - t5.WORDS
        assert whole == [t5.WORDS + (first + place) % 8 for place in range(len(whole))]
        assert previous[row].tolist() == [t5.BEGIN, *missing]


def test_t5_finds_the_missing_words():
    model, (inputs, target) = trained("t5", steps=100), unseen("t5")
    assert (model(*inputs).argmax(2) == target).float().mean() > 0.85
