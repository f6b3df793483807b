"""Layers for the persistent recurrent kernels as data, their tensors, one run, the reference's answers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pyarch.reference import recurrent as reference
from pyarch.triton_kernels import recurrent
from pyarch.triton_kernels import recurrent_persistent as persistent
from pyarch.triton_kernels.recurrent_products import (
    GATES,
    grad_input,
    grad_weights,
    input_side,
    states_before,
    weights_of,
)
from tests import recurrent_cases
from tests.compare import check
from tests.conv_cases import expanded, misaligned, sliced
from tests.gpu_calls import placed
from tests.recurrent_models import batch_major, features_first

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


# A dtype, and whether float32 products are tf32.
PRODUCTS = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "fp32": (torch.float32, False),
    "fp32 as tf32": (torch.float32, True),
}
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
# What only a GPU computes in a reasonable time.
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


# Whole layers, because the host side lays some of their tensors out anew.
STRIDED = {
    f"{mode}, {layout.__name__}": recurrent_cases.Case(
        mode, batch=5, hidden=20, directions=2, layout=layout, state_layout=features_first, grad_layout=layout
    )
    for layout in (batch_major, features_first, sliced, misaligned, expanded)
    for mode in ("lstm", "gru", "rnn_tanh")
}
STRIDED["lstm, packed"] = recurrent_cases.Case(
    "lstm", hidden=20, lengths=(7, 5, 5, 2, 1), directions=2, layout=sliced, grad_layout=expanded
)


def hold_strided(case: recurrent_cases.Case, dtype: torch.dtype, device: str) -> None:
    """A layer by the persistent path on views, weights that lie column by column among them."""
    operands = case.operands(dtype)
    weights = [each.t().contiguous().t() if each.dim() == 2 else sliced(each) for each in operands.weights]
    there = {
        name: [placed(each, device) if isinstance(each, Tensor) else each for each in given]
        for name, given in (("states", operands[:3]), ("weights", weights), ("grads", operands.grads))
    }
    inputs = *there["states"], there["weights"], operands.batch_sizes
    results = recurrent.forward(case.mode, *inputs, True, "persistent")
    output, _, _, gates, cells = results
    needs = [each is not None for each in operands.flat]
    *states, of_weights = recurrent.backward(
        case.mode, *there["grads"], *inputs, output, gates, cells, needs, "persistent"
    )
    named = dict(zip((*recurrent_cases.OUTPUTS, *recurrent_cases.RESIDUALS), results, strict=True))
    named |= recurrent_cases.named_gradients([*states, *of_weights])
    recurrent_cases.hold_all(
        case, operands, {name: None if each is None else each.cpu() for name, each in named.items()}
    )


def planned(problem: Problem, place: persistent.Place) -> tuple[list, tuple]:
    """The forward's launches at a place, and what they fill."""
    arguments = problem.forward_arguments()
    alarm = persistent.alarm_of(problem.input.device)
    return persistent.plan_forward(*arguments, place, alarm), arguments[-1]


def planned_backward(
    problem: Problem, place: persistent.Place, saved: tuple[Tensor | None, ...] | None = None
) -> tuple[list, tuple]:
    """The backward's launches at a place, and what they fill; behind a forward unless `saved` is given."""
    if saved is None:
        arguments = problem.forward_arguments()
        persistent.forward(*arguments)
        saved = arguments[-1]
    output, _, _, gates, cells = saved
    arguments = problem.backward_arguments(problem.incoming(), (output, gates, cells))
    alarm = persistent.alarm_of(problem.input.device)
    return persistent.plan_backward(*arguments, place, alarm), arguments[-1]


def need_plans(problem: Problem) -> None:
    """Skip, quoting the refusal, where the GPU has too few multiprocessors for a layer's programs."""
    for kernel in ("forward", "backward"):
        refused = list(persistent.refusals(problem.layer, kernel, persistent.place_of(problem.input.device)))
        if refused:
            pytest.skip(f"the persistent kernel refuses: {'; '.join(refused)}")


AT_ONCE = persistent.Place("default", 64)
