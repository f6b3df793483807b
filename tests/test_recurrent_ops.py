"""The recurrent operator between backends and users: metadata, choices, registration, autograd."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pyarch
from pyarch import dispatch, ops
from pyarch.ops import recurrent, recurrent_call, recurrent_measured
from tests.recurrent_cases import SOME, Case, cases, every_mode, given
from tests.recurrent_functions import FUNCTIONS, extra, flat, recorded, stock_layer
from tests.recurrent_models import close, each_backend, each_mode

OPERATOR = "recurrent"
FORWARD_OP = torch.ops.pyarch.recurrent_forward.default
BACKWARD_OP = torch.ops.pyarch.recurrent_backward.default


def run(mode, input, hx, weights, batch_sizes=None, **settings):
    defaults = dict(num_layers=1, bidirectional=False, dropout=0.0, training=False, backend="auto")
    return recurrent.run(mode, input, hx, weights, batch_sizes, **defaults | settings)


# ------------------------------------------------------------------------------------ metadata and refusals


def call_of(case, dtype=torch.float32, save=True):
    input, h0, _, weights, batch_sizes, _ = case.operands(dtype)
    return recurrent_call.describe(case.mode, input, h0, weights, batch_sizes, save)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case("gru"), dict(steps=5, batch=3, rows=15, input_size=4, hidden_size=6, proj_size=0, bias=True)),
        (Case("lstm", proj=2, directions=2), dict(proj_size=2, hidden_size=6, directions=2, packed=False)),
        (Case("rnn_relu", bias=False), dict(mode="rnn_relu", bias=False, gates=1)),
        (Case("lstm", lengths=(4, 1, 1)), dict(steps=4, batch=3, rows=6, packed=True, gates=4)),
        (Case("gru", batch=0), dict(batch=0, rows=0, dtype=torch.float32, device="cpu")),
    ],
)
def test_recurrent_call_describes_the_tensors(case, expected):
    call = call_of(case)
    assert {name: getattr(call, name) for name in expected} == expected


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
@pytest.mark.parametrize("op", [recurrent.FORWARD, recurrent.BACKWARD], ids=lambda op: op.name)
def test_recurrent_refusals(op, backend, change, reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        op.choose(call_of(Case("lstm"))._replace(**change), backend)


def test_recurrent_triton_takes_cpu_tensors_when_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    verdict = next(
        each for each in recurrent.FORWARD.explain(call_of(Case("gru"))) if each.backend == "triton"
    )
    assert not any("device" in reason for reason in verdict.refusals)


# ------------------------------------------------------------------------------------ concessions


def concede(monkeypatch, *modes, hidden=(0, 1e9), training=None):
    """Pretend that a sweep had found torch faster there; decisions already taken are forgotten."""
    region = recurrent_measured.Slower(
        "over 2 shapes 0.50x of torch", cell=False, modes=modes, hidden_size=hidden, training=training
    )
    monkeypatch.setattr(recurrent_measured, "SLOWER", {})
    monkeypatch.setattr(recurrent_measured, "ZEN_5", (region,))
    forget_decisions()


def forget_decisions():
    recurrent.FORWARD._choices.clear()
    recurrent.decided.clear()


@pytest.fixture
def fresh_choices():
    """Decisions taken under a pretended table must not outlive it."""
    yield
    forget_decisions()


def test_recurrent_concessions_quote_the_measurement(monkeypatch):
    call = call_of(Case("gru"))
    assert not list(recurrent_measured.forward_concessions(call._replace(device="cuda")))
    concede(monkeypatch, "gru", training=True)
    (reason,) = recurrent_measured.forward_concessions(call)
    said = "gru with 5 steps, batch 3, 6 hidden units: measured over 2 shapes 0.50x of torch"
    assert reason == f"{said}, see benchmarks/results"
    for other in (call._replace(mode="lstm"), call._replace(save=False), call._replace(device="cuda")):
        assert not list(recurrent_measured.forward_concessions(other))


def test_recurrent_a_stack_left_to_torch_is_one_stock_call(monkeypatch, fresh_choices):
    concede(monkeypatch, "gru")
    layer = stock_layer("gru", num_layers=3)
    x, h0 = torch.randn(5, 3, 4), torch.randn(3, 3, 6)
    stacks = []
    stock = recurrent.run_stock
    monkeypatch.setattr(recurrent, "run_stock", lambda *given: stacks.append(given[6]) or stock(*given))
    (output, h_n, c_n), seen = recorded(lambda: run("gru", x, (h0,), layer._flat_weights, num_layers=3))
    assert seen == [("recurrent_forward", "torch")] * 3 and stacks == [3] and c_n is None
    expected = layer(x, h0)
    assert torch.equal(output, expected[0]) and torch.equal(h_n, expected[1])
    assert "_Layer" not in str(output.grad_fn)


def test_recurrent_a_mixed_stack_runs_each_layer_where_it_is_best(monkeypatch, fresh_choices):
    """The first layer, of other input size, stays ours by name; the rest is torch's with its own autograd."""
    choose = type(recurrent.FORWARD).choose

    def by_size(op, call, requested="auto"):
        return choose(op, call, "reference" if call.input_size == 4 else "torch")

    monkeypatch.setattr(type(recurrent.FORWARD), "choose", by_size)
    layer = stock_layer("lstm", num_layers=3, bidirectional=True)
    x, hx = torch.randn(5, 3, 4), (torch.randn(6, 3, 6), torch.randn(6, 3, 6))
    settings = dict(num_layers=3, bidirectional=True)
    results, seen = recorded(lambda: run("lstm", x, hx, layer._flat_weights, **settings))
    assert [name for _, name in seen] == ["reference", "torch", "torch"]
    expected = flat(layer(x, hx))
    cotangents = [torch.randn_like(each) for each in expected]
    for mine, theirs in zip(results, expected, strict=True):
        close(mine, theirs)
    for mine, theirs in zip(
        torch.autograd.grad(results, layer._flat_weights, cotangents),
        torch.autograd.grad(expected, layer._flat_weights, cotangents),
        strict=True,
    ):
        close(mine, theirs)


