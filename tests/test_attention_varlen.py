"""attention_varlen on every backend that takes CPU tensors: each sequence held to float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pyarch
from pyarch.ops import attention_varlen, scaled_dot_product_attention
from tests.attention_cases import DTYPES, each_dtype, table
from tests.varlen_cases import VarlenCase, every_backend, need, prove, run

OPERATOR = "attention_varlen"


def heads_first(tokens: Tensor) -> Tensor:
    """(T, H, D) as a view of (H, T, D)."""
    return tokens.transpose(0, 1).contiguous().transpose(0, 1)


def part_of_a_projection(tokens: Tensor) -> Tensor:
    """A third of something three times as wide, with NaN beside it."""
    wide = tokens.new_full((tokens.shape[0], 3, *tokens.shape[1:]), float("nan"))
    wide[:, 1] = tokens
    return wide[:, 1]


def features_first(tokens: Tensor) -> Tensor:
    """The last dimension outermost in memory."""
    return tokens.movedim(-1, 0).contiguous().movedim(0, -1)


CASES = table(
    VarlenCase(),
    VarlenCase(()),
    VarlenCase((0, 0)),
    VarlenCase((1,)),
    VarlenCase((0, 7, 0, 0, 3, 0), causal=True),
    VarlenCase((3, 0, 4, 2), (5, 6, 0, 2), sinks=True, lse_grad=True),
    VarlenCase((1, 1, 1, 1), (1, 300, 0, 70), heads=4, kv_heads=2),
    VarlenCase(
        (1, 2, 2), (500, 3, 260), heads=4, kv_heads=1, causal=True, offset="end", dim=40, value_dim=24
    ),
    VarlenCase((260, 3, 33, 64, 1), heads=4, kv_heads=2, dim=16, value_dim=16),
    VarlenCase((260, 3, 33, 64, 1), causal=True, dim=16, value_dim=5),
    VarlenCase((9, 40), (40, 9), causal=True),
    VarlenCase((9, 40), (40, 9), causal=True, offset="end"),
    VarlenCase((9, 40), (40, 9), causal=True, offset=3),
    VarlenCase((70, 20), window=(5, 2)),
    VarlenCase((70, 20), (90, 31), window=(5, 0), offset="end", sinks=True),
    VarlenCase((70, 20), (31, 4), window=(3, 1), lse_grad=True),
    VarlenCase((33, 20), softcap=2.0, causal=True, sinks=True, heads=4, kv_heads=2),
    VarlenCase((33, 20), dim=59, value_dim=111, lse_grad=True, window=(None, 3)),
    *(VarlenCase((12, 5), layout=each) for each in (heads_first, part_of_a_projection, features_first)),
)
MANY = {
    f"{name}, {dtype}".replace("torch.", ""): (case, dtype)
    for dtype in DTYPES
    for name, case in CASES.items()
    if dtype == torch.float32 or sum(case.lengths) < 200
}


@pytest.mark.parametrize(("case", "dtype"), MANY.values(), ids=MANY)
@every_backend
def test_attention_varlen_results_and_gradients(backend, case, dtype, monkeypatch):
    backend.serve(monkeypatch)
    results = prove(backend, case, dtype)
    sees = any(queries and keys for queries, keys in zip(case.lengths, case.of_keys, strict=True))
    assert bool(results["grad value"].any()) == sees


def test_attention_varlen_in_float64():
    """As an ordinary call: what no kernel takes runs on torch or the reference."""
    case = VarlenCase((5, 0, 9), causal=True, lse_grad=True)
    query, key, value = (case.tensors(torch.float64)[name] for name in ("query", "key", "value"))
    out = attention_varlen(query, key, value, case.ends(case.lengths), is_causal=True)
    for first, end in ((0, 5), (5, 14)):
        one = [each[first:end].transpose(0, 1)[None] for each in (query, key, value)]
        exact = torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True)
        torch.testing.assert_close(out[first:end], exact[0].transpose(0, 1))


@every_backend
def test_attention_varlen_nothing_leaks_into_another_sequence(backend, monkeypatch):
    """NaN in one sequence, its gradients too, leaves the bits of the others as they are."""
    backend.serve(monkeypatch)
    generator = torch.Generator().manual_seed(3)
    query, key, value, grad = (torch.randn(90, 2, 16, generator=generator) for _ in range(4))
    ends = torch.tensor([0, 40, 55, 90])

    def outcome(*tensors):
        leaves = [each.clone().requires_grad_() for each in tensors[:3]]
        with pyarch.backend(backend.name):
            out, lse = attention_varlen(*leaves, ends, is_causal=True, return_lse=True)
            return out.detach(), lse.detach().T, *torch.autograd.grad(out, leaves, tensors[3])

    clean = outcome(query, key, value, grad)
    spoiled = [each.clone() for each in (query, key, value, grad)]
    for each in spoiled:
        each[40:55] = float("nan")
    found = outcome(*spoiled)
    for is_clean, is_spoiled in zip(clean, found, strict=True):
        assert torch.equal(is_clean[:40], is_spoiled[:40]) and torch.equal(is_clean[55:], is_spoiled[55:])
    assert found[0][40:55].isnan().all()


@every_backend
def test_attention_varlen_keys_that_nobody_sees_may_hold_nan(backend, monkeypatch):
    backend.serve(monkeypatch)
    case = VarlenCase((3, 40), (9, 90), causal=True)
    given = case.tensors(torch.float32)
    tensors = [given[name] for name in ("query", "key", "value")]
    ends = case.ends(case.lengths), case.ends(case.of_keys)
    with pyarch.backend(backend.name):
        clean = attention_varlen(*tensors, *ends, is_causal=True)
        for each in tensors[1:]:
            each[3:9], each[49:] = float("nan"), float("nan")
        leaves = [each.requires_grad_() for each in tensors]
        spoiled = attention_varlen(*leaves, *ends, is_causal=True)
        gradients = torch.autograd.grad(spoiled, leaves, given["grad out"])
    assert torch.equal(clean, spoiled.detach())
    assert all(each.isfinite().all() for each in gradients) and not gradients[1][3:9].any()


@every_backend
@each_dtype
def test_attention_varlen_repeats_to_the_bit(backend, dtype, monkeypatch):
    backend.serve(monkeypatch)
    case = VarlenCase((260, 3, 33, 64, 1), heads=4, kv_heads=2, causal=True)
    need(backend, case, dtype)
    first, second = (run(backend, case, dtype) for _ in range(2))
    for name, result in first.items():
        assert result is None or torch.equal(result, second[name]), name


@pytest.mark.parametrize("threads", [2, 7])
@every_backend
def test_attention_varlen_on_several_threads(backend, threads, monkeypatch):
    """One long sequence among short ones: its heads are fewer than the threads, so that they are split."""
    backend.serve(monkeypatch)
    case = VarlenCase((3, 500, 17), heads=2, kv_heads=1, dim=64, value_dim=64, causal=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        prove(backend, case, torch.float32)
    finally:
        torch.set_num_threads(before)


@every_backend
def test_attention_varlen_of_one_sequence_is_the_plain_call(backend, monkeypatch):
    backend.serve(monkeypatch)
    query, key, value = (torch.randn(50, 3, 8) for _ in range(3))
    with pyarch.backend(backend.name):
        out = attention_varlen(query, key, value, torch.tensor([0, 50]), window=(4, 1))
        four = [each.transpose(0, 1)[None] for each in (query, key, value)]
        one = scaled_dot_product_attention(*four, window=(4, 1))
    torch.testing.assert_close(out, one[0].transpose(0, 1))
