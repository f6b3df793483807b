"""The attention models of pyarch.models beyond what every model must do: masks, positions, rules."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import pyarch
from pyarch import models
from pyarch.demo import demonstrate
from pyarch.models import conformer, encoder, gpt, longformer
from pyarch.reference.attention_mask import Extras, Settings, visible
from pyarch.swap_report import CONTEXT
from tests.model_cases import ATTENTION, KERNELS, need, running, swap, tensors, tiny, unseen
from tests.test_models_training import CURVE_TOLERANCE, SEEDS, train

OPERATOR = "attention"
# Batch normalisation pools over the batch: in training these give a row another output beside other rows.
POOLED = ("conformer", "cnn_transformer")
BY_ITSELF = tuple(name for name in ATTENTION if name not in POOLED)
# The classifier of a CvT reads the class token alone, whose query no convolution of the last block touches.
UNREAD = {"cnn_transformer": "stages.1.0.query."}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def without_masks(name: str = "longformer", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return models.build(name, "tiny", masked=False)


def stated(name: str = "longformer", backend: str = "auto", **changed: int) -> dict[str, pyarch.Config]:
    """The rules that stand for a tiny model's masks, or others."""
    patterns = models.patterns(name, "tiny")
    return {
        layers: pyarch.Config(**{**pattern, **changed}, backend=backend)
        for layers, pattern in patterns.items()
    }


# -------------------------------------------------------------------------------- every one


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_every_parameter_gets_a_gradient(name):
    module, model, (inputs, target) = models.load(name), tiny(name), unseen(name)
    module.loss(model(*inputs), target).backward()
    trained = {key: each for key, each in model.named_parameters() if each.requires_grad}
    unread = {key for key in trained if name in UNREAD and key.startswith(UNREAD[name])}
    assert {key for key, each in trained.items() if not each.grad.count_nonzero()} == unread


@pytest.mark.parametrize("name", BY_ITSELF)
def test_attention_no_row_of_a_batch_sees_another(name):
    model, (inputs, _) = tiny(name), unseen(name)
    whole, first = tensors(model(*inputs)), tensors(model(*(each[:1] for each in inputs)))
    torch.testing.assert_close(first, [each[:1] for each in whole])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_swapped_agrees_in_evaluation(name, backend):
    """There torch's own encoder layers take a fused path, and leave the padding out."""
    need(backend)
    model, (inputs, _) = tiny(name).eval(), unseen(name)
    with torch.no_grad():
        stock = model(*inputs)
        report = swap(name, model, backend)
        with running(name, backend):
            ours = model(*inputs)
        report.restore()
        torch.testing.assert_close(ours, stock)
        assert all(map(torch.equal, tensors(model(*inputs)), tensors(stock)))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_verifies_in_evaluation(name, backend):
    """Forward alone, so that torch's encoder makes nested tensors of padded ones."""
    need(backend)
    model, (inputs, _) = tiny(name).eval(), unseen(name)
    swap(name, model, backend)
    with running(name, backend):
        proof = pyarch.verify(model, inputs, backward=False, timing=False)
    assert [each for each in proof.problems if not each.startswith("no layer ran a kernel of ours")] == []
    assert proof.ok == (backend != "reference")
    assert {layer.forward for layer in proof.layers} == {backend}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_swap_reaches_every_kind_of_layer(name):
    model = tiny(name)
    now = {record.now.removeprefix("pyarch.nn.") for record in swap(name, model).swapped}
    of_transformer = {"TransformerEncoderLayer", "MultiheadAttention"}
    expected = {
        "conformer": {"MultiheadAttention", "Conv1d"},
        "encoder": of_transformer,
        "bert": of_transformer,
        "distillation": {"MultiheadAttention"},
        "gpt": of_transformer,
        "translation": of_transformer | {"TransformerDecoderLayer"},
        "t5": {CONTEXT},
        "longformer": {"MultiheadAttention"},
        "swin": {"WindowAttention"},
        "vit": of_transformer,
        "timesformer": {"MultiheadAttention"},
        "cnn_transformer": {"MultiheadAttention", "Conv2d"},
        "rnn_transformer": of_transformer | {"GRU"},
    }
    assert now == expected[name]


