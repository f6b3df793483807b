"""Recurrent layers under torch's transforms: autocast, functorch, double backward, checkpoints, threads."""

from __future__ import annotations

import copy
import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import pyarch
from pyarch import dispatch
from tests.recurrent_models import (
    Problem,
    cases,
    close,
    each_backend,
    each_layer,
    each_mode,
    hold,
    in_every_mode,
    nets,
    outcome,
    results_of,
    worst_relative,
)

OPERATOR = "recurrent"


def outcome_or_error(run):
    """What a call returns, or the type and text of its error."""
    try:
        return run()
    except (RuntimeError, NotImplementedError) as error:
        return type(error).__name__, str(error)


# ------------------------------------------------------------------------------------ autocast


@each_backend
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", [False, True], ids=["layer", "cell"])
@each_mode
def test_recurrent_autocast_casts_as_torch_does(backend, mode, cell, target):
    """LSTM and RNN run in the target's dtype, GRU in its own; where torch fails, so it does."""
    problem = Problem(mode, cell=cell)
    kinds = []
    for layer in (problem.ours(), problem.stock()):
        for state in (True, False):
            leaves = list(problem.arguments())[: None if state else 1]
            with torch.autocast("cpu", dtype=target), pyarch.backend(backend):
                results = outcome_or_error(lambda layer=layer, leaves=leaves: problem.call(layer, leaves))
            if isinstance(results, dict):
                results = {name: each.dtype for name, each in results.items()}
            kinds.append(results)
    assert kinds[:2] == kinds[2:]


@each_backend
@cases(*in_every_mode(layers=2, bidirectional=True), Problem("lstm", proj=3), *in_every_mode(cell=True))
def test_recurrent_autocast_trains(backend, problem):
    results = []
    for layer in (problem.ours(), problem.stock()):
        with pyarch.backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(outcome(problem, layer))
    exact = problem.stock().double()
    wide = outcome(problem, exact, [each.double() for each in problem.arguments()])
    hold(*results, wide)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_layer
def test_recurrent_autocast_takes_packed_input_of_either_dtype(backend, name, dtype):
    ours, stock = nets(name)
    data = torch.randn(7, 3, 4).to(dtype)
    results = []
    for layer in (ours.first, stock.first):
        sequence = nn.utils.rnn.pack_padded_sequence(data, [7, 5, 1])
        with torch.autocast("cpu", dtype=torch.bfloat16), pyarch.backend(backend):
            results.append(outcome_or_error(lambda layer=layer, s=sequence: layer(s)[0].data))
    assert type(results[0]) is type(results[1])
    if isinstance(results[1], torch.Tensor):
        assert results[0].dtype == results[1].dtype
        close(results[0], results[1], 0.02)
    else:
        assert results[0] == results[1]


# ------------------------------------------------------------------------------------ functorch, forward mode


def functions(mode, batch=3):
    """Our layer and torch's as functions of (parameters, input), and both arguments."""
    problem = Problem(mode, batch=batch, bidirectional=True)
    ours, stock = problem.ours(), problem.stock()
    parameters = {name: each.detach() for name, each in stock.named_parameters()}
    calls = [
        lambda parameters, x, layer=layer: functional_call(layer, parameters, (x,))[0]
        for layer in (ours, stock)
    ]
    return calls, parameters, problem.arguments()[0]


def loss_of(call):
    return lambda parameters, x: call(parameters, x).square().sum()


