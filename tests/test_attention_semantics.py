"""pyarch.ops.scaled_dot_product_attention means what torch's means, and its own options what they say."""

from __future__ import annotations

import pytest
import torch

import pyarch
from tests.attention_cases import (
    MASKS,
    PATTERNS,
    SCORES,
    SIZES,
    Case,
    answers,
    cases,
    each_dtype,
)
from tests.attention_definition import (
    NEGATIVE_INFINITY,
    hold,
    with_gradients,
)
from tests.attention_functions import (
    arguments_of,
    close,
    drawn,
    each_backend,
    ours,
    outcome,
    outcome_or_error,
    ran,
    stock,
)

OPERATOR = "attention"


# ------------------------------------------------------------------------------------ the operator's cases


def is_public(case):
    """Whether the public function can say it: it draws its own seed, and takes one kind of global tokens."""
    return case.dropout in (0, 1) and not (case.global_mask and case.global_tokens)


SOME_SIZES = dict(list(SIZES.items())[::4])
PUBLIC = {name: case for name, case in (SOME_SIZES | PATTERNS | MASKS | SCORES).items() if is_public(case)}


@cases(PUBLIC)
@each_backend
def test_attention_function_computes_the_case(backend, case):
    """Forward and backward run on the backend that was asked for, and nothing else does."""
    operands = case.operands(torch.float32)

    def run(given):
        tensors, options = arguments_of(given)
        return ours(*tensors, **options, return_lse=True)

    results, seen = ran(backend, lambda: with_gradients(operands, run))
    hold(results, answers(case, torch.float32))
    assert seen == [("attention_forward", backend), ("attention_backward", backend)]


@each_dtype
@each_backend
@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
def test_attention_function_in_every_dtype_is_torchs(backend, dtype, causal):
    case = Case(33, 35, causal=causal)
    operands = case.operands(dtype)

    def run(given):
        return ours(*given[:3], is_causal=causal), None

    results, _ = ran(backend, lambda: with_gradients(operands, run))
    hold({name: each for name, each in results.items() if name != "lse"}, answers(case, dtype))


def test_attention_function_takes_float64():
    tensors = drawn(dtype=torch.float64)
    for mine, theirs in zip(outcome(ours, tensors), outcome(stock, tensors), strict=True):
        assert mine.dtype == torch.float64
        close(mine, theirs, 1e-12)


# ------------------------------------------------------------------------------------ torch's masks

MASK_SHAPES = [
    (9, 11),
    (1, 11),
    (9, 1),
    (1, 1),
    (3, 9, 11),
    (1, 9, 11),
    (3, 1, 1),
    (2, 1, 1, 11),
    (2, 3, 9, 11),
    (1, 1, 9, 11),
    (2, 1, 9, 1),
]


@each_backend
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_attention_bool_mask_keeps_where_true(backend, shape):
    """The mean of the mask is far from a half, so that the opposite meaning would fail."""
    tensors, mask = drawn(), torch.rand(shape) < 0.8
    mask[..., 0] = True
    expected = outcome(lambda *qkv: stock(*qkv, mask), tensors)
    with pyarch.backend(backend):
        close(outcome(lambda *qkv: ours(*qkv, mask), tensors), expected)


@each_backend
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_attention_float_mask_is_added_and_trained(backend, shape):
    """Its gradient has its own shape: summed over what it was broadcast over."""
    tensors = [*drawn(), torch.randn(shape)]
    expected = outcome(stock, tensors)
    with pyarch.backend(backend):
        found = outcome(ours, tensors)
    assert found[-1].shape == shape and found[-1].any()
    close(found, expected)


@each_dtype
@each_backend
def test_attention_float_mask_of_expanded_strides(backend, dtype):
    """One row of bias shown to every query, head and sample without being copied."""
    *tensors, row = *drawn(dtype=dtype), torch.randn(11).to(dtype)

    def attend(function):
        return lambda *given: function(*given[:3], given[3].expand(2, 3, 9, 11))

    with pyarch.backend(backend):
        found = outcome(attend(ours), [*tensors, row])
    precision = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    expected = outcome(attend(stock), [each.double() for each in (*tensors, row)])
    close([each.double() for each in found], expected, precision)


