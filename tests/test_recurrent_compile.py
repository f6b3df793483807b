"""Recurrent layers in torch.compile and torch.export, and torch's own check of the operators inside."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pyarch
from tests.recurrent_models import (
    Net,
    Problem,
    batch_major,
    cases,
    close,
    each_backend,
    each_layer,
    in_every_mode,
    nets,
    outcome,
    results_of,
)

OPERATOR = "recurrent"


@each_backend
@pytest.mark.parametrize(
    "name, engine", [("RNN", "aot_eager"), ("LSTM", "aot_eager"), ("GRU", "aot_eager"), ("LSTM", "inductor")]
)
def test_recurrent_compiles_whole_with_dynamic_shapes(backend, name, engine):
    """Steps and batch vary without a new graph. Dynamo takes recurrent classes only with allow_rnn."""
    if engine == "inductor" and shutil.which("g++") is None:
        pytest.skip("no C++ compiler, inductor needs one")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ours, stock = nets(name)
    with torch._dynamo.config.patch(allow_rnn=True), pyarch.backend(backend):
        graph = torch.compile(ours, fullgraph=True, dynamic=True, backend=engine)
        for steps, batch in ((7, 3), (5, 2), (9, 4)):
            x = torch.randn(steps, batch, 4)
            close(results_of(graph, x), results_of(stock, x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@each_backend
@pytest.mark.parametrize("name", ["GRU"])
def test_recurrent_compiles_as_it_is(backend, name):
    """Without allow_rnn dynamo leaves the graph at each layer, as at torch's, and goes on after it."""
    torch._dynamo.reset()
    ours, stock = nets(name)
    with pyarch.backend(backend):
        compiled = torch.compile(ours, backend="aot_eager")
        for steps in (7, 5):
            x = torch.randn(steps, 3, 4)
            close(results_of(compiled, x), results_of(stock, x))


@each_backend
@cases(*in_every_mode(cell=True))
def test_recurrent_cells_compile_whole(backend, problem):
    torch._dynamo.reset()
    with pyarch.backend(backend):
        compiled = torch.compile(problem.ours(), fullgraph=True, dynamic=True, backend="aot_eager")
        close(outcome(problem, compiled._orig_mod), outcome(problem, problem.stock()))
        for batch in (3, 5):
            x = torch.randn(batch, problem.inputs)
            close(compiled(x), problem.stock()(x))


@each_layer
def test_recurrent_compiled_runs_our_operators(name):
    """One opaque operator a layer and pass: nothing of the recurrence is unrolled into the graph."""
    from functorch.compile import aot_module_simplified

    torch._dynamo.reset()
    targets = []

    def keep(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def engine(graph, inputs):
        return aot_module_simplified(graph, inputs, fw_compiler=keep, bw_compiler=keep)

    with torch._dynamo.config.patch(allow_rnn=True):
        model = torch.compile(Net(name, True), fullgraph=True, backend=engine)
        model(torch.randn(50, 3, 4)).sum().backward()
    assert targets.count(torch.ops.pyarch.recurrent_forward.default) == 2
    assert targets.count(torch.ops.pyarch.recurrent_backward.default) == 2
    assert len(targets) < 100


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@each_layer
def test_recurrent_exports(name, strict):
    """With steps and batch dynamic, which torch's own layer does not allow for steps."""
    ours, stock = nets(name)
    dynamic = {"x": {0: torch.export.Dim("steps", min=2), 1: torch.export.Dim("batch", min=2)}}
    program = torch.export.export(ours, (torch.randn(7, 3, 4),), dynamic_shapes=dynamic, strict=strict)
    parts = [part for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    targets = [node.target for part in parts for node in part.graph.nodes]
    assert targets.count(torch.ops.pyarch.recurrent_forward.default) == 2
    x = torch.randn(11, 5, 4)
    close(program.module()(x), stock(x))


class Calls(TorchDispatchMode):
    """Keeps the arguments of every call of our operators."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pyarch":
            self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.unpoisoned
@each_backend
@cases(
    *in_every_mode(bidirectional=True),
    *in_every_mode(bidirectional=True, lengths=(4, 2, 5)),
    *in_every_mode(cell=True),
    *in_every_mode(frozen=("input", "h0", "bias")),
    Problem("lstm", proj=3, bias=False),
    Problem("lstm", dtype=torch.bfloat16, reached=("c_n",)),
    Problem("gru", layout=batch_major),
)
def test_recurrent_opcheck(backend, problem):
    with pyarch.backend(backend), Calls() as calls:
        outcome(problem, problem.ours())
    names = {func.name() for func, _ in calls.seen}
    assert names == {"pyarch::recurrent_forward", "pyarch::recurrent_backward"}
    with pyarch.backend(backend):
        for func, arguments in calls.seen:
            torch.library.opcheck(func, torch.utils._pytree.tree_map_only(torch.Tensor, detached, arguments))


def detached(tensor):
    return tensor.detach()
