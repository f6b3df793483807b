"""The persistent recurrent kernels: by interpreter on a CPU, compiled on a GPU.

The interpreter runs one program after another. So it shows several programs with a launch for every step,
the barrier with a single program, and a barrier that expires because its second program never comes. Whether
programs really wait for each other, only a GPU shows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from pyarch.reference import recurrent as reference
from tests.compare import check

pytest.importorskip("triton", reason="Triton is not installed")

from pyarch.triton_kernels import recurrent  # noqa: E402
from pyarch.triton_kernels import recurrent_persistent as persistent  # noqa: E402
from pyarch.triton_kernels.recurrent_products import (  # noqa: E402
    GATES,
    grad_input,
    grad_weights,
    input_side,
    states_before,
    weights_of,
)

OPERATOR = "recurrent"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(not INTERPRETED, reason="interpreter tests run with TRITON_INTERPRET=1")
no_gpu = INTERPRETED or not torch.cuda.is_available()
INPUTS = 3


@dataclass(frozen=True)
class Case:
    """One layer; `lengths` of packed sequences, longest first, give the steps and the batch."""

    mode: str
    hidden_size: int
    batch: int = 3
    steps: int = 4
    directions: int = 1
    bias: bool = True
    lengths: tuple[int, ...] = ()

    def batch_sizes(self) -> Tensor | None:
        if not self.lengths:
            return None
        return torch.tensor([sum(n > t for n in self.lengths) for t in range(max(self.lengths))])


MODES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
# The interpreter's tiles have 16 units and 16 sequences and cut a product into pieces of 32.
CASES = {f"{mode}, two shards": Case(mode, 20) for mode in MODES}
CASES |= {f"{mode}, both directions": Case(mode, 17, directions=2) for mode in MODES}
CASES |= {f"{mode}, packed": Case(mode, 18, lengths=(4, 2, 2, 1)) for mode in MODES}
CASES |= {
    f"{mode}, packed, both directions": Case(mode, 18, lengths=(5, 5, 2, 1), directions=2) for mode in MODES
}
CASES |= {f"{mode}, three pieces": Case(mode, 70, steps=3) for mode in ("lstm", "gru")}
CASES |= {
    "rnn, pieces of its parts": Case("rnn_tanh", 150, steps=2),
    "gru, two batch tiles": Case("gru", 18, batch=17, steps=3, directions=2),
    "lstm, one unit, one sequence": Case("lstm", 1, batch=1),
    "lstm, one step": Case("lstm", 33, steps=1),
    "lstm, no bias": Case("lstm", 20, bias=False),
    "gru, no bias": Case("gru", 20, bias=False),
    "lstm, packed, all of length 1": Case("lstm", 17, lengths=(1, 1, 1), directions=2),
    "gru, packed, two batch tiles": Case("gru", 17, lengths=(3,) * 10 + (2,) * 8, directions=2),
}


@dataclass
class Problem:
    """A case's tensors in one dtype, and what the kernel's host side makes of them."""

    case: Case
    input: Tensor
    h0: Tensor
    c0: Tensor | None
    weights: list[Tensor]
    batch_sizes: Tensor | None

    @classmethod
    def drawn(cls, case: Case, dtype: torch.dtype, device: str) -> Problem:
        sizes = case.batch_sizes()
        batch = case.batch if sizes is None else len(case.lengths)
        H, D, G = case.hidden_size, case.directions, GATES[case.mode]

        def draw(*shape):
            return torch.randn(*shape, device=device).to(dtype)

        shape = (case.steps, batch) if sizes is None else (int(sizes.sum()),)
        weights = []
        for _ in range(D):
            weights += [draw(G * H, INPUTS) / 2, draw(G * H, H) / H**0.5]
            weights += [draw(G * H) / 2, draw(G * H) / 2] if case.bias else []
        c0 = draw(D, batch, H) if case.mode == "lstm" else None
        return cls(case, draw(*shape, INPUTS), draw(D, batch, H), c0, weights, sizes)

    def to(self, dtype: torch.dtype) -> Problem:
        tensors = (None if t is None else t.to(dtype) for t in (self.input, self.h0, self.c0))
        return Problem(self.case, *tensors, [w.to(dtype) for w in self.weights], self.batch_sizes)

    @property
    def sides(self):
        return weights_of(self.weights, self.case.directions)

    @property
    def layer(self):
        return recurrent.layer_of(self.case.mode, self.input, self.h0, self.sides, self.batch_sizes)

    def operands(self):
        """(w, states, index) of both kernels."""
        index = recurrent.index_of(self.batch_sizes, self.h0.shape[1], self.input.device)
        return recurrent.stacked([side.w_hh for side in self.sides]), (self.h0, self.c0), index

    def forward_arguments(self):
        """Arguments of `persistent.forward`."""
        layer, (w, states, index) = self.layer, self.operands()
        b_hn = None
        if layer.mode == "gru" and self.case.bias:
            b_hn = recurrent.stacked([side.b_hh[2 * layer.hidden_size :].float() for side in self.sides])
        xg = input_side(self.input.reshape(layer.rows, INPUTS), self.sides, layer.mode)
        return layer, xg, w, b_hn, states, index, self.results()

    def results(self):
        """(output, h_n, c_n, gates, cells), not filled."""
        D, N, H = self.case.directions, self.layer.rows, self.case.hidden_size
        lstm, gated = self.case.mode == "lstm", GATES[self.case.mode] > 1
        gates = self.input.new_empty(D, N, 4 * H) if gated else None
        cells = torch.empty(D, N, H, device=self.input.device) if lstm else None
        c_n = self.h0.new_empty(self.h0.shape) if lstm else None
        return self.input.new_empty(N, D * H), self.h0.new_empty(self.h0.shape), c_n, gates, cells

    def backward_arguments(self, incoming, saved):
        """Arguments of `persistent.backward`."""
        w, states, index = self.operands()
        D, N, H = self.case.directions, self.layer.rows, self.case.hidden_size
        dpre = self.input.new_empty(D, N, (4 if GATES[self.case.mode] > 1 else 1) * H)
        grad_c0 = None if self.c0 is None else self.c0.new_empty(self.c0.shape)
        results = (dpre, self.h0.new_empty(self.h0.shape), grad_c0)
        return self.layer, incoming, w, states, index, saved, results

    def reference(self, incoming):
        """The reference's results and gradients in this dtype: {name: tensor}."""
        mode, D = self.case.mode, self.case.directions
        output, h_n, c_n, gates, cells = reference.forward(
            mode, self.input, self.h0, self.c0, self.weights, self.batch_sizes, True
        )
        grad_output, grad_h_n, grad_c_n = incoming
        grad_output = None if grad_output is None else grad_output.view(output.shape)
        needs = (True, True, self.c0 is not None, *(True for _ in self.weights))
        grad_x, grad_h0, grad_c0, grads = reference.backward(
            mode, grad_output, grad_h_n, grad_c_n, self.input, self.h0, self.c0,
            self.weights, self.batch_sizes, output, gates, cells, needs,
        )  # fmt: skip
        named = dict(output=output.view(-1, output.shape[-1]), h_n=h_n, c_n=c_n, gates=gates, cells=cells)
        named |= {"gradient of input": grad_x, "gradient of h0": grad_h0, "gradient of c0": grad_c0}
        each = len(grads) // D
        named |= {
            f"gradient of {'w_ih w_hh b_ih b_hh'.split()[i % each]} {i // each}": g
            for i, g in enumerate(grads)
        }
        return {name: t for name, t in named.items() if t is not None and t.numel()}

    def incoming(self):
        """Dense random gradients of output, h_n and c_n."""

        def like(*shape):
            return torch.randn(shape, device=self.input.device).to(self.input.dtype)

        D, H = self.case.directions, self.case.hidden_size
        state = self.h0.shape
        return like(self.layer.rows, D * H), like(*state), like(*state) if self.c0 is not None else None


