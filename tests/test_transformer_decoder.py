"""pyarch.nn.TransformerDecoderLayer computes what torch's does, alone and inside torch's own containers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyarch
from tests.attention_modules_cases import (
    E,
    H,
    L,
    N,
    S,
    as_infinities,
    causal,
    compare,
    drawn,
    each_backend,
    filled,
    hidden,
    learned,
    operators_of,
    outcome,
    said,
    strides,
    warned,
    window_mask,
)

OPERATOR = "attention"
FORWARD = "attention_forward"
INNER = 24

SETTINGS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "norm first": {"norm_first": True},
    "norm first, batch first": {"norm_first": True, "batch_first": True},
    "gelu by name": {"activation": "gelu"},
    "a module as activation": {"activation": nn.SiLU(), "batch_first": True},
    "a function as activation": {"activation": F.elu},
    "no bias": {"bias": False, "batch_first": True},
    "one head": {"nhead": 1},
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
each_norm = pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])


def layers(**settings):
    """Our layer and torch's with the same numbers, without dropout unless the settings have some."""
    settings = {"d_model": E, "nhead": H, "dim_feedforward": INNER, "dropout": 0.0, **settings}
    stock = filled(nn.TransformerDecoderLayer(**settings))
    ours = pyarch.nn.TransformerDecoderLayer(**settings)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def sequences(layer):
    """A sequence of L and a memory of S."""
    first = layer.self_attn.batch_first
    return tuple(drawn(*((N, length) if first else (length, N)), E) for length in (L, S))


def masks():
    return {
        "none": {},
        "both masks": {"tgt_mask": hidden(L, L), "memory_mask": hidden(L, S)},
        "numbers": {"tgt_mask": learned(L, L), "memory_mask": learned(L, S)},
        "each head": {"tgt_mask": hidden(N * H, L, L), "memory_mask": learned(N * H, L, S)},
        "causal": {"tgt_mask": causal(L), "tgt_is_causal": True},
        "causal numbers": {"tgt_mask": as_infinities(causal(L)), "tgt_is_causal": True},
        "causal to the memory": {"memory_mask": causal(L, S), "memory_is_causal": True},
        "padding": {"tgt_key_padding_mask": hidden(N, L), "memory_key_padding_mask": hidden(N, S)},
        "all": {
            "tgt_mask": causal(L),
            "memory_mask": hidden(L, S),
            "tgt_key_padding_mask": hidden(N, L),
            "memory_key_padding_mask": hidden(N, S),
            "tgt_is_causal": True,
        },
    }


# ------------------------------------------------------------------------------------ the layer


@each_backend
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@each_setting
def test_transformer_decoder_layer_settings(backend, settings, training):
    ours, stock = (layer.train(training) for layer in layers(**settings))
    with pyarch.backend(backend):
        assert [name for name, _ in operators_of(ours, *sequences(ours))] == [FORWARD] * 2
        compare(ours, stock, *sequences(ours))


@each_backend
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", masks())
def test_transformer_decoder_layer_masks(backend, kind, training):
    for settings in ({"batch_first": True}, {"norm_first": True}):
        ours, stock = (layer.train(training) for layer in layers(**settings))
        with pyarch.backend(backend):
            compare(ours, stock, *sequences(ours), **masks()[kind])


@each_backend
@each_norm
@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer_decoder_layer_evaluates_without_gradients(backend, batch_first, norm_first):
    ours, stock = (layer.eval() for layer in layers(batch_first=batch_first, norm_first=norm_first))
    inputs, keywords = sequences(ours), masks()["all"]
    before = [each.clone() for each in inputs]
    with torch.no_grad(), pyarch.backend(backend):
        mine, theirs = ours(*inputs, **keywords), stock(*inputs, **keywords)
    assert strides(mine) == strides(theirs)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, inputs, before)), "an input was overwritten"


@each_backend
@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer_decoder_layer_without_a_batch(backend, batch_first):
    ours, stock = layers(batch_first=batch_first)
    masked = {
        "tgt_mask": hidden(H, L, L),
        "memory_mask": hidden(L, S),
        "tgt_key_padding_mask": hidden(L),
        "memory_key_padding_mask": hidden(S),
    }
    with pyarch.backend(backend):
        for keywords in ({}, masked):
            compare(ours, stock, drawn(L, E), drawn(S, E), **keywords)


@each_backend
@each_norm
def test_transformer_decoder_layer_in_bfloat16(backend, norm_first):
    # Not relu: what 16 bits round to the other side of zero passes or stops a gradient.
    settings = {"norm_first": norm_first, "activation": "gelu"}
    ours, stock = (layer.to(torch.bfloat16) for layer in layers(**settings))
    with pyarch.backend(backend):
        inputs = [each.bfloat16() for each in sequences(ours)]
        compare(ours, stock, *inputs, tgt_mask=causal(L), tgt_is_causal=True)