# -------------------------------------------------------------------------------- encoder


@pytest.fixture(params=encoder.POSITIONS)
def positioned(request) -> encoder.Config:
    return replace(encoder.TINY, positions=request.param)


def test_encoder_reads_no_padding(positioned):
    torch.manual_seed(0)
    model = encoder.build(positioned)
    words, lengths = encoder.inputs(positioned, seed=0)
    other = torch.where(encoder.beyond(lengths, words.shape[1]), (words + 1) % positioned.classes, words)
    assert not torch.equal(words, other)
    torch.testing.assert_close(model(other, lengths), model(words, lengths))


def test_encoder_reads_the_order(positioned):
    torch.manual_seed(0)
    model = encoder.build(positioned)
    words, lengths = encoder.inputs(positioned, seed=0)
    lengths = torch.full_like(lengths, words.shape[1])
    mirrored = torch.cat([words[:, :1], words[:, 1:].flip(1)], 1)
    assert not torch.allclose(model(mirrored, lengths), model(words, lengths), atol=1e-3)
    # Without positions attention cannot tell them apart.
    model.positions.forward = lambda T: torch.zeros(T, positioned.width)
    torch.testing.assert_close(model(mirrored, lengths), model(words, lengths))


def test_encoder_learns_with_either_positions(positioned):
    torch.manual_seed(0)
    model = encoder.build(positioned)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for step in range(30):
        inputs, target = encoder.batch(positioned, seed=step)
        optimizer.zero_grad()
        losses.append(encoder.loss(model(*inputs), target))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("width", (6, 7))