FUNCTORCH = {
    "grad": lambda call, parameters, x: grad(loss_of(call), argnums=(0, 1))(parameters, x),
    "vmap over inputs": lambda call, parameters, x: vmap(call, (None, 0))(parameters, torch.stack([x, -x])),
    "vmap over parameters": lambda call, parameters, x: vmap(call, (0, None))(
        {name: torch.stack([each, -each]) for name, each in parameters.items()}, x
    ),
    "grad of each sample": lambda call, parameters, x: vmap(grad(loss_of(call)), (None, 1))(parameters, x),
    "grad of each copy": lambda call, parameters, x: vmap(grad(loss_of(call)), (None, 0))(
        parameters, torch.stack([x, -x])
    ),
    "jacrev": lambda call, parameters, x: jacrev(call, argnums=1)(parameters, x),
    "jvp": lambda call, parameters, x: jvp(functools.partial(call, parameters), (x,), (x.cos(),)),
    "grad of grad": lambda call, parameters, x: grad(
        lambda x: grad(loss_of(call), argnums=1)(parameters, x).square().sum()
    )(x),
}


@each_backend
@pytest.mark.parametrize("transform", FUNCTORCH)
@each_mode
def test_recurrent_functorch_is_torchs(backend, mode, transform):
    """The same values where torch has them, the same error where it has none."""
    (ours, stock), parameters, x = functions(mode)
    expected = outcome_or_error(lambda: FUNCTORCH[transform](stock, parameters, x))
    with pyarch.backend(backend):
        got = outcome_or_error(lambda: FUNCTORCH[transform](ours, parameters, x))
    if isinstance(expected, tuple) and isinstance(expected[0], str):
        assert got == expected
    else:
        close(got, expected)


@each_backend
@pytest.mark.parametrize("transform", ["grad", "grad of grad", "jacrev"])
def test_recurrent_functorch_transforms_that_torch_has(backend, transform):
    """The table above compares values for these, not errors."""
    (_, stock), parameters, x = functions("gru")
    assert not isinstance(FUNCTORCH[transform](stock, parameters, x)[0], str)


@each_backend
@pytest.mark.parametrize("dual", ["input", "state", "parameter"])
@pytest.mark.parametrize("cell", [False, True], ids=["layer", "cell"])
@each_mode
def test_recurrent_forward_mode(backend, mode, cell, dual):
    """A tangent of any argument reaches the output; torch's LSTM on a CPU refuses, and so does ours."""
    problem = Problem(mode, cell=cell)

    def tangent(layer):
        input, *state = problem.arguments()
        with torch.autograd.forward_ad.dual_level():
            make = torch.autograd.forward_ad.make_dual
            if dual == "input":
                input = make(input, torch.ones_like(input))
            if dual == "state":
                state = [make(each, torch.ones_like(each)) for each in state]
            if dual == "parameter":
                layer = copy.deepcopy(layer)
                name, weight = next(iter(layer.named_parameters()))
                delattr(layer, name)
                setattr(layer, name, make(weight.detach(), torch.ones_like(weight)))
            output = problem.call(layer, [input, *state])["h_n"]
            return torch.autograd.forward_ad.unpack_dual(output).tangent

    expected = outcome_or_error(lambda: tangent(problem.stock()))
    with pyarch.backend(backend):
        got = outcome_or_error(lambda: tangent(problem.ours()))
    assert expected is not None
    if isinstance(expected, tuple):
        assert got == expected
    else:
        close(got, expected)


# ------------------------------------------------------------------------------------ higher derivatives


def penalty(problem, layer, arguments):
    """Gradients of the squared gradients, of every argument and parameter."""
    leaves = [each.detach().requires_grad_() for each in arguments]
    outputs = problem.call(layer, leaves)
    wanted = [*leaves, *layer.parameters()]
    first = torch.autograd.grad(
        sum(each.pow(3).sum() for each in outputs.values()), wanted, create_graph=True
    )
    second = torch.autograd.grad(sum(each.square().sum() for each in first), wanted)
    return {f"grad {place}": each for place, each in enumerate(second)}