@each_norm
def test_transformer_decoder_layer_drops_what_torch_drops_elsewhere(norm_first):
    results, states = [], []
    for layer in layers(dropout=0.4, norm_first=norm_first):
        layer.self_attn.dropout = layer.multihead_attn.dropout = 0.0
        torch.manual_seed(3)
        results.append(outcome(layer, *sequences(layer)))
        states.append(torch.get_rng_state())
    assert torch.equal(*states), "another count of random numbers was drawn"
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@each_backend
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_transformer_decoder_layer_rows_that_see_nothing_stay_finite(backend, training):
    """A memory that is all padding gives the bias of out_proj, and its keys no gradient."""
    ours, stock = (layer.train(training) for layer in layers())
    tgt, memory = sequences(ours)
    ends = torch.zeros(N, S, dtype=torch.bool)
    ends[1] = True
    memory.requires_grad_()
    with pyarch.backend(backend):
        output = ours(tgt, memory, memory_key_padding_mask=ends)
        output.square().sum().backward()
    assert output.isfinite().all() and memory.grad[:, 0].any() and not memory.grad[:, 1].any()
    torch.testing.assert_close(output[:, :1], stock(tgt[:, :1], memory[:, :1]), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------ refusals

TGT, MEMORY = torch.zeros(L, N, E), torch.zeros(S, N, E)
CALLS = {
    "too wide": ((torch.zeros(L, N, E + 1), MEMORY), {}),
    "memory too wide": ((TGT, torch.zeros(S, N, E + 1)), {}),
    "batch of the memory": ((TGT, torch.zeros(S, N + 1, E)), {}),
    "2-D memory": ((TGT, torch.zeros(S, E)), {}),
    "mask too wide": ((TGT, MEMORY), {"tgt_mask": torch.zeros(L, L + 1)}),
    "memory mask transposed": ((TGT, MEMORY), {"memory_mask": torch.zeros(S, L)}),
    "mask of integers": ((TGT, MEMORY), {"memory_mask": torch.zeros(L, S, dtype=torch.long)}),
    "padding of integers": ((TGT, MEMORY), {"tgt_key_padding_mask": torch.zeros(N, L, dtype=torch.int)}),
    "memory padding too long": ((TGT, MEMORY), {"memory_key_padding_mask": torch.zeros(N, S + 1) > 0}),
    "causal without a mask": ((TGT, MEMORY), {"tgt_is_causal": True}),
    "memory causal without a mask": ((TGT, MEMORY), {"memory_is_causal": True}),
    "float64": ((TGT.double(), MEMORY.double()), {}),
    "float64 memory": ((TGT, MEMORY.double()), {}),
    "None": ((TGT, None), {}),
    "no memory": ((TGT,), {}),
    "unknown": ((TGT, MEMORY), {"mask": None}),
}


@each_norm
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CALLS)
def test_transformer_decoder_layer_refuses_as_torch(case, training, norm_first):
    inputs, keywords = CALLS[case]
    mine, theirs = (
        said(lambda layer=layer: layer.train(training)(*inputs, **keywords))
        for layer in layers(norm_first=norm_first)
    )
    assert mine == theirs and theirs[0] != "no error"


@pytest.mark.parametrize("settings", [{"activation": "tanh"}, {"nhead": 3}, {"depth": 1}, {"dropout": 2.0}])
def test_transformer_decoder_layer_is_refused_as_torchs(settings):
    arguments = {"d_model": E, "nhead": H, **settings}
    mine, theirs = (
        said(lambda cls=cls: cls(**arguments))
        for cls in (pyarch.nn.TransformerDecoderLayer, nn.TransformerDecoderLayer)
    )
    assert mine == theirs and theirs[0] != "no error"


def test_transformer_decoder_layer_warns_of_masks_of_two_kinds_as_torch():
    ours, stock = layers()
    keywords = {
        "tgt_mask": torch.randn(L, L),
        "tgt_key_padding_mask": hidden(N, L),
        "memory_mask": hidden(L, S),
        "memory_key_padding_mask": torch.randn(N, S),
    }
    texts = [warned(lambda layer=layer: layer(TGT, MEMORY, **keywords)) for layer in (ours, stock)]
    assert texts[0] == texts[1] and len(texts[1]) == 2
    compare(ours, stock, *sequences(ours), **keywords)


# ------------------------------------------------------------------------------------ attention by itself


