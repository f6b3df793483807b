"""pyarch.nn.TransformerEncoderLayer computes what torch's does, alone and inside torch's own containers."""

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
    as_infinities,
    causal,
    compare,
    drawn,
    each_backend,
    filled,
    hidden,
    largest,
    learned,
    operators_of,
    outcome,
    said,
    strides,
    warned,
    widened,
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
    "gelu by name": {"activation": "gelu", "batch_first": True},
    "gelu": {"activation": F.gelu},
    "a module as activation": {"activation": nn.SiLU(), "batch_first": True},
    "a function as activation": {"activation": torch.tanh},
    "no bias": {"bias": False, "batch_first": True},
    "no bias, norm first": {"bias": False, "norm_first": True},
    "eps": {"layer_norm_eps": 0.1},
    "one head": {"nhead": 1, "batch_first": True},
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
each_norm = pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])


def layers(**settings):
    """Our layer and torch's with the same numbers, without dropout unless the settings have some."""
    settings = {"d_model": E, "nhead": H, "dim_feedforward": INNER, "dropout": 0.0, **settings}
    stock = filled(nn.TransformerEncoderLayer(**settings))
    ours = pyarch.nn.TransformerEncoderLayer(**settings)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def sequence(layer, batch=N, length=L):
    return drawn(*((batch, length) if layer.self_attn.batch_first else (length, batch)), E)


def masks():
    ends = torch.zeros(N, L, dtype=torch.bool)
    ends[1, -3:] = True
    return {
        "none": {},
        "bool": {"src_mask": hidden(L, L)},
        "float": {"src_mask": learned(L, L)},
        "each head": {"src_mask": hidden(N * H, L, L)},
        "causal": {"src_mask": causal(L), "is_causal": True},
        "causal numbers": {"src_mask": as_infinities(causal(L)), "is_causal": True},
        "padding": {"src_key_padding_mask": ends},
        "float padding": {"src_key_padding_mask": learned(N, L)},
        "both": {"src_mask": hidden(L, L), "src_key_padding_mask": ends},
        "causal and padding": {"src_mask": causal(L), "src_key_padding_mask": ends, "is_causal": True},
    }


def assert_near(ours, stock, truth):
    """Shapes and strides of torch; as near to float64 as float32 comes through two norms."""
    assert ours.shape == stock.shape and ours.dtype == stock.dtype and strides(ours) == strides(stock)
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=8e-6 * largest(truth))
    torch.testing.assert_close(stock.double(), truth, rtol=0, atol=8e-6 * largest(truth))


def step_by_step(stock, x, **keywords):
    """torch's layer in float64, not fused."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        wide = {name: widened(each) for name, each in keywords.items()}
        return copy.deepcopy(stock).double()(x.double(), **wide)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


# ------------------------------------------------------------------------------------ the layer


@each_backend
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@each_setting
def test_transformer_encoder_layer_settings(backend, settings, training):
    ours, stock = (layer.train(training) for layer in layers(**settings))
    ends = torch.zeros(N, L, dtype=torch.bool)
    ends[0, -2:] = True
    with pyarch.backend(backend):
        assert FORWARD in {name for name, _ in operators_of(ours, sequence(ours))}
        compare(ours, stock, sequence(ours))
        heads = settings.get("nhead", H)
        both = {"src_mask": hidden(N * heads, L, L), "src_key_padding_mask": ends}
        compare(ours, stock, sequence(ours), **both)


@each_backend
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", masks())
def test_transformer_encoder_layer_masks(backend, kind, training):
    for settings in ({"batch_first": True}, {"norm_first": True}):
        ours, stock = (layer.train(training) for layer in layers(**settings))
        with pyarch.backend(backend):
            compare(ours, stock, sequence(ours), **masks()[kind])


@each_backend
@pytest.mark.parametrize("kind", masks())
@each_norm
def test_transformer_encoder_layer_where_torch_fuses_it(backend, kind, norm_first):
    """Evaluation without gradients: torch's fused operator reads raw parameters; ours runs attention here."""
    ours, stock = (layer.eval() for layer in layers(batch_first=True, norm_first=norm_first))
    x, keywords = sequence(ours), masks()[kind]
    before = x.clone()
    with torch.no_grad(), pyarch.backend(backend):
        assert FORWARD in {name for name, _ in operators_of(ours, x, **keywords)}
        exact, theirs = step_by_step(stock, x, **keywords), stock(x, **keywords)
        if kind in ("float", "float padding"):
            # torch's fused operator takes numbers for flags: any but zero hides, and here nothing is left.
            assert theirs.isnan().all()
            theirs = exact.float()
        assert_near(ours(x, **keywords), theirs, exact)
        assert torch.equal(x, before), "the input was overwritten"


