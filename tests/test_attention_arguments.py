"""pyarch.nn.MultiheadAttention takes and refuses what torch's does, in its types of error and its words."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn

import pyarch
from tests.attention_modules_cases import E, H, L, N, S, attention, each_backend, said

OPERATOR = "attention"
CLASSES = (pyarch.nn.MultiheadAttention, nn.MultiheadAttention)


def ends_of(run) -> tuple[tuple[str, str], list[str]]:
    """The error and the warnings of a call."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        return said(run), [str(each.message) for each in seen]


# ------------------------------------------------------------------------------------ constructors

CONSTRUCTIONS = {
    "width 0": ((0, 2), {}),
    "width below 0": ((-16, 2), {}),
    "no head": ((16, 0), {}),
    "heads that do not divide": ((16, 3), {}),
    "more heads than width": ((2, 4), {}),
    "width as text": (("16", 2), {}),
    "heads as text": ((16, "2"), {}),
    "kdim as text": ((16, 2), {"kdim": "6"}),
    "kdim below 0": ((16, 2), {"kdim": -1}),
    "kdim 0": ((16, 2), {"kdim": 0}),
    "an integer dtype": ((16, 2), {"dtype": torch.long}),
    "unknown": ((16, 2), {"depth": 3}),
    "nothing": ((), {}),
    "too many": ((16, 2, 0.0, True, False, False, None, None, False, None, None, 1), {}),
}


@pytest.mark.parametrize("case", CONSTRUCTIONS)
def test_attention_constructor_refuses_as_torch(case):
    arguments, settings = CONSTRUCTIONS[case]
    outcomes = [ends_of(lambda cls=cls: cls(*arguments, **settings)) for cls in CLASSES]
    if case == "too many":
        # torch counts its own arguments, and a keyword-only option of ours adds none.
        assert outcomes[0][0][0] == outcomes[1][0][0] == "TypeError"
    else:
        assert outcomes[0] == outcomes[1]


# ------------------------------------------------------------------------------------ calls


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def given(query=(L, N, E), key=(S, N, E), value=None, dtypes=(torch.float32,) * 3) -> tuple:
    """Query, key and value of zeros; the value is shaped as the key unless it is given."""
    shapes = (query, key, value or key)
    return tuple(zeros(*shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))