@pytest.mark.parametrize("name", ["self_attn", "multihead_attn"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_transformer_decoder_layer_hooks_of_its_attentions_run(name, training):
    seen, results = [], []
    for layer in layers():
        torch.manual_seed(1)
        attention = getattr(layer.train(training), name)
        attention.register_forward_pre_hook(lambda module, given: seen.append(len(given)))
        attention.register_forward_hook(lambda module, given, got: (2 * got[0], got[1]))
        results.append(outcome(layer, *sequences(layer)))
    assert seen == [3, 3]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_transformer_decoder_layer_calls_an_attention_of_the_users():
    class Doubled(nn.MultiheadAttention):
        def forward(self, *arguments, **keywords):
            output, weights = super().forward(*arguments, **keywords)
            return 2 * output, weights

    results = []
    for layer in layers():
        torch.manual_seed(1)
        state = layer.multihead_attn.state_dict()
        layer.multihead_attn = Doubled(E, H)
        layer.multihead_attn.load_state_dict(state)
        results.append(outcome(layer, *sequences(layer)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------ in torch's containers


@each_backend
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", masks())
def test_transformer_decoder_around_our_layers(backend, kind, training):
    stock = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, INNER, 0.0), 2, nn.LayerNorm(E))
    ours = copy.deepcopy(filled(stock))
    pyarch.swap(ours)
    keywords = {n: each for n, each in masks()[kind].items() if n != "tgt_is_causal"}
    with pyarch.backend(backend):
        compare(ours.train(training), stock.train(training), drawn(L, N, E), drawn(S, N, E), **keywords)


def transformers(**settings):
    """torch's Transformer and a swapped copy of it."""
    stock = nn.Transformer(E, H, 2, 2, INNER, **{"dropout": 0.0, **settings})
    ours = copy.deepcopy(filled(stock))
    report = pyarch.swap(ours)
    classes = {type(each).__name__ for each in ours.modules() if type(each).__module__.startswith("pyarch")}
    assert classes >= {"TransformerEncoderLayer", "TransformerDecoderLayer"} and report.swapped
    return ours, stock


def transformer_masks():
    ends = torch.zeros(N, S, dtype=torch.bool)
    ends[1, -4:] = True
    square = nn.Transformer.generate_square_subsequent_mask
    return {
        "none": {},
        "causal": {"tgt_mask": square(L), "tgt_is_causal": True},
        "causal, found out": {"tgt_mask": square(L), "src_mask": square(S)},
        "padding": {"src_key_padding_mask": ends, "memory_key_padding_mask": ends},
        "all": {
            "src_mask": hidden(S, S),
            "tgt_mask": causal(L),
            "memory_mask": hidden(L, S),
            "src_key_padding_mask": ends,
            "tgt_key_padding_mask": hidden(N, L),
            "memory_key_padding_mask": ends,
        },
    }


@each_backend
@pytest.mark.parametrize("settings", [{}, {"batch_first": True, "norm_first": True, "activation": "gelu"}])
@pytest.mark.parametrize("kind", transformer_masks())
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_transformer_with_swapped_layers(backend, kind, settings):
    ours, stock = transformers(**settings)
    shape = (N, S, E) if settings else (S, N, E)
    src, tgt = drawn(*shape), drawn(*((N, L, E) if settings else (L, N, E)))
    with pyarch.backend(backend):
        compare(ours, stock, src, tgt, **transformer_masks()[kind])


@each_backend
@pytest.mark.parametrize("kind", transformer_masks())
def test_transformer_with_swapped_layers_evaluates(backend, kind):
    """Its encoder makes a nested tensor of padded sequences."""
    ours, stock = (each.eval() for each in transformers(batch_first=True))
    src, tgt, keywords = drawn(N, S, E), drawn(N, L, E), transformer_masks()[kind]
    with torch.no_grad(), pyarch.backend(backend):
        results = [each(src, tgt, **keywords) for each in (ours, stock)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=2e-5)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_transformer_is_built_of_our_layers():
    """As custom encoder and decoder, the documented way to another layer."""
    encoder = nn.TransformerEncoder(pyarch.nn.TransformerEncoderLayer(E, H, INNER, 0.0), 2, nn.LayerNorm(E))
    decoder = nn.TransformerDecoder(pyarch.nn.TransformerDecoderLayer(E, H, INNER, 0.0), 2, nn.LayerNorm(E))
    ours = nn.Transformer(E, H, custom_encoder=encoder, custom_decoder=decoder)
    stock = nn.Transformer(E, H, 2, 2, INNER, 0.0)
    stock.load_state_dict(filled(ours).state_dict())
    compare(ours, stock, drawn(S, N, E), drawn(L, N, E), tgt_mask=causal(L))


# ------------------------------------------------------------------------------------ windows


@each_backend
@pytest.mark.parametrize(
    "options", [dict(window=(2, 1)), dict(window=(1, 0), window_dilation=2, global_tokens=1)]
)
def test_transformer_decoder_layer_windows_are_masks_of_the_sequence_to_itself(backend, options):
    stock = filled(nn.TransformerDecoderLayer(E, H, INNER, 0.0))
    ours = pyarch.nn.TransformerDecoderLayer(E, H, INNER, 0.0, **options)
    ours.load_state_dict(stock.state_dict())
    window = window_mask(
        L, L, options["window"], options.get("window_dilation", 1), options.get("global_tokens", 0)
    )
    with pyarch.backend(backend):
        compare(Masked(ours), Masked(stock, tgt_mask=window), *sequences(ours))


class Masked(nn.Module):
    """A layer that is always called with the same masks."""

    def __init__(self, layer, **masks):
        super().__init__()
        self.layer, self.masks = layer, masks

    def forward(self, *inputs):
        return self.layer(*inputs, **self.masks)
