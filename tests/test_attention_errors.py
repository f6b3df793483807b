"""Bad calls of scaled_dot_product_attention raise what torch raises, type and text, on whatever backend.

What only our own options can get wrong raises errors of our own, which say what was given and what is needed.
"""

from __future__ import annotations

import re

import pytest
import torch

import pyarch
from pyarch.ops import attention
from tests.attention_cases import Case, native_attention
from tests.attention_functions import drawn, each_backend, ours, stock

OPERATOR = "attention"
ones = torch.ones
Q = ones(2, 4, 5, 8)
K = ones(2, 4, 7, 8)


def failure_of(run) -> tuple[type, str]:
    """The type and text of what `run` raises."""
    with pytest.raises(Exception) as raised:  # noqa: B017
        run()
    return raised.type, str(raised.value)


# ------------------------------------------------------------------------------------ torch's errors

# name: query, key, value, options
CALLS = {
    "one dimension": (ones(8), ones(8), ones(8), {}),
    "no dimension": (ones(()), ones(()), ones(()), {}),
    "value of one dimension": (Q, K, ones(8), {}),
    "widths that differ": (Q, ones(2, 4, 7, 9), K, {}),
    "widths that differ, 3-D": (Q[0], ones(4, 7, 9), K[0], {}),
    "widths that differ, 2-D": (Q[0, 0], ones(7, 9), K[0, 0], {}),
    "lengths that differ": (Q, K, ones(2, 4, 6, 8), {}),
    "lengths that differ, 3-D": (Q[0], K[0], ones(4, 6, 8), {}),
    "batches that differ": (Q, ones(3, 4, 7, 8), ones(3, 4, 7, 8), {}),
    "batches of key and value differ": (Q, K, ones(3, 4, 7, 8), {}),
    "heads that differ": (Q, ones(2, 2, 7, 8), ones(2, 2, 7, 8), {}),
    "heads of key and value differ": (Q, K, ones(2, 2, 7, 8), {}),
    "groups that do not divide": (Q, ones(2, 3, 7, 8), ones(2, 3, 7, 8), {"enable_gqa": True}),
    "groups of key and value differ": (Q, ones(2, 2, 7, 8), ones(2, 4, 7, 8), {"enable_gqa": True}),
    "more groups than heads": (Q, ones(2, 8, 7, 8), ones(2, 8, 7, 8), {"enable_gqa": True}),
    "dtypes that differ": (Q, K.double(), K.double(), {}),
    "value of another dtype": (Q, K, K.bfloat16(), {}),
    "query of another dtype": (Q.half(), K, K, {}),
    "integers": (Q.long(), K.long(), K.long(), {}),
    "bools": (Q.bool(), K.bool(), K.bool(), {}),
    "integer mask": (Q, K, K, {"attn_mask": ones(5, 7, dtype=torch.int64)}),
    "double mask": (Q, K, K, {"attn_mask": ones(5, 7, dtype=torch.float64)}),
    "bfloat16 mask": (Q, K, K, {"attn_mask": ones(5, 7, dtype=torch.bfloat16)}),
    "half mask of bfloat16": (
        Q.bfloat16(),
        K.bfloat16(),
        K.bfloat16(),
        {"attn_mask": ones(5, 7, dtype=torch.float16)},
    ),
    "mask transposed": (Q, K, K, {"attn_mask": ones(7, 5, dtype=torch.bool)}),
    "float mask transposed": (Q, K, K, {"attn_mask": ones(7, 5)}),
    "mask of another batch": (Q, K, K, {"attn_mask": ones(3, 1, 5, 7)}),
    "mask of another head": (Q, K, K, {"attn_mask": ones(3, 5, 7, dtype=torch.bool)}),
    "mask of five dimensions": (Q, K, K, {"attn_mask": ones(1, 1, 1, 5, 7)}),
    "mask of one dimension": (Q, K, K, {"attn_mask": ones(7)}),
    "mask of one dimension, too short": (Q, K, K, {"attn_mask": ones(6)}),
    "mask of no dimension": (Q, K, K, {"attn_mask": ones(())}),
    "mask, 3-D, per head": (Q[0], K[0], K[0], {"attn_mask": ones(3, 5, 7)}),
    "dropout below 0": (Q, K, K, {"dropout_p": -0.1}),
    "dropout above 1": (Q, K, K, {"dropout_p": 1.5}),
    "dropout of text": (Q, K, K, {"dropout_p": "0.1"}),
    "dropout of nothing": (Q, K, K, {"dropout_p": None}),
    "scale of text": (Q, K, K, {"scale": "1"}),
    "scale of a tensor of two": (Q, K, K, {"scale": ones(2)}),
    "causality of text": (Q, K, K, {"is_causal": "yes"}),
    "groups of text": (Q, K, K, {"enable_gqa": "yes"}),
    "a list": ([1.0], K, K, {}),
    "None": (None, K, K, {}),
    "key of None": (Q, None, K, {}),
    "mask of a list": (Q, K, K, {"attn_mask": [1.0]}),
    "meta key": (Q, K.to("meta"), K.to("meta"), {}),
    "sparse query": (ones(5, 8).to_sparse(), K[0, 0], K[0, 0], {}),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@each_backend
def test_attention_errors_are_torchs(backend, call):
    """And where torch takes the call after all, so do we, with its result."""
    *tensors, options = call
    expected = result_or_failure(lambda: stock(*tensors, **options))
    with pyarch.backend(backend):
        found = result_or_failure(lambda: ours(*tensors, **options))
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected)
    else:
        assert found == expected


