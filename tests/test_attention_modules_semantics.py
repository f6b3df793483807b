"""MultiheadAttention's causality, hidden rows, windows and dropout, against torch's where torch has them.

Two things are pyarch's own: a row that sees nothing is zero before out_proj, and dropout's random stream.
"""

from __future__ import annotations

import pytest
import torch

import pyarch
from pyarch.nn.config import Config
from pyarch.nn.drop_in import CONFIG_ATTRIBUTE
from pyarch.reference.philox import keep_mask
from tests.attention_modules_cases import (
    E,
    H,
    L,
    N,
    S,
    answers,
    as_infinities,
    attention,
    causal,
    compare,
    drawn,
    each_backend,
    hidden,
    hold,
    operands,
    outcome,
    said,
    warned,
    window_mask,
    with_or_without_weights,
)

OPERATOR = "attention"

# ------------------------------------------------------------------------------------ causality


@each_backend
@with_or_without_weights
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attention_modules_causal_hint_beside_its_mask(backend, kind, need_weights):
    mask = causal(L) if kind == "bool" else as_infinities(causal(L))
    ours, stock = attention()
    x = drawn(L, N, E)
    with pyarch.backend(backend):
        for padding in (None, hidden(N, L)):
            keywords = {"key_padding_mask": padding, "need_weights": need_weights}
            compare(ours, stock, x, x, x, attn_mask=mask, is_causal=True, **keywords)


@each_backend
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@with_or_without_weights
def test_attention_modules_causal_hint_against_the_mask(backend, need_weights, padded):
    """Torch drops the mask for the hint only where neither padding nor weights are asked for; so do we."""
    ours, stock = attention()
    x, mask = drawn(L, N, E), hidden(L, L)
    keywords = {"key_padding_mask": hidden(N, L) if padded else None, "need_weights": need_weights}
    with pyarch.backend(backend):
        compare(ours, stock, x, x, x, attn_mask=mask, is_causal=True, **keywords)
        got = ours(x, x, x, attn_mask=mask, is_causal=True, **keywords)[0]
        hinted = ours(x, x, x, attn_mask=causal(L), **keywords)[0]
    assert torch.allclose(got, hinted, atol=1e-5) == (not padded and not need_weights)


@each_backend
@pytest.mark.parametrize("queries, keys", [(L, S), (S, L)])
def test_attention_modules_causal_hint_of_two_lengths(backend, queries, keys):
    """Query 0 sees key 0 alone: upper-left, as torch has it."""
    ours, stock = attention()
    query, key = drawn(queries, N, E), drawn(keys, N, E)
    mask = causal(queries, keys)
    with pyarch.backend(backend):
        compare(ours, stock, query, key, key, attn_mask=mask, is_causal=True, need_weights=False)
        compare(ours, stock, query, key, key, attn_mask=mask)


