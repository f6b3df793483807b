"""MultiheadAttention and TransformerEncoderLayer over jagged nested tensors: every sequence as if alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pyarch
from tests.attention_functions import close, each_backend

OPERATOR = "attention_varlen"
LENGTHS = (5, 1, 9)


def sequences(lengths=LENGTHS, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, width, generator=generator) for length in lengths]


def jagged(tensors):
    return torch.nested.nested_tensor(tensors, layout=torch.jagged)


def attention(stock=False, **options):
    torch.manual_seed(1)
    kind = nn.MultiheadAttention if stock else pyarch.nn.MultiheadAttention
    return kind(16, 4, batch_first=True, **options)


def layer(stock=False, **options):
    torch.manual_seed(1)
    kind = nn.TransformerEncoderLayer if stock else pyarch.nn.TransformerEncoderLayer
    return kind(16, 4, 32, batch_first=True, **{"dropout": 0.0} | options)


def trained(module, results):
    """Results, joined, and the gradients of the module's parameters for fixed cotangents."""
    rows = torch.cat(list(results))
    cotangent = torch.randn(rows.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(rows, list(module.parameters()), cotangent)
    assert all(each.any() for each in gradients if each.dim() == 2)
    return rows, gradients


@each_backend
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_attention_jagged_self_attention_is_torchs_of_each_sequence(backend, training):
    mine, theirs = attention().train(training), attention(stock=True).train(training)
    x = jagged(sequences())
    with pyarch.backend(backend):
        output, weights = mine(x, x, x, need_weights=False)
        found = trained(mine, output.unbind())
    assert weights is None and torch.equal(output.offsets(), x.offsets())
    alone = (theirs(each, each, each, need_weights=False)[0] for each in sequences())
    close(found, trained(theirs, alone))


@each_backend
def test_attention_jagged_memory_of_other_lengths_and_widths(backend):
    options = dict(kdim=12, vdim=10)
    mine, theirs = attention(**options), attention(stock=True, **options)
    parts = sequences(), sequences((3, 7, 2), 12, seed=1), sequences((3, 7, 2), 10, seed=2)
    with pyarch.backend(backend):
        output = mine(*map(jagged, parts), need_weights=False)[0]
        found = trained(mine, output.unbind())
    alone = (theirs(*each, need_weights=False)[0] for each in zip(*parts, strict=True))
    close(found, trained(theirs, alone))


@each_backend
def test_attention_jagged_causal_and_windowed(backend):
    mine, theirs = attention(window=(3, None)), attention(stock=True)
    x = jagged(sequences())
    with pyarch.backend(backend):
        found = trained(mine, mine(x, x, x, need_weights=False, is_causal=True)[0].unbind())
    alone = []
    for each in sequences():
        distance = torch.arange(len(each)) - torch.arange(len(each))[:, None]
        hidden = (distance > 0) | (distance < -3)
        alone.append(theirs(each, each, each, need_weights=False, attn_mask=hidden)[0])
    close(found, trained(theirs, alone))


def test_attention_jagged_input_has_a_gradient():
    mine, parts = attention(), [each.requires_grad_() for each in sequences()]
    x = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    mine(x, x, x, need_weights=False)[0].values().square().sum().backward()
    found, theirs = [each.grad.clone() for each in parts], attention(stock=True)
    alone = [each.detach().requires_grad_() for each in parts]
    sum(theirs(each, each, each, need_weights=False)[0].square().sum() for each in alone).backward()
    close(found, [each.grad for each in alone])


@each_backend
@pytest.mark.parametrize("norm_first", [True, False], ids=["norm first", "norm last"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_attention_jagged_encoder_layer_is_torchs_of_each_sequence(backend, training, norm_first):
    mine, theirs = (layer(stock, norm_first=norm_first).train(training) for stock in (False, True))
    x = jagged(sequences())
    with pyarch.backend(backend):
        output = mine(x)
        found = trained(mine, output.unbind())
    assert torch.equal(output.offsets(), x.offsets())
    close(found, trained(theirs, (theirs(each) for each in sequences())))


def test_attention_jagged_encoder_layer_calls_hooks_of_its_attention():
    mine, called = layer(), []
    x = jagged(sequences())
    expected = mine(x)
    mine.self_attn.register_forward_hook(lambda *_: called.append(True))
    close(mine(x).values(), expected.values())
    assert called


def test_attention_jagged_through_swap():
    model = nn.Sequential(layer(stock=True), layer(stock=True))
    x = sequences()
    expected = torch.cat([model(each[None])[0] for each in x])
    pyarch.swap(model)
    close(model(jagged(x)).values(), expected)


@pytest.mark.parametrize(
    ("options", "arguments", "text"),
    [
        (dict(), dict(), "need_weights=True, needs need_weights=False"),
        (dict(), dict(need_weights=False, attn_mask=torch.ones(9, 9)), "masks, give what they hide"),
        (dict(), dict(need_weights=False, key=sequences()[0]), "must all be jagged"),
        (
            dict(),
            dict(need_weights=False, key=jagged(sequences((5, 1)))),
            "3 sequences of queries and 2 of keys",
        ),
        (
            dict(),
            dict(need_weights=False, key=jagged(sequences((5, 2, 8)))),
            "key and value must have the same",
        ),
        (dict(), dict(need_weights=False, key=jagged(sequences(width=8))), r"key must be .*, 16\), got"),
        (dict(dropout=0.1), dict(need_weights=False), "dropout 0.1 in training, needs dropout 0"),
        (dict(add_zero_attn=True), dict(need_weights=False), "add_bias_kv or add_zero_attn"),
        (dict(window=2, window_dilation=2), dict(need_weights=False), "a dilated window or global tokens"),
    ],
)
def test_attention_jagged_refusals_are_named(options, arguments, text):
    x = jagged(sequences())
    given = dict(query=x, key=x, value=x) | arguments
    with pytest.raises(NotImplementedError, match=text):
        attention(**options)(**given)


def test_attention_jagged_refuses_sequence_first():
    x = jagged(sequences())
    module = pyarch.nn.MultiheadAttention(16, 4)
    with pytest.raises(NotImplementedError, match="needs batch_first=True"):
        module(x, x, x, need_weights=False)


def test_attention_jagged_explains_itself():
    x = jagged(sequences())
    for verdicts in (attention().explain(x, x, x), layer().explain(x)):
        assert set(verdicts) == {"forward", "backward"}
        for of_pass in verdicts.values():
            assert [each.backend for each in of_pass] == ["triton", "cuda", "cpu", "torch", "reference"]
            assert any(each.accepts for each in of_pass)


def test_attention_jagged_layer_refuses_gaps_and_other_layouts():
    """As the attention inside it would, whose rows no longer know of either."""
    model = layer()
    padded = torch.randn(2, 6, 16)
    starts, lengths = torch.tensor([0, 0]), torch.tensor([3, 6])
    gaps = torch.nested.narrow(padded, 1, starts, lengths, layout=torch.jagged)
    with pytest.raises(NotImplementedError, match="gaps between its sequences"):
        model(gaps)
    turned = jagged(sequences((16, 16))).transpose(1, 2)
    with pytest.raises(NotImplementedError, match="must be .sequences, tokens of each, 16."):
        model(turned)


def test_attention_jagged_explains_no_call_that_it_refuses():
    model = layer(dropout=0.1)
    with pytest.raises(NotImplementedError, match="dropout 0.1 in training"):
        model.explain(jagged(sequences()))
