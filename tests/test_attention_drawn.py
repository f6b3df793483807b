"""Attention of drawn sizes, patterns, masks and layouts, held to the tolerance rule."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.attention_cases import (
    DTYPES,
    EVERY_ATTENTION,
    Case,
    features_first,
    heads_last,
    one_head_for_all,
    one_sample_for_all,
    prove,
    rows_reversed,
)
from tests.conv_cases import contiguous, expanded, misaligned, sliced

OPERATOR = "attention"
LENGTHS = st.one_of(st.integers(1, 12), st.integers(1, 150), st.sampled_from([15, 16, 31, 63, 64, 65, 129]))
WIDTHS = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 40, 59, 64, 65, 80, 96, 111, 128]))
LAYOUTS = st.sampled_from(
    [
        contiguous,
        heads_last,
        features_first,
        sliced,
        misaligned,
        expanded,
        one_head_for_all,
        one_sample_for_all,
        rows_reversed,
    ]
)
OVER = st.sampled_from([None, None, "", "k", "q", "h", "qk", "bk", "hqk", "bqk", "bhqk"])
REACH = st.one_of(st.none(), st.integers(0, 5), st.integers(0, 100))
drawn = settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def sometimes(draw) -> bool:
    return draw(st.integers(0, 3)) == 3


@st.composite
def problems(draw) -> Case:
    """Any call; one that stock SDPA computes too every second time."""
    queries = draw(LENGTHS)
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    dim = draw(WIDTHS)
    is_stocks = draw(st.booleans())
    mask, padding = draw(OVER), sometimes(draw)
    windowed = sometimes(draw)
    return Case(
        queries=queries,
        keys=queries if sometimes(draw) else draw(LENGTHS),
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        dim=dim,
        value_dim=draw(WIDTHS) if sometimes(draw) else dim,
        scale=draw(st.sampled_from([None, None, 0.0, 1.0, -0.3])),
        causal=draw(st.booleans()),
        left=draw(REACH) if windowed else None,
        right=draw(REACH) if windowed else None,
        dilation=draw(st.integers(1, 4)) if sometimes(draw) else 1,
        global_tokens=draw(st.integers(0, 9)) if windowed and sometimes(draw) else 0,
        offset=draw(st.integers(-20, 60)) if sometimes(draw) else 0,
        softcap=0.0 if is_stocks else draw(st.sampled_from([0.0, 1.0, 30.0])),
        dropout=0.0 if is_stocks else draw(st.sampled_from([0.0, 0.0, 0.2, 0.7])),
        mask=mask,
        bias=draw(OVER),
        distance=draw(st.sampled_from([None, None, "", "b", "h", "bh"])),
        padding=padding,
        global_mask=windowed and sometimes(draw),
        sinks=not is_stocks and sometimes(draw),
        lost=not is_stocks and (mask is not None or padding) and sometimes(draw),
        lse_grad=not is_stocks and draw(st.booleans()),
        layout=draw(LAYOUTS),
        grad_layout=draw(LAYOUTS),
        seed=draw(st.integers(0, 2**16)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [each for each in EVERY_ATTENTION if each.name != "torch"], ids=str)
@drawn
@given(case=problems())
def test_attention_drawn_calls(backend, dtype, monkeypatch, case):
    backend.serve(monkeypatch)
    prove(backend, case, dtype)
