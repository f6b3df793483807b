"""Attention in torch.compile and torch.export, and torch's own check of the operators inside."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyarch
from tests.attention_functions import close, drawn, each_backend, ours, stock

OPERATOR = "attention"
FORWARD_OP = torch.ops.pyarch.attention_forward.default
BACKWARD_OP = torch.ops.pyarch.attention_backward.default


class Net(nn.Module):
    """Two attention layers, the second with a learned bias, and something to fuse between them."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(1)
        self.packed, self.again = nn.Linear(12, 36), nn.Linear(12, 36)
        self.bias = nn.Parameter(torch.randn(3, 1, 1))
        self.function = function

    def forward(self, x):
        hidden = self.attend(self.packed(x), is_causal=True)
        bias = self.bias.expand(3, x.shape[1], x.shape[1])
        return self.attend(self.again(torch.relu(hidden) + x), attn_mask=bias)

    def attend(self, packed, **options):
        heads = packed.unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        return self.function(*heads.unbind(0), **options).transpose(1, 2).flatten(2)


def nets():
    return Net(ours), Net(stock)


def results_of(model, x):
    """Output and gradients of input and parameters."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y, x.grad, *(each.grad for each in model.parameters())]


@each_backend
def test_attention_compiles_whole_with_dynamic_shapes(backend):
    """Batch and length vary without a new graph."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler, inductor needs one")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    mine, theirs = nets()
    with pyarch.backend(backend):
        graph = torch.compile(mine, fullgraph=True, dynamic=True)
        for batch, length in ((2, 9), (3, 7), (4, 33)):
            x = torch.randn(batch, length, 12)
            close(results_of(graph, x), results_of(theirs, x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


MASK = torch.arange(99).reshape(9, 11).remainder(3) != 1
CALLS = {
    "causal, offset, scale": dict(is_causal=True, query_offset=2, scale=-0.4),
    "window": dict(window=(3, None), dilation=2, global_tokens=1),
    "bias and mask": dict(attn_mask=MASK, bias=torch.linspace(-1, 1, 99).reshape(9, 11)),
    "distance bias": dict(distance_bias=torch.linspace(-1, 1, 57).reshape(3, 19), window=4),
    "padding": dict(key_padding_mask=torch.tensor([[False] * 8 + [True] * 3, [False] * 11])),
    "softcap, sinks": dict(softcap=2.0, sinks=torch.tensor([0.1, -0.3, 1.0])),
    "weights": dict(return_weights="mean", return_lse=True, is_causal=True),
}


@pytest.fixture(scope="module")
def unpoisoned_dynamo():
    """Dynamo lists torch's functions once, perhaps in a test that patches torch.empty_like: look again.

    It traces the gradient of the weights, which uses that function.
    """
    torch._dynamo.trace_rules.clear_lru_cache()


@pytest.mark.unpoisoned
@pytest.mark.usefixtures("unpoisoned_dynamo")
@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("backend", ["reference"])
def test_attention_compiled_function_is_the_eager_one(backend, options):
    """Every option in one graph, results and gradients and strides as without it."""
    torch._dynamo.reset()

    def train(query, key, value):
        found = ours(query, key, value, **options)
        return found if isinstance(found, tuple) else (found,)

    compiled = torch.compile(train, fullgraph=True, dynamic=True, backend="aot_eager")
    tensors, outcomes = drawn(), []
    with pyarch.backend(backend):
        for run in (compiled, train):
            leaves = [each.clone().requires_grad_() for each in tensors]
            found = run(*leaves)
            sum(each.square().sum() for each in found).backward()
            outcomes.append((found, [each.grad for each in leaves]))
    close(*outcomes)
    assert [each.stride() for each in outcomes[0][0]] == [each.stride() for each in outcomes[1][0]]


@each_backend
@pytest.mark.parametrize(
    ("layout", "value_dim"), [("contiguous", 5), ("heads last", 8), ("heads last", 5), ("sliced", 8)]
)
def test_attention_compiled_strides_are_the_eager_ones(layout, value_dim, backend):
    """The fake operator promises the very strides that the kernel gives, or inductor reads wrong numbers."""
    torch._dynamo.reset()
    tensors = drawn(value_dim=value_dim)
    if layout == "heads last":
        tensors = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in tensors]
    if layout == "sliced":
        tensors = [each.repeat_interleave(2, -1)[..., ::2] for each in tensors]
    strides = []
    for run in (torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager"), ours):
        leaves = [each.detach().requires_grad_() for each in tensors]
        with pyarch.backend(backend):
            out = run(*leaves)
            gradients = torch.autograd.grad(out.square().sum(), leaves)
        strides.append([each.stride() for each in (out, *gradients)])
    assert strides[0] == strides[1]


@each_backend
def test_attention_compiled_dropout_follows_torchs_generator(backend):
    """A compiled call draws anew every time and again the same after manual_seed."""
    torch._dynamo.reset()
    tensors = drawn(20, 30)
    compiled = torch.compile(
        lambda *qkv: ours(*qkv, dropout_p=0.5), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    with pyarch.backend(backend):
        torch.manual_seed(3)
        first, second = compiled(*tensors), compiled(*tensors)
        torch.manual_seed(3)
        again = compiled(*tensors)
        torch.manual_seed(3)
        eager = ours(*tensors, dropout_p=0.5)
    assert torch.equal(first, again) and not torch.equal(first, second)
    close(first, eager)


def test_attention_compiled_runs_our_operators():
    """One opaque operator a call and pass: nothing of Tq * Tk is in the graph."""
    from functorch.compile import aot_module_simplified

    torch._dynamo.reset()
    targets = []

    def keep(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def engine(graph, inputs):
        return aot_module_simplified(graph, inputs, fw_compiler=keep, bw_compiler=keep)

    model = torch.compile(Net(ours), fullgraph=True, backend=engine)
    model(torch.randn(2, 9, 12)).sum().backward()
    assert targets.count(FORWARD_OP) == targets.count(BACKWARD_OP) == 2
    assert not any("softmax" in str(target) for target in targets)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_attention_exports(strict):
    mine, theirs = nets()
    dynamic = {"x": {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)}}
    program = torch.export.export(mine, (torch.randn(2, 9, 12),), dynamic_shapes=dynamic, strict=strict)
    parts = [part for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    targets = [node.target for part in parts for node in part.graph.nodes]
    assert targets.count(FORWARD_OP) == 2
    x = torch.randn(5, 17, 12)
    close(program.module()(x), theirs(x))


def test_attention_compiled_takes_what_torch_takes():
    """Other ranks and float64, in one graph."""
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for tensors in (
        [torch.randn(2, 9, 8) for _ in range(3)],
        [torch.randn(9, 8) for _ in range(3)],
        drawn(dtype=torch.float64),
        drawn(dtype=torch.bfloat16),
    ):
        close(compiled(*tensors), stock(*tensors), 1e-2 if tensors[0].dtype == torch.bfloat16 else 1e-5)


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
@pytest.mark.parametrize("options", [CALLS["window"], CALLS["weights"]], ids=["window", "weights"])
def test_attention_opcheck_of_real_calls(backend, options):
    """With the arguments that the public function makes of a call."""
    leaves = [each.requires_grad_() for each in drawn(dtype=torch.bfloat16)]
    with pyarch.backend(backend), Calls() as calls:
        found = ours(*leaves, **options)
        found = found if isinstance(found, tuple) else (found,)
        sum(each.sum() for each in found).backward()
    names = {func.name() for func, _ in calls.seen}
    assert {"pyarch::attention_forward", "pyarch::attention_backward"} <= names
    with pyarch.backend(backend):
        for func, arguments in calls.seen:
            torch.library.opcheck(func, torch.utils._pytree.tree_map_only(torch.Tensor, detached, arguments))


def detached(tensor):
    return tensor.detach()
