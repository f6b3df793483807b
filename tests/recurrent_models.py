"""Recurrent layers as data: a problem, our layer and torch's on it, float64's answer, the rule for them.

A result is a dict: "output", "h_n", "c_n", then "grad input", "grad h0", "grad c0" and "grad <parameter>",
which are None where autograd gives no gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pyarch
from pyarch import dispatch, native
from tests.compare import check, error

STOCK = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "rnn_tanh": (nn.RNN, {"nonlinearity": "tanh"}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
}
STOCK_CELLS = {
    "lstm": (nn.LSTMCell, {}),
    "gru": (nn.GRUCell, {}),
    "rnn_tanh": (nn.RNNCell, {"nonlinearity": "tanh"}),
    "rnn_relu": (nn.RNNCell, {"nonlinearity": "relu"}),
}
MODES = tuple(STOCK)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUTPUTS = ("output", "h_n", "c_n")
STATE = ("h0", "c0")
# Below this many elements torch's largest error is a poor sample; its worst of the same call stands in.
FEW = 64

_missing = native.serving()[1]
CPU = pytest.param("cpu", marks=pytest.mark.skipif(bool(_missing), reason=_missing or "never"))
each_backend = pytest.mark.parametrize("backend", [CPU, "reference"])
each_mode = pytest.mark.parametrize("mode", MODES)
each_layer = pytest.mark.parametrize("name", ("RNN", "LSTM", "GRU"))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def contiguous(tensor: Tensor) -> Tensor:
    return tensor


def batch_major(tensor: Tensor) -> Tensor:
    """The first two dimensions in each other's memory order."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def features_first(tensor: Tensor) -> Tensor:
    """The last dimension outermost in memory."""
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1)


def drop_in(stock: type[nn.Module]) -> type[nn.Module]:
    """pyarch's class of torch's name."""
    return getattr(pyarch.nn, stock.__name__)


@dataclass(frozen=True)
class Problem:
    """A layer, what it is given and which of its outputs receive a gradient.

    `state` is "given", "none" or "expanded" (one row for the whole batch); batch None is an input without a
    batch; `frozen` holds "input", "h0", "c0" or parts of parameters' names; a cell does one step on (B, I).
    """

    mode: str
    steps: int = 5
    batch: int | None = 3
    inputs: int = 4
    hidden: int = 6
    proj: int = 0
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    dtype: torch.dtype = torch.float32
    cell: bool = False
    state: str = "given"
    lengths: tuple[int, ...] | None = None
    enforce_sorted: bool = False
    layout: Callable[[Tensor], Tensor] = contiguous
    grad_layout: Callable[[Tensor], Tensor] = contiguous
    change: Callable[[Tensor], Tensor] = contiguous
    frozen: tuple[str, ...] = ()
    reached: tuple[str, ...] = OUTPUTS
    seed: int = 0

    def __str__(self) -> str:
        """What differs from the defaults, for the name of a test."""
        texts = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                texts.append(f"{field.name} {getattr(value, '__name__', value)}")
        return ", ".join(texts)

    # -------------------------------------------------------------------------------- the layer

    @property
    def stock_class(self) -> type[nn.Module]:
        return (STOCK_CELLS if self.cell else STOCK)[self.mode][0]

    @property
    def settings(self) -> dict:
        settings = dict((STOCK_CELLS if self.cell else STOCK)[self.mode][1], bias=self.bias)
        if not self.cell:
            settings |= dict(
                num_layers=self.layers, bidirectional=self.bidirectional, batch_first=self.batch_first
            )
            if self.proj:
                settings["proj_size"] = self.proj
        return settings

    def stock(self) -> nn.Module:
        """Torch's layer, the same numbers every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 1)
            layer = self.stock_class(self.inputs, self.hidden, **self.settings).to(self.dtype)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not any(part in name for part in self.frozen))
        return layer

    def ours(self) -> nn.Module:
        """Our layer with the numbers of torch's."""
        layer = drop_in(self.stock_class)(self.inputs, self.hidden, **self.settings).to(self.dtype)
        layer.load_state_dict(self.stock().state_dict())
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not any(part in name for part in self.frozen))
        return layer

    # -------------------------------------------------------------------------------- its arguments

    def arguments(self) -> tuple[Tensor, ...]:
        """Input (padded where there are lengths) and state (h0, or h0 and c0, or nothing)."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        batch = () if self.batch is None else (self.batch,)
        shape = (*batch, self.inputs) if self.cell else (self.steps, *batch, self.inputs)
        input = self.change(torch.randn(shape, generator=generator)).to(self.dtype)
        if self.batch_first and not self.cell and batch:
            input = input.transpose(0, 1).contiguous()
        state = []
        if self.state != "none":
            stacked = () if self.cell else (self.layers * (1 + self.bidirectional),)
            row = (1,) if self.state == "expanded" else batch
            for width in (self.proj or self.hidden, self.hidden)[: 1 + (self.mode == "lstm")]:
                drawn = torch.randn(*stacked, *row, width, generator=generator).to(self.dtype)
                state.append(drawn.expand(*stacked, *batch, width))
        return self.layout(input), *state

    def call(self, layer: nn.Module, leaves: list[Tensor]) -> dict[str, Tensor]:
        """The layer's outputs by name."""
        input, *state = leaves
        hx = None if not state else tuple(state) if self.mode == "lstm" else state[0]
        if self.lengths is not None:
            input = pack_padded_sequence(input, self.lengths, self.batch_first, self.enforce_sorted)
        results = layer(input, hx)
        if not self.cell:
            output, state = results
            results = (output.data if isinstance(output, PackedSequence) else output), state
        names = OUTPUTS[self.cell :]
        flat = results if self.cell and self.mode != "lstm" else _flat(results)
        return dict(zip(names, (flat,) if isinstance(flat, Tensor) else flat, strict=False))