@with_or_without_weights
def test_attention_modules_causal_hint_without_a_mask(need_weights):
    """An error where torch computes step by step; on its fast path, evaluation without gradients, ignored."""
    ours, stock = attention(batch_first=True)
    x = drawn(N, L, E)
    for layer in (ours, stock):
        with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
            layer(x, x, x, is_causal=True, need_weights=need_weights)
    with torch.no_grad():
        for layer in (ours.eval(), stock.eval()):
            layer(x, x, x, need_weights=need_weights)
        results = [layer(x, x, x, is_causal=True, need_weights=need_weights) for layer in (ours, stock)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(results[0], ours(x, x, x, need_weights=need_weights))


@with_or_without_weights
def test_attention_modules_causal_hint_against_the_mask_on_the_fast_path(need_weights):
    """There torch heeds the mask and not the hint."""
    ours, stock = (layer.eval() for layer in attention(batch_first=True))
    x, mask = drawn(N, L, E), hidden(L, L)
    with torch.no_grad():
        results = [
            layer(x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights)
            for layer in (ours, stock)
        ]
    torch.testing.assert_close(*results)


# ------------------------------------------------------------------------------------ rows that see nothing


@each_backend
@with_or_without_weights
@pytest.mark.parametrize("kind", ["bool", "infinities"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_attention_modules_rows_that_see_nothing(backend, kind, need_weights, training):
    """Zeros before out_proj, zero weights, and no gradient; torch gives NaN or zeros, by its path."""
    ours, stock = (layer.train(training) for layer in attention(batch_first=True))
    x = drawn(N, L, E)
    mask, ends = hidden(L, L), hidden(N, L)
    mask[2], ends[1] = True, True
    if kind == "infinities":
        mask, ends = as_infinities(mask), as_infinities(ends)
    blind = torch.zeros(N, L, dtype=torch.bool)
    blind[:, 2], blind[1] = True, True
    with pyarch.backend(backend):
        keywords = {"attn_mask": mask, "key_padding_mask": ends, "need_weights": need_weights}
        output, weights = ours(x, x, x, **keywords)
        torch.testing.assert_close(output[blind], ours.out_proj.bias.expand(output[blind].shape))
        assert not need_weights or not weights[blind].any()
        query = x.clone().requires_grad_()
        key = x.clone().requires_grad_()
        output, weights = ours(query, key, key, **keywords)
        output.square().sum().backward()
    assert not query.grad[blind].any() and not key.grad[1].any()
    assert query.grad[0].any() and key.grad.isfinite().all()
    # The rows that do see something are torch's, and their gradients too.
    seeing = [x[:1], x[:1], x[:1]]
    rows = [row for row in range(L) if row != 2]
    theirs = stock(*seeing, attn_mask=mask, key_padding_mask=ends[:1], need_weights=False)[0]
    torch.testing.assert_close(output[:1, rows], theirs[:, rows])


@each_backend
@with_or_without_weights
def test_attention_modules_rows_that_see_nothing_leave_the_others_gradients(backend, need_weights):
    """Parameters learn from the rows that see something as if the others were not there."""
    ours, stock = attention()
    query, key, value = operands(ours)
    mask = hidden(L, S)
    mask[3] = True
    rows = [row for row in range(L) if row != 3]
    gradients = []
    for layer, given, masked in ((ours, query, mask), (stock, query[rows], mask[rows])):
        with pyarch.backend(backend if layer is ours else "auto"):
            output = layer(given, key, value, attn_mask=masked, need_weights=need_weights)[0]
        loss = (output[rows] if layer is ours else output).square().sum()
        gradients.append(torch.autograd.grad(loss, list(layer.parameters())))
    torch.testing.assert_close(*gradients)


@each_backend
@with_or_without_weights
def test_attention_modules_hidden_numbers_never_leak(backend, need_weights):
    """NaN and infinity in padded keys reach no output."""
    ours, _ = attention()
    query, key, value = operands(ours)
    ends = torch.zeros(N, S, dtype=torch.bool)
    ends[:, -3:] = True
    with pyarch.backend(backend):
        clean = ours(query, key, value, key_padding_mask=ends, need_weights=need_weights)
        key[-3:], value[-2:] = torch.nan, torch.inf
        again = ours(query, key, value, key_padding_mask=ends, need_weights=need_weights)
    torch.testing.assert_close(again, clean)


# ------------------------------------------------------------------------------------ windows

WINDOWS = {
    "both sides": dict(window=(2, 1)),
    "one number": dict(window=2),
    "itself": dict(window=0),
    "behind": dict(window=(3, 0)),
    "all behind": dict(window=(None, 0)),
    "all ahead": dict(window=(1, None)),
    "dilated": dict(window=(2, 1), window_dilation=2),
    "global tokens": dict(window=(1, 1), global_tokens=2),
    "all of it": dict(window=(1, 2), window_dilation=3, global_tokens=1),
}


def explicit(queries, keys, window, window_dilation=1, global_tokens=0):
    """The same window as a mask for torch's layer."""
    sides = window if isinstance(window, tuple) else (window, window)
    return window_mask(queries, keys, sides, window_dilation, global_tokens)


@each_backend
@with_or_without_weights
@pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS)
def test_attention_modules_windows_are_masks(backend, options, need_weights):
    _, stock = attention()
    ours = pyarch.nn.MultiheadAttention(E, H, **options)
    ours.load_state_dict(stock.state_dict())
    x = drawn(11, N, E)
    window = explicit(11, 11, **options)
    assert not window.all(1).any(), "this table has no row that sees nothing"
    with pyarch.backend(backend):
        got = outcome(ours, x, x, x, need_weights=need_weights)
    hold(got, answers(stock, x, x, x, attn_mask=window, need_weights=need_weights))


@each_backend
@pytest.mark.parametrize("kind", ["bool", "float", "padding", "causal"])
def test_attention_modules_windows_hold_beside_masks(backend, kind):
    _, stock = attention()
    ours = pyarch.nn.MultiheadAttention(E, H, window=(2, 2))
    ours.load_state_dict(stock.state_dict())
    x = drawn(11, N, E)
    window = explicit(11, 11, (2, 2))
    mask = hidden(11, 11) & ~torch.eye(11, dtype=torch.bool)
    ends = torch.zeros(N, 11, dtype=torch.bool)
    ends[1, -2:] = True
    numbers = torch.randn(11, 11)
    mine, theirs = {
        "bool": ({"attn_mask": mask}, {"attn_mask": mask | window}),
        "float": ({"attn_mask": numbers}, {"attn_mask": numbers + as_infinities(window)}),
        "padding": ({"key_padding_mask": ends}, {"key_padding_mask": ends, "attn_mask": window}),
        "causal": ({"attn_mask": causal(11), "is_causal": True}, {"attn_mask": causal(11) | window}),
    }[kind]
    with pyarch.backend(backend):
        got = outcome(ours, x, x, x, need_weights=False, **mine)
    hold(got, answers(stock, x, x, x, need_weights=False, **theirs))


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(window=(1, 2, 3)), "window"),
        (dict(window=-1), "window"),
        (dict(window="2"), "window"),
        (dict(window=(1, 1), window_dilation=0), "window_dilation"),
        (dict(window=(1, 1), global_tokens=-1), "global_tokens"),
        (dict(window=(1, 1), global_tokens=1.5), "global_tokens"),
    ],
)
@pytest.mark.parametrize("build", [Config, lambda **options: pyarch.nn.MultiheadAttention(E, H, **options)])
def test_attention_modules_refuse_wrong_options(build, options, text):
    with pytest.raises((TypeError, ValueError), match=f"^{text} should be "):
        build(**options)


