"""MultiheadAttention and transformer layers over jagged nested tensors: every sequence as if alone."""

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


def decoder(stock=False, **options):
    torch.manual_seed(1)
    kind = nn.TransformerDecoderLayer if stock else pyarch.nn.TransformerDecoderLayer
    return kind(16, 4, 32, **{"dropout": 0.0, "batch_first": True} | options)


def memories(seed=3):
    return sequences((3, 7, 2), seed=seed)


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
            "3 sequences in query and 2 in key",
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


# ------------------------------------------------------------------------------------ the decoder layer


@each_backend
@pytest.mark.parametrize("norm_first", [True, False], ids=["norm first", "norm last"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_attention_jagged_decoder_layer_is_torchs_of_each_sequence(backend, training, norm_first):
    mine, theirs = (decoder(stock, norm_first=norm_first).train(training) for stock in (False, True))
    tgt = jagged(sequences())
    with pyarch.backend(backend):
        output = mine(tgt, jagged(memories()))
        found = trained(mine, output.unbind())
    assert torch.equal(output.offsets(), tgt.offsets())
    close(found, trained(theirs, map(theirs, sequences(), memories())))


@each_backend
@pytest.mark.parametrize("to_memory", [False, True], ids=["itself", "and the memory"])
def test_attention_jagged_decoder_layer_is_causal(backend, to_memory):
    mine, theirs = decoder(), decoder(stock=True)
    with pyarch.backend(backend):
        output = mine(jagged(sequences()), jagged(memories()), tgt_is_causal=True, memory_is_causal=to_memory)
        found = trained(mine, output.unbind())
    alone = []
    for each, memory in zip(sequences(), memories(), strict=True):
        later = torch.ones(len(each), len(each), dtype=torch.bool).triu(1)
        beyond = torch.ones(len(each), len(memory), dtype=torch.bool).triu(1)
        masks = dict(tgt_mask=later, memory_mask=beyond if to_memory else None)
        alone.append(theirs(each, memory, **masks))
    close(found, trained(theirs, alone))


@each_backend
def test_attention_jagged_decoder_layer_gives_both_inputs_gradients(backend):
    def gradients(run):
        leaves = [each.requires_grad_() for each in (*sequences(), *memories())]
        rows = torch.cat(run(leaves[:3], leaves[3:]))
        return torch.autograd.grad(rows.square().sum(), leaves)

    def together(tgt, memory):
        nested = (torch.nested.as_nested_tensor(each, layout=torch.jagged) for each in (tgt, memory))
        return decoder()(*nested, tgt_is_causal=True).unbind()

    def alone(tgt, memory):
        layer = decoder(stock=True)
        later = [torch.ones(len(each), len(each), dtype=torch.bool).triu(1) for each in tgt]
        return list(map(layer, tgt, memory, later))

    with pyarch.backend(backend):
        found = gradients(together)
    expected = gradients(alone)
    assert all(each.any() for each in expected)
    close(found, expected)


def test_attention_jagged_decoder_layer_window_is_for_the_sequence_itself():
    mine, theirs = decoder(window=(2, 0)), decoder(stock=True)
    found = trained(mine, mine(jagged(sequences()), jagged(memories())).unbind())
    alone = []
    for each, memory in zip(sequences(), memories(), strict=True):
        distance = torch.arange(len(each)) - torch.arange(len(each))[:, None]
        alone.append(theirs(each, memory, tgt_mask=(distance > 0) | (distance < -2)))
    close(found, trained(theirs, alone))


@pytest.mark.parametrize("name", ["self_attn", "multihead_attn"])
def test_attention_jagged_decoder_layer_calls_hooks_of_its_attentions(name):
    mine, called = decoder(), []
    given = jagged(sequences()), jagged(memories())
    expected = mine(*given, tgt_is_causal=True)
    getattr(mine, name).register_forward_hook(lambda *_: called.append(True))
    close(mine(*given, tgt_is_causal=True).values(), expected.values())
    assert called


def test_attention_jagged_a_hook_does_not_lose_the_window_of_the_layer():
    """The attention that a hook makes the layer call does not know of a rule for the layer alone."""
    x, later = jagged(sequences()), jagged(memories())
    for model, given in ((layer(stock=True), (x,)), (decoder(stock=True), (x, later))):
        pyarch.swap(model, rules={"": pyarch.Config(window=1)})
        model(*given)
        model.self_attn.register_forward_hook(lambda *_: None)
        with pytest.raises(NotImplementedError, match="give the attention's name the window too"):
            model(*given)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_attention_jagged_whole_transformer_through_swap():
    """torch's own containers hand jagged tensors on; without masks, so the decoder is causal by its hint."""
    torch.manual_seed(1)
    model = nn.Transformer(16, 4, 2, 2, 32, 0.0, batch_first=True, norm_first=True)
    src, tgt = memories(), sequences()
    alone = []
    for source, target in zip(src, tgt, strict=True):
        later = model.generate_square_subsequent_mask(len(target))
        alone.append(model(source, target, tgt_mask=later))
    expected = trained(model, alone)
    pyarch.swap(model)
    close(trained(model, model(jagged(src), jagged(tgt), tgt_is_causal=True).unbind()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_jagged_decoder_layer_in_16_bits(dtype):
    mine, theirs = decoder().to(dtype), decoder(stock=True).to(dtype)
    parts = [[each.to(dtype) for each in some] for some in (sequences(), memories())]
    found = mine(*map(jagged, parts)).values()
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.cat(list(map(theirs, *parts))), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("options", "arguments", "text"),
    [
        ({}, dict(memory=torch.randn(3, 7, 16)), "tgt and memory must all be jagged"),
        ({}, dict(tgt=torch.randn(3, 7, 16)), "tgt and memory must all be jagged"),
        ({}, dict(memory=jagged(sequences((3, 7)))), "3 sequences in tgt and 2 in memory"),
        ({}, dict(memory=jagged(sequences(width=8))), r"memory must be .*, 16\), got"),
        ({}, dict(tgt=jagged(sequences(width=8))), r"tgt must be .*, 16\), got"),
        ({}, dict(tgt_mask=torch.ones(9, 9)), "masks, give what they hide by tgt_is_causal"),
        ({}, dict(tgt_key_padding_mask=torch.ones(3, 9)), "masks, give what they hide by tgt_is_causal"),
        ({}, dict(memory_mask=torch.ones(9, 7)), "give what they hide by memory_is_causal"),
        (
            {},
            dict(memory_key_padding_mask=torch.ones(3, 7)),
            "give what they hide by memory_is_causal",
        ),
        (dict(dropout=0.1), {}, "dropout 0.1 in training, needs dropout 0"),
        (dict(batch_first=False), {}, "needs batch_first=True"),
        (dict(window=2, window_dilation=2), {}, "a dilated window or global tokens"),
    ],
)
def test_attention_jagged_decoder_layer_refusals_are_named(options, arguments, text):
    given = dict(tgt=jagged(sequences()), memory=jagged(memories())) | arguments
    with pytest.raises(NotImplementedError, match=f"over jagged nested tensors: .*{text}"):
        decoder(**options)(**given)


def test_attention_jagged_decoder_layer_names_all_that_it_refuses():
    model = decoder(dropout=0.1)
    with pytest.raises(NotImplementedError) as refused:
        model(jagged(sequences()), jagged(sequences((3, 7))), memory_mask=torch.ones(9, 7))
    assert str(refused.value) == (
        "attention over jagged nested tensors: 3 sequences in tgt and 2 in memory; masks, give what they "
        "hide by memory_is_causal or a window, or pad the tensors; dropout 0.1 in training, needs dropout 0"
    )


def test_attention_jagged_decoder_layer_leaves_strided_nested_tensors_to_torch():
    def strided(tensors):
        return torch.nested.nested_tensor(tensors)

    texts = []
    for each in (decoder(), decoder(stock=True)):
        with pytest.raises(AssertionError) as refused:
            each(strided(sequences()), strided(memories()))
        texts.append(str(refused.value))
    assert texts[0] == texts[1] and "does not support NestedTensor" in texts[0]


# ------------------------------------------------------------------------------------ explain


def test_attention_jagged_explains_itself():
    x = jagged(sequences())
    for verdicts in (attention().explain(x, x, x), layer().explain(x)):
        assert set(verdicts) == {"forward", "backward"}
        for of_pass in verdicts.values():
            assert [each.backend for each in of_pass] == ["triton", "cuda", "cpu", "torch", "reference"]
            assert any(each.accepts for each in of_pass)


def test_attention_jagged_explains_memory_of_other_lengths_and_widths():
    module = attention(kdim=12, vdim=10)
    parts = sequences(), sequences((3, 7, 2), 12), sequences((3, 7, 2), 10)
    assert set(module.explain(*map(jagged, parts))) == {"forward", "backward"}
    verdicts = decoder().explain(jagged(sequences()), jagged(memories()), tgt_is_causal=True)
    assert list(verdicts) == ["forward", "backward", "forward, memory", "backward, memory"]
    assert all(any(each.accepts for each in of_pass) for of_pass in verdicts.values())
    with pytest.raises(NotImplementedError, match="3 sequences in tgt and 2 in memory"):
        decoder().explain(jagged(sequences()), jagged(sequences((3, 7))))


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


def test_attention_jagged_layers_explain_in_the_words_of_the_call():
    x, memory, mask = jagged(sequences()), jagged(memories()), torch.zeros(9, 9)
    hooked = nn.Sequential(layer(stock=True))
    pyarch.swap(hooked, rules={"0": pyarch.Config(window=2)})
    hooked[0].self_attn.register_forward_hook(lambda *call: None)
    calls = [
        (layer(), (x, mask)),
        (hooked[0], (x,)),
        (decoder(), (x, memory, mask)),
        (decoder(), (x, memory, None, mask)),
    ]
    for model, given in calls:
        with pytest.raises(NotImplementedError) as of_call:
            model(*given)
        with pytest.raises(NotImplementedError) as of_explain:
            model.explain(*given)
        assert str(of_call.value) == str(of_explain.value)