@each_backend
@cases(
    *in_every_mode(bidirectional=True, steps=4),
    *in_every_mode(layers=2, lengths=(3, 1, 4), steps=4),
    *in_every_mode(cell=True),
    Problem("lstm", proj=3, steps=4),
    Problem("gru", bias=False, steps=4),
)
def test_recurrent_double_backward(backend, problem):
    """Held to float64 by the rule; each second derivative gathers the errors of all first ones."""
    with pyarch.backend(backend):
        mine = penalty(problem, problem.ours(), problem.arguments())
    theirs = penalty(problem, problem.stock(), problem.arguments())
    wide = [each.double() for each in problem.arguments()]
    exact = penalty(problem, problem.stock().double(), wide)
    assert all(each.abs().max() > 0 for each in exact.values())
    hold(mine, theirs, exact, dict.fromkeys(exact, worst_relative(theirs, exact, exact)))


@each_backend
@each_mode
def test_recurrent_double_backward_of_some(backend, mode):
    """A gradient penalty on the input alone, with the weights frozen."""
    problem = Problem(mode, frozen=("weight", "bias"))
    results = []
    for layer, engine in ((problem.ours(), backend), (problem.stock(), "auto")):
        x = problem.arguments()[0].requires_grad_()
        with pyarch.backend(engine):
            (first,) = torch.autograd.grad(layer(x)[0].pow(3).sum(), x, create_graph=True)
            results.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert results[1].abs().max() > 0
    close(*results)


# ------------------------------------------------------------------------------------ autograd's machinery


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@each_backend
@each_layer
def test_recurrent_activation_checkpointing(backend, name, reentrant):
    ours, stock = nets(name)
    x = torch.randn(7, 3, 4)
    seen = []
    record = dispatch.recording(lambda op, call, chosen: seen.append((op.name, chosen.name)))
    with pyarch.backend(backend), record:
        got = results_of(Recomputed(ours, use_reentrant=reentrant), x)
    close(got, results_of(stock, x))
    assert seen.count(("recurrent_forward", backend)) == 4
    assert seen.count(("recurrent_backward", backend)) == 2


@each_backend
@each_layer
def test_recurrent_selective_checkpointing_keeps_the_layers(backend, name):
    """A policy that saves our operator and recomputes all else runs each layer once."""
    ours, stock = nets(name)

    def policy(context, func, *args, **kwargs):
        ours = func is torch.ops.pyarch.recurrent_forward.default
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    x = torch.randn(7, 3, 4)
    seen = []
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    with pyarch.backend(backend), dispatch.recording(lambda op, *_: seen.append(op.name)):
        got = results_of(Recomputed(ours, use_reentrant=False, context_fn=contexts), x)
    close(got, results_of(stock, x))
    assert seen.count("recurrent_forward") == 2


class Recomputed(nn.Module):
    """The model with its activations computed again in the backward."""

    def __init__(self, model, **settings):
        super().__init__()
        self.model = model
        self.settings = settings

    def forward(self, x):
        return checkpoint(self.model, x, **self.settings)


@each_backend
@each_mode
def test_recurrent_saved_tensors_may_be_moved(backend, mode):
    """What autograd keeps for the backward goes through its hooks."""
    problem = Problem(mode, bidirectional=True)
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.clone()

    with pyarch.backend(backend):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
            got = outcome(problem, problem.ours())
    assert packed
    close(got, outcome(problem, problem.stock()))


@each_backend
@each_mode
def test_recurrent_backward_twice_needs_the_graph_kept(backend, mode):
    layer = Problem(mode).ours()
    with pyarch.backend(backend):
        loss = layer(torch.randn(5, 3, 4))[0].square().sum()
        loss.backward(retain_graph=True)
        first = layer.weight_hh_l0.grad.clone()
        loss.backward()
        close(layer.weight_hh_l0.grad, 2 * first)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


