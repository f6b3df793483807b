"""swap on attention and transformer layers: what is re-typed, reported, watched, restored, left alone."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

import pyarch
from pyarch.nn.config import Config
from pyarch.nn.drop_in import CONFIG_ATTRIBUTE
from tests.attention_modules_cases import (
    STOCK,
    TAKES,
    E,
    H,
    L,
    N,
    S,
    Translator,
    built,
    compare,
    data,
    drawn,
    each_backend,
    each_class,
    filled,
    first_of,
    fresh_dynamo,
    operators_of,
    outcome,
    sentences,
    window_mask,
)
from tests.whole_models import layout

OPERATOR = "attention"
FORWARD = "attention_forward"
LAYERS = [
    "encoder.layers.0",
    "encoder.layers.0.self_attn",
    "encoder.layers.1",
    "encoder.layers.1.self_attn",
    "decoder",
    "decoder.self_attn",
    "decoder.multihead_attn",
    "pooling",
]


# ------------------------------------------------------------------------------------ what is swapped


@each_class
def test_attention_swap_serves_the_three_classes(stock):
    layer = built(stock)
    report = pyarch.swap(layer)
    record = report.swapped[0]
    assert (record.was, record.now) == (f"torch.nn.{stock.__name__}", f"pyarch.nn.{stock.__name__}")
    assert record.backend and type(layer) is getattr(pyarch.nn, stock.__name__)
    report.restore()
    assert type(layer) is stock


def test_attention_swap_reports_layers_and_the_attentions_inside():
    report = pyarch.swap(model := Translator())
    assert [record.name for record in report.swapped] == LAYERS and not report.skipped
    assert all(f"pyarch.nn.{record.was.removeprefix('torch.nn.')}" == record.now for record in report.swapped)
    text = str(report)
    assert "encoder.layers.0" in text and "pyarch.nn.TransformerEncoderLayer" in text
    assert [each["name"] for each in json.loads(report.to_json())["swapped"]] == LAYERS
    assert type(model.decoder.multihead_attn) is pyarch.nn.MultiheadAttention


def test_attention_swap_restores_bit_by_bit():
    model = Translator().eval()
    before, state = layout(model), copy.deepcopy(model.state_dict())
    attributes = [{name: id(value) for name, value in vars(each).items()} for each in model.modules()]
    inputs = sentences()
    results = outcome(model, *inputs)
    report = pyarch.swap(model, backend="reference")
    assert operators_of(model, *inputs) and layout(model) != before
    assert list(model.state_dict()) == list(state)
    report.restore()
    assert operators_of(model, *inputs) == [] and layout(model) == before
    assert [{n: id(v) for n, v in vars(each).items()} for each in model.modules()] == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    again = outcome(model, *inputs)
    assert all(torch.equal(again[name], results[name]) for name in results)


@each_backend
def test_attention_swap_computes_the_same(backend):
    stock = filled(Translator()).eval()
    ours = copy.deepcopy(stock)
    pyarch.swap(ours, backend=backend)
    compare(ours, stock, *sentences())
    chosen = operators_of(ours, *sentences())
    assert [name for name, _ in chosen].count(FORWARD) == 5
    assert {name for _, name in chosen} == {backend}


@each_class
def test_attention_swap_names_the_backend_that_runs(stock):
    layer = built(stock)
    record = pyarch.swap(layer).swapped[0]
    inputs = [drawn(32, E) for _ in range(TAKES[stock])]
    chosen = {backend for name, backend in operators_of(layer, *inputs) if name == FORWARD}
    assert any(name in record.backend for name in chosen)


@each_class
def test_attention_swap_in_float64_names_torch(stock):
    record = pyarch.swap(built(stock).double()).swapped[0]
    assert record.backend == "torch" and "float64" in record.reason


@each_backend
def test_attention_swap_of_a_layer_alone_serves_the_attention_inside(backend):
    """Rules may leave self_attn stock: the layer computes it with our operator all the same."""
    stock = built(nn.TransformerDecoderLayer)
    ours = copy.deepcopy(stock)
    pyarch.swap(ours, rules={"*_attn": None, "": Config(backend=backend)})
    assert type(ours.self_attn) is type(ours.multihead_attn) is nn.MultiheadAttention
    inputs = data(nn.TransformerDecoderLayer)
    assert operators_of(ours, *inputs) == [(FORWARD, backend)] * 2
    compare(ours, stock, *inputs)


def test_attention_swap_says_what_is_never_called():
    """In evaluation torch's fused layer reads the parameters of an attention that it never calls."""
    model = nn.TransformerEncoder(built(nn.TransformerEncoderLayer, batch_first=True), 1).eval()
    report = pyarch.swap(model, rules={"layers.0": None})
    assert [record.name for record in report.swapped] == ["layers.0.self_attn"]
    with report.observe(), torch.no_grad():
        model(drawn(N, L, E))
    assert report.never_called == ["layers.0.self_attn"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_attention_swap_names_no_layer_that_ran_as_never_called(training):
    """An attention inside a swapped layer runs through that layer, called as a module or not."""
    model = Translator().train(training)
    report = pyarch.swap(model)
    with report.observe(), torch.no_grad():
        model(*sentences())
    assert not report.never_called


# ------------------------------------------------------------------------------------ rules and options


@pytest.mark.parametrize("decoder", ["decoder", "decoder*"])
def test_attention_swap_rules_state_a_window(decoder):
    """A decoder layer's window is over the sequence itself; over the memory only where a rule names that."""
    stock = filled(Translator()).eval()
    ours = copy.deepcopy(stock)
    rules = {"encoder.layers.?": Config(window=(2, 1)), decoder: Config(window=(3, 0), global_tokens=1)}
    pyarch.swap(ours, rules=rules)
    source, target = sentences()
    memory = stock.encoder(source, mask=window_mask(S, S, (2, 1)))
    torch.testing.assert_close(ours.encoder(source), memory, rtol=1e-4, atol=1e-5)
    masks = {"tgt_mask": window_mask(L, L, (3, 0), 1, 1)}
    if decoder == "decoder*":
        masks["memory_mask"] = window_mask(L, S, (3, 0), 1, 1)
    expected = stock.decoder(target, memory, **masks)
    torch.testing.assert_close(ours.decoder(target, memory), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dilation, tokens", [(1, 0), (2, 0), (2, 2)])
@each_backend
def test_attention_swap_window_of_one_attention(backend, dilation, tokens):
    stock = built(nn.MultiheadAttention)
    ours = copy.deepcopy(stock)
    config = Config(backend=backend, window=(2, 1), window_dilation=dilation, global_tokens=tokens)
    report = pyarch.swap(ours, rules={"": config})
    assert ours.pyarch_config == config
    x = drawn(11, N, E)
    window = window_mask(11, 11, (2, 1), dilation, tokens)
    compare(Masked(ours), Masked(stock, attn_mask=window), x)
    report.restore()
    assert CONFIG_ATTRIBUTE not in vars(ours)
    assert torch.equal(ours(x, x, x)[0], stock(x, x, x)[0])


class Masked(nn.Module):
    """An attention of a sequence to itself, always called with the same masks."""

    def __init__(self, attention, **masks):
        super().__init__()
        self.attention, self.masks = attention, masks

    def forward(self, x):
        return self.attention(x, x, x, **self.masks)


def test_attention_swap_report_keeps_the_window():
    config = Config(window=(None, 2), window_dilation=3, global_tokens=1)
    text = pyarch.swap(nn.ModuleDict({"a": built(STOCK[0])}), rules={"a": config}).to_json()
    again = nn.ModuleDict({"a": built(STOCK[0])})
    pyarch.apply_report(again, text)
    assert again["a"].pyarch_config == config


# ------------------------------------------------------------------------------------ what a user derived


class Named(nn.MultiheadAttention):
    """Overrides nothing of the computation."""

    def __init__(self, width):
        super().__init__(width, H, batch_first=True)
        self.label = "named"

    def extra_repr(self):
        return self.label


class Weighted(nn.MultiheadAttention):
    def forward(self, query, key, value, **keywords):
        return super().forward(query, key, value, **{**keywords, "need_weights": True})


class Merged(nn.MultiheadAttention):
    def merge_masks(self, attn_mask, key_padding_mask, query):
        return None, None


class Scaled(nn.TransformerEncoderLayer):
    def _sa_block(self, *arguments, **keywords):
        return 0.5 * super()._sa_block(*arguments, **keywords)


class Wide(nn.TransformerDecoderLayer):
    def _ff_block(self, x):
        return 2 * super()._ff_block(x)


def test_attention_swap_takes_a_subclass_that_overrides_nothing():
    layer = Named(E)
    x = drawn(N, L, E)
    expected = layer(x, x, x)
    report = pyarch.swap(nn.Sequential(layer))
    assert isinstance(layer, pyarch.nn.MultiheadAttention) and isinstance(layer, Named)
    assert repr(layer).startswith("Named(") and operators_of(layer, x, x, x)
    torch.testing.assert_close(layer(x, x, x), expected)
    assert type(copy.deepcopy(layer)) is type(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=False)) is Named
    report.restore()
    assert type(layer) is Named


@pytest.mark.parametrize(
    "build, method, ours",
    [
        (lambda: Weighted(E, H), "forward", "MultiheadAttention"),
        (lambda: Merged(E, H), "merge_masks", "MultiheadAttention"),
        (lambda: Scaled(E, H), "_sa_block", "TransformerEncoderLayer"),
        (lambda: Wide(E, H), "_ff_block", "TransformerDecoderLayer"),
    ],
)
def test_attention_swap_leaves_a_subclass_that_overrides_the_computation(build, method, ours):
    layer = build()
    report = pyarch.swap(nn.ModuleList([built(nn.MultiheadAttention), layer]))
    (record,) = (each for each in report.skipped if each.name == "1")
    assert record.code == "overridden" and record.reason == f"{type(layer).__name__} overrides {method}"
    assert record.hint == f"derive from pyarch.nn.{ours} instead"


# ------------------------------------------------------------------------------------ copies and files


@each_class
def test_attention_swap_copies_stay_and_pickles_are_stock(stock):
    layer = built(stock)
    inputs = data(stock)
    expected = outcome(layer, *inputs)
    pyarch.swap(layer, rules={"*": Config(backend="reference"), "": Config(backend="reference")})
    duplicate = copy.deepcopy(layer)
    assert type(duplicate) is type(layer) and duplicate.pyarch_config == layer.pyarch_config
    text = pickle.dumps(layer)
    assert b"pyarch" not in text
    loaded = pickle.loads(text)
    assert not any(type(each).__module__.startswith("pyarch") for each in loaded.modules())
    again = outcome(loaded, *inputs)
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    fresh = built(stock)
    fresh.load_state_dict(layer.state_dict())
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in fresh.state_dict().items())
    report = pyarch.swap(loaded)
    loaded.load_state_dict(built(stock).state_dict())
    report.restore()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("place", ["in_proj_weight", "out_proj"])
