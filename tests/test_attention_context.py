"""attention_context: which calls run on pyarch, for how long and for whom; torch.compile, torch.export."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError, checkpoint

import pyarch
from pyarch.attention_context import answering, is_in_context
from tests.attention_context_cases import HEADS, WIDTH, Mixed, Net, tokens
from tests.attention_functions import drawn
from tests.compare import check
from tests.swap_cases import operators_of

OPERATOR = "attention"
FORWARD, BACKWARD = "attention_forward", "attention_backward"


def operators(function, *inputs):
    return [name for name, _ in operators_of(function, *inputs)]


def in_context(*arguments, **options):
    with pyarch.attention_context():
        return F.scaled_dot_product_attention(*arguments, **options)


# -------------------------------------------------------------------------------- which calls


MASK = torch.arange(99).reshape(9, 11).remainder(3) != 1
CALLS = {
    "plain": ((), {}),
    "causal": ((), {"is_causal": True}),
    "positional": ((MASK, 0.0, False), {}),
    "named": ((), {"attn_mask": MASK, "scale": 0.3}),
    "float mask": ((), {"attn_mask": torch.linspace(-2, 2, 99).reshape(9, 11)}),
}


@pytest.mark.parametrize("more, options", CALLS.values(), ids=CALLS)
def test_attention_context_answers_as_torch_does(more, options):
    tensors = drawn()
    exact = [each.double() for each in tensors]
    others = [
        each.double() if each.dtype.is_floating_point else each
        for each in (options.get("attn_mask"),)
        if each is not None
    ]
    in_double = {**options, "attn_mask": others[0]} if others else options
    truth = F.scaled_dot_product_attention(*exact, *more, **in_double)
    theirs = F.scaled_dot_product_attention(*tensors, *more, **options)
    with pyarch.backend("reference"):
        check("out", in_context(*tensors, *more, **options), theirs, truth)
        assert operators(lambda: in_context(*tensors, *more, **options)) == [FORWARD]


def test_attention_context_answers_grouped_heads_and_torchs_other_name():
    query, key, value = drawn(heads=4, kv_heads=2)
    wanted = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    with pyarch.attention_context():
        found = torch._C._nn.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(found, wanted)
    assert operators(lambda: in_context(query, key, value, enable_gqa=True)) == [FORWARD]


def test_attention_context_leaves_other_functions_and_the_outside_alone():
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    wanted = F.linear(x, weight).softmax(-1)
    with pyarch.attention_context():
        assert torch.equal(F.linear(x, weight).softmax(-1), wanted)
    before = F.scaled_dot_product_attention
    in_context(*drawn())
    assert F.scaled_dot_product_attention is before
    assert operators(lambda: F.scaled_dot_product_attention(*drawn())) == []


def test_attention_context_gives_torchs_errors_for_torchs_faults():
    query, key, value = drawn()
    with pytest.raises(RuntimeError) as theirs:
        F.scaled_dot_product_attention(query, key[..., :3], value)
    with pytest.raises(RuntimeError) as mine:
        in_context(query, key[..., :3], value)
    assert str(mine.value) == str(theirs.value)
    assert not is_in_context()


def test_attention_context_heeds_the_backend_asked_for():
    with pyarch.backend("reference"):
        assert operators_of(lambda: in_context(*drawn())) == [(FORWARD, "reference")]


def test_attention_context_does_not_see_torchs_layer_but_a_swapped_one_works_inside():
    model, x = Mixed(), tokens()
    wanted = model(x)

    def run():
        with pyarch.attention_context():
            return model(x)

    assert operators(run) == [FORWARD]
    torch.testing.assert_close(run(), wanted)
    pyarch.swap(model)
    assert operators(run) == [FORWARD] * 2
    torch.testing.assert_close(run(), wanted)


# -------------------------------------------------------------------------------- for how long


def test_attention_context_nests_and_ends_with_the_outer_block():
    with pyarch.attention_context():
        with pyarch.attention_context():
            assert operators(lambda: F.scaled_dot_product_attention(*drawn())) == [FORWARD]
        assert operators(lambda: F.scaled_dot_product_attention(*drawn())) == [FORWARD]
    assert operators(lambda: F.scaled_dot_product_attention(*drawn())) == []


def test_attention_context_ends_with_an_error():
    with pytest.raises(KeyError, match="inside"), pyarch.attention_context():
        raise KeyError("inside")
    assert not is_in_context()


def test_attention_context_decorates_a_function():
    @pyarch.attention_context()
    def attend():
        return F.scaled_dot_product_attention(*drawn())

    assert operators(attend) == [FORWARD] and operators(attend) == [FORWARD]


def test_attention_context_holds_for_its_thread():
    inside, outside = threading.Event(), threading.Event()
    seen = []

    def other():
        inside.wait(10)
        seen.append(is_in_context())
        outside.set()

    thread = threading.Thread(target=other)
    thread.start()
    with pyarch.attention_context():
        inside.set()
        outside.wait(10)
        seen.append(is_in_context())
    thread.join(10)
    assert seen == [False, True]


def test_attention_context_backward_is_ours_outside_the_block():
    leaves = [each.requires_grad_() for each in drawn()]
    with pyarch.backend("reference"):
        out = in_context(*leaves)
        assert operators(lambda: out.sum().backward()) == [BACKWARD]
    wanted = torch.autograd.grad(F.scaled_dot_product_attention(*leaves).sum(), leaves)
    for leaf, gradient in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


# -------------------------------------------------------------------------------- torch's in ours


def test_attention_context_does_not_see_what_our_own_kernels_call():
    """The torch backend calls the very function that the context answers."""
    x, seen = tokens(), []
    layer = pyarch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()

    def attend(*args, **kwargs):
        seen.append(args)
        return pyarch.ops.scaled_dot_product_attention(*args, **kwargs)

    with pyarch.backend("torch"), torch.no_grad(), answering(attend), pyarch.attention_context():
        assert operators(lambda: layer(x, x, x, need_weights=False)) == [FORWARD]
        assert seen == []
        F.scaled_dot_product_attention(*drawn())
    assert len(seen) == 1


def test_attention_context_around_a_backward_on_torchs_kernel():
    """It computes the forward once more by torch's function, which must not come back to us."""
    tensors, bias = drawn(), torch.randn(3, 9, 11)
    leaves = [each.clone().requires_grad_() for each in (*tensors, bias)]
    with pyarch.backend("torch"), pyarch.attention_context():
        F.scaled_dot_product_attention(*leaves[:3], attn_mask=leaves[3]).square().sum().backward()
    stocks = [each.clone().requires_grad_() for each in (*tensors, bias)]
    F.scaled_dot_product_attention(*stocks[:3], attn_mask=stocks[3]).square().sum().backward()
    for mine, theirs in zip(leaves, stocks, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


# -------------------------------------------------------------------------------- tracing


class Targets:
    """A backend of torch.compile that runs graphs as they are and keeps what they call."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        from functorch.compile import aot_module_simplified, make_boxed_func

        def keep(traced, inputs):
            self.graphs.append([str(node.target) for node in traced.graph.nodes])
            return make_boxed_func(traced.forward)

        return aot_module_simplified(graph, inputs, fw_compiler=keep, bw_compiler=keep)

    def count(self, operator):
        return sum(f"pyarch.{operator}" in target for graph in self.graphs for target in graph)


def trained(run, model, x):
    """Output and gradients."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    return [y, x.grad, *(each.grad for each in model.parameters())]


@pytest.mark.parametrize("place", ["inside", "around"])
def test_attention_context_compiles_whole(place):
    """Entered by the function that is compiled, or by its caller; the backward outside."""
    torch._dynamo.reset()
    model, targets = Net(), Targets()

    def inside(x):
        with pyarch.attention_context():
            return model(x)

    if place == "inside":
        run = torch.compile(inside, fullgraph=True, dynamic=True, backend=targets)
    else:
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=targets)

        def run(x):
            with pyarch.attention_context():
                return compiled(x)

    for x in (tokens(), tokens(3, 7)):
        torch.testing.assert_close(trained(run, model, x), trained(model, model, x))
    assert len(targets.graphs) == 2
    assert targets.count(FORWARD) == targets.count(BACKWARD) == 2