@pytest.mark.parametrize("further", ["add_bias_kv", "add_zero_attn"])
@pytest.mark.parametrize("options", [{"window": 2}, {"window_dilation": 2}])
def test_attention_modules_refuse_a_window_over_keys_without_a_position(options, further):
    with pytest.raises(ValueError, match="a window needs keys that have positions"):
        pyarch.nn.MultiheadAttention(E, H, **{further: True}, **options)


def test_attention_modules_options_are_keywords_alone_and_off():
    with pytest.raises(TypeError, match="positional"):
        pyarch.nn.MultiheadAttention(E, H, 0.0, True, False, False, None, None, False, None, None, 2)
    ours, _ = attention()
    config = ours.pyarch_config
    assert (config.window, config.window_dilation, config.global_tokens) == (None, 1, 0)
    assert CONFIG_ATTRIBUTE not in vars(ours)


# ------------------------------------------------------------------------------------ dropout


def seeded(layer, *inputs, **keywords):
    torch.manual_seed(5)
    return layer(*inputs, **keywords)


@each_backend
@pytest.mark.parametrize("average", [True, False], ids=["mean", "heads"])
def test_attention_modules_dropout_is_in_the_weights(backend, average):
    """The weights are those after dropout: kept ones grow by 1 / (1 - p), and the output is made of them."""
    ours, stock = attention(dropout=0.4)
    query, key, value = operands(ours)
    keywords = {"key_padding_mask": hidden(N, S), "average_attn_weights": False}
    with pyarch.backend(backend):
        output, weights = seeded(ours, query, key, value, **keywords)
        _, mean = seeded(ours, query, key, value, **keywords | {"average_attn_weights": True})
        _, undropped = seeded(ours.eval(), query, key, value, **keywords)
    torch.testing.assert_close(mean, weights.mean(1))
    visible = undropped > 0
    kept = weights > 0
    assert 0.4 < kept[visible].float().mean() < 0.8
    torch.testing.assert_close(weights[kept], undropped[kept] / 0.6)
    values = value @ stock.in_proj_weight[2 * E :].T + stock.in_proj_bias[2 * E :]
    heads = values.view(S, N, H, E // H).permute(1, 2, 0, 3)
    made = (weights @ heads).permute(2, 0, 1, 3).reshape(L, N, E)
    torch.testing.assert_close(output, stock.out_proj(made), rtol=1e-4, atol=1e-5)


@each_backend
def test_attention_modules_dropout_keeps_what_philox_says(backend):
    """One number of torch's generator a call is the seed of the stream that pyarch documents."""
    ours, _ = attention(dropout=0.4)
    with pyarch.backend(backend):
        _, weights = seeded(ours, *operands(ours), average_attn_weights=False)
    torch.manual_seed(5)
    seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64)
    assert torch.equal(weights > 0, keep_mask(seed, 0.4, N, H, L, S))