FLAGS = torch.bool
WIDE = torch.float64
CALLS = {
    "1-D query": (given(query=(E,)), {}),
    "4-D query": (given(query=(1, L, N, E)), {}),
    "4-D all": (given((1, L, N, E), (1, S, N, E)), {}),
    "1-D all": (given((E,), (E,)), {}),
    "2-D query, 3-D key": (given(query=(L, E)), {}),
    "3-D query, 2-D key": (given(key=(S, E)), {}),
    "3-D query and key, 2-D value": (given(value=(S, E)), {}),
    "query too wide": (given(query=(L, N, E + 1)), {}),
    "query too narrow": (given(query=(L, N, E - 1)), {}),
    "key too wide": (given(key=(S, N, E + 1)), {}),
    "value too wide": (given(value=(S, N, E + 1)), {}),
    "all too wide": (given((L, N, E + 2), (S, N, E + 2)), {}),
    "other length of the value": (given(value=(S + 1, N, E)), {}),
    "other batch of the value": (given(value=(S, N + 1, E)), {}),
    "other batch of the key": (given(key=(S, N + 1, E)), {}),
    "batch of 1 of the key": (given(key=(S, 1, E)), {}),
    "batch of 1 of the query": (given(query=(L, 1, E)), {}),
    "no key": (given(key=(0, N, E)), {}),
    "no query": (given(query=(0, N, E)), {}),
    "no batch at all": (given((L, 0, E), (S, 0, E)), {}),
    "unbatched, too wide": (given((L, E + 1), (S, E + 1)), {}),
    "unbatched, other length of the value": (given((L, E), (S, E), (S + 1, E)), {}),
    "float64": (given(dtypes=(WIDE,) * 3), {}),
    "float64 query": (given(dtypes=(WIDE, torch.float32, torch.float32)), {}),
    "float64 key": (given(dtypes=(torch.float32, WIDE, torch.float32)), {}),
    "float64 value": (given(dtypes=(torch.float32, torch.float32, WIDE)), {}),
    "bfloat16": (given(dtypes=(torch.bfloat16,) * 3), {}),
    "integers": (given(dtypes=(torch.long,) * 3), {}),
    "bools": (given(dtypes=(FLAGS,) * 3), {}),
    "complex": (given(dtypes=(torch.complex64,) * 3), {}),
    "no tensors": (([[1.0]], [[1.0]], [[1.0]]), {}),
    "None": ((None, None, None), {}),
    "key None": ((zeros(L, N, E), None, None), {}),
    "value missing": ((zeros(L, N, E), zeros(S, N, E)), {}),
    "nothing": ((), {}),
    "unknown name": (given(), {"mask": zeros(L, S)}),
    # attn_mask
    "mask of integers": (given(), {"attn_mask": zeros(L, S, dtype=torch.long)}),
    "mask of bytes": (given(), {"attn_mask": zeros(L, S, dtype=torch.uint8)}),
    "mask too wide": (given(), {"attn_mask": zeros(L, S + 1, dtype=FLAGS)}),
    "mask too high": (given(), {"attn_mask": zeros(L + 1, S, dtype=FLAGS)}),
    "float mask too wide": (given(), {"attn_mask": zeros(L, S + 1)}),
    "mask transposed": (given(), {"attn_mask": zeros(S, L, dtype=FLAGS)}),
    "mask of one row": (given(), {"attn_mask": zeros(1, S, dtype=FLAGS)}),
    "mask (1, L, S)": (given(), {"attn_mask": zeros(1, L, S, dtype=FLAGS)}),
    "mask (N, L, S)": (given(), {"attn_mask": zeros(N, L, S, dtype=FLAGS)}),
    "mask (H, L, S)": (given(), {"attn_mask": zeros(H + 1, L, S, dtype=FLAGS)}),
    "float mask (1, L, S)": (given(), {"attn_mask": zeros(1, L, S)}),
    "mask (N H, L, S + 1)": (given(), {"attn_mask": zeros(N * H, L, S + 1, dtype=FLAGS)}),
    "1-D mask": (given(), {"attn_mask": zeros(S, dtype=FLAGS)}),
    "4-D mask": (given(), {"attn_mask": zeros(N, H, L, S, dtype=FLAGS)}),
    "0-D mask": (given(), {"attn_mask": zeros(dtype=FLAGS)}),
    "float64 mask": (given(), {"attn_mask": zeros(L, S, dtype=WIDE)}),
    "bfloat16 mask": (given(), {"attn_mask": zeros(L, S, dtype=torch.bfloat16)}),
    "complex mask": (given(), {"attn_mask": zeros(L, S, dtype=torch.complex64)}),
    "mask as a list": (given(), {"attn_mask": [[True]]}),
    "unbatched, mask (1, L, S)": (given((L, E), (S, E)), {"attn_mask": zeros(1, L, S, dtype=FLAGS)}),
    "unbatched, mask (H, L, S + 1)": (given((L, E), (S, E)), {"attn_mask": zeros(H, L, S + 1, dtype=FLAGS)}),
    "unbatched, mask too wide": (given((L, E), (S, E)), {"attn_mask": zeros(L, S + 1, dtype=FLAGS)}),
    "unbatched, 1-D mask": (given((L, E), (S, E)), {"attn_mask": zeros(S, dtype=FLAGS)}),
    # key_padding_mask
    "padding of integers": (given(), {"key_padding_mask": zeros(N, S, dtype=torch.long)}),
    "padding too long": (given(), {"key_padding_mask": zeros(N, S + 1, dtype=FLAGS)}),
    "padding too short": (given(), {"key_padding_mask": zeros(N, S - 1, dtype=FLAGS)}),
    "padding transposed": (given(), {"key_padding_mask": zeros(S, N, dtype=FLAGS)}),
    "padding of another batch": (given(), {"key_padding_mask": zeros(N + 1, S, dtype=FLAGS)}),
    "padding of a batch of 1": (given(), {"key_padding_mask": zeros(1, S, dtype=FLAGS)}),
    "1-D padding": (given(), {"key_padding_mask": zeros(S, dtype=FLAGS)}),
    "3-D padding": (given(), {"key_padding_mask": zeros(N, 1, S, dtype=FLAGS)}),
    "float64 padding": (given(), {"key_padding_mask": zeros(N, S, dtype=WIDE)}),
    "padding as a list": (given(), {"key_padding_mask": [[True]]}),
    "unbatched, 2-D padding": (given((L, E), (S, E)), {"key_padding_mask": zeros(1, S, dtype=FLAGS)}),
    "unbatched, padding too long": (given((L, E), (S, E)), {"key_padding_mask": zeros(S + 1, dtype=FLAGS)}),
    # both masks, hints
    "integers beside bools": (
        given(),
        {"attn_mask": zeros(L, S, dtype=torch.long), "key_padding_mask": zeros(N, S, dtype=FLAGS)},
    ),
    "floats beside bools": (
        given(),
        {"attn_mask": zeros(L, S), "key_padding_mask": zeros(N, S, dtype=FLAGS)},
    ),
    "two widths of floats": (
        given(),
        {"attn_mask": zeros(L, S), "key_padding_mask": zeros(N, S, dtype=WIDE)},
    ),
    "mask too wide beside padding": (
        given(),
        {"attn_mask": zeros(L, S + 1, dtype=FLAGS), "key_padding_mask": zeros(N, S, dtype=FLAGS)},
    ),
    "causal without a mask": (given(), {"is_causal": True}),
    "causal without a mask, padded": (
        given(),
        {"is_causal": True, "key_padding_mask": zeros(N, S, dtype=FLAGS)},
    ),
    "causal, mask too wide": (given(), {"is_causal": True, "attn_mask": zeros(L, S + 1, dtype=FLAGS)}),
    "causal, mask of integers": (given(), {"is_causal": True, "attn_mask": zeros(L, S, dtype=torch.long)}),
    "causal, 1-D mask": (given(), {"is_causal": True, "attn_mask": zeros(S, dtype=FLAGS)}),
}
SETTINGS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "kdim and vdim": {"kdim": E, "vdim": E + 1},
    "further keys": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "output"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("case", CALLS)
