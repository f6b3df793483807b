"""The resident and the step-by-step recurrent kernels: by interpreter on a CPU, compiled on a GPU.

Results and gradients are held to torch's own operators in float64. The interpreter shows the logic (masks,
tails, directions, packing) in float32 and float16; it computes bfloat16 wrongly and shows no speed. The path
that waits between programs has tests of its own (test_recurrent_persistent_triton.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from pyarch.reference import recurrent as reference
from tests.compare import check, error
from tests.gpu_calls import full_precision, precision

pytest.importorskip("triton", reason="Triton is not installed")

from pyarch.triton_kernels import recurrent, recurrent_products, recurrent_steps  # noqa: E402

OPERATOR = "recurrent"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(not INTERPRETED, reason="interpreter tests run with TRITON_INTERPRET=1")
no_gpu = INTERPRETED or not torch.cuda.is_available()
by_triton = pytest.mark.parametrize("backend", ["triton"])
both_paths = pytest.mark.parametrize("path", ["resident", "step"])
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
MODES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
each_mode = pytest.mark.parametrize("mode", MODES)
FEW = 8
NAMES = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")


@dataclass(frozen=True)
class Case:
    """One layer; `lengths` of packed sequences, longest first, give the steps and the batch."""

    mode: str
    hidden_size: int
    input_size: int = 3
    batch: int = 3
    steps: int = 4
    directions: int = 1
    bias: bool = True
    proj_size: int = 0
    lengths: tuple[int, ...] = ()

    @property
    def names(self) -> list[str]:
        """Of one direction's weights."""
        return [*NAMES[: 4 if self.bias else 2], *(["w_hr"] if self.proj_size else [])]

    def batch_sizes(self) -> Tensor | None:
        if not self.lengths:
            return None
        return torch.tensor([sum(n > t for n in self.lengths) for t in range(max(self.lengths))])


CASES = {mode: Case(mode, 6) for mode in MODES}
CASES |= {f"{mode}, both directions, two tiles": Case(mode, 20, 4, 17, 3, 2) for mode in MODES}
CASES |= {
    f"{mode}, packed, both directions": Case(mode, 5, lengths=(5, 4, 4, 1), directions=2) for mode in MODES
}
CASES |= {
    "lstm, no bias": Case("lstm", 16, bias=False),
    "gru, no bias, both directions": Case("gru", 16, directions=2, bias=False),
    "lstm, one unit, one input": Case("lstm", 1, 1, 5),
    "lstm, one sequence": Case("lstm", 9, batch=1),
    "gru, one unit": Case("gru", 1, 1, 2),
    "lstm, one step": Case("lstm", 33, steps=1),
    "gru, one step, both directions": Case("gru", 31, steps=1, directions=2),
    "gru, two steps": Case("gru", 33, steps=2),
    "rnn, a wide input": Case("rnn_tanh", 7, 70, 2),
    "lstm, packed, all of length 1": Case("lstm", 5, lengths=(1, 1, 1), directions=2),
    "gru, packed, all of one length": Case("gru", 5, lengths=(3, 3), directions=2),
    "gru, packed, two tiles": Case("gru", 5, lengths=(4,) + (3,) * 10 + (2,) * 6 + (1,), directions=2),
    "lstm, packed, two tiles, a short one": Case("lstm", 5, lengths=(3,) * 16 + (1,) * 2, directions=2),
}
PROJECTIONS = {
    "lstm, projected": Case("lstm", 7, proj_size=3),
    "lstm, projected, both directions, no bias": Case("lstm", 7, proj_size=3, directions=2, bias=False),
    "lstm, projected, packed": Case("lstm", 6, proj_size=5, directions=2, lengths=(4, 2, 2)),
}
each_case = pytest.mark.parametrize(
    ("name", "path"),
    [(name, path) for name in CASES for path in ("resident", "step")]
    + [(name, "step") for name in PROJECTIONS],
)