@each_backend
@with_or_without_weights
def test_attention_modules_dropout_follows_the_seed(backend, need_weights):
    ours, _ = attention(dropout=0.5)
    inputs, keywords = operands(ours), {"need_weights": need_weights}
    with pyarch.backend(backend):
        first = seeded(ours, *inputs, **keywords)[0]
        second = ours(*inputs, **keywords)[0]
        assert torch.equal(seeded(ours, *inputs, **keywords)[0], first)
        assert not torch.allclose(second, first)


@each_backend
def test_attention_modules_dropout_is_the_same_with_and_without_weights(backend):
    ours, _ = attention(dropout=0.5)
    inputs = operands(ours)
    with pyarch.backend(backend):
        outputs = [seeded(ours, *inputs, need_weights=need)[0] for need in (True, False)]
    torch.testing.assert_close(*outputs)


@each_backend
@with_or_without_weights
def test_attention_modules_dropout_drops_the_same_in_the_backward(backend, need_weights):
    """The gradient of the seeded layer is that of its own differences."""
    ours, _ = attention(dropout=0.5)
    query, key, value = operands(ours)
    direction = torch.randn_like(value)

    def loss(moved):
        return seeded(ours, query, key, moved, need_weights=need_weights)[0].double().sin().sum()

    with pyarch.backend(backend):
        leaf = value.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        step = 1e-2
        difference = (loss(value + step * direction) - loss(value - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum().double(), difference, rtol=5e-3, atol=5e-3)


@each_backend
def test_attention_modules_streams_are_equal_on_every_backend(backend):
    ours, _ = attention(dropout=0.5)
    inputs, outputs = operands(ours), []
    for name in (backend, "reference", "auto"):
        with pyarch.backend(name):
            outputs.append(seeded(ours, *inputs)[1])
    for each in outputs[1:]:
        torch.testing.assert_close(each, outputs[0])


@pytest.mark.parametrize("training, dropout", [(False, 0.5), (True, 0.0)])
def test_attention_modules_without_dropout_draw_no_random_number(training, dropout):
    ours, _ = attention(dropout=dropout)
    ours.train(training)
    before = torch.get_rng_state()
    ours(*operands_of_zeros(ours))
    assert torch.equal(torch.get_rng_state(), before)


def operands_of_zeros(layer):
    return tuple(torch.zeros(length, N, E) for length in (L, S, S))


@each_backend
def test_attention_modules_drop_everything(backend):
    ours, stock = attention(dropout=1.0)
    with pyarch.backend(backend):
        mine, theirs = (outcome(layer, *operands_of_zeros(layer)) for layer in (ours, stock))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dropout", [None, "x", 2, 1.5, -1, (1, 2)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_attention_modules_dropout_that_is_no_probability_is_as_in_torch(dropout, training):
    """Refused in training in torch's words, but for a negative one, which drops nothing there."""
    ours, stock = (layer.train(training) for layer in attention(dropout=dropout))
    mine, theirs = (said(lambda layer=layer: layer(*operands_of_zeros(layer))) for layer in (ours, stock))
    assert mine == theirs and (theirs[0] != "no error") == (training and dropout != -1)


# ------------------------------------------------------------------------------------ warnings


@each_backend
def test_attention_modules_warn_of_masks_of_two_kinds_as_torch(backend):
    ours, stock = attention()
    inputs = operands(ours)
    keywords = {"attn_mask": torch.randn(L, S), "key_padding_mask": hidden(N, S)}
    with pyarch.backend(backend):
        texts = [warned(lambda layer=layer: layer(*inputs, **keywords)) for layer in (ours, stock)]
    assert texts[0] == texts[1] and "mismatched key_padding_mask and attn_mask" in texts[0][0]
    with pyarch.backend(backend):
        compare(ours, stock, *inputs, **keywords)