def result_or_failure(run):
    """What `run` returns, or the type and text of what it raises."""
    try:
        return run()
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, AttributeError) as error:
        # Whether an argument was given by position or by name is not known to what it is handed on to.
        return type(error).__name__, re.sub(r" \(position \d\)", "", str(error))


def test_attention_errors_most_of_the_table_raises():
    """The table above compares errors, not results."""
    taken = [
        name
        for name, (*tensors, options) in CALLS.items()
        if isinstance(result_or_failure(lambda t=tensors, o=options: stock(*t, **o)), torch.Tensor)
    ]
    assert len(taken) <= len(CALLS) // 5, taken


def test_attention_errors_the_texts_users_know():
    """The text that a user most often meets, so that a change in torch's words is seen."""
    kind, text = failure_of(lambda: ours(Q, K, ones(2, 4, 7, 8), ones(5, 7, dtype=torch.int64)))
    assert kind is RuntimeError and text.startswith(
        "Expected attn_mask dtype to be bool or float or to match query dtype, but got attn_mask.dtype: long"
    )


@pytest.mark.parametrize("wrong", [{"depth": 1}, {"need_weights": True}, {"causal": True}], ids=str)
def test_attention_unknown_options_are_type_errors(wrong):
    assert failure_of(lambda: stock(Q, K, K, **wrong))[0] is TypeError
    kind, text = failure_of(lambda: ours(Q, K, K, **wrong))
    assert kind is TypeError and next(iter(wrong)) in text


# ------------------------------------------------------------------------------------ errors of our own