@each_backend
@pytest.mark.parametrize("changed", ["input", "weight"])
@each_mode
def test_recurrent_notices_what_changed_before_the_backward(backend, mode, changed):
    layer = Problem(mode).ours()
    x = torch.randn(5, 3, 4)
    with pyarch.backend(backend):
        output, _ = layer(x)
        with torch.no_grad():
            {"input": x, "weight": layer.weight_hh_l0}[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.square().sum().backward()


@each_backend
@pytest.mark.parametrize("change", ["relu_", "mul_"])
@each_mode
def test_recurrent_output_may_be_changed_in_place_as_torchs(backend, mode, change):
    """An inplace activation behind the layer trains wherever it does behind torch's layer, with its gradient.

    Torch's LSTM on a CPU keeps its output for the backward and says that it was modified.
    """
    problem = Problem(mode)
    x, gradients = torch.randn(5, 3, 4), []
    for layer, engine in ((problem.stock(), "auto"), (problem.ours(), backend)):

        def train(layer=layer):
            output, _ = layer(x)
            changed = output.relu_() if change == "relu_" else output.mul_(2)
            return torch.autograd.grad(changed.square().sum(), list(layer.parameters()))

        with pyarch.backend(engine):
            gradients.append(outcome_or_error(train))
    if isinstance(gradients[0][0], str):
        assert mode == "lstm" and "modified by an inplace operation" in gradients[0][1]
    if isinstance(gradients[1][0], str):
        assert isinstance(gradients[0][0], str), gradients[1]
    else:
        layer = problem.stock()
        output, _ = layer(x)
        changed = output.relu() if change == "relu_" else output * 2
        close(gradients[1], torch.autograd.grad(changed.square().sum(), list(layer.parameters())))


@each_backend
@cases(*in_every_mode(), *in_every_mode(cell=True), *in_every_mode(lengths=(3, 5, 1)))
def test_recurrent_without_grad_mode_records_nothing(backend, problem):
    layer, arguments = problem.ours(), problem.arguments()
    with pyarch.backend(backend):
        with torch.no_grad():
            assert not any(each.requires_grad for each in problem.call(layer, arguments).values())
        with torch.inference_mode():
            results = problem.call(layer, arguments)
            assert all(each.is_inference() for each in results.values())
        assert all(each.requires_grad for each in problem.call(layer, arguments).values())
        layer.requires_grad_(False)
        assert not any(each.requires_grad for each in problem.call(layer, arguments).values())
    close(results, problem.call(problem.stock().requires_grad_(False), arguments))


@each_backend
@each_layer
def test_recurrent_hooks_see_what_they_see_on_stock(backend, name):
    seen = []
    x = torch.randn(7, 3, 4)
    for model, engine in zip(nets(name), (backend, "auto"), strict=True):
        model.first.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].detach()))
        model.first.register_forward_hook(lambda layer, inputs, output: seen.append(output[0].detach()))
        model.first.register_full_backward_hook(
            lambda layer, inputs, outputs: seen.append(outputs[0].detach())
        )
        model.second.weight_hh_l0.register_hook(lambda gradient: seen.append(gradient.detach()))
        with pyarch.backend(engine):
            results_of(model, x)
    assert len(seen) == 8
    close(seen[:4], seen[4:])


@each_backend
@each_mode
def test_recurrent_concurrent_calls(backend, mode):
    """Two threads train two layers at once, many times, and get what one after the other gives."""
    problems = [Problem(mode, hidden=hidden, steps=20, bidirectional=True) for hidden in (9, 40)]
    layers = [problem.ours() for problem in problems]

    def work(problem, layer):
        with pyarch.backend(backend):
            return [outcome(problem, layer) for _ in range(8)]

    expected = [outcome_on(backend, *each) for each in zip(problems, layers, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(work, problems, layers))
    for wanted, many in zip(expected, runs, strict=True):
        for got in many:
            assert all(torch.equal(got[each], wanted[each]) for each in wanted)


def outcome_on(backend, problem, layer):
    with pyarch.backend(backend):
        return outcome(problem, layer)


@each_backend
@each_layer
def test_recurrent_concurrent_calls_of_one_layer(backend, name):
    layer, x = nets(name)[0], [torch.randn(9, 3, 4) for _ in range(6)]

    def work(each):
        with pyarch.backend(backend), torch.no_grad():
            return layer(each)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(work, x * 5))
    for each, got in zip(x * 5, results, strict=True):
        assert torch.equal(got, work(each))