@each_backend
@pytest.mark.parametrize("kind", ["none", "mask", "mask of each head", "padding", "both"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer_encoder_layer_without_a_batch(backend, kind, batch_first):
    ours, stock = layers(batch_first=batch_first)
    keywords = {
        "none": {},
        "mask": {"src_mask": hidden(L, L)},
        "mask of each head": {"src_mask": hidden(H, L, L)},
        "padding": {"src_key_padding_mask": hidden(L)},
        "both": {"src_mask": torch.randn(L, L), "src_key_padding_mask": torch.randn(L)},
    }[kind]
    with pyarch.backend(backend):
        compare(ours, stock, drawn(L, E), **keywords)
        with torch.no_grad():
            x = drawn(L, E)
            results = [layer.eval()(x, **keywords) for layer in (ours, stock)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@each_backend
@each_norm
def test_transformer_encoder_layer_in_bfloat16(backend, norm_first):
    # Not relu: what 16 bits round to the other side of zero passes or stops a gradient.
    settings = {"norm_first": norm_first, "batch_first": True, "activation": "gelu"}
    ours, stock = (layer.to(torch.bfloat16) for layer in layers(**settings))
    with pyarch.backend(backend):
        compare(ours, stock, sequence(ours).bfloat16(), src_mask=causal(L), is_causal=True)


@each_norm
def test_transformer_encoder_layer_drops_what_torch_drops_elsewhere(norm_first):
    """Without dropout of attention, whose stream is ours, the layer draws torch's random numbers."""
    results, states = [], []
    for layer in layers(dropout=0.4, norm_first=norm_first):
        layer.self_attn.dropout = 0.0
        torch.manual_seed(3)
        x = drawn(L, N, E)
        results.append(outcome(layer, x))
        states.append(torch.get_rng_state())
    assert torch.equal(*states), "another count of random numbers was drawn"
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@each_backend
def test_transformer_encoder_layer_dropout_follows_the_seed(backend):
    ours, _ = layers(dropout=0.4)
    x, results = sequence(ours), []
    with pyarch.backend(backend):
        for _ in range(2):
            torch.manual_seed(3)
            results.append(outcome(ours, x))
        assert not torch.equal(ours(x), results[0]["output"])
        assert torch.equal(ours.eval()(x), ours(x))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@each_backend
def test_transformer_encoder_layer_rows_that_see_nothing_stay_finite(backend):
    """torch gives NaN for them, or zeros, by its path; ours goes on without attention there."""
    for training in (True, False):
        ours, stock = (layer.train(training) for layer in layers(batch_first=True))
        ends = torch.zeros(N, L, dtype=torch.bool)
        ends[1] = True
        x = sequence(ours)
        with pyarch.backend(backend), torch.set_grad_enabled(training):
            output = ours(x, src_key_padding_mask=ends)
        blind = ours.norm1(x[1] + ours.self_attn.out_proj.bias)
        torch.testing.assert_close(output[1], ours.norm2(blind + ours._ff_block(blind)))
        torch.testing.assert_close(output[:1], stock(x[:1]), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------ refusals

CALLS = {
    "too wide": ((torch.zeros(N, L, E + 1),), {}),
    "4-D": ((torch.zeros(1, N, L, E),), {}),
    "mask too wide": ((torch.zeros(N, L, E),), {"src_mask": torch.zeros(L, L + 1, dtype=torch.bool)}),
    "mask (1, L, L)": ((torch.zeros(N, L, E),), {"src_mask": torch.zeros(1, L, L)}),
    "mask of integers": ((torch.zeros(N, L, E),), {"src_mask": torch.zeros(L, L, dtype=torch.long)}),
    "padding of integers": (
        (torch.zeros(N, L, E),),
        {"src_key_padding_mask": torch.zeros(N, L, dtype=torch.uint8)},
    ),
    "padding too long": ((torch.zeros(N, L, E),), {"src_key_padding_mask": torch.zeros(N, L + 1) > 0}),
    "causal without a mask": ((torch.zeros(N, L, E),), {"is_causal": True}),
    "float64": ((torch.zeros(N, L, E, dtype=torch.float64),), {}),
    "integers": ((torch.zeros(N, L, E, dtype=torch.long),), {}),
    "None": ((None,), {}),
    "nothing": ((), {}),
    "unknown": ((torch.zeros(N, L, E),), {"mask": None}),
}


@each_norm
@pytest.mark.parametrize("case", CALLS)
def test_transformer_encoder_layer_refuses_as_torch(case, norm_first):
    """In its words; in evaluation without gradients torch's fused operator has words of its own."""
    inputs, keywords = CALLS[case]
    pair = layers(batch_first=True, norm_first=norm_first)
    mine, theirs = (said(lambda layer=layer: layer(*inputs, **keywords)) for layer in pair)
    assert mine == theirs and theirs[0] != "no error"
    with torch.no_grad():
        mine, theirs = (said(lambda layer=layer: layer.eval()(*inputs, **keywords)) for layer in pair)
    assert (mine[0] == "no error") == (theirs[0] == "no error"), (mine, theirs)


@pytest.mark.parametrize(
    "settings", [{"activation": "tanh"}, {"nhead": 3}, {"nhead": 0}, {"depth": 1}, {"dropout": 2.0}]
)
def test_transformer_encoder_layer_is_built_or_refused_as_torchs(settings):
    arguments = {"d_model": E, "nhead": H, **settings}
    mine, theirs = (
        said(lambda cls=cls: cls(**arguments))
        for cls in (pyarch.nn.TransformerEncoderLayer, nn.TransformerEncoderLayer)
    )
    assert mine == theirs and theirs[0] != "no error"


def test_transformer_encoder_layer_warns_of_masks_of_two_kinds_as_torch():
    ours, stock = layers(batch_first=True)
    keywords = {"src_mask": torch.randn(L, L), "src_key_padding_mask": hidden(N, L)}
    texts = [warned(lambda layer=layer: layer(drawn(N, L, E), **keywords)) for layer in (ours, stock)]
    assert texts[0] == texts[1] and len(texts[1]) == 1
    compare(ours, stock, drawn(N, L, E), **keywords)


# ------------------------------------------------------------------------------------ attention by itself


def test_transformer_encoder_layer_hooks_of_its_attention_run():
    """Once a call, in training and in evaluation, and what a hook returns counts."""
    seen, results = [], []
    for layer in layers(batch_first=True):
        x = torch.linspace(-1, 1, N * L * E).view(N, L, E)
        layer.self_attn.register_forward_pre_hook(lambda module, given: seen.append(len(given)))
        layer.self_attn.register_forward_hook(lambda module, given, got: (2 * got[0], got[1]))
        results.append([layer(x)])
        with torch.no_grad():
            results[-1].append(layer.eval()(x))
    assert seen == [3, 3] * 2
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_transformer_encoder_layer_hooks_of_all_modules_run():
    seen, x = [], drawn(N, L, E)
    for layer in layers(batch_first=True):
        with (
            torch.no_grad(),
            torch.nn.modules.module.register_module_forward_hook(
                lambda module, given, got: seen.append(type(module).__name__)
            ),
        ):
            layer.train()(x)
    half = len(seen) // 2
    assert seen[:half] == seen[half:] and "MultiheadAttention" in seen


def test_transformer_encoder_layer_calls_an_attention_of_the_users():
    class Doubled(nn.MultiheadAttention):
        def forward(self, *arguments, **keywords):
            output, weights = super().forward(*arguments, **keywords)
            return 2 * output, weights

    results, x = [], drawn(L, N, E)
    for layer in layers():
        state = layer.self_attn.state_dict()
        layer.self_attn = Doubled(E, H)
        layer.self_attn.load_state_dict(state)
        results.append(outcome(layer, x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------ in torch's containers


def encoders(depth=2, norm=True, **settings):
    """torch's TransformerEncoder of torch's layers, and a copy of it with the layers swapped."""
    settings = {
        "d_model": E,
        "nhead": H,
        "dim_feedforward": INNER,
        "dropout": 0.0,
        "batch_first": True,
    } | settings
    layer = nn.TransformerEncoderLayer(**settings)
    stock = nn.TransformerEncoder(layer, depth, nn.LayerNorm(E) if norm else None)
    filled(stock)
    ours = copy.deepcopy(stock)
    pyarch.swap(ours)
    assert all(isinstance(each, pyarch.nn.TransformerEncoderLayer) for each in ours.layers)
    return ours, stock


def encoder_masks():
    ends = torch.zeros(N, L, dtype=torch.bool)
    ends[1, -3:] = True
    return {
        "none": {},
        "mask": {"mask": hidden(L, L)},
        "causal": {"mask": nn.Transformer.generate_square_subsequent_mask(L)},
        "causal, said": {"mask": causal(L), "is_causal": True},
        "padding": {"src_key_padding_mask": ends},
        "padding in between": {"src_key_padding_mask": hidden(N, L)},
        "both": {"mask": causal(L), "src_key_padding_mask": ends},
    }


@each_backend
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", encoder_masks())
def test_transformer_encoder_trains_around_our_layers(backend, kind, training):
    ours, stock = (each.train(training) for each in encoders())
    with pyarch.backend(backend):
        compare(ours, stock, drawn(N, L, E), **encoder_masks()[kind])


@each_backend
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "padded"])
@pytest.mark.parametrize("kind", encoder_masks())
def test_transformer_encoder_evaluates_around_our_layers(backend, kind, nested):
    """Padding at the end becomes a nested tensor between the layers, and zeros in the output."""
    ours, stock = (each.eval() for each in encoders(norm=False))
    x, keywords = drawn(N, L, E), encoder_masks()[kind]
    for each in (ours, stock):
        each.use_nested_tensor = nested
    exact = copy.deepcopy(stock).double()
    with torch.no_grad(), pyarch.backend(backend):
        assert FORWARD in {name for name, _ in operators_of(ours, x, **keywords)}
        mine, theirs = ours(x, **keywords), stock(x, **keywords)
        wide = {name: widened(each) for name, each in keywords.items()}
        assert_near(mine, theirs, exact(x.double(), **wide))
    if kind == "padding":
        assert (not mine[1, -3:].any()) == nested == (not theirs[1, -3:].any())


@each_backend
@pytest.mark.parametrize("lengths", [(7, 4), (1, 1), (7, 7), (2, 5)])
@each_norm
def test_transformer_encoder_layer_of_a_nested_tensor(backend, lengths, norm_first):
    ours, stock = (layer.eval() for layer in layers(batch_first=True, norm_first=norm_first))
    rows = [drawn(length, E) for length in lengths]
    with torch.no_grad(), pyarch.backend(backend):
        nested = torch.nested.nested_tensor(rows)
        mine, theirs = ours(nested), stock(nested)
        assert mine.is_nested
        for got, wanted, each in zip(mine.unbind(), theirs.unbind(), rows, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(got, ours(each[None])[0], rtol=1e-4, atol=1e-5)


def test_transformer_encoder_layer_refuses_a_nested_tensor_as_torch():
    ours, stock = layers(batch_first=True)
    nested = torch.nested.nested_tensor([drawn(3, E), drawn(5, E)])
    mine, theirs = (said(lambda layer=layer: layer(nested)) for layer in (ours, stock))
    assert mine == theirs and theirs[0] == "AssertionError"


def test_transformer_encoder_is_built_of_our_layers():
    """Copies of one layer of ours; the container sees torch's class in it and warns of nothing new."""
    layer = pyarch.nn.TransformerEncoderLayer(E, H, INNER, 0.0, batch_first=True)
    assert warned(lambda: nn.TransformerEncoder(layer, 2)) == []
    encoder = nn.TransformerEncoder(layer, 2)
    stock = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, INNER, 0.0, batch_first=True), 2)
    stock.load_state_dict(encoder.state_dict())
    assert all(type(each) is pyarch.nn.TransformerEncoderLayer for each in encoder.layers)
    compare(encoder, stock, drawn(N, L, E))


# ------------------------------------------------------------------------------------ windows

WINDOWS = {
    "both sides": dict(window=(2, 1)),
    "behind, dilated": dict(window=(2, 0), window_dilation=2),
    "global tokens": dict(window=1, global_tokens=1),
}


def explicit(window, window_dilation=1, global_tokens=0):
    sides = window if isinstance(window, tuple) else (window, window)
    return window_mask(L, L, sides, window_dilation, global_tokens)


@each_backend
@pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS)
def test_transformer_encoder_layer_windows_are_masks(backend, options):
    stock = filled(nn.TransformerEncoderLayer(E, H, INNER, 0.0, batch_first=True))
    ours = pyarch.nn.TransformerEncoderLayer(E, H, INNER, 0.0, batch_first=True, **options)
    ours.load_state_dict(stock.state_dict())
    x, window = drawn(N, L, E), explicit(**options)
    ends = torch.zeros(N, L, dtype=torch.bool)
    ends[1, -1:] = True
    with pyarch.backend(backend):
        compare(Masked(ours), Masked(stock, src_mask=window), x)
        padded = {"src_key_padding_mask": ends}
        compare(Masked(ours, **padded), Masked(stock, src_mask=window, **padded), x)
        with torch.no_grad():
            results = ours.eval()(x), stock.eval()(x, src_mask=window)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


class Masked(nn.Module):
    """A layer that is always called with the same masks."""

    def __init__(self, layer, **masks):
        super().__init__()
        self.layer, self.masks = layer, masks

    def forward(self, x):
        return self.layer(x, **self.masks)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_transformer_encoder_layer_windows_hold_where_its_attention_is_called(training):
    """A hook makes the layer call its attention: the window goes along."""
    stock = filled(nn.TransformerEncoderLayer(E, H, INNER, 0.0, batch_first=True)).train(training)
    ours = copy.deepcopy(stock)
    pyarch.swap(ours, rules={"": pyarch.Config(window=(2, 1)), "self_attn": pyarch.Config()})
    seen = []
    ours.self_attn.register_forward_hook(lambda *_: seen.append(1))
    x = drawn(N, L, E)
    torch.testing.assert_close(ours(x), stock(x, src_mask=explicit((2, 1))), rtol=1e-4, atol=1e-5)
    assert seen == [1]