def kernels(problem: Problem, incoming) -> dict[str, Tensor]:
    """What the persistent kernels and the products behind them give, named as in `Problem.reference`."""
    arguments = problem.forward_arguments()
    layer = arguments[0]
    persistent.forward(*arguments)
    output, h_n, c_n, gates, cells = arguments[-1]
    arguments = problem.backward_arguments(incoming, (output, gates, cells))
    persistent.backward(*arguments)
    dpre, grad_h0, grad_c0 = arguments[-1]
    named = dict(output=output, h_n=h_n, c_n=c_n, gates=gates, cells=cells)
    rows = problem.input.reshape(layer.rows, INPUTS)
    grad_x = grad_input(dpre, problem.sides, layer.mode, problem.input.dtype).view(problem.input.shape)
    named |= {"gradient of input": grad_x, "gradient of h0": grad_h0, "gradient of c0": grad_c0}
    sizes = recurrent.sizes_of(layer, problem.batch_sizes)
    H = layer.hidden_size
    for d in range(layer.directions):
        before = states_before(output[:, d * H : (d + 1) * H], problem.h0[d], sizes, d == 1)
        needs = (True, True, problem.case.bias, problem.case.bias)
        names = (f"gradient of {name} {d}" for name in ("w_ih", "w_hh", "b_ih", "b_hh"))
        named |= dict(zip(names, grad_weights(dpre[d], rows, before, layer.mode, needs), strict=True))
    return {name: t for name, t in named.items() if t is not None}