def _flat(results: tuple) -> list[Tensor]:
    return [leaf for each in results for leaf in (each if isinstance(each, tuple) else (each,))]


# ------------------------------------------------------------------------------------ one run


def outcome(problem: Problem, layer: nn.Module, arguments=None, cotangents=None) -> dict[str, Tensor | None]:
    """Outputs and gradients of one layer, with random dense gradients of every reached output."""
    arguments = problem.arguments() if arguments is None else arguments
    names = ("input", *STATE)[: len(arguments)]
    leaves = [
        each.detach().requires_grad_(name not in problem.frozen)
        for name, each in zip(names, arguments, strict=True)
    ]
    outputs = problem.call(layer, leaves)
    wanted = {f"grad {name}": leaf for name, leaf in zip(names, leaves, strict=True)}
    wanted |= {f"grad {name}": parameter for name, parameter in layer.named_parameters()}
    differentiable = {name: leaf for name, leaf in wanted.items() if leaf.requires_grad}
    reached = {name: each for name, each in outputs.items() if name in problem.reached}
    grads = _cotangents(problem, reached) if cotangents is None else cotangents
    gradients = dict.fromkeys(wanted)
    if differentiable:
        found = torch.autograd.grad(
            list(reached.values()), list(differentiable.values()), list(grads.values()), allow_unused=True
        )
        gradients |= dict(zip(differentiable, found, strict=True))
    return {name: each.detach() for name, each in outputs.items()} | gradients


def _cotangents(problem: Problem, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random gradients, rounded to the problem's dtype whatever dtype the outputs have."""
    generator = torch.Generator().manual_seed(problem.seed + 3)
    grads = {}
    for name, output in outputs.items():
        drawn = torch.randn(output.shape, generator=generator).to(problem.dtype)
        grads[name] = problem.grad_layout(drawn).to(output.dtype)
    return grads


@lru_cache(maxsize=8)
def answers(problem: Problem) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None], dict[str, float]]:
    """What torch's layer gives in the problem's dtype and in float64, and the noise of each gradient."""
    stock = problem.stock()
    exact = copy.deepcopy(stock).double()
    wide = [each.double() for each in problem.arguments()]
    truth = outcome(problem, exact, wide)
    theirs = outcome(problem, stock)
    return theirs, truth, noise_of(problem, theirs, truth)


