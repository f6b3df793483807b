"""The attention operators between backends and users: metadata, choices, registration, autograd."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pyarch
from pyarch import dispatch, hardware
from pyarch.ops import attention, attention_measured
from pyarch.ops.attention_call import describe, misfit
from pyarch.reference import attention as reference
from tests.attention_cases import SOME, Case, cases, heads_last, table
from tests.attention_functions import close, drawn, each_backend, ours, outcome, ran, stock

OPERATOR = "attention"
CPU = torch.device("cpu")
FORWARD_OP = torch.ops.pyarch.attention_forward.default
BACKWARD_OP = torch.ops.pyarch.attention_backward.default
WEIGHTS_OP = torch.ops.pyarch.attention_weights.default
OPS = (attention.FORWARD, attention.BACKWARD, attention.WEIGHTS)
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


# ------------------------------------------------------------------------------------ metadata and refusals


def call_of(case, dtype=torch.float32, save=True):
    return describe(*case.operands(dtype)[:5], save)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(5, 7), dict(batch=2, heads=2, kv_heads=2, queries=5, keys=7, head_dim=8, value_dim=8)),
        (Case(heads=4, kv_heads=2, value_dim=5), dict(heads=4, kv_heads=2, value_dim=5, save=True)),
        (Case(causal=True, left=3, right=0, dilation=2), dict(is_causal=True, left=3, right=0, dilation=2)),
        (Case(global_tokens=2, offset=4, left=1), dict(global_tokens=2, query_offset=4, right=None)),
        (Case(softcap=2.0, dropout=0.1), dict(softcap=True, dropout=True, mask=False, bias=False)),
        (Case(mask="qk", padding=True), dict(mask=True, padding=True, global_mask=False, sinks=False)),
        (Case(bias="hqk", sinks=True, global_mask=True), dict(bias=True, sinks=True, global_mask=True)),
        (Case(batch=0, keys=0), dict(batch=0, keys=0, dtype=torch.float32, device="cpu")),
    ],
    ids=str,
)
def test_attention_call_describes_the_tensors(case, expected):
    call = call_of(case)
    assert {name: getattr(call, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("case", "is_stock"),
    [
        (Case(), True),
        (Case(causal=True), True),
        (Case(causal=True, offset=1), False),
        (Case(left=3), False),
        (Case(dilation=2), False),
        (Case(mask="qk"), False),
        (Case(bias="qk"), False),
        (Case(padding=True), False),
        (Case(softcap=1.0), False),
        (Case(sinks=True), False),
        (Case(dropout=0.5), False),
        (Case(value_dim=5), False),
    ],
    ids=str,
)
def test_attention_call_knows_what_torchs_fused_kernel_takes(case, is_stock):
    assert call_of(case).is_stock == is_stock


@pytest.mark.parametrize(
    ("backend", "change", "reason"),
    [
        ("triton", {}, "device cpu, needs a GPU"),
        ("triton", {"device": "cuda", "dtype": torch.float64}, "dtype torch.float64, needs float32"),
        ("cuda", {"device": "cuda"}, "CUDA C++ kernels not written yet"),
        ("cpu", {"device": "cuda"}, "device cuda, needs cpu"),
        ("cpu", {"dtype": torch.float64}, "dtype torch.float64, needs float32"),
    ],
)
@each_op
def test_attention_refusals(op, backend, change, reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        op.choose(call_of(Case())._replace(**change), backend)


@each_op
def test_attention_triton_takes_cpu_tensors_when_interpreted(op, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    verdict = next(each for each in op.explain(call_of(Case())) if each.backend == "triton")
    assert not any("device" in reason for reason in verdict.refusals)


@each_op
def test_attention_reference_takes_every_call(op):
    for case in SOME.values():
        (verdict,) = (each for each in op.explain(call_of(case)) if each.backend == "reference")
        assert verdict.accepts


def test_attention_misfit_finds_nothing_wrong_with_a_good_call():
    good = (
        (2, 4, 5, 8),
        (2, 2, 7, 8),
        (2, 2, 7, 3),
        (1, 1, 5, 7),
        (2, 1, 1, 7),
        (2, 7),
        (2, 9),
        (4,),
        (1, 4, 11),
    )
    assert misfit(*good) is None
    for place, wrong in enumerate(
        [(2, 3, 5, 8), (2, 2, 7, 9), (2, 2, 6, 3), (5, 7), (3, 1, 1, 7), (2, 8), (3, 9), (2,), (1, 4, 12)]
    ):
        assert misfit(*good[:place], wrong, *good[place + 1 :]), place


# ------------------------------------------------------------------------------------ concessions


def forget_decisions():
    for op in OPS:
        op._choices.clear()
    attention._decided.clear()


@pytest.fixture
def fresh_choices():
    """Decisions taken under a pretended table must not outlive it."""
    yield
    forget_decisions()


def concede(monkeypatch, **region):
    """Pretend that a sweep had found torch faster there; decisions already taken are forgotten."""
    slower = attention_measured.Slower("over 2 shapes 0.50x of torch", **region)
    monkeypatch.setattr(attention_measured, "SLOWER", {hardware.architecture(CPU): (slower,)})
    forget_decisions()


def test_attention_concessions_quote_the_measurement(monkeypatch, fresh_choices):
    call = call_of(Case())
    concede(monkeypatch, training=True, queries=(1, 64))
    (reason,) = attention_measured.forward_concessions(call)
    assert "measured over 2 shapes 0.50x of torch" in reason and "see benchmarks/results" in reason
    for other in (dict(save=False), dict(device="cuda"), dict(queries=65), dict(mask=True), dict(left=3)):
        assert not list(attention_measured.forward_concessions(call._replace(**other))), other


def test_attention_a_call_left_to_torch_is_torchs(monkeypatch, fresh_choices):
    """Bit by bit, forward and backward; what torch has no fused kernel for stays ours."""
    concede(monkeypatch)
    tensors = drawn()
    monkeypatch.setattr(pyarch.native, "serving", lambda: (None, "no library in this test"))
    found, seen = ran("auto", lambda: ours(*tensors))
    assert seen == [("attention_forward", "torch")] and torch.equal(found, stock(*tensors))
    close(outcome(ours, tensors), outcome(stock, tensors))


# ------------------------------------------------------------------------------------ explain


def test_attention_explain_says_what_every_backend_says():
    operands = Case(sinks=True).operands(torch.float32)
    said = attention.explain(*operands[:5])
    assert set(said) == {"forward", "backward"}
    for verdicts in said.values():
        assert [each.backend for each in verdicts] == ["triton", "cuda", "cpu", "torch", "reference"]
        (of_torch,) = (each for each in verdicts if each.backend == "torch")
        assert of_torch.refusals == ("sinks, stock SDPA has none",)


def test_attention_explain_of_what_goes_straight_to_torch():
    query, key, value = drawn()
    for tensors in ((query.to(torch.complex64), key, value), (query[..., :5], key, value)):
        for verdicts in attention.explain(*tensors).values():
            (verdict,) = verdicts
            assert verdict.backend == "torch"
            assert "torch's own operator runs it directly" in verdict.concessions[0]


def test_attention_triton_leaves_wide_heads_with_a_bias_of_distances():
    """Backward only, where the registers do not suffice."""
    operands = Case(3, 4, dim=136, distance="h").operands(torch.bfloat16)
    call = describe(*operands[:5], True)
    words = "head_dim 136, needs at most 128"
    found = {
        op: next(each for each in op.explain(call) if each.backend == "triton").refusals
        for op in (attention.FORWARD, attention.BACKWARD)
    }
    assert words in found[attention.BACKWARD] and words not in found[attention.FORWARD]


def test_attention_float64_runs_on_a_backend_that_takes_it():
    tensors = drawn(dtype=torch.float64)
    found, seen = ran("auto", lambda: outcome(ours, tensors))
    assert {op for op, _ in seen} == {"attention_forward", "attention_backward"}
    assert {backend for _, backend in seen} <= {"torch", "reference"}
    close(found, outcome(stock, tensors), 1e-12)


# ------------------------------------------------------------------------------------ the opaque operators

OPCHECK = table(
    Case(5, 7, causal=True, heads=4, kv_heads=2, value_dim=3, layout=heads_last, left=2, dilation=2),
    Case(5, 7, mask="bqk", bias="hqk", padding=True, sinks=True, lse_grad=True, lost=True, dropout=0.5),
    Case(5, 7, distance="h", causal=True),
)


@cases(OPCHECK)
@each_backend
@pytest.mark.unpoisoned
def test_attention_opcheck(backend, case):
    operands = case.operands(torch.float32)
    options = *operands.extras, *operands.settings
    for save in (True, False):
        torch.library.opcheck(FORWARD_OP, (*operands[:3], *options, save, backend))
    out, lse = FORWARD_OP(*operands[:3], *options, True, backend)
    given = operands.grad_out, operands.grad_lse, *operands[:3], out, lse
    for needs in (operands.needs, [False, True, False, False, False, False]):
        torch.library.opcheck(BACKWARD_OP, (*given, *options, needs, backend))
    for mean in (True, False):
        torch.library.opcheck(WEIGHTS_OP, (*operands[:2], lse, *options, mean, backend))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_attention_opcheck_of_torchs_route(dtype):
    operands = Case(5, 7, mask="qk").operands(dtype)
    options = *operands.extras, *operands.settings
    torch.library.opcheck(FORWARD_OP, (*operands[:3], *options, True, "torch"))
    out, lse = FORWARD_OP(*operands[:3], *options, True, "torch")
    given = operands.grad_out, None, *operands[:3], out, lse
    torch.library.opcheck(BACKWARD_OP, (*given, *options, operands.needs, "torch"))


@cases(SOME)
@each_backend
def test_attention_operators_are_the_straight_call(backend, case):
    """The opaque operators give, bit by bit, what a plain eager call gives without them.

    But for a mean of the weights on the CPU: a plain call makes it beside out, the operator from lse.
    """
    operands = case.operands(torch.float32)
    options = *operands.extras, *operands.settings
    out, lse = FORWARD_OP(*operands[:3], *options, True, backend)
    given = dict(return_lse=True, return_weights="mean", backend=backend)
    expected = attention.attend(*operands[:5], **given)
    weights = WEIGHTS_OP(*operands[:2], lse, *options, True, backend)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[2])
    if backend == "cpu":
        torch.testing.assert_close(weights, expected[1], rtol=1e-5, atol=1e-7)
    else:
        assert torch.equal(weights, expected[1])


class Watch(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@each_backend
def test_attention_under_a_dispatch_mode_is_one_operator(backend):
    tensors = drawn()

    def train():
        return outcome(lambda *qkv: ours(*qkv, is_causal=True, window=4), tensors)

    with pyarch.backend(backend):
        straight = train()
        with Watch() as watch:
            watched = train()
    assert watch.seen.count(FORWARD_OP) == watch.seen.count(BACKWARD_OP) == 1
    assert all(torch.equal(one, other) for one, other in zip(straight, watched, strict=True))


@each_backend
def test_attention_weights_are_one_operator_more(backend):
    with pyarch.backend(backend), Watch() as watch:
        ours(*drawn(), return_weights="mean")
    assert [each for each in watch.seen if each.namespace == "pyarch"] == [FORWARD_OP, WEIGHTS_OP]


# ------------------------------------------------------------------------------------ autograd

SMALL = table(
    Case(3, 4, dim=3, value_dim=2, causal=True, lse_grad=True),
    Case(3, 4, dim=3, heads=4, kv_heads=2, bias="hqk", left=1, right=1),
    Case(3, 4, dim=3, mask="bqk", lost=True, sinks=True, softcap=2.0, bias="bk", lse_grad=True),
    Case(3, 4, dim=3, dropout=0.4, padding=True, lost=True),
)


@cases(SMALL)
def test_attention_gradgradcheck(case):
    """First and second derivatives of out and lse against finite differences, in float64."""
    operands = replace(case, batch=1 + case.lost).operands(torch.float64)
    leaves = [each.requires_grad_() for each in operands.differentiable if each is not None]
    present = [each is not None for each in operands.differentiable]

    def run(*given):
        found = iter(given)
        given = operands.with_leaves([next(found) if there else None for there in present])
        out, lse = attention.attend(*given[:5], return_lse=True, backend="reference")
        return (out, lse.nan_to_num(neginf=0.0)) if case.lse_grad else out

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("mean", [False, True], ids=["heads", "mean"])
@cases(dict(list(SMALL.items())[:3]))
def test_attention_gradcheck_of_the_weights(case, mean):
    operands = replace(case, batch=1 + case.lost).operands(torch.float64)
    differentiable = operands.differentiable
    used = [each is not None and place != 2 for place, each in enumerate(differentiable)]
    leaves = [each.requires_grad_() for each, use in zip(differentiable, used, strict=True) if use]

    def run(*given):
        found = iter(given)
        leaves = [next(found) if use else each for each, use in zip(differentiable, used, strict=True)]
        kind = dict(return_weights="mean" if mean else "heads", backend="reference")
        return attention.attend(*operands.with_leaves(leaves)[:5], **kind)[1]

    assert torch.autograd.gradcheck(run, leaves)


@each_backend
def test_attention_saves_no_probabilities(backend):
    """What autograd keeps is what it was given, out and lse: nothing of Tq * Tk."""
    tensors = [each.requires_grad_() for each in drawn(60, 70)]
    kept = []

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    with pyarch.backend(backend), torch.autograd.graph.saved_tensors_hooks(note, lambda each: each):
        ours(*tensors, is_causal=True, dropout_p=0.2)
    assert kept and max(kept) < 60 * 70


@each_backend
def test_attention_decisions_are_remembered_by_what_they_depend_on(backend):
    """The same shapes in another dtype, with another window, gradients or not: each is decided on its own."""
    seen = []
    tensors = drawn()
    attention._decided.clear()
    with pyarch.backend(backend):
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            ours(*(each.to(dtype) for each in tensors))
            seen.append(len(attention._decided))
        ours(*tensors, window=3)
        ours(*(each.clone().requires_grad_() for each in tensors))
        seen.append(len(attention._decided))
    assert seen == [1, 2, 2, 4]


def test_attention_a_recorder_hears_of_remembered_calls():
    tensors, heard = drawn(), []
    ours(*tensors)
    with dispatch.recording(lambda op, call, chosen: heard.append(op.name)):
        ours(*tensors)
        ours(*tensors)
    assert heard == ["attention_forward"] * 2


def test_attention_double_backward_runs_through_the_reference(monkeypatch):
    """Only when the backward is differentiated: the usual backward is the backend's."""
    calls, backward = [], reference.backward
    monkeypatch.setattr(reference, "backward", lambda *given: calls.append(1) or backward(*given))
    leaves = [each.requires_grad_() for each in drawn()]
    with pyarch.backend("torch"):
        torch.autograd.grad(ours(*leaves).sum(), leaves)
        assert not calls
        torch.autograd.grad(ours(*leaves).square().sum(), leaves, create_graph=True)
    assert calls