def hold_to_reference(case: Case, dtype: torch.dtype, device: str) -> None:
    problem = Problem.drawn(case, dtype, device)
    incoming = problem.incoming()
    ours = kernels(problem, incoming)
    as_is = problem.reference(incoming)
    wide = problem.to(torch.float64).reference([None if g is None else g.double() for g in incoming])
    assert set(ours) == set(wide)
    scale = max(t.abs().max().item() for name, t in wide.items() if name.startswith("gradient"))
    for name, result in ours.items():
        check(name, result, as_is[name], wide[name], scale if name.startswith("gradient") else 0.0)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["triton"])
def test_recurrent_persistent_matches_float64_by_interpreter(backend, name, dtype):
    hold_to_reference(CASES[name], dtype, "cpu")


# -------------------------------------------------------------------------------- the barrier


def planned(problem: Problem, place: persistent.Place) -> tuple[list, tuple]:
    """The forward's launches at a place, and what they fill."""
    arguments = problem.forward_arguments()
    alarm = persistent.alarm_of(problem.input.device)
    return persistent.plan_forward(*arguments, place, alarm), arguments[-1]


def planned_backward(problem: Problem, place: persistent.Place) -> tuple[list, tuple]:
    arguments = problem.forward_arguments()
    persistent.forward(*arguments)
    output, _, _, gates, cells = arguments[-1]
    arguments = problem.backward_arguments(problem.incoming(), (output, gates, cells))
    alarm = persistent.alarm_of(problem.input.device)
    return persistent.plan_backward(*arguments, place, alarm), arguments[-1]


AT_ONCE = persistent.Place("default", 64)


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


# -------------------------------------------------------------------------------- on a GPU

gpu = pytest.mark.skipif(no_gpu, reason="no CUDA GPU")
LARGE_CASES = {
    "lstm 512": Case("lstm", 512, batch=16, steps=64),
    "lstm 512, batch 64, packed, both directions": Case(
        "lstm", 512, lengths=(33,) * 20 + (20,) * 24 + (1,) * 20, directions=2
    ),
    "lstm 1024": Case("lstm", 1024, batch=16, steps=40),
    "gru 1024, batch 33": Case("gru", 1024, batch=33, steps=20),
    "gru 200, both directions": Case("gru", 200, batch=5, steps=77, directions=2),
    "gru 193, one sequence": Case("gru", 193, batch=1, steps=50),
    "rnn 1024, batch 64": Case("rnn_tanh", 1024, batch=64, steps=30),
    "rnn 768": Case("rnn_tanh", 768, batch=3, steps=30),
    "lstm 768, long": Case("lstm", 768, batch=4, steps=1024),
}


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
@pytest.mark.parametrize("name", LARGE_CASES)
@pytest.mark.parametrize("backend", ["triton"])
def test_recurrent_persistent_matches_float64_on_gpu(backend, name, dtype):
    case = LARGE_CASES[name]
    layer = Problem.drawn(case, dtype, "cuda").layer
    for kernel in ("forward", "backward"):
        for refused in persistent.refusals(layer, kernel, persistent.place_of(torch.device("cuda"))):
            pytest.skip(f"the persistent kernel refuses: {refused}")
    hold_to_reference(case, dtype, "cuda")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", ["lstm 512", "gru 200, both directions", "rnn 768"])