@each_backend
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(("queries", "keys"), [(9, 11), (11, 9)])
def test_attention_mask_and_causality_both_hold(backend, kind, queries, keys):
    """torch's CPU operator takes both together, and so does ours."""
    tensors, mask = drawn(queries, keys), torch.rand(queries, keys) < 0.7
    mask[:, 0] = True
    mask = mask if kind == "bool" else torch.randn(queries, keys).masked_fill(~mask, NEGATIVE_INFINITY)
    lower = torch.ones(queries, keys, dtype=torch.bool).tril()
    both = mask & lower if kind == "bool" else mask.masked_fill(~lower, NEGATIVE_INFINITY)
    expected = outcome(lambda *qkv: stock(*qkv, both), tensors)
    close(expected[0], stock(*tensors, mask, is_causal=True))
    with pyarch.backend(backend):
        close(outcome(lambda *qkv: ours(*qkv, mask, is_causal=True), tensors), expected)


@each_backend
@pytest.mark.parametrize(("queries", "keys"), [(5, 9), (9, 5), (1, 9), (9, 1)])
def test_attention_causality_is_upper_left(backend, queries, keys):
    """Query 0 sees key 0 alone, however many keys there are; the last query need not see the last key."""
    tensors = drawn(queries, keys)
    expected = outcome(lambda *qkv: stock(*qkv, is_causal=True), tensors)
    with pyarch.backend(backend):
        found = outcome(lambda *qkv: ours(*qkv, is_causal=True), tensors)
    close(found, expected)
    close(found[0][:, :, 0], tensors[2][:, :, 0])


@each_backend
def test_attention_offset_makes_causality_lower_right(backend):
    """The last query sees every key with offset Tk - Tq."""
    tensors = drawn(5, 9)
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    expected = outcome(lambda *qkv: stock(*qkv, mask), tensors)
    with pyarch.backend(backend):
        close(outcome(lambda *qkv: ours(*qkv, is_causal=True, query_offset=4), tensors), expected)


# ------------------------------------------------------------------------------------ scale, heads, ranks


@each_backend
@pytest.mark.parametrize("scale", [None, 1.0, 0.3, -0.7, 0.0])
def test_attention_scale(backend, scale):
    tensors = drawn()
    if scale == 0.0:
        mean = tensors[2].mean(2, keepdim=True).expand_as(tensors[0])
        close(stock(*tensors, scale=scale), mean)
    expected = outcome(lambda *qkv: stock(*qkv, scale=scale), tensors)
    with pyarch.backend(backend):
        close(outcome(lambda *qkv: ours(*qkv, scale=scale), tensors), expected)


@each_backend
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
def test_attention_grouped_heads(backend, kv_heads, causal):
    tensors = drawn(heads=6, kv_heads=kv_heads)
    options = dict(enable_gqa=True, is_causal=causal)
    expected = outcome(lambda *qkv: stock(*qkv, **options), tensors)
    with pyarch.backend(backend):
        found = outcome(lambda *qkv: ours(*qkv, **options), tensors)
    assert [each.shape for each in found] == [each.shape for each in expected]
    close(found, expected)


RANKS = {
    "2-D": ((9, 8), (11, 8), (11, 8), (9, 11)),
    "3-D": ((2, 9, 8), (2, 11, 8), (2, 11, 8), (2, 9, 11)),
    "3-D, one mask": ((2, 9, 8), (2, 11, 8), (2, 11, 5), (9, 11)),
    "4-D": ((2, 3, 9, 8), (2, 3, 11, 8), (2, 3, 11, 8), (2, 1, 9, 11)),
    "5-D": ((2, 2, 3, 9, 8), (2, 2, 3, 11, 8), (2, 2, 3, 11, 8), (2, 1, 3, 9, 11)),
    "batch of one, broadcast": ((2, 3, 9, 8), (1, 3, 11, 8), (1, 3, 11, 8), (9, 11)),
    "heads of one, broadcast": ((2, 3, 9, 8), (2, 1, 11, 8), (2, 1, 11, 8), (9, 11)),
    "ranks that differ": ((2, 3, 9, 8), (3, 11, 8), (3, 11, 8), (9, 11)),
}


@each_backend
@pytest.mark.parametrize("masked", [None, "bool", "float"])
@pytest.mark.parametrize("shapes", RANKS.values(), ids=RANKS)
def test_attention_ranks(backend, shapes, masked):
    *qkv, of_mask = shapes
    tensors = [torch.randn(shape) for shape in qkv]
    mask = None if masked is None else torch.randn(of_mask)
    if masked == "bool":
        mask = mask > -1
        mask[..., 0] = True
    expected = outcome_or_error(lambda *qkv: stock(*qkv, mask), tensors)
    with pyarch.backend(backend):
        found = outcome_or_error(lambda *qkv: ours(*qkv, mask), tensors)
    if isinstance(expected[0], str):
        assert found == expected
    else:
        assert [each.shape for each in found] == [each.shape for each in expected]
        close(found, expected)