def test_attention_context_around_a_function_compiled_without_it_compiles_anew():
    torch._dynamo.reset()
    model, targets, x = Net(), Targets(), tokens()
    compiled = torch.compile(model, fullgraph=True, backend=targets)
    with torch.no_grad():
        wanted = compiled(x)
        assert targets.count(FORWARD) == 0
        with pyarch.attention_context():
            torch.testing.assert_close(compiled(x), wanted)
        assert targets.count(FORWARD) == 2
        compiled(x)
        with pyarch.attention_context():
            compiled(x)
    assert len(targets.graphs) == 2


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_attention_context_exports(strict):
    class Inside(Net):
        def forward(self, x):
            with pyarch.attention_context():
                return super().forward(x)

    model = Inside()
    dynamic = {"x": {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)}}
    program = torch.export.export(model, (tokens(),), dynamic_shapes=dynamic, strict=strict)
    parts = [part for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    found = [str(node.target) for part in parts for node in part.graph.nodes]
    assert sum("pyarch.attention_forward" in target for target in found) == 2
    x = tokens(3, 7)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*deprecated")
def test_attention_context_leaves_a_trace_to_torch():
    model, x = Net(), tokens()
    wanted = model(x)
    pyarch.swap(model, sdpa=True)
    traced = torch.jit.trace(model, (x,), check_trace=False)
    assert "aten::scaled_dot_product_attention" in str(traced.inlined_graph)
    assert "pyarch::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), wanted)


# -------------------------------------------------------------------------------- others who call us


def checkpointed(model, x, **options):
    with pyarch.attention_context():
        y = checkpoint(model, x, use_reentrant=False, **options)
    y.sum().backward()


def test_attention_context_in_what_a_checkpoint_computes_again():
    model, x = Net(), tokens()
    with pyarch.backend("reference"):
        checkpointed(model, x, context_fn=lambda: (nullcontext(), pyarch.attention_context()))
        found = [each.grad for each in model.parameters()]
        model.zero_grad()
        model(x).sum().backward()
        torch.testing.assert_close(found, [each.grad for each in model.parameters()])
        with pytest.raises(CheckpointError):
            checkpointed(model, x)


def test_attention_context_heeds_autocast():
    tensors = drawn()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = in_context(*tensors)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, pyarch.ops.scaled_dot_product_attention(*tensors))


def test_attention_context_serves_vmap():
    tensors = [torch.stack([each, 2 * each]) for each in drawn()]
    wanted = torch.stack([F.scaled_dot_product_attention(*each) for each in zip(*tensors, strict=True)])
    torch.testing.assert_close(torch.vmap(in_context)(*tensors), wanted)


def test_attention_context_leaves_torchs_transformer_right():
    """Without its fused path, which no torch function mode allows and which zeroes padded positions."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 2).eval(), tokens()
    padding = torch.arange(x.shape[1]).expand(2, -1) >= torch.tensor([[x.shape[1]], [5]])
    with torch.no_grad():
        wanted = encoder(x, src_key_padding_mask=padding)
        with pyarch.attention_context():
            found = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], wanted[~padding])
    assert wanted[padding].count_nonzero() == 0 and found[padding].count_nonzero() > 0