def test_recurrent_persistent_repeats_bitwise_on_gpu(name):
    problem = Problem.drawn(LARGE_CASES[name], torch.bfloat16, "cuda")
    incoming = problem.incoming()
    first = kernels(problem, incoming)
    for _ in range(200):
        again = kernels(problem, incoming)
        assert all(torch.equal(first[name], again[name]) for name in first)
    torch.cuda.synchronize()
    persistent.raise_alarm(problem.input.device)


@pytest.mark.gpu
@gpu
def test_recurrent_persistent_on_two_streams_at_once():
    names = ("lstm 512", "gru 193, one sequence")
    problems = [Problem.drawn(LARGE_CASES[name], torch.bfloat16, "cuda") for name in names]
    incomings = [problem.incoming() for problem in problems]
    alone = [kernels(problem, incoming) for problem, incoming in zip(problems, incomings, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(50):
        together = []
        for stream, problem, incoming in zip(streams, problems, incomings, strict=True):
            with torch.cuda.stream(stream):
                together.append(kernels(problem, incoming))
        torch.cuda.synchronize()
        for expected, ours in zip(alone, together, strict=True):
            assert all(torch.equal(expected[name], ours[name]) for name in expected)
    persistent.raise_alarm(problems[0].input.device)


@pytest.mark.gpu
@gpu
def test_recurrent_persistent_refuses_more_programs_than_the_gpu_holds():
    problem = Problem.drawn(LARGE_CASES["lstm 512"], torch.bfloat16, "cuda")
    device = problem.input.device
    loop = planned(problem, persistent.place_of(device))[0][0]
    limits = persistent.multiprocessor_of(device)
    each = persistent.programs_at_once(limits, persistent.footprint_of(loop, device))
    count = persistent.place_of(device).multiprocessors
    persistent.need_resident(replace(loop, grid=each * count), device)
    with pytest.raises(NotImplementedError, match="programs must run at once, this GPU holds"):
        persistent.need_resident(replace(loop, grid=each * count + 1), device)


@pytest.mark.gpu
@gpu
def test_recurrent_persistent_barrier_that_expires_on_gpu():
    problem = Problem.drawn(LARGE_CASES["lstm 512"], torch.bfloat16, "cuda")
    device = problem.input.device
    (loop, expiry), results = planned(problem, persistent.place_of(device))
    replace(loop, grid=1, arguments=loop.arguments | {"spin_limit": 1000}).run(device)
    expiry.run(device)
    torch.cuda.synchronize()
    assert all(result.isnan().all() for result in results[:3])
    with pytest.raises(RuntimeError, match="gave up waiting for its own programs"):
        persistent.forward(*problem.forward_arguments())
    persistent.forward(*problem.forward_arguments())


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", ["lstm 512", "gru 200, both directions"])
def test_recurrent_persistent_in_a_cuda_graph(name):
    problem = Problem.drawn(LARGE_CASES[name], torch.bfloat16, "cuda")
    incoming = problem.incoming()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        kernels(problem, incoming)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels(problem, incoming)
    problem.input.copy_(torch.randn_like(problem.input))
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    expected = kernels(problem, incoming)
    assert all(torch.equal(captured[name], expected[name]) for name in expected)