NOTHING = [
    dict(batch=0),
    dict(heads=0),
    dict(queries=0),
    dict(keys=0),
    dict(queries=0, keys=0),
]


@each_backend
@pytest.mark.parametrize("sizes", NOTHING, ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"bias": True}], ids=str)
def test_attention_of_nothing(backend, sizes, options):
    tensors = [torch.randn(shape) for shape in shapes_of(**sizes)]
    bias = torch.randn(1, 1, tensors[0].shape[2], tensors[1].shape[2]) if "bias" in options else None
    options = {name: each for name, each in options.items() if name != "bias"}
    leaves = tensors + ([] if bias is None else [bias])
    expected = nothing(lambda *given: stock(*given, **options), leaves)
    with pyarch.backend(backend):
        found = nothing(lambda *given: ours(*given, **options), leaves)
    assert [each.shape for each in found] == [each.shape for each in expected]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def shapes_of(batch=2, heads=3, queries=5, keys=7, dim=8):
    return (batch, heads, queries, dim), (batch, heads, keys, dim), (batch, heads, keys, dim)


def nothing(function, leaves):
    leaves = [each.detach().requires_grad_() for each in leaves]
    result = function(*leaves)
    return [result, *torch.autograd.grad(result.sum(), leaves, materialize_grads=True)]


@pytest.mark.parametrize(("dim", "value_dim"), [(0, 4), (8, 0)])
def test_attention_of_no_width_is_torchs(dim, value_dim):
    tensors = [torch.randn(2, 3, 5, dim), torch.randn(2, 3, 7, dim), torch.randn(2, 3, 7, value_dim)]
    close(ours(*tensors), stock(*tensors))


# ------------------------------------------------------------------------------------ windows


@each_backend
@pytest.mark.parametrize(
    ("window", "sides"),
    [
        (0, (0, 0)),
        (1, (1, 1)),
        (3, (3, 3)),
        (40, (40, 40)),
        (10**6, (10**6, 10**6)),
        ((2, None), (2, 10**6)),
        ((None, 2), (10**6, 2)),
        ((None, None), (10**6, 10**6)),
        ((0, 4), (0, 4)),
        ([4, 0], (4, 0)),
        (None, (10**6, 10**6)),
    ],
    ids=str,
)
@pytest.mark.parametrize("offset", [0, 6])
def test_attention_window_is_the_mask_it_stands_for(backend, window, sides, offset):
    tensors = drawn(33, 40)
    distance = torch.arange(40)[None, :] - torch.arange(33)[:, None] - offset
    mask = (distance >= -sides[0]) & (distance <= sides[1])
    expected = outcome(lambda *qkv: stock(*qkv, mask), tensors)
    with pyarch.backend(backend):
        close(outcome(lambda *qkv: ours(*qkv, window=window, query_offset=offset), tensors), expected)


@each_backend
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
def test_attention_global_tokens_by_number_or_by_name(backend, causal):
    """A global token sees all and is seen by all, causality still applying; the others keep their window."""
    tensors, named = drawn(40, 40), torch.zeros(2, 40, dtype=torch.bool)
    named[:, :3] = True
    chosen = torch.zeros(40, dtype=torch.bool)
    chosen[:3] = True
    distance = torch.arange(40)[None, :] - torch.arange(40)[:, None]
    mask = (distance.abs() <= 2) | chosen[None, :] | chosen[:, None]
    mask = mask & (distance <= 0) if causal else mask
    expected = outcome(lambda *qkv: stock(*qkv, mask), tensors)
    with pyarch.backend(backend):
        for tokens in (3, named):
            options = dict(window=2, global_tokens=tokens, is_causal=causal)
            close(outcome(lambda *qkv, options=options: ours(*qkv, **options), tensors), expected)


@each_backend
def test_attention_padding_is_the_mask_it_stands_for(backend):
    tensors, padding = drawn(), torch.rand(2, 11) < 0.3
    padding[:, 0] = False
    expected = outcome(lambda *qkv: stock(*qkv, ~padding[:, None, None]), tensors)
    with pyarch.backend(backend):
        close(outcome(lambda *qkv: ours(*qkv, key_padding_mask=padding), tensors), expected)


