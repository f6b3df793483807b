"""Depthwise convolution under torch's transforms: compile, export, autocast, functorch, double backward."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import pyarch
from pyarch import dispatch
from pyarch.ops import depthwise_conv
from tests.conv_cases import CPU_BACKENDS, Case, channels_last

OPERATOR = "depthwise_conv"
each_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)


@pytest.fixture(autouse=True)
def the_backend_runs_here(request):
    """Skip, quoting the refusal, where the asked backend cannot run on this machine."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend")
    if name == "cpu" and (problem := pyarch.native.serving()[1]):
        pytest.skip(problem)


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


class Net(nn.Module):
    """Two depthwise layers with something to fuse between them."""

    def __init__(self, conv=pyarch.nn.Conv2d):
        super().__init__()
        self.first = conv(4, 8, 3, padding=1, groups=4)
        self.second = conv(8, 8, 5, padding="same", dilation=2, groups=8)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def pair():
    stock, ours = Net(nn.Conv2d), Net()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def outcome(model, x):
    """Output and gradients of input and parameters."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return y, x.grad, *(p.grad for p in model.parameters())


# ------------------------------------------------------------------------------------ compile and export


@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
@each_backend
def test_conv_compiles_whole_with_dynamic_shapes(backend, engine):
    if engine == "inductor" and shutil.which("g++") is None:
        pytest.skip("no C++ compiler, inductor needs one")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    stock, ours = pair()
    graphs = torch.compile(ours, fullgraph=True, dynamic=True, backend=engine)
    with pyarch.backend(backend):
        for size in (11, 13):
            x = torch.randn(2, 4, size, size + 1)
            for got, expected in zip(outcome(graphs, x), outcome(stock, x), strict=True):
                close(got, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_conv_compiled_function(dimensions, layout):
    if layout == "channels_last" and dimensions == 1:
        layout = "transposed"
    torch._dynamo.reset()
    input, weight = torch.randn(2, 4, *[7] * dimensions), torch.randn(4, 1, *[3] * dimensions)
    if layout == "channels_last":
        input = channels_last(input)
    if layout == "transposed":
        input = torch.randn(2, 7, 4).transpose(1, 2)
    compiled = torch.compile(depthwise_conv, fullgraph=True, dynamic=True, backend="aot_eager")
    got, expected = compiled(input, weight, padding=2), depthwise_conv(input, weight, padding=2)
    close(got, expected)
    assert got.stride() == expected.stride()


def test_conv_compiled_runs_our_operator():
    torch._dynamo.reset()
    targets = []

    def keep(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    from functorch.compile import aot_module_simplified

    def engine(graph, inputs):
        return aot_module_simplified(graph, inputs, fw_compiler=keep, bw_compiler=keep)

    model = torch.compile(Net(), fullgraph=True, backend=engine)
    model(torch.randn(2, 4, 9, 9)).sum().backward()
    assert targets.count(torch.ops.pyarch.depthwise_conv_forward.default) == 2
    assert targets.count(torch.ops.pyarch.depthwise_conv_backward.default) == 2


@pytest.mark.parametrize("strict", [True, False])
def test_conv_exports(strict):
    stock, ours = pair()
    x = torch.randn(2, 4, 9, 10)
    dynamic = {"x": {0: torch.export.Dim("batch"), 3: torch.export.Dim("width", min=9)}}
    program = torch.export.export(ours, (x,), dynamic_shapes=dynamic, strict=strict)
    parts = [part for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    targets = [node.target for part in parts for node in part.graph.nodes]
    assert targets.count(torch.ops.pyarch.depthwise_conv_forward.default) == 2
    wider = torch.randn(3, 4, 9, 14)
    close(program.module()(wider), stock(wider))


OPCHECK = {
    "1-D": Case((2, 3, 9), (3,), padding=(1, 0)),
    "2-D": Case((2, 3, 9, 8), (3, 3), 2, 1, multiplier=2),
    "NHWC": Case((2, 5, 7, 8), (3, 3), padding=1, layout=channels_last),
    "3-D": Case((1, 2, 4, 5, 6), (2, 3, 1), mode="circular", padding=1),
}


@pytest.mark.parametrize("case", OPCHECK.values(), ids=OPCHECK)
@each_backend
@pytest.mark.unpoisoned
def test_conv_opcheck(backend, case):
    input, weight, bias, cotangent = case.tensors(torch.float32)
    forward, backward = torch.ops.pyarch.depthwise_conv_forward, torch.ops.pyarch.depthwise_conv_backward
    torch.library.opcheck(forward.default, (input, weight, bias, *case.settings, backend))
    for needs in ([True, True, True], [False, True, False]):
        arguments = (cotangent, input, weight, *case.settings, needs, backend)
        torch.library.opcheck(backward.default, arguments)


# ------------------------------------------------------------------------------------ autocast


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_conv_autocast_casts_as_torch_does(given, target):
    input, weight, bias = (torch.randn(s, dtype=given) for s in ((2, 3, 9), (3, 1, 3), (3,)))
    with torch.autocast("cpu", dtype=target):
        stock = kind_of(lambda: F.conv1d(input, weight, bias, groups=3))
        ours = kind_of(lambda: depthwise_conv(input, weight, bias))
    assert ours == stock


def kind_of(run):
    """The result's dtype, or the error's text."""
    try:
        return run().dtype
    except RuntimeError as error:
        return str(error)


@each_backend
def test_conv_autocast_trains(backend):
    stock, ours = pair()
    x = torch.randn(2, 4, 9, 9)
    results = []
    for model in (ours, stock):
        with pyarch.backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        y.float().square().mean().backward()
        results.append([y, *(p.grad for p in model.parameters())])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.02)


def test_conv_functional_call():
    stock, ours = pair()
    x = torch.randn(2, 4, 9, 9)
    other = {name: torch.randn_like(p) for name, p in ours.named_parameters()}
    close(functional_call(ours, other, x), functional_call(stock, other, x))


# ------------------------------------------------------------------------------------ functorch, forward mode


def tensors(dtype=torch.float32):
    return torch.randn(2, 3, 9, dtype=dtype), torch.randn(6, 1, 3, dtype=dtype), torch.randn(6, dtype=dtype)


def stock_conv(input, weight, bias=None):
    return F.conv1d(input, weight, bias, padding=1, groups=3)


def our_conv(input, weight, bias=None):
    return depthwise_conv(input, weight, bias, padding=1)


@pytest.mark.parametrize("over", [(0, None, None), (None, 0, 0), (0, 0, 0)], ids=str)
@each_backend
def test_conv_vmap(backend, over):
    arguments = [
        t if axis is None else torch.stack([t, t + 1, -t]) for t, axis in zip(tensors(), over, strict=True)
    ]
    with pyarch.backend(backend):
        close(vmap(our_conv, over)(*arguments), vmap(stock_conv, over)(*arguments))


@each_backend
def test_conv_grad_per_sample(backend):
    input, weight, bias = tensors()

    def per_sample(conv):
        def loss(weight, bias, sample):
            return conv(sample, weight, bias).square().sum()

        return vmap(grad(loss, argnums=(0, 1)), (None, None, 0))(weight, bias, input)

    with pyarch.backend(backend):
        for got, expected in zip(per_sample(our_conv), per_sample(stock_conv), strict=True):
            close(got, expected)


@each_backend
def test_conv_jacrev(backend):
    input, weight, _ = tensors()
    with pyarch.backend(backend):
        close(jacrev(our_conv, argnums=1)(input, weight), jacrev(stock_conv, argnums=1)(input, weight))


@each_backend
def test_conv_jvp(backend):
    arguments, tangents = tensors(), tensors()
    with pyarch.backend(backend):
        for got, expected in zip(
            jvp(our_conv, arguments, tangents), jvp(stock_conv, arguments, tangents), strict=True
        ):
            close(got, expected)


@each_backend
def test_conv_forward_mode(backend):
    input, weight, _ = tensors()
    with torch.autograd.forward_ad.dual_level(), pyarch.backend(backend):
        dual = torch.autograd.forward_ad.make_dual(input, torch.ones_like(input))
        tangents = [
            torch.autograd.forward_ad.unpack_dual(conv(dual, weight)).tangent
            for conv in (our_conv, stock_conv)
        ]
    assert tangents[0] is not None
    close(*tangents)


# ------------------------------------------------------------------------------------ higher derivatives


@pytest.mark.parametrize(
    "case",
    [
        Case((2, 2, 6), (3,), padding=(2, 0), multiplier=2),
        Case((1, 2, 5, 4), (3, 2), 2, (1, 2, 0, 1), mode="reflect"),
        Case((1, 2, 3, 4, 3), (2, 2, 2), padding=1),
    ],
    ids=["1-D causal", "2-D reflect", "3-D"],
)
def test_conv_gradgradcheck_of_the_differentiable_backward(case):
    """The graph that stands in for our backward when it is itself differentiated, in float64."""
    from pyarch.ops.conv import _DepthwiseConv

    leaves = [t.requires_grad_() for t in case.tensors(torch.float64)[:3]]

    def ours(*leaves):
        return _DepthwiseConv.apply(*leaves, *case.settings, "reference")

    assert torch.autograd.gradcheck(ours, leaves)
    assert torch.autograd.gradgradcheck(ours, leaves)


@each_backend
def test_conv_double_backward(backend):
    input, weight, bias = (t.requires_grad_() for t in tensors())

    def penalty(conv):
        output = conv(input, weight, bias).square().sum()
        first = torch.autograd.grad(output, (input, weight, bias), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (input, weight, bias))

    with pyarch.backend(backend):
        got = penalty(our_conv)
    assert all(g.abs().max() > 0 for g in got)
    for mine, expected in zip(got, penalty(stock_conv), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_conv_double_backward_of_some(frozen):
    """Only the gradients of what is trained, also through the differentiable route."""
    arguments = [t.requires_grad_(i != frozen) for i, t in enumerate(tensors())]
    trained = [t for t in arguments if t.requires_grad]

    def penalty(conv):
        first = torch.autograd.grad(conv(*arguments).square().sum(), trained, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), trained)

    for mine, expected in zip(penalty(our_conv), penalty(stock_conv), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("reentrant", [True, False])
@each_backend
def test_conv_activation_checkpointing(backend, reentrant):
    _, ours = pair()
    x = torch.randn(2, 4, 9, 9)
    seen = []
    with pyarch.backend(backend), dispatch.recording(lambda op, *_: seen.append(op.name)):
        got = outcome(lambda_module(ours, reentrant), x)
    for mine, expected in zip(got, outcome(ours, x), strict=True):
        close(mine, expected)
    assert seen.count("depthwise_conv_forward") == 4 and seen.count("depthwise_conv_backward") == 2


def lambda_module(model, reentrant):
    """The model with its activations computed again in the backward."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=reentrant)

    return Checkpointed()


def test_conv_hooks_see_what_they_see_on_stock():
    seen = []
    for model in pair():
        torch.manual_seed(0)
        model.first.register_forward_hook(lambda layer, inputs, output: seen.append(output.detach()))
        model.first.register_full_backward_hook(
            lambda layer, inputs, outputs: seen.append(outputs[0].detach())
        )
        model(torch.randn(2, 4, 9, 9)).sum().backward()
    assert len(seen) == 4
    close(seen[2], seen[0])
    close(seen[3], seen[1])