# ------------------------------------------------------------------------------------ explain


def verdict_of_cpu(monkeypatch, reasons):
    """What `explain` says of backend cpu in a stack of two gru layers, under made-up concessions."""
    (cpu,) = (each for each in recurrent.FORWARD.backends if each.name == "cpu")
    monkeypatch.setitem(cpu.__dict__, "concessions", reasons)
    layer = stock_layer("gru", num_layers=2)
    given = "gru", torch.randn(5, 3, 4), (torch.randn(2, 3, 6),), layer._flat_weights, None
    said = recurrent.explain(*given, num_layers=2, bidirectional=False)
    assert not any(each.reason for each in said["forward"] if each.backend in ("torch", "reference"))
    return next(each for each in said["forward"] if each.backend == "cpu")


def test_recurrent_explain_says_once_what_holds_for_every_layer(monkeypatch):
    assert verdict_of_cpu(monkeypatch, lambda call: iter(["slow"])).concessions == ("slow",)


def test_recurrent_explain_names_the_layer_that_differs(monkeypatch):
    verdict = verdict_of_cpu(monkeypatch, lambda call: iter(["slow"] if call.input_size == 6 else []))
    assert verdict.concessions == ("layer 1: slow",)


@pytest.mark.parametrize("name", ["float64", "shape"])
def test_recurrent_explain_of_what_goes_straight_to_torch(name):
    layer = stock_layer("gru")
    x = torch.randn(5, 3, 4).double() if name == "float64" else torch.randn(5, 3, 5)
    said = recurrent.explain(
        "gru", x, (torch.randn(1, 3, 6),), layer._flat_weights, None, num_layers=1, bidirectional=False
    )
    for verdicts in said.values():
        (verdict,) = verdicts
        assert (
            verdict.backend == "torch" and "torch's own operator runs it directly" in verdict.concessions[0]
        )


# ------------------------------------------------------------------------------------ the opaque operators


OPCHECK = {
    str(index): case
    for index, case in enumerate(
        (*every_mode(directions=2), Case("lstm", proj=2, bias=False), *every_mode(lengths=(3, 2)))
    )
}


@cases(OPCHECK)
@each_backend
@pytest.mark.unpoisoned
def test_recurrent_opcheck(backend, case):
    operands = case.operands(torch.float32)
    inputs = case.mode, *operands[:5]
    for save in (True, False):
        torch.library.opcheck(FORWARD_OP, (*inputs, save, backend))
    output, _, _, gates, cells = FORWARD_OP(*inputs, True, backend)
    for needs in (
        [each is not None for each in operands.flat],
        [False, True] + [False] * (len(operands.flat) - 2),
    ):
        arguments = case.mode, *operands.grads, *operands[:5], output, gates, cells, needs, backend
        torch.library.opcheck(BACKWARD_OP, arguments)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("mode", ["lstm", "gru"])
def test_recurrent_opcheck_of_torchs_route(mode):
    operands = Case(mode, directions=2).operands(torch.float32)
    torch.library.opcheck(FORWARD_OP, (mode, *operands[:5], True, "torch"))
    output, _, _, gates, cells = FORWARD_OP(mode, *operands[:5], True, "torch")
    needs = [each is not None for each in operands.flat]
    torch.library.opcheck(
        BACKWARD_OP, (mode, *operands.grads, *operands[:5], output, gates, cells, needs, "torch")
    )