def test_encoder_sinusoidal_positions_are_the_papers(width):
    waves = encoder.SinusoidalPositions(50, width)(50)
    assert waves.shape == (50, width)
    for t, feature in ((0, 0), (0, 1), (1, 0), (17, 2), (49, 3), (49, width - 1)):
        angle = t / 10_000 ** (2 * (feature // 2) / width)
        assert waves[t, feature].item() == pytest.approx((math.sin, math.cos)[feature % 2](angle), abs=1e-5)


def test_encoder_only_learned_positions_have_parameters():
    sinusoidal, learned = (
        encoder.build(replace(encoder.TINY, positions=positions)) for positions in ("sinusoidal", "learned")
    )
    places = encoder.TINY.words * encoder.TINY.width
    assert parameters(learned) - parameters(sinusoidal) == places
    assert set(learned.state_dict()) - set(sinusoidal.state_dict()) == {"positions.places"}


# -------------------------------------------------------------------------------- GPT


def test_gpt_has_the_published_parameters():
    """Of GPT-2 small with its 50,257 tokens."""
    with torch.device("meta"):
        model = gpt.build(replace(gpt.REAL, vocabulary=50_257, layers=12, tokens=1024))
    assert parameters(model) == 124_439_808


@pytest.mark.parametrize("backend", ("stock", *KERNELS))
def test_gpt_sees_no_later_token(backend):
    need(backend)
    model, ((tokens,), _) = tiny("gpt"), unseen("gpt")
    if backend != "stock":
        pyarch.swap(model, backend=backend)
    other = tokens.clone()
    other[:, 20] = (other[:, 20] + 1) % gpt.TINY.vocabulary
    before, after = model(tokens), model(other)
    torch.testing.assert_close(after[:, :20], before[:, :20])
    assert not torch.allclose(after[:, 20:], before[:, 20:], atol=1e-3)


def test_gpt_residual_projections_start_smaller():
    torch.manual_seed(0)
    config = replace(gpt.TINY, width=768, heads=12)
    model = gpt.build(config)
    layer = model.layers[0]
    assert layer.linear1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for weight in (layer.linear2.weight, layer.self_attn.out_proj.weight):
        assert weight.std().item() == pytest.approx(0.02 / (2 * config.layers) ** 0.5, rel=0.02)


# -------------------------------------------------------------------------------- Longformer: the pattern


@pytest.mark.parametrize("window, global_tokens", [(0, 0), (2, 0), (2, 1), (3, 4), (50, 0), (0, 9)])
def test_longformer_mask_is_the_pattern_of_attention(window, global_tokens):
    settings = Settings(scale=1.0, left=window, right=window, global_tokens=global_tokens)
    seen = visible(Extras(), settings, 9, 9, torch.device("cpu"))
    assert torch.equal(longformer.blocked_pairs(9, window, global_tokens), ~seen[0, 0])


def test_longformer_mask_of_few_words():
    blocked = longformer.blocked_pairs(5, window=1, global_tokens=1).int().tolist()
    assert blocked == [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0]]


def test_longformer_reaches_two_windows_and_through_the_first_word():
    """What the last word's scores depend on, through two layers."""
    config = replace(longformer.TINY, batch=1)
    reached = {}
    for global_tokens in (0, 1):
        torch.manual_seed(0)
        model = longformer.build(replace(config, global_tokens=global_tokens))
        embedded = model.embedding(torch.zeros(1, config.words, dtype=torch.long)).detach().requires_grad_()
        model.embedding.forward = lambda words, embedded=embedded: embedded
        model(torch.zeros(1, config.words, dtype=torch.long))[0, -1].sum().backward()
        reached[global_tokens] = embedded.grad[0].abs().sum(1).nonzero().flatten().tolist()
    assert reached[0] == list(range(config.words - 1 - 2 * config.window, config.words))
    assert reached[1] == list(range(config.words))


def test_longformer_without_masks_has_the_same_parameters():
    masked, bare = tiny("longformer"), without_masks()
    assert list(masked.state_dict()) == list(bare.state_dict())
    assert all(torch.equal(value, bare.state_dict()[key]) for key, value in masked.state_dict().items())
    (words,), _ = unseen("longformer")
    assert bare.blocked is None
    assert not torch.allclose(bare(words), masked(words), atol=1e-2), "the mask hides nothing"


def test_longformer_patterns_name_every_layer():
    """The pattern over layer names fits all layers and nothing else."""
    report = pyarch.swap(without_masks(), rules=stated(), dry_run=True)
    assert [record.config for record in report.swapped] == [pyarch.Config(window=2, global_tokens=1)] * 2


@pytest.mark.parametrize("name", [name for name in models.names() if name != "longformer"])
def test_models_without_patterns_say_so(name):
    assert models.patterns(name, "tiny") == {}
    with pytest.raises(ValueError, match=f"model='{name}' has no patterns that could stand for its masks"):
        models.build(name, "tiny", masked=False)


# -------------------------------------------------------------------------------- Longformer: by rules


@pytest.mark.parametrize("backend", ("cpu",))
@pytest.mark.parametrize("masked", (False, True))
def test_longformer_by_rules_verifies(masked, backend):
    """Without masks beside the same model with them, and with masks that the rules state once more."""
    need(backend)
    plain = tiny("longformer")
    model = tiny("longformer") if masked else without_masks()
    pyarch.swap(model, rules=stated(backend=backend))
    stock = None if masked else plain
    proof = pyarch.verify(model, longformer.inputs(longformer.TINY, seed=0), stock=stock, timing=False)
    proof.assert_ok()
    assert {(layer.forward, layer.backward) for layer in proof.layers} == {(backend, backend)}
    assert all(layer.outputs and layer.gradients for layer in proof.layers)


@pytest.mark.parametrize("changed", ({"window": 1}, {"global_tokens": 0}))
@pytest.mark.parametrize("masked", (False, True))
def test_longformer_verify_finds_a_wrong_rule(masked, changed):
    model = tiny("longformer") if masked else without_masks()
    pyarch.swap(model, rules=stated(**changed))
    inputs = longformer.inputs(longformer.TINY, seed=0)
    stock = None if masked else tiny("longformer")
    proof = pyarch.verify(model, inputs, stock=stock, timing=False)
    assert any(problem.startswith("model: output") for problem in proof.problems)


def test_longformer_verify_compares_with_the_dense_model_unless_told():
    model = without_masks()
    pyarch.swap(model, rules=stated())
    proof = pyarch.verify(model, longformer.inputs(longformer.TINY, seed=0), timing=False)
    assert any(problem.startswith("model: output") for problem in proof.problems)


def test_longformer_verify_finds_another_stock_model():
    model = without_masks()
    pyarch.swap(model, rules=stated())
    inputs = longformer.inputs(longformer.TINY, seed=0)
    proof = pyarch.verify(model, inputs, stock=tiny("longformer", seed=1), timing=False)
    assert any(problem.startswith("model: output") for problem in proof.problems)
    with pytest.raises(TypeError, match="needs a torch.nn.Module, got dict"):
        pyarch.verify(model, inputs, stock={}, timing=False)


def test_longformer_demo_says_how_it_compares(monkeypatch):
    monkeypatch.setattr("pyarch.timing.BUDGET_SECONDS", 0.0)
    monkeypatch.setattr("pyarch.timing.FEWEST_ROUNDS", 1)
    shown = demonstrate(("longformer", "gpt"), torch.device("cpu"), "tiny")
    assert [each.by_rules for each in shown.shown] == [True, False]
    assert not any(problem.startswith("model: ") for each in shown.shown for problem in each.proof.problems)
    notes = "\n".join(shown.table().notes)
    assert "longformer: at first under explicit masks, swapped without masks" in notes
    assert "gpt: at first" not in notes


@pytest.mark.parametrize("backend", KERNELS)
def test_longformer_by_rules_trains_like_the_masked_model(backend):
    need(backend)
    for seed in SEEDS:
        stock, _ = train("longformer", tiny("longformer", seed), seed)
        model = without_masks(seed=seed)
        pyarch.swap(model, rules=stated(backend=backend))
        ours, _ = train("longformer", model, seed)
        pairs = zip(stock, ours, strict=True)
        assert max(abs(one - other) / one for one, other in pairs) <= CURVE_TOLERANCE


def test_longformer_restored_is_dense_again():
    (words,), _ = unseen("longformer")
    model = without_masks()
    dense = model(words)
    report = pyarch.swap(model, rules=stated())
    torch.testing.assert_close(model(words), tiny("longformer")(words))
    report.restore()
    assert torch.equal(model(words), dense)
    assert {type(layer.attention) for layer in model.layers} == {nn.MultiheadAttention}


# -------------------------------------------------------------------------------- Conformer


def test_conformer_block_has_every_part():
    """Without what a branch adds, each part of a block changes the output."""
    model, (inputs, _) = tiny("conformer").eval(), unseen("conformer")
    whole = model(*inputs)
    block = model.blocks[0]
    attention_out = block.attention.out_proj
    ends = [block.first_half[-1], attention_out, block.convolution.project, block.second_half[-1]]
    for end in ends:
        weight, bias = end.weight.detach().clone(), end.bias.detach().clone()
        with torch.no_grad():
            end.weight.zero_()
            end.bias.zero_()
            assert not torch.allclose(model(*inputs), whole, atol=1e-3)
            end.weight.copy_(weight)
            end.bias.copy_(bias)
    assert torch.equal(model(*inputs), whole)


def test_conformer_attention_sees_the_whole_utterance():
    """The last frame depends on the first, which no convolution reaches."""
    reach = conformer.TINY.layers * (conformer.TINY.kernel // 2)
    assert reach < conformer.TINY.frames - 1
    model, ((frames,), _) = tiny("conformer").eval(), unseen("conformer")
    frames = frames.requires_grad_()
    tensors(model(frames))[0][:, -1].sum().backward()
    assert frames.grad[:, 0].abs().min() > 0