@dataclass
class Problem:
    """A case's tensors in one dtype, and the gradients that arrive from behind it."""

    case: Case
    input: Tensor
    h0: Tensor
    c0: Tensor | None
    weights: list[Tensor]
    incoming: list[Tensor]

    @classmethod
    def drawn(cls, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Problem:
        sizes = case.batch_sizes()
        batch = case.batch if sizes is None else len(case.lengths)
        H, D, G = case.hidden_size, case.directions, recurrent_products.GATES[case.mode]
        P = case.proj_size or H

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        shape = (case.steps, batch) if sizes is None else (int(sizes.sum()),)
        weights = []
        for _ in range(D):
            weights += [draw(G * H, case.input_size) / 2, draw(G * H, P) / P**0.5]
            weights += [draw(G * H) / 2, draw(G * H) / 2] if case.bias else []
            weights += [draw(P, H) / H**0.5] if case.proj_size else []
        lstm = case.mode == "lstm"
        incoming = [draw(*shape, D * P), draw(D, batch, P)] + [draw(D, batch, H)] * lstm
        c0 = draw(D, batch, H) if lstm else None
        return cls(case, draw(*shape, case.input_size), draw(D, batch, P), c0, weights, incoming)

    def forward(self, path: str, save: bool = True) -> tuple:
        return recurrent.forward(self.case.mode, *self.tensors, save, path)

    def backward(self, path: str, result: tuple, needs: tuple | None = None, incoming: list | None = None):
        """Gradients named as `by_torch` names them, None among them."""
        output, _, _, gates, cells = result
        grads = self.incoming if incoming is None else incoming
        grads = [*grads, None][:3]
        grad_x, grad_h0, grad_c0, grads = recurrent.backward(
            self.case.mode, *grads, *self.tensors, output, gates, cells, needs or self.all_needs, path
        )
        return dict(zip(self.gradient_names, [grad_x, grad_h0, grad_c0, *grads], strict=True))

    @property
    def tensors(self) -> tuple:
        return self.input, self.h0, self.c0, self.weights, self.case.batch_sizes()

    @property
    def all_needs(self) -> tuple[bool, ...]:
        return (True, True, self.c0 is not None, *(True for _ in self.weights))

    @property
    def gradient_names(self) -> list[str]:
        weights = [f"{name} {d}" for d in range(self.case.directions) for name in self.case.names]
        return [f"gradient of {name}" for name in ("input", "h0", "c0", *weights)]

    def by_torch(self, dtype: torch.dtype, incoming: list | None = None) -> tuple[dict, dict]:
        """Results and gradients of torch's own operator: ({name: tensor}, {name: tensor})."""
        case = self.case
        leaves = [self.input, self.h0, *([] if self.c0 is None else [self.c0]), *self.weights]
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        x, states, weights = leaves[0], leaves[1 : -len(self.weights)], leaves[-len(self.weights) :]
        operator = getattr(torch._VF, case.mode)
        hx = states if case.mode == "lstm" else states[0]
        # In training, without which cuDNN refuses a backward.
        options = (case.bias, 1, 0.0, True, case.directions == 2)
        if case.lengths:
            results = operator(x, case.batch_sizes(), hx, weights, *options)
        else:
            results = operator(x, hx, weights, *options, False)
        wanted = [self.incoming[i] if incoming is None else incoming[i] for i in range(len(results))]
        pairs = [(r, g.to(dtype)) for r, g in zip(results, wanted, strict=True) if g is not None]
        grads = torch.autograd.grad([r for r, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
        grads = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)]
        names = [name for name in self.gradient_names if self.c0 is not None or not name.endswith("c0")]
        results = dict(zip(("output", "h_n", "c_n"), (r.detach() for r in results), strict=False))
        return results, dict(zip(names, grads, strict=True))


def stock_of(problem: Problem, incoming: list | None = None) -> tuple[dict, dict]:
    """Torch's own results in the problem's dtype."""
    return problem.by_torch(problem.input.dtype, incoming)


def hold_gradients(problem: Problem, ours: dict, incoming: list | None = None) -> None:
    wide, stock = problem.by_torch(torch.float64, incoming)[1], stock_of(problem, incoming)[1]
    assert {name for name, grad in ours.items() if grad is not None} == set(wide)
    scale = max(grad.abs().max().item() for grad in wide.values())
    # Torch's error of few numbers is luck; there the layer's worst relative error stands for it.
    relative = max(
        error(stock[name], grad) / grad.abs().max().item() for name, grad in wide.items() if grad.any()
    )
    for name, grad in wide.items():
        assert ours[name].is_contiguous(), name
        check(name, ours[name], stock[name], grad, scale, relative if grad.numel() <= FEW else 0.0)


def hold_to_torch(problem: Problem, path: str) -> None:
    result = problem.forward(path)
    wide, stock = problem.by_torch(torch.float64)[0], stock_of(problem)[0]
    for name, ours in zip(("output", "h_n", "c_n"), result, strict=False):
        if ours is None:
            assert name == "c_n" and problem.case.mode != "lstm"
            continue
        assert ours.is_contiguous()
        check(name, ours, stock[name], wide[name])
    hold_gradients(problem, problem.backward(path, result))


@interpreter
@by_triton
@both_dtypes
@each_case
def test_recurrent_matches_float64_by_interpreter(backend, name, path, dtype):
    hold_to_torch(Problem.drawn((CASES | PROJECTIONS)[name], dtype), path)


@interpreter
@by_triton
@each_case
def test_recurrent_saves_what_the_operator_defines(backend, name, path):
    problem = Problem.drawn((CASES | PROJECTIONS)[name])
    ours = problem.forward(path)
    wide = Problem(problem.case, *(None if t is None else t.double() for t in problem.tensors[:3]), [], [])
    wide.weights = [w.double() for w in problem.weights]
    mode = problem.case.mode
    expected = reference.forward(mode, *wide.tensors, True)
    stock = reference.forward(mode, *problem.tensors, True)
    for name, i in (("gates", 3), ("cells", 4)):
        assert ours[i].shape == expected[i].shape, name
        if expected[i].numel():
            check(name, ours[i], stock[i], expected[i])


@interpreter
@by_triton
@each_case
def test_recurrent_backward_takes_any_forwards_residuals(backend, name, path):
    problem = Problem.drawn((CASES | PROJECTIONS)[name])
    result = reference.forward(problem.case.mode, *problem.tensors, True)
    hold_gradients(problem, problem.backward(path, result))


@interpreter
@by_triton
@both_paths
@each_mode
def test_recurrent_saves_nothing_unasked(backend, mode, path):
    problem = Problem.drawn(CASES[f"{mode}, packed, both directions"])
    saved, bare = problem.forward(path), problem.forward(path, save=False)
    for ours, expected in zip(bare[:3], saved[:3], strict=True):
        assert ours is expected or torch.equal(ours, expected)
    assert bare[3].shape == bare[4].shape == (0,)
    assert bare[3].dtype == problem.input.dtype and bare[4].dtype == torch.float32


@interpreter
@by_triton
@pytest.mark.parametrize(
    ("name", "path"),
    [("lstm, packed, both directions", "resident"), ("gru, packed, both directions", "step")]
    + [("lstm, projected", "step")],
)
def test_recurrent_computes_only_the_gradients_asked_for(backend, name, path):
    problem = Problem.drawn((CASES | PROJECTIONS)[name])
    result = problem.forward(path)
    everything = problem.backward(path, result)
    possible = [i for i, need in enumerate(problem.all_needs) if need]
    alone = [tuple(i == j for i in range(len(problem.all_needs))) for j in possible]
    without = [tuple(need and i != j for i, need in enumerate(problem.all_needs)) for j in possible]
    for needs in (*alone, *without):
        some = problem.backward(path, result, needs)
        for need, (name, grad) in zip(needs, some.items(), strict=True):
            assert (grad is not None) == need, name
            assert grad is None or torch.equal(grad, everything[name]), name


@interpreter
@by_triton
@both_paths
@pytest.mark.parametrize("given", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_recurrent_takes_gradients_that_are_missing(backend, given, path):
    problem = Problem.drawn(Case("lstm", 5, lengths=(4, 2, 1), directions=2))
    incoming = [grad if i in given else None for i, grad in enumerate(problem.incoming)]
    hold_gradients(problem, problem.backward(path, problem.forward(path), None, incoming), incoming)


@interpreter
@by_triton
@both_paths
@each_mode
def test_recurrent_takes_strided_and_expanded_tensors(backend, mode, path):
    problem = Problem.drawn(Case(mode, 5, batch=3, directions=2))
    problem.input = problem.input.transpose(0, 1).contiguous().transpose(0, 1)
    problem.h0 = problem.h0[:, :1].expand(problem.h0.shape)
    problem.weights = [torch.stack([w, w], -1)[..., 1] for w in problem.weights]
    for grad_output in (
        torch.tensor(0.5).expand(problem.incoming[0].shape),
        problem.incoming[0].transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([problem.incoming[0]] * 2, -1)[..., 0],
    ):
        problem.incoming[:2] = grad_output, problem.incoming[1][:, :1].expand(problem.h0.shape)
        hold_to_torch(problem, path)


@interpreter
@by_triton
@both_paths
@pytest.mark.parametrize("lengths", [(), (4, 4, 2)], ids=["padded", "packed"])
@each_mode
def test_recurrent_nan_stays_in_its_sequence(backend, mode, lengths, path):
    problem = Problem.drawn(Case(mode, 5, directions=2, lengths=lengths))
    clean = problem.forward(path)
    clean_grads = problem.backward(path, clean)
    poisoned = replace(problem, input=problem.input.clone())
    sizes = [3] * 4 if not lengths else problem.case.batch_sizes().tolist()
    sequence = torch.cat([torch.arange(size) for size in sizes])
    poisoned.input.view(len(sequence), -1)[sizes[0] + 1] = float("nan")
    result = poisoned.forward(path)
    grads = poisoned.backward(path, result)
    expected_results, expected_grads = poisoned.by_torch(torch.float64)
    dx = "gradient of input"
    for ours, untouched, expected in (
        (result[0], clean[0], expected_results["output"]),
        (grads[dx], clean_grads[dx], expected_grads[dx]),
    ):
        ours, untouched, expected = (t.view(len(sequence), -1) for t in (ours, untouched, expected))
        assert torch.equal(ours[sequence != 1], untouched[sequence != 1])
        assert torch.equal(ours.isnan(), expected.isnan())
    others = torch.tensor([0, 2])
    for ours, expected in zip(result[1:3], clean[1:3], strict=True):
        assert ours is expected or (
            torch.equal(ours[:, others], expected[:, others]) and ours[:, 1].isnan().any()
        )


@interpreter
@by_triton
@both_paths
@each_mode
def test_recurrent_saturated_gates_stay_finite(backend, mode, path):
    problem = Problem.drawn(Case(mode, 5, steps=3))
    problem.input[1:] = problem.input[1:].sign() * 1e4
    result = problem.forward(path)
    grads = problem.backward(path, result)
    assert all(t.isfinite().all() for t in (*result, *grads.values()) if t is not None)
    hold_to_torch(problem, path)


@interpreter
@by_triton
@both_paths
@each_mode
def test_recurrent_of_an_empty_batch(backend, mode, path):
    problem = Problem.drawn(Case(mode, 5, batch=0, directions=2))
    result = problem.forward(path)
    assert result[0].shape == (4, 0, 10) and result[1].shape == (2, 0, 5)
    grads = problem.backward(path, result)
    shapes = {name: grad.shape for name, grad in grads.items() if grad is not None}
    assert shapes["gradient of input"] == (4, 0, 3)
    for name, weight in zip(problem.gradient_names[3:], problem.weights, strict=True):
        assert torch.equal(grads[name], torch.zeros_like(weight))


@interpreter
@by_triton
@pytest.mark.parametrize("name", ["gru, both directions, two tiles", "lstm, packed, both directions"])
def test_recurrent_steps_hold_the_input_side_in_chunks(backend, name, monkeypatch):
    problem = Problem.drawn(CASES[name])
    asked = []
    multiply = recurrent_steps.product

    def product(a, b, *rest, **options):
        asked.append(tuple(a.shape))
        return multiply(a, b, *rest, **options)

    monkeypatch.setattr(recurrent_steps, "product", product)
    monkeypatch.setattr(recurrent_steps, "CHUNK_BYTES", 2 * 4 * 4 * 4 * problem.case.hidden_size)
    hold_to_torch(problem, "step")
    rows = problem.input[..., 0].numel()
    assert rows not in {shape[0] for shape in asked if shape[1] == problem.case.input_size}


@interpreter
@by_triton
@each_mode
def test_recurrent_chooses_a_path_by_itself(backend, mode, monkeypatch):
    problem = Problem.drawn(CASES[mode])
    monkeypatch.setattr(recurrent, "forward_by_steps", None)
    monkeypatch.setattr(recurrent, "backward_by_steps", None)
    result = problem.forward(None)
    hold_gradients(problem, problem.backward(None, result))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", [[3], [3, 3, 3], [4, 4, 3, 1, 1], [2, 1]], ids=str)
def test_recurrent_states_before_each_step(sizes, reverse):
    states = torch.arange(float(sum(sizes)))[:, None]
    start = -1 - torch.arange(float(sizes[0]))[:, None]
    begins = recurrent_steps.begins_of(sizes)
    expected = []
    for t, size in enumerate(sizes):
        for b in range(size):
            other = t + 1 if reverse else t - 1
            exists = 0 <= other < len(sizes) and b < sizes[other]
            expected.append(float(begins[other] + b) if exists else -1.0 - b)
    before = recurrent_products.states_before(states, start, sizes, reverse)
    assert before[:, 0].tolist() == expected


def test_recurrent_index_of_packed_rows():
    starts, lengths = recurrent.index_of(torch.tensor([4, 3, 3, 1]), 4, torch.device("cpu"))
    assert starts.tolist() == [0, 4, 7, 10] and lengths.tolist() == [4, 3, 3, 1]


def test_recurrent_refuses_a_dtype_without_a_kernel():
    problem = Problem.drawn(CASES["lstm"], torch.float64)
    with pytest.raises(NotImplementedError, match="dtype=torch.float64, needs float32, float16 or bfloat16"):
        problem.forward("step")


# ------------------------------------------------------------------------------------ on a GPU


LARGE_CASES = {
    "lstm 128": Case("lstm", 128, 64, 33, 50, 2),
    "lstm 127": Case("lstm", 127, 40, 17, 20),
    "gru 100": Case("gru", 100, 64, 33, 50, 2),
    "gru 64, packed": Case("gru", 64, 32, directions=2, lengths=tuple(range(40, 3, -1))),
    "rnn 256": Case("rnn_tanh", 256, 64, 33, 50),
    "lstm 64": Case("lstm", 64, 64, 16, 30, 2),
}
STEP_CASES = {
    "lstm 512": Case("lstm", 512, 128, 64, 12, 2),
    "gru 1025": Case("gru", 1025, 64, 9, 5),
    "lstm 256, projected, packed": Case(
        "lstm", 256, 64, directions=2, proj_size=96, lengths=tuple(range(30, 3, -2))
    ),
}
on_gpu = pytest.mark.skipif(no_gpu, reason="no CUDA GPU")
gpu_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)


@pytest.mark.gpu
@on_gpu
@by_triton
@gpu_dtypes
@each_case
def test_recurrent_matches_float64_on_gpu(backend, name, path, dtype):
    with full_precision():
        hold_to_torch(Problem.drawn((CASES | PROJECTIONS)[name], dtype, "cuda"), path)


@pytest.mark.gpu
@on_gpu
@by_triton
@gpu_dtypes
@pytest.mark.parametrize("name", LARGE_CASES | STEP_CASES)
def test_recurrent_matches_float64_on_gpu_at_real_sizes(backend, name, dtype):
    with full_precision():
        hold_to_torch(Problem.drawn((LARGE_CASES | STEP_CASES)[name], dtype, "cuda"), None)


@pytest.mark.gpu
@on_gpu
@by_triton
@pytest.mark.parametrize("mode", ["lstm", "gru"])
def test_recurrent_follows_torchs_tf32_switch_on_gpu(backend, mode):
    problem = Problem.drawn(Case(mode, 64, 64, 32, 20), device="cuda")
    with precision(tf32=True):
        hold_to_torch(problem, "resident")
        rounded = problem.forward("resident")[0]
    with full_precision():
        assert not torch.equal(problem.forward("resident")[0], rounded)


@pytest.mark.gpu
@on_gpu
@by_triton
@pytest.mark.parametrize("name", LARGE_CASES | STEP_CASES)
def test_recurrent_repeats_bitwise_on_gpu(backend, name):
    problem = Problem.drawn((LARGE_CASES | STEP_CASES)[name], torch.bfloat16, "cuda")
    runs = []
    for _ in range(3):
        result = problem.forward(None)
        grads = problem.backward(None, result).values()
        runs.append([t for t in (*result, *grads) if t is not None])
    for again in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], again, strict=True))


@pytest.mark.gpu
@on_gpu
@by_triton
@pytest.mark.parametrize("name", ["lstm 128", "gru 64, packed", "lstm 512", "lstm 256, projected, packed"])
def test_recurrent_is_captured_in_a_cuda_graph(backend, name):
    problem = Problem.drawn((LARGE_CASES | STEP_CASES)[name], torch.bfloat16, "cuda")
    path = "step" if problem.case.lengths else None
    result = problem.forward(path)
    expected = [*result, *problem.backward(path, result).values()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = problem.forward(None)
        captured = [*result, *problem.backward(None, result).values()]
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    for ours, once in zip(captured, expected, strict=True):
        assert ours is once or torch.equal(ours, once)