@pytest.mark.parametrize("wrap", [weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm])
def test_attention_swap_takes_rewritten_weights(wrap, place):
    layer = built(nn.MultiheadAttention)
    target = layer.out_proj if place == "out_proj" else layer
    wrap(target, "weight" if place == "out_proj" else place)
    layer.eval()
    inputs, cls = data(nn.MultiheadAttention), type(layer)
    expected = layer(*inputs)
    report = pyarch.swap(layer)
    assert operators_of(layer, *inputs)
    torch.testing.assert_close(layer(*inputs), expected)
    with torch.no_grad():
        next(layer.parameters()).mul_(1.5)
    changed = layer(*inputs)[0]
    report.restore()
    assert type(layer) is cls
    torch.testing.assert_close(layer(*inputs)[0], changed)


def test_attention_swap_restores_what_was_parametrized_after_it():
    layer = built(nn.TransformerEncoderLayer)
    report = pyarch.swap(layer)
    parametrizations.weight_norm(layer.self_attn, "in_proj_weight")
    expected = layer(x := drawn(L, N, E))
    report.restore()
    assert type(layer) is nn.TransformerEncoderLayer
    assert not isinstance(layer.self_attn, pyarch.nn.MultiheadAttention)
    assert parametrize.is_parametrized(layer.self_attn)
    torch.testing.assert_close(layer(x), expected)