# ------------------------------------------------------------------------------------ the rule


def noise_of(
    problem: Problem, stock: dict[str, Tensor | None], truth: dict[str, Tensor | None]
) -> dict[str, float]:
    """The relative error that each gradient may have by chance, whatever torch's happens to be.

    A float32 gradient of one layer or cell: one rounding of the sum of its absolute terms, which torch adds
    up in another order, step by step. A relu in 16 bits: the square root of epsilon, as in pyarch.verify,
    because an activation that rounds to the other side of zero passes or stops a gradient. A stack of layers:
    torch's worst relative error among the gradients, because each layer's errors reach all below it.
    """
    gradients = {name: each for name, each in truth.items() if name not in OUTPUTS and each is not None}
    if problem.mode == "rnn_relu" and problem.dtype != torch.float32:
        return dict.fromkeys(gradients, torch.finfo(problem.dtype).eps ** 0.5 / 2)
    if problem.layers > 1:
        return dict.fromkeys(gradients, worst_relative(stock, truth, gradients))
    if problem.dtype != torch.float32 or problem.batch == 0:
        return {}
    eps = torch.finfo(torch.float32).eps
    terms = absolute_terms(problem, truth)
    shared = gradients.keys() & terms.keys()
    return {name: eps * terms[name] / (_largest(gradients[name]) or 1.0) for name in shared}


def worst_relative(stock: dict[str, Tensor | None], truth: dict[str, Tensor | None], names) -> float:
    """Torch's largest error relative to its tensor."""
    relative = (error(stock[name], truth[name]) / (_largest(truth[name]) or 1.0) for name in names)
    return max(relative, default=0.0)


def absolute_terms(problem: Problem, truth: dict[str, Tensor | None]) -> dict[str, float]:
    """The largest sum of absolute terms in each gradient of one layer or cell, in float64."""
    weights = {name: each.detach().double().abs() for name, each in problem.stock().named_parameters()}
    places = [""] if problem.cell else ["_l0", "_l0_reverse"][: 1 + problem.bidirectional]
    input, *hx = (each.double().abs() for each in problem.arguments())
    rows = input.reshape(-1, problem.inputs)
    states = [*hx[:1], *(truth[name] for name in ("output",) if name in truth)]
    highest = max(map(_largest, states), default=0.0)
    terms, of_input = {"grad h0": 0.0}, torch.zeros_like(rows)
    for place, gates in zip(places, _gradients_of_gates(problem, places), strict=True):
        total = gates.sum(0)
        of_input += gates @ weights[f"weight_ih{place}"]
        terms["grad h0"] = max(terms["grad h0"], _largest(gates @ weights[f"weight_hh{place}"]))
        terms[f"grad weight_ih{place}"] = _largest(gates.mT @ rows)
        terms[f"grad weight_hh{place}"] = _largest(total) * highest
        terms[f"grad bias_ih{place}"] = terms[f"grad bias_hh{place}"] = _largest(total)
    return terms | {"grad input": _largest(of_input)}


def _gradients_of_gates(problem: Problem, places: list[str]) -> tuple[Tensor, ...]:
    """Of each direction, |gradient| of the gates' sums (rows, G H) in float64.

    It is the gradient of further inputs that are zero and each feed one gate.
    """
    state = {name: each.double() for name, each in problem.stock().state_dict().items()}
    units = len(state[f"weight_hh{places[0]}"])
    feeds = torch.eye(len(places) * units, dtype=torch.float64).split(units)
    for place, feed in zip(places, feeds, strict=True):
        state[f"weight_ih{place}"] = torch.cat([state[f"weight_ih{place}"], feed], 1)
    further = len(places) * units
    layer = problem.stock_class(problem.inputs + further, problem.hidden, **problem.settings).double()
    layer.load_state_dict(state)
    input, *hx = (each.double() for each in problem.arguments())
    fed = torch.cat([input, input.new_zeros(*input.shape[:-1], further)], -1)
    gradients = outcome(replace(problem, frozen=()), layer, [fed, *hx])["grad input"]
    return gradients[..., problem.inputs :].abs().reshape(-1, further).split(units, -1)