class Watch(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@each_backend
@each_mode
def test_recurrent_under_a_dispatch_mode_is_one_operator_a_layer(backend, mode):
    layer = stock_layer(mode, num_layers=2, bidirectional=True)
    x = torch.randn(5, 3, 4, requires_grad=True)
    leaves = [x, *layer.parameters()]
    settings = dict(num_layers=2, bidirectional=True, **extra(mode))

    def train():
        output, *_ = FUNCTIONS[mode](x, None, layer._flat_weights, **settings)
        return output, *torch.autograd.grad(output.square().sum(), leaves)

    with pyarch.backend(backend):
        straight = train()
        with Watch() as watch:
            watched = train()
    assert watch.seen.count(FORWARD_OP) == watch.seen.count(BACKWARD_OP) == 2
    assert all(torch.equal(one, other) for one, other in zip(straight, watched, strict=True))


@pytest.mark.parametrize("sizes", [[3, 1, 2], [2, 2, 2], [3, 2], [3, 2, 2], [3, 4, -1], []], ids=str)
def test_recurrent_operator_refuses_batch_sizes_that_do_not_pack(sizes):
    operands = (
        Case("gru", lengths=(3, 2, 1))
        .operands(torch.float32)
        ._replace(batch_sizes=torch.tensor(sizes, dtype=torch.int64))
    )
    with pytest.raises(RuntimeError, match="batch_sizes must fall from 3, the batch of h0, and add up to 6"):
        FORWARD_OP("gru", *operands[:5], False, "reference")


# ------------------------------------------------------------------------------------ autograd


@pytest.mark.parametrize(
    "case",
    [
        *every_mode(steps=3, batch=2, inputs=2, hidden=2, directions=2),
        Case("lstm", inputs=2, hidden=3, proj=2, lengths=(3, 1)),
    ],
    ids=lambda case: f"{case.mode} {case.lengths}",
)
def test_recurrent_gradgradcheck_of_the_differentiable_backward(case):
    """The graph that stands in for our backward when it is itself differentiated, in float64."""
    from pyarch.ops.recurrent_layer import run_tracked_layer

    operands = case.operands(torch.float64)
    leaves = [each.requires_grad_() for each in given(dict(enumerate(operands.flat))).values()]

    def ours(input, h0, *rest):
        c0, weights = (rest[0], rest[1:]) if case.mode == "lstm" else (None, rest)
        return run_tracked_layer(
            None, case.mode, "reference", False, False, input, h0, c0, operands.batch_sizes, *weights
        )

    assert torch.autograd.gradcheck(ours, leaves)
    assert torch.autograd.gradgradcheck(ours, leaves)


@each_backend
def test_recurrent_double_backward_of_a_tensor_given_twice(backend):
    """h0 is c0, and both directions share their weights: each place counts once."""
    layer = stock_layer("lstm")
    shared = list(layer.parameters()) * 2
    x, state = torch.randn(5, 3, 4), torch.randn(2, 3, 6, requires_grad=True)
    leaves = [state, *layer.parameters()]

    def penalty(engine):
        with pyarch.backend(engine):
            results = run("lstm", x, (state, state), shared, bidirectional=True)
            loss = sum(each.square().sum() for each in results)
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            return [*first, *torch.autograd.grad(sum(each.square().sum() for each in first), leaves)]

    wide = [each.detach().double().requires_grad_() for each in leaves]
    results = torch._VF.lstm(x.double(), (wide[0], wide[0]), wide[1:] * 2, True, 1, 0.0, True, True, False)
    first = torch.autograd.grad(sum(each.square().sum() for each in results), wide, create_graph=True)
    exact = [*first, *torch.autograd.grad(sum(each.square().sum() for each in first), wide)]
    for mine, theirs in zip(penalty(backend), exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


@each_backend
@pytest.mark.parametrize("lengths", [None, (5, 2, 2)])
@pytest.mark.parametrize("mode", ["lstm", "gru"])
def test_recurrent_recompute_saves_less_and_gives_the_same_gradients(backend, mode, lengths):
    layer = stock_layer(mode, num_layers=2, bidirectional=True, hidden=16)
    x = torch.randn(5, 3, 4)
    gradients, saved = [], []
    for recompute in (False, True):
        kept = {}

        def pack(tensor, kept=kept):
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with pyarch.backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output, *_ = FUNCTIONS[mode](
                x,
                None,
                layer._flat_weights,
                num_layers=2,
                bidirectional=True,
                lengths=lengths,
                recompute=recompute,
            )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            gradients.append(torch.autograd.grad(output.square().sum(), layer._flat_weights))
        saved.append(sum(kept.values()))
    rows = 15 if lengths is None else sum(lengths)
    assert saved[0] - saved[1] == 2 * 2 * rows * 4 * 16 * 4
    for plain, again in zip(*gradients, strict=True):
        close(again, plain)


@each_backend
def test_recurrent_a_frozen_layer_below_saves_nothing(backend):
    layer = stock_layer("gru", num_layers=2)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.endswith("l1"))
    calls = []
    with (
        pyarch.backend(backend),
        dispatch.recording(lambda op, call, _: calls.append((op.name, call.save))),
    ):
        ops.gru(torch.randn(5, 3, 4), None, layer._flat_weights, num_layers=2)[0].sum().backward()
    assert calls == [("recurrent_forward", False), ("recurrent_forward", True), ("recurrent_backward", True)]


@each_backend
@cases(SOME)
def test_recurrent_run_takes_no_part_in_autograd_without_gradients(backend, case):
    operands = case.operands(torch.float32)
    hx = [each for each in operands[1:3] if each is not None]
    with pyarch.backend(backend):
        results = run(
            case.mode,
            operands.input,
            hx,
            operands.weights,
            operands.batch_sizes,
            bidirectional=case.directions == 2,
        )
    assert not any(each.requires_grad for each in results if each is not None)