@each_backend
def test_attention_bias_adds_to_either_mask(backend):
    """To a float mask it is added, both with gradients of their own shapes; a bool mask hides beside it."""
    tensors = [*drawn(), torch.randn(3, 1, 11), torch.randn(2, 1, 9, 1)]
    expected = outcome(lambda *given: stock(*given[:3], given[3] + given[4]), tensors)
    mask = torch.rand(9, 11) < 0.8
    mask[:, 0] = True
    hidden = outcome(
        lambda *given: stock(*given[:3], given[3].expand(2, 3, 9, 11).masked_fill(~mask, NEGATIVE_INFINITY)),
        tensors[:4],
    )
    with pyarch.backend(backend):
        close(outcome(lambda *given: ours(*given[:3], given[3], bias=given[4]), tensors), expected)
        close(outcome(lambda *given: ours(*given[:3], mask, bias=given[3]), tensors[:4]), hidden)


# ------------------------------------------------------------------------------------ rows that see nothing


@each_backend
@each_dtype
@pytest.mark.parametrize("kind", ["bool", "float", "padding", "window"])
def test_attention_fully_masked_rows_are_zero(backend, kind, dtype):
    """The one deviation from torch, which gives NaN or zero by the path it takes."""
    tensors = drawn(9, 9, dtype=dtype)
    options = {}
    if kind in ("bool", "float"):
        mask = torch.ones(9, 9, dtype=torch.bool)
        mask[4] = False
        as_float = torch.zeros(9, 9).masked_fill(~mask, NEGATIVE_INFINITY).to(dtype)
        options["attn_mask"] = mask if kind == "bool" else as_float
        blind = (slice(None), slice(None), 4)
    elif kind == "padding":
        options["key_padding_mask"] = torch.tensor([False, True])[:, None].expand(2, 9)
        blind = (1,)
    else:
        options |= dict(window=(0, 2), query_offset=6)
        blind = (slice(None), slice(None), slice(3, None))
    with pyarch.backend(backend):
        out, *gradients = outcome(lambda *qkv: ours(*qkv, **options), tensors)
        _, lse = ours(*tensors, **options, return_lse=True)
    assert not out[blind].any() and not gradients[0][blind].any()
    assert (lse[blind] == NEGATIVE_INFINITY).all() and (lse > NEGATIVE_INFINITY).any()
    assert all(each.isfinite().all() for each in (out, *gradients))


# ------------------------------------------------------------------------------------ dropout


@each_backend
def test_attention_dropout_has_no_training_flag(backend):
    """As torch's: it drops whenever asked to, scales what it keeps and follows torch's generator."""
    query, key, _ = drawn(40, 50)
    value = torch.eye(50).expand(2, 3, 50, 50)

    def run():
        return ours(query, key, value, dropout_p=0.25)

    with pyarch.backend(backend):
        torch.manual_seed(3)
        first, second = run(), run()
        torch.manual_seed(3)
        again = run()
        whole = ours(query, key, value)
    assert torch.equal(first, again) and not torch.equal(first, second)
    share = (first == 0).double().mean()
    assert abs(share - 0.25) < 0.02
    close(first[first != 0], (whole / 0.75)[first != 0])


def test_attention_dropout_is_one_stream_on_every_backend():
    tensors, results = drawn(40, 50), []
    for backend in ("cpu", "reference"):
        if backend == "cpu" and pyarch.native.serving()[1]:
            continue
        torch.manual_seed(3)
        with pyarch.backend(backend):
            results.append(outcome(lambda *qkv: ours(*qkv, dropout_p=0.5), tensors))
    torch.manual_seed(3)
    results.append(outcome(lambda *qkv: ours(*qkv, dropout_p=0.5), tensors))
    for other in results[1:]:
        close(results[0], other)


@each_backend
def test_attention_dropout_of_the_backward_is_the_forwards(backend):
    """The gradient of the dropped, linear part: the output times the value, summed, is its own gradient."""
    query, key, value = drawn(40, 50)
    value.requires_grad_()
    with pyarch.backend(backend):
        out = ours(query, key, value, dropout_p=0.5)
        cotangent = torch.randn_like(out)
        (gradient,) = torch.autograd.grad(out, value, cotangent)
    close((gradient * value).sum(), (out * cotangent).sum(), 1e-4)


@each_backend
def test_attention_dropout_of_nothing_draws_nothing(backend):
    """Neither p = 0 nor p = 1 touches torch's generator; p = 1 leaves zeros and zero gradients."""
    tensors = drawn()
    state = torch.get_rng_state()
    with pyarch.backend(backend):
        assert torch.equal(ours(*tensors, dropout_p=0.0), ours(*tensors))
        leaves = [each.requires_grad_() for each in tensors]
        out = ours(*leaves, dropout_p=1.0)
        gradients = torch.autograd.grad(out.sum(), leaves)
    assert torch.equal(torch.get_rng_state(), state)
    assert not out.any() and not any(each.any() for each in gradients)