def hold(
    results: dict[str, Tensor | None],
    stock: dict[str, Tensor | None],
    truth: dict[str, Tensor | None],
    noise: dict[str, float] | None = None,
) -> None:
    """Hold outputs and gradients to the tolerance rule, and to torch in which gradients there are.

    One float32 rounding of the largest value counts as torch's error too: on few elements torch may be right
    by luck, and there its worst relative error of the same call counts. Where torch's graph does not reach a
    parameter at all, None in torch's words, zeros are as good.
    """
    assert results.keys() == stock.keys()
    for name, each in stock.items():
        assert each is None or results[name] is not None, f"{name}: missing"
        assert each is not None or results[name] is None or not results[name].any(), f"{name}: torch has none"
    present = [name for name, each in stock.items() if each is not None]
    outputs = [name for name in present if name in OUTPUTS]
    for group in (outputs, [name for name in present if name not in OUTPUTS]):
        scales = {name: _largest(truth[name]) for name in group}
        layer = 0.0 if group is outputs else max(scales.values(), default=0.0)
        worst = worst_relative(stock, truth, group)
        for name in group:
            chance = max(torch.finfo(torch.float32).eps, (noise or {}).get(name, 0.0))
            if truth[name].numel() < FEW:
                chance = max(chance, worst)
            check(name, results[name], stock[name], truth[name], layer, chance)


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def prove(problem: Problem, backend: str, drawn: bool = False) -> dict[str, Tensor | None]:
    """Run our layer on a backend, hold it to the rule and to having run there; returns the results.

    Among many drawn problems some meet torch at its luckiest, so there its worst relative error among the
    gradients counts for each.
    """
    seen: set[tuple[str, str]] = set()
    with (
        dispatch.recording(lambda op, call, chosen: seen.add((op.name, chosen.name))),
        pyarch.backend(backend),
    ):
        results = outcome(problem, problem.ours())
    stock, truth, noise = answers(problem)
    if drawn:
        gradients = [name for name, each in stock.items() if name not in OUTPUTS and each is not None]
        worst = worst_relative(stock, truth, gradients)
        noise = {name: max(worst, noise.get(name, 0.0)) for name in gradients}
    hold(results, stock, truth, noise)
    if problem.batch != 0:
        gradients = [each for name, each in truth.items() if name not in OUTPUTS and each is not None]
        passes = ("recurrent_forward", "recurrent_backward")[: 1 + bool(gradients)]
        assert seen == {(name, backend) for name in passes}
        assert not gradients or any(each.abs().nan_to_num().max() > 0 for each in gradients)
    return results


def in_every_mode(**settings) -> list[Problem]:
    return [Problem(mode, **settings) for mode in MODES]


def cases(*problems: Problem):
    """A test's problems, named by what differs from the defaults."""
    return pytest.mark.parametrize("problem", problems, ids=str)


# ------------------------------------------------------------------------------------ a small network


def close(mine, theirs, tolerance=1e-5):
    torch.testing.assert_close(mine, theirs, rtol=10 * tolerance, atol=tolerance)


class Net(nn.Module):
    """Two recurrent layers, one in both directions, with something to fuse between them."""

    def __init__(self, name, ours):
        super().__init__()
        build = drop_in(getattr(nn, name)) if ours else getattr(nn, name)
        self.first = build(4, 6, bidirectional=True)
        self.second = build(12, 5)

    def forward(self, x):
        hidden, _ = self.first(x)
        return self.second(torch.relu(hidden) + 1)[0]


def nets(name):
    ours, stock = Net(name, True), Net(name, False)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def results_of(model, x):
    """Output and gradients of input and parameters."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y, x.grad, *(each.grad for each in model.parameters())]
