"""pyarch.nn.MultiheadAttention computes what torch's does: settings, masks, weights, layouts, dtypes.

Causality, rows that see nothing, windows and dropout are in test_attention_modules_semantics.py, refused
calls in test_attention_arguments.py, copies, files and training in test_attention_modules_kept.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pyarch
from pyarch.nn.config import Config
from pyarch.nn.drop_in import CONFIG_ATTRIBUTE
from tests.attention_modules_cases import (
    SETTINGS,
    E,
    H,
    L,
    N,
    S,
    assert_same,
    attention,
    compare,
    drawn,
    each_backend,
    hidden,
    largest,
    masks_of,
    operands,
    operators_of,
    outcome,
    strides,
    unbatched_masks_of,
    widened,
    with_or_without_weights,
)

OPERATOR = "attention"
FORWARD = "attention_forward"
WEIGHTS = "attention_weights"
NO_WEIGHTS = {"need_weights": False}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


# ------------------------------------------------------------------------------------ torch's own inputs

MODULES = ("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer")


def inputs_of(name, dtype, training):
    """Constructor and forward arguments that torch tests its own module with."""
    pytest.importorskip("expecttest", reason="torch's module inputs need the package expecttest")
    from torch.testing._internal.common_modules import module_db

    info = next(info for info in module_db if info.module_cls.__name__ == name)
    return info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
@each_backend
def test_attention_modules_on_torchs_inputs(backend, name, training):
    inputs = inputs_of(name, torch.float32, training)
    assert len(inputs) >= 35
    for each in inputs:
        arguments, settings = each.constructor_input.args, each.constructor_input.kwargs
        stock = getattr(nn, name)(*arguments, **settings).train(training)
        ours = getattr(pyarch.nn, name)(*arguments, **settings).train(training)
        ours.load_state_dict(stock.state_dict())
        assert repr(ours) == repr(stock)
        inputs, keywords = each.forward_input.args, each.forward_input.kwargs
        with pyarch.backend(backend):
            got = outcome(ours, *inputs, **keywords)
        assert_same(got, outcome(stock, *inputs, **keywords))


@pytest.mark.parametrize("name", MODULES)
def test_attention_modules_on_torchs_inputs_in_float64(name):
    """Past the kernels' dtypes torch's own formulas run: the same to the last digits."""
    for each in inputs_of(name, torch.float64, True):
        arguments = each.constructor_input.args
        settings = dict(each.constructor_input.kwargs, dtype=torch.float64)
        stock, ours = (getattr(library, name)(*arguments, **settings) for library in (nn, pyarch.nn))
        ours.load_state_dict(stock.state_dict())
        inputs, keywords = each.forward_input.args, each.forward_input.kwargs
        assert_same(outcome(ours, *inputs, **keywords), outcome(stock, *inputs, **keywords))


# ------------------------------------------------------------------------------------ who answers a call


def test_attention_modules_good_calls_reach_our_operator():
    ours, _ = attention()
    query, key, value = operands(ours)
    mask, ends = hidden(L, S), hidden(N, S)
    assert [name for name, _ in operators_of(ours, query, key, value, **NO_WEIGHTS)] == [FORWARD]
    assert [name for name, _ in operators_of(ours, query, key, value)] == [FORWARD, WEIGHTS]
    for keywords in ({"attn_mask": mask}, {"key_padding_mask": ends}):
        assert operators_of(ours, query, key, value, **NO_WEIGHTS, **keywords)
    assert operators_of(ours, query[:, 0], key[:, 0], value[:, 0], **NO_WEIGHTS)
    with torch.no_grad():
        assert operators_of(ours.eval(), query, query, query, **NO_WEIGHTS), "torch's fast path ran"


@each_setting
def test_attention_modules_every_setting_reaches_our_operator(settings):
    ours, _ = attention(**settings)
    assert {name for name, _ in operators_of(ours, *operands(ours))} == {FORWARD, WEIGHTS}


def test_attention_modules_in_float64_never_ask_dispatch():
    ours, stock = (each.double() for each in attention())
    inputs = operands(ours, dtype=torch.float64)
    assert operators_of(ours, *inputs) == []
    torch.testing.assert_close(outcome(ours, *inputs), outcome(stock, *inputs))


def test_attention_modules_config_names_the_backend():
    ours, _ = attention()
    vars(ours)[CONFIG_ATTRIBUTE] = Config(backend="reference")
    inputs = operands(ours)
    assert {backend for _, backend in operators_of(ours, *inputs)} == {"reference"}
    with pyarch.backend("torch"):
        assert {backend for _, backend in operators_of(ours, *inputs, **NO_WEIGHTS)} == {"torch"}


@each_setting
@with_or_without_weights
def test_attention_modules_on_meta_tensors_give_shapes(settings, need_weights):
    ours, stock = (layer.to("meta") for layer in attention(**settings))
    inputs = [each.to("meta") for each in operands(ours)]
    for mine, theirs in zip(
        ours(*inputs, need_weights=need_weights), stock(*inputs, need_weights=need_weights), strict=True
    ):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            assert mine.is_meta and mine.shape == theirs.shape and strides(mine) == strides(theirs)


# ------------------------------------------------------------------------------------ every setting and mask


@each_backend
@each_setting
@with_or_without_weights
def test_attention_modules_settings(backend, settings, need_weights):
    ours, stock = attention(**settings)
    mask = {"attn_mask": hidden(L, S), "key_padding_mask": hidden(N, S), "need_weights": need_weights}
    with pyarch.backend(backend):
        for keywords in ({"need_weights": need_weights}, mask):
            compare(ours, stock, *operands(ours), **keywords)
            compare(ours.eval(), stock.eval(), *operands(ours), **keywords)


@each_backend
@with_or_without_weights
@pytest.mark.parametrize("kind", masks_of(L, S))
def test_attention_modules_masks(backend, kind, need_weights):
    """Each kind of mask beside plain layers and such with further keys, which no mask hides."""
    for settings in ({}, {"batch_first": True}, {"add_bias_kv": True, "add_zero_attn": True}):
        ours, stock = attention(**settings)
        with pyarch.backend(backend):
            keywords = masks_of(L, S)[kind]
            compare(ours, stock, *operands(ours), need_weights=need_weights, **keywords)


@each_backend
@with_or_without_weights
@pytest.mark.parametrize("kind", unbatched_masks_of(L, S))
def test_attention_modules_without_a_batch(backend, kind, need_weights):
    """Batch first or not, one sequence is (L, E)."""
    for batch_first in (False, True):
        ours, stock = attention(batch_first=batch_first, add_zero_attn=batch_first)
        inputs = operands(ours, batch=None)
        with pyarch.backend(backend):
            compare(ours, stock, *inputs, need_weights=need_weights, **unbatched_masks_of(L, S)[kind])


@each_backend
@with_or_without_weights
@pytest.mark.parametrize("batch_first", [False, True], ids=["sequence first", "batch first"])
@pytest.mark.parametrize("kind", masks_of(L, L))
def test_attention_modules_of_a_sequence_to_itself(backend, kind, batch_first, need_weights):
    """One tensor as query, key and value; two as query and key."""
    ours, stock = attention(batch_first=batch_first)
    x, other = (drawn(*((N, L) if batch_first else (L, N)), E) for _ in range(2))
    keywords = {"need_weights": need_weights, **masks_of(L, L)[kind]}
    with pyarch.backend(backend):
        for inputs in ((x, x, x), (x, x, other), (x, other, other)):
            compare(ours, stock, *inputs, **keywords)


@each_backend
@with_or_without_weights
@pytest.mark.parametrize("kind", masks_of(L, L))
def test_attention_modules_without_gradients_in_evaluation(backend, kind, need_weights):
    """Where torch takes its fast path: the same output, weights and strides."""
    ours, stock = (layer.eval() for layer in attention(batch_first=True))
    x = drawn(N, L, E)
    keywords = {"need_weights": need_weights, **masks_of(L, L)[kind]}
    exact = copy.deepcopy(stock).double()
    with torch.no_grad(), pyarch.backend(backend):
        mine, theirs = ours(x, x, x, **keywords), stock(x, x, x, **keywords)
        wide = exact(*[x.double()] * 3, **{n: widened(each) for n, each in keywords.items()})
    assert (mine[1] is None) == (theirs[1] is None) == (not need_weights)
    for got, wanted, truth in zip(mine, theirs, wide, strict=True):
        if wanted is not None:
            assert got.shape == wanted.shape and strides(got) == strides(wanted)
            torch.testing.assert_close(got.double(), truth, rtol=0, atol=4e-6 * largest(truth))


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@with_or_without_weights
def test_attention_modules_in_sixteen_bits(backend, dtype, need_weights):
    ours, stock = (layer.to(dtype) for layer in attention())
    with pyarch.backend(backend):
        for keywords in ({}, {"attn_mask": hidden(L, S), "key_padding_mask": hidden(N, S)}):
            inputs = [each / 2 for each in operands(ours, dtype=dtype)]
            compare(ours, stock, *inputs, need_weights=need_weights, **keywords)


LAYOUTS = {
    "batch in the middle": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "width outermost": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "sliced": lambda x: torch.cat([x, x], -1)[..., 1 : 1 + x.shape[-1]],
    "one sequence for the batch": lambda x: x[:, :1].expand(x.shape),
}


@each_backend
@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
def test_attention_modules_layouts(backend, change):
    for settings in ({}, {"kdim": 6, "vdim": 10}):
        ours, stock = attention(**settings)
        with pyarch.backend(backend):
            compare(ours, stock, *map(change, operands(ours)))


@each_backend
@pytest.mark.parametrize("queries, keys, batch", [(1, 1, 1), (1, 9, 2), (9, 1, 2), (33, 65, 1), (3, 4, 0)])
def test_attention_modules_sizes(backend, queries, keys, batch):
    ours, stock = attention()
    query, key = drawn(queries, batch, E), drawn(keys, batch, E)
    with pyarch.backend(backend):
        if batch:
            compare(ours, stock, query, key, key)
        else:
            mine, theirs = outcome(ours, query, key, key), outcome(stock, query, key, key)
            torch.testing.assert_close(mine, theirs)


# ------------------------------------------------------------------------------------ weights


@each_backend
@pytest.mark.parametrize("batch", [N, None], ids=["batch", "one sequence"])
@pytest.mark.parametrize("average", [True, False], ids=["mean", "heads"])
@each_setting
def test_attention_modules_weights_have_torchs_shapes(backend, settings, average, batch):
    """(N, L, S) or (N, H, L, S), as wide as the keys and the further ones; without a batch no N."""
    ours, stock = attention(**settings)
    further = bool(settings.get("add_bias_kv")) + bool(settings.get("add_zero_attn"))
    inputs = operands(ours, batch=batch)
    with pyarch.backend(backend):
        weights = ours(*inputs, average_attn_weights=average)[1]
        compare(ours, stock, *inputs, average_attn_weights=average)
    heads = () if average else (settings.get("num_heads", H),)
    assert weights.shape == (*(() if batch is None else (batch,)), *heads, L, S + further)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@each_backend
@pytest.mark.parametrize("average", [True, False], ids=["mean", "heads"])
def test_attention_modules_gradients_reach_through_the_weights_alone(backend, average):
    """A loss on the weights that leaves the output alone, as attention supervision has it."""
    ours, stock = attention()
    inputs, gradients = operands(ours), []
    for layer in (ours, stock):
        with pyarch.backend(backend if layer is ours else "auto"):
            weights = layer(*inputs, average_attn_weights=average)[1]
        gradients.append(torch.autograd.grad(weights.square().sum(), layer.in_proj_weight)[0])
    assert gradients[1].abs().max() > 0.01
    torch.testing.assert_close(*gradients)
