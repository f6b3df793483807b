"""The persistent recurrent kernels by interpreter on a CPU; test_gpu_persistent.py runs them on a GPU.

The interpreter runs one program after another. So it shows several programs with a launch for every step,
the barrier with a single program, and a barrier that expires because its second program never comes. Whether
programs really wait for each other, only a GPU shows.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from pyarch.triton_kernels import recurrent_persistent as persistent  # noqa: E402
from tests.gpu_calls import on_gpu, precision  # noqa: E402
from tests.gpu_neighbour import hold_beside_a_neighbour  # noqa: E402
from tests.recurrent_persistent_cases import (  # noqa: E402
    AT_ONCE,
    CASES,
    LARGE_CASES,
    MODES,
    PRODUCTS,
    STRIDED,
    Case,
    Problem,
    hold_strided,
    hold_to_reference,
    kernels,
    need_plans,
    planned,
    planned_backward,
)

OPERATOR = "recurrent"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(not INTERPRETED, reason="interpreter tests run with TRITON_INTERPRET=1")


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["triton"])
def test_recurrent_persistent_matches_float64_by_interpreter(backend, name, dtype):
    hold_to_reference(CASES[name], dtype, "cpu")


# -------------------------------------------------------------------------------- the barrier


@interpreter
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["triton"])
def test_recurrent_persistent_barrier_with_one_program(backend, mode):
    case = Case(mode, 15, batch=4, steps=5, lengths=(5, 5, 3, 1))
    launches, _ = planned(Problem.drawn(case, torch.float32, "cpu"), persistent.place_of(torch.device("cpu")))
    assert [launch.grid for launch in launches] == [1, 1]
    assert launches[0].constants["BARRIER"]
    hold_to_reference(case, torch.float32, "cpu")


def test_recurrent_persistent_takes_a_launch_a_step_where_programs_cannot_wait():
    problem = Problem.drawn(Case("gru", 20, steps=4), torch.float32, "cpu")
    launches, _ = planned(problem, persistent.place_of(torch.device("cpu")))
    steps = [(launch.arguments["step_begin"], launch.arguments["step_end"]) for launch in launches]
    assert steps == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert not any(launch.constants["BARRIER"] for launch in launches)


def test_recurrent_persistent_launches_are_cooperative_where_programs_wait():
    problem = Problem.drawn(Case("gru", 20, steps=4), torch.float32, "cpu")
    loop, expiry = planned(problem, AT_ONCE)[0]
    assert loop.options["launch_cooperative_grid"] and loop.constants["BARRIER"]
    assert "launch_cooperative_grid" not in expiry.options


def test_recurrent_persistent_counters_of_two_plans_are_two():
    problem = Problem.drawn(Case("gru", 20, directions=2), torch.float32, "cpu")
    first, second = (planned(problem, AT_ONCE)[0][0].arguments["counters_ptr"] for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    assert not first.any() and first.numel() == 3 * persistent.COUNTER_STRIDE


@interpreter
@pytest.mark.parametrize("programs", [1, 2], ids=["the other never comes", "the other comes late"])
@pytest.mark.parametrize("plan", [planned, planned_backward], ids=["forward", "backward"])
@pytest.mark.parametrize("mode", ["lstm", "rnn_tanh"])
@pytest.mark.parametrize("backend", ["triton"])
def test_recurrent_persistent_barrier_that_expires(backend, mode, plan, programs):
    problem = Problem.drawn(Case(mode, 20), torch.float32, "cpu")
    (loop, expiry), results = plan(problem, AT_ONCE)
    assert loop.grid == loop.arguments["shards"] == 2
    replace(loop, grid=programs, arguments=loop.arguments | {"spin_limit": 3}).run(problem.input.device)
    expiry.run(problem.input.device)
    for result in results[:3]:
        assert result is None or result.isnan().all()
    with pytest.raises(RuntimeError, match="gave up waiting for its own programs, and its results are NaN"):
        persistent.forward(*problem.forward_arguments())
    hold_to_reference(problem.case, torch.float32, "cpu")


@interpreter
@pytest.mark.parametrize("backend", ["triton"])
def test_recurrent_persistent_results_stay_where_the_barrier_held(backend):
    problem = Problem.drawn(Case("lstm", 15), torch.float32, "cpu")
    launches, results = planned(problem, AT_ONCE)
    for launch in launches:
        launch.run(problem.input.device)
    assert not any(result.isnan().any() for result in results)
    persistent.raise_alarm(problem.input.device)


@interpreter
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["triton"])
def test_recurrent_persistent_nan_stays_in_its_sequence(backend, mode):
    problem = Problem.drawn(Case(mode, 20, batch=3), torch.float32, "cpu")
    problem.input[1, 1] = float("nan")
    incoming = problem.incoming()
    ours, expected = kernels(problem, incoming), problem.reference(incoming)
    for name in ("output", "h_n", "gradient of input", "gradient of h0"):
        assert torch.equal(ours[name].isnan(), expected[name].isnan()), name
    assert not ours["output"].view(4, 3, 20)[:, [0, 2]].isnan().any()


@interpreter
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["triton"])
def test_recurrent_persistent_stays_finite_at_saturated_gates(backend, mode):
    problem = Problem.drawn(Case(mode, 20), torch.float32, "cpu")
    problem.input *= 1e4
    results = kernels(problem, problem.incoming())
    bounded = {name: t for name, t in results.items() if mode != "rnn_relu" or name in ("output", "h_n")}
    assert all(t.isfinite().all() for t in bounded.values())


@interpreter
@pytest.mark.parametrize("missing", [0, 1, 2])
@pytest.mark.parametrize("backend", ["triton"])
def test_recurrent_persistent_takes_no_gradient_as_zero(backend, missing):
    problem = Problem.drawn(Case("lstm", 20, directions=2), torch.float32, "cpu")
    incoming = list(problem.incoming())
    zeros = [torch.zeros_like(g) if i == missing else g for i, g in enumerate(incoming)]
    incoming[missing] = None
    ours, same = kernels(problem, incoming), kernels(problem, zeros)
    assert all(torch.equal(ours[name], same[name]) for name in ours)


@interpreter
@pytest.mark.parametrize("backend", ["triton"])
def test_recurrent_persistent_takes_an_expanded_gradient(backend):
    problem = Problem.drawn(Case("gru", 20, directions=2), torch.float32, "cpu")
    _, grad_h_n, grad_c_n = problem.incoming()
    dense = torch.full((problem.layer.rows, 40), 0.5)
    expanded = torch.tensor(0.5).expand(dense.shape)
    ours, same = (kernels(problem, (grad, grad_h_n, grad_c_n)) for grad in (expanded, dense))
    assert all(torch.equal(ours[name], same[name]) for name in ours)


@interpreter
@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("backend", ["triton"])
def test_recurrent_persistent_takes_any_strides(backend, name):
    hold_strided(STRIDED[name], torch.float32, "cpu")


@interpreter
def test_recurrent_persistent_beside_another_process():
    hold_beside_a_neighbour("lstm, one unit, one sequence", "cpu", 0.1)


# -------------------------------------------------------------------------------- compiled on a GPU


@on_gpu
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("name", LARGE_CASES)
def test_recurrent_persistent_programs_fit_on_gpu(name, product):
    """By what the compiler made of them. Runs none, so that test_gpu_persistent.py finds them compiled."""
    dtype, tf32 = PRODUCTS[product]
    with precision(tf32):
        problem = Problem.drawn(LARGE_CASES[name], dtype, "cuda")
        need_plans(problem)
        place = persistent.place_of(problem.input.device)
        plans = [planned(problem, place), planned_backward(problem, place, problem.results())]
    for (loop, _), _ in plans:
        persistent.need_resident(loop, problem.input.device)