def test_attention_call_ends_as_torchs(case, settings, need_weights):
    """The same error or the same answer, and the same warnings, training and in evaluation."""
    inputs, keywords = CALLS[case]
    layers = attention(**settings)
    for training in (True, False):
        outcomes, results = [], []
        for layer in layers:
            call = functools.partial(layer.train(training), *inputs, need_weights=need_weights, **keywords)
            outcomes.append(ends_of(lambda call=call, results=results: results.append(call())))
        assert outcomes[0] == outcomes[1]
        if results:
            torch.testing.assert_close(*results)


def test_attention_calls_that_torch_refuses_are_most_of_the_table():
    """The table above compares errors, and the errors are of more than one kind."""
    _, stock = attention()
    outcomes = [said(lambda case=case: stock(*case[0], **case[1])) for case in CALLS.values()]
    refused = [kind for kind, _ in outcomes if kind != "no error"]
    assert len(refused) > 50 and {"AssertionError", "RuntimeError", "TypeError"} <= set(refused)


LARGE = {
    "mask (N, L, S)": ({}, {"attn_mask": zeros(4, 130, 200, dtype=FLAGS)}),
    "mask (1, L, S)": ({}, {"attn_mask": zeros(1, 130, 200)}),
    "padding too long": ({}, {"key_padding_mask": zeros(4, 201, dtype=FLAGS)}),
    "padding transposed": ({}, {"key_padding_mask": zeros(200, 4, dtype=FLAGS)}),
    "value too long": ({"value": (201, 4, 96)}, {}),
    "batch of the key": ({"key": (200, 3, 96)}, {}),
    "query too wide": ({"query": (130, 4, 97)}, {}),
}


@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "output"])
def test_attention_call_ends_as_torchs_at_real_sizes(case, need_weights):
    shapes, keywords = LARGE[case]
    inputs = given(**{"query": (130, 4, 96), "key": (200, 4, 96), **shapes})
    outcomes = []
    for cls in CLASSES:
        layer = cls(96, 8)
        outcomes.append(said(lambda layer=layer: layer(*inputs, need_weights=need_weights, **keywords)))
    assert outcomes[0] == outcomes[1] and outcomes[1][0] != "no error"


# ------------------------------------------------------------------------------------ torch's fast path

FAST = {
    name: CALLS[name]
    for name in (
        "mask of integers",
        "padding of integers",
        "causal without a mask",
        "floats beside bools",
        "nothing",
        "None",
        "unknown name",
    )
}
FAST |= {
    "mask too wide": ((), {"attn_mask": zeros(L, L + 1, dtype=FLAGS)}),
    "mask (1, L, L)": ((), {"attn_mask": zeros(1, L, L, dtype=FLAGS)}),
    "padding too long": ((), {"key_padding_mask": zeros(N, L + 1, dtype=FLAGS)}),
    "too wide": ((zeros(N, L, E + 1),) * 3, {}),
    "float64": ((zeros(N, L, E, dtype=WIDE),) * 3, {}),
    "integers": ((zeros(N, L, E, dtype=torch.long),) * 3, {}),
}


@each_backend
@pytest.mark.parametrize("case", FAST)
def test_attention_fast_path_refuses_where_torchs_does(backend, case):
    """In evaluation without gradients the text is that of torch's fused operator; the refusal must agree."""
    given_inputs, keywords = FAST[case]
    x = zeros(N, L, E)
    inputs = given_inputs if case in ("nothing", "None", "too wide", "float64", "integers") else (x, x, x)
    keywords = {name: fitted(each) for name, each in keywords.items()}
    ours, stock = (layer.eval() for layer in attention(batch_first=True))
    with torch.no_grad(), pyarch.backend(backend):
        mine, theirs = (said(lambda layer=layer: layer(*inputs, **keywords)) for layer in (ours, stock))
    assert (mine[0] == "no error") == (theirs[0] == "no error"), (mine, theirs)


def fitted(mask):
    """A mask of the table above for L keys instead of S."""
    if isinstance(mask, torch.Tensor) and mask.shape[-1] == S:
        return mask[..., :L]
    return mask