OWN = {
    "window below 0": (dict(window=-1), ValueError, "must reach 0 or more keys"),
    "window below 0 on a side": (dict(window=(3, -2)), ValueError, "got right -2"),
    "window of three": (dict(window=(1, 2, 3)), ValueError, "window must be an integer or (left, right)"),
    "window of a float": (dict(window=1.5), TypeError, "window must hold integers or None, got 1.5"),
    "window of a bool": (dict(window=True), TypeError, "window must hold integers or None, got True"),
    "window of text": (dict(window="3"), TypeError, "window must hold integers or None"),
    "dilation 0": (dict(window=2, dilation=0), ValueError, "dilation must be at least 1, got 0"),
    "dilation of a float": (dict(window=2, dilation=2.0), TypeError, "dilation must be an integer, got 2.0"),
    "global tokens below 0": (dict(global_tokens=-1), ValueError, "global_tokens must be at least 0, got -1"),
    "global tokens of a float": (dict(global_tokens=1.0), TypeError, "global_tokens must be an integer"),
    "global tokens of another dtype": (
        dict(window=1, global_tokens=ones(2, 7)),
        TypeError,
        "the mask of global tokens must be torch.bool, got torch.float32",
    ),
    "global tokens of another batch": (
        dict(window=1, global_tokens=ones(3, 7, dtype=torch.bool)),
        ValueError,
        "the mask of global tokens must be (2, tokens), got (3, 7)",
    ),
    "offset of a float": (dict(query_offset=0.5), TypeError, "query_offset must be an integer, got 0.5"),
    "bias of another shape": (dict(bias=ones(3, 5, 7)), ValueError, "broadcastable to (2, 4, 5, 7)"),
    "bias of another dtype": (dict(bias=ones(5, 7).double()), TypeError, "bias must be torch.float32"),
    "bias of bools": (dict(bias=ones(5, 7, dtype=torch.bool)), TypeError, "got torch.bool"),
    "padding of another shape": (
        dict(key_padding_mask=ones(2, 6, dtype=torch.bool)),
        ValueError,
        "padding must be (batch, keys) = (2, 7), got (2, 6)",
    ),
    "padding of floats": (dict(key_padding_mask=ones(2, 7)), TypeError, "padding must be torch.bool"),
    "sinks of another size": (dict(sinks=ones(3)), ValueError, "sinks must be (heads,) = (4,), got (3,)"),
    "sinks of another dtype": (dict(sinks=ones(4).half()), TypeError, "sinks must be torch.float32"),
    "distances of another length": (
        dict(distance_bias=ones(4, 12)),
        ValueError,
        "distance_bias must be (batch or 1, heads or 1, queries + keys - 1) = (2, 4, 11), got (1, 4, 12)",
    ),
    "distances of another number of heads": (
        dict(distance_bias=ones(3, 11)),
        ValueError,
        "broadcastable to (2, 4",
    ),
    "distances of another rank": (
        dict(distance_bias=ones(1, 2, 4, 11)),
        ValueError,
        "broadcastable to (2, 4",
    ),
    "distances of another dtype": (
        dict(distance_bias=ones(11).half()),
        TypeError,
        "distance_bias must be torch.float32, got torch.float16",
    ),
    "softcap below 0": (dict(softcap=-1.0), ValueError, "softcap must be positive"),
    "weights of another name": (dict(return_weights="sum"), ValueError, "'mean' or 'heads', got 'sum'"),
    "weights of a bool": (dict(return_weights=True), ValueError, "'mean' or 'heads', got True"),
}


@pytest.mark.parametrize("wrong", OWN.values(), ids=OWN)
@each_backend
def test_attention_errors_of_our_own_options(backend, wrong):
    options, kind, words = wrong
    with pyarch.backend(backend), pytest.raises(kind) as raised:
        ours(Q, K, K, **options)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(window=2), "float32"),
        (dict(softcap=1.0), "float32"),
        (dict(return_lse=True), "float32"),
        (dict(return_weights="mean"), "float32"),
        (dict(sinks=ones(4)), "float32"),
        (dict(distance_bias=ones(11)), "float32"),
    ],
    ids=str,
)
def test_attention_options_of_ours_are_not_dropped_where_torch_takes_the_call(options, words):
    """torch computes complex attention, but knows nothing of a window: an error, not torch's result."""
    query, key = (torch.complex(each, each) for each in (Q, K))
    with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError)) as raised:
        ours(query, key, key, **options)
    assert words in str(raised.value) or str(raised.value) == failure_of(lambda: stock(query, key, key))[1]


