"""Every backend of the recurrent layers that takes CPU tensors, held to float64 by the tolerance rule.

The C++ kernels run once for each instruction set that this CPU has.
"""

from __future__ import annotations

import pytest
import torch

from pyarch.ops import recurrent
from tests.conv_cases import backend_of
from tests.recurrent_cases import (
    CASES,
    MODES,
    SOME,
    Case,
    cases,
    each_dtype,
    every_layers,
    every_mode,
    given,
    hold_all,
    prove,
)

OPERATOR = "recurrent"


@each_dtype
@cases(CASES)
@every_layers
def test_recurrent_backends_results_and_gradients(backend, case, dtype, monkeypatch):
    backend.serve(monkeypatch)
    prove(backend, case, dtype)


@cases(SOME)
@every_layers
def test_recurrent_backends_forward_alone_is_the_same(backend, case, monkeypatch):
    backend.serve(monkeypatch)
    inputs = case.operands(torch.float32)[:5]
    run = backend_of(recurrent.FORWARD, backend.name).run
    saving, plain = run(case.mode, *inputs, True), run(case.mode, *inputs, False)
    for kept, alone in zip(saving[:3], plain[:3], strict=True):
        assert kept is alone is None or torch.equal(kept, alone)
    assert plain[3].shape == plain[4].shape == (0,)


# ------------------------------------------------------------------------------------ some of the gradients


def some_needs(case, operands):
    """Each gradient alone, all but each, and none but the states'."""
    possible = [each is not None for each in operands.flat]
    for index in [index for index, is_there in enumerate(possible) if is_there]:
        yield [place == index for place in range(len(possible))]
        yield [is_there and place != index for place, is_there in enumerate(possible)]
    yield [is_there and place in (1, 2) for place, is_there in enumerate(possible)]


@cases(SOME)
@every_layers
def test_recurrent_backends_only_the_gradients_asked_for(backend, case, monkeypatch):
    backend.serve(monkeypatch)
    operands = case.operands(torch.float32)
    for needs in some_needs(case, operands):
        hold_all(case, operands, backend.run(case, operands, needs))


REACHED = [
    tuple(name in reached for name in ("output", "h_n", "c_n"))
    for reached in (["output"], ["h_n"], ["c_n"], ["h_n", "c_n"], ["output", "c_n"])
]


@pytest.mark.parametrize("reached", REACHED, ids=str)
@cases(SOME)
@every_layers
def test_recurrent_backends_gradients_of_some_results(backend, case, reached, monkeypatch):
    """Also of c_n alone, which leaves some parameters of a direction without a gradient: zeros."""
    if case.mode != "lstm":
        reached = (reached[0], reached[1] or not reached[0], False)
    backend.serve(monkeypatch)
    operands = case.operands(torch.float32)
    results = backend.run(case, operands, reached=reached)
    hold_all(case, operands, results, reached=reached)


@pytest.mark.parametrize("mode", MODES)
@every_layers
def test_recurrent_backends_no_gradient_at_all_is_zero(backend, mode, monkeypatch):
    backend.serve(monkeypatch)
    case = Case(mode, directions=2)
    results = backend.run(case, case.operands(torch.float32), reached=(False, False, False))
    gradients = [each for name, each in given(results).items() if "grad" in name]
    assert gradients and not any(each.any() for each in gradients)


# ------------------------------------------------------------------------------------ extreme values


@each_dtype
@pytest.mark.parametrize("value", [1e4, -1e4])
@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn_tanh"])
@every_layers
def test_recurrent_backends_saturated_gates_are_finite(backend, mode, value, dtype, monkeypatch):
    """Gradients of live gates among saturated ones are held by the cases whose input is scaled."""
    backend.serve(monkeypatch)
    case = Case(mode, directions=2, batch=4, inputs=1, hidden=17)
    operands = case.operands(dtype)
    operands.input.fill_(value)
    results = backend.run(case, operands)
    assert all(each.isfinite().all() for each in given(results).values())
    hold_all(case, operands, {name: each for name, each in results.items() if "grad" not in name})


@each_dtype
@pytest.mark.parametrize("where", ["input", "h0", "c0"])
@cases(
    {
        case.mode + f" batch {case.batch}": case
        for batch in (5, 17)
        for case in every_mode(batch=batch, directions=2)
    }
)
@every_layers
def test_recurrent_backends_nan_stays_in_its_sequence(backend, case, where, dtype, monkeypatch):
    backend.serve(monkeypatch)
    clean = case.operands(dtype)
    place = ("input", "h0", "c0").index(where)
    if clean.flat[place] is None:
        place = 1
    spoiled = clean.flat[place].clone()
    spoiled[0, 2] = float("nan")
    operands = clean._replace(**{clean._fields[place]: spoiled})
    results, others = backend.run(case, operands), [row for row in range(case.batch) if row != 2]
    assert results["output"][:, 2].isnan().any()
    expected = backend.run(case, clean)
    for name in ("output", "h_n", "c_n", "grad input", "grad h0", "grad c0"):
        if results[name] is not None:
            assert torch.equal(results[name][:, others], expected[name][:, others]), name


@each_dtype
@cases(SOME)
@every_layers
def test_recurrent_backends_nan_of_a_gradient_stays_in_its_sequence(backend, case, dtype, monkeypatch):
    backend.serve(monkeypatch)
    operands = case.operands(dtype)
    grad = operands.grads[1].clone()
    grad[0, 0] = float("nan")
    results = backend.run(case, operands._replace(grads=(operands.grads[0], grad, operands.grads[2])))
    for name in ("grad h0", "grad c0"):
        if results[name] is not None:
            assert results[name][0, 0].isnan().any() and not results[name][:, 1:].isnan().any(), name


# ------------------------------------------------------------------------------------ repeatability


@pytest.mark.parametrize("threads", [1, 2])
@each_dtype
@cases(SOME)
@every_layers
def test_recurrent_backends_repeat_bit_by_bit(backend, case, dtype, threads, monkeypatch):
    backend.serve(monkeypatch)
    torch.set_num_threads(threads)
    operands = case.operands(dtype)
    once, again = backend.run(case, operands), backend.run(case, operands)
    assert all(torch.equal(each, again[name]) for name, each in given(once).items())