@each_class
def test_attention_swap_follows_functional_call(stock):
    layer = built(stock)
    ours = copy.deepcopy(layer)
    pyarch.swap(ours)
    other = {key: torch.randn_like(value) / 3 for key, value in layer.state_dict().items()}
    inputs = tuple(data(stock))
    results = [first_of(torch.func.functional_call(each, other, inputs)) for each in (ours, layer)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@each_class
def test_attention_swap_leaves_an_optimizer_at_work(stock):
    ours = built(stock)
    other = copy.deepcopy(ours)
    steps = [torch.optim.AdamW(layer.parameters(), lr=0.02) for layer in (ours, other)]
    pyarch.swap(ours)
    inputs, losses = data(stock), []
    for layer, step in zip((ours, other), steps, strict=True):
        for _ in range(4):
            step.zero_grad()
            loss = (first_of(layer(*inputs)) - 1).square().mean()
            loss.backward()
            step.step()
            losses.append(loss.detach())
    torch.testing.assert_close(losses[:4], losses[4:])
    assert losses[3] < losses[0]


@each_class
def test_attention_swap_in_a_model_of_bfloat16(stock):
    layer = built(stock).bfloat16()
    ours = copy.deepcopy(layer)
    pyarch.swap(ours)
    inputs = [each.bfloat16() for each in data(stock)]
    assert operators_of(ours, *inputs)
    compare(ours, layer, *inputs)


@pytest.mark.unpoisoned
def test_attention_swap_compiles_whole():
    fresh_dynamo()
    stock = filled(Translator()).eval()
    ours = copy.deepcopy(stock)
    pyarch.swap(ours)
    graph = torch.compile(ours, fullgraph=True, backend="aot_eager")
    source, target = sentences()
    results = []
    for model in (graph, stock):
        leaf = source.clone().requires_grad_()
        output, weights = model(leaf, target)
        results.append([output, weights, torch.autograd.grad(output.square().sum(), leaf)[0]])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_attention_swap_under_vmap_and_jacrev():
    """Copies of one attention with weights of their own, as an ensemble has them."""
    stock = built(nn.MultiheadAttention)
    ours = copy.deepcopy(stock)
    pyarch.swap(ours)
    x = drawn(4, E)
    several = {name: torch.stack([each, 2 * each]).detach() for name, each in stock.named_parameters()}
    results = []
    for layer in (ours, stock):

        def call(parameters, x, layer=layer):
            return torch.func.functional_call(layer, parameters, (x, x, x))[0]

        one = {name: each[0] for name, each in several.items()}
        mapped = torch.func.vmap(call, (0, None))(several, x)
        results.append([mapped, torch.func.jacrev(call, argnums=1)(one, x)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