ATTEND = {
    "ranks": ((Q[0], K, K), {}, ValueError, "query, key and value must be 4-D, got 3-D, 4-D and 4-D"),
    "dtypes": ((Q, K.half(), K), {}, TypeError, "must have one dtype"),
    "heads": ((Q, ones(2, 3, 7, 8), ones(2, 3, 7, 8)), {}, ValueError, "4 query heads cannot share 3 key"),
    "widths": ((Q, ones(2, 4, 7, 9), K), {}, ValueError, "query and key must have one width"),
    "lengths": ((Q, K, ones(2, 4, 6, 8)), {}, ValueError, "key and value must have one length, got 7 and 6"),
    "mask": ((Q, K, K), {"mask": ones(5, 7, dtype=torch.bool)}, ValueError, "mask (5, 7) must be 4-D"),
    "mask of floats": ((Q, K, K), {"mask": ones(1, 1, 5, 7)}, TypeError, "mask must be torch.bool"),
    "seed without dropout": ((Q, K, K), {"seed": torch.tensor(1)}, ValueError, "seed must be given exactly"),
}


@pytest.mark.parametrize("wrong", ATTEND.values(), ids=ATTEND)
@each_backend
def test_attention_errors_of_the_differentiable_entry(backend, wrong):
    tensors, extras, kind, words = wrong
    with pytest.raises(kind) as raised:
        attention.attend(*tensors, attention.Extras(**extras), backend=backend)
    assert words in str(raised.value)


def test_attention_a_good_call_raises_nothing():
    """The errors above are not raised because nothing runs at all."""
    torch.testing.assert_close(ours(Q, K, K), ones(2, 4, 5, 8))
    torch.testing.assert_close(attention.attend(Q, K, K), ones(2, 4, 5, 8))


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("backend", "words"),
    [("triton", "needs a GPU"), ("cuda", "CUDA C\\+\\+ kernels not written yet")],
)
def test_attention_a_backend_asked_for_by_name_refuses_aloud(backend, words, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pyarch.backend(backend), pytest.raises(NotImplementedError, match=words) as raised:
        ours(*drawn())
    assert f"attention_forward: backend '{backend}' refuses this call" in str(raised.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(softcap=2.0), "softcap, stock SDPA has none"),
        (dict(sinks=ones(3)), "sinks, stock SDPA has none"),
        (dict(dropout_p=0.5), "dropout, stock SDPA draws from another random stream"),
    ],
    ids=str,
)
def test_attention_torch_refuses_what_it_has_not(options, words):
    with pyarch.backend("torch"), pytest.raises(NotImplementedError, match=words):
        ours(*drawn(), **options)


def test_attention_the_backward_refuses_aloud_too(monkeypatch):
    """A backend that has a forward alone fails in the backward, and nothing else answers in its stead."""
    leaves = [each.requires_grad_() for each in drawn()]
    with pyarch.backend("reference"):
        out = ours(*leaves)
    (served,) = (each for each in attention.BACKWARD.backends if each.name == "reference")
    monkeypatch.setitem(served.__dict__, "refusals", lambda call: iter(["no backward today"]))
    attention.BACKWARD._choices.clear()
    try:
        with pyarch.backend("reference"), pytest.raises(NotImplementedError, match="no backward today"):
            out.sum().backward()
    finally:
        attention.BACKWARD._choices.clear()


@native_attention
def test_attention_the_cpu_backend_without_its_library_says_how_to_build_it(backend, monkeypatch):
    reason = f"C++ CPU extension for {backend.instruction_set} not built, build it with: ..."
    monkeypatch.setattr(pyarch.native, "serving", lambda: (None, reason))
    operands = Case(9 + len(backend.instruction_set), 11).operands(torch.float32)
    with pyarch.backend("cpu"), pytest.raises(NotImplementedError) as raised:
        ours(*operands[:3])
    assert reason in str(raised.value)
