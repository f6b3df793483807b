"""Attention under torch's transforms: autocast, functorch, double backward, checkpoints, threads."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.func import grad, jacrev, jvp, vmap
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import pyarch
from pyarch import dispatch
from tests.attention_cases import Case, cases, table
from tests.attention_definition import composed
from tests.attention_functions import arguments_of, close, drawn, each_backend, ours, outcome, stock, wide

OPERATOR = "attention"
FORWARD_OP = torch.ops.pyarch.attention_forward.default


# ------------------------------------------------------------------------------------ autocast


def kind_of(run):
    """The result's dtype, or the error's type and text."""
    try:
        return run().dtype
    except RuntimeError as error:
        return type(error).__name__, str(error)


@each_backend
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_attention_autocast_casts_as_torch_does(backend, masked, given, target):
    tensors = drawn(dtype=given)
    mask = {None: None, "bool": torch.ones(9, 11, dtype=torch.bool), "float": torch.randn(9, 11)}[masked]
    with torch.autocast("cpu", dtype=target):
        expected = kind_of(lambda: stock(*tensors, mask))
        with pyarch.backend(backend if given != torch.float64 else "auto"):
            assert kind_of(lambda: ours(*tensors, mask)) == expected


@each_backend
def test_attention_autocast_mixes_dtypes_as_torch_does(backend):
    """A float32 query on a bfloat16 cache is an error outside autocast and none inside it."""
    query, key, value = drawn()
    tensors = query, key.bfloat16(), value.bfloat16()
    with pyarch.backend(backend):
        assert isinstance(kind_of(lambda: ours(*tensors)), tuple)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert kind_of(lambda: ours(*tensors)) == kind_of(lambda: stock(*tensors)) == torch.bfloat16


@each_backend
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 5.0, "return_lse": True}], ids=str)
def test_attention_autocast_is_the_call_on_cast_tensors(backend, options):
    """Backward outside the context, gradients in the dtype of the leaves."""
    tensors = [*drawn(), torch.randn(3, 9, 11)]

    def run(cast):
        def attend(query, key, value, bias):
            found = ours(*(cast(each) for each in (query, key, value)), bias=cast(bias), **options)
            return found[0] + found[1][..., None] if isinstance(found, tuple) else found

        return attend

    with pyarch.backend(backend):
        expected = outcome(run(lambda each: each.bfloat16()), tensors)

        def under_autocast(*given):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return run(lambda each: each)(*given)

        found = outcome(under_autocast, tensors)
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------ functorch

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "masked": {"attn_mask": torch.arange(99).reshape(9, 11).remainder(3) != 1},
    "biased": {"attn_mask": torch.linspace(-2, 2, 99).reshape(9, 11)},
    "scaled": {"scale": -0.3},
}
FUNCTORCH = {
    "grad": lambda call, q, k, v: grad(loss_of(call), argnums=(0, 1, 2))(q, k, v),
    "vmap over all": lambda call, q, k, v: vmap(call)(*(torch.stack([t, -t]) for t in (q, k, v))),
    "vmap over queries": lambda call, q, k, v: vmap(call, (0, None, None))(torch.stack([q, -q]), k, v),
    "vmap over keys": lambda call, q, k, v: vmap(call, (None, 1, 1))(
        q, torch.stack([k, -k], 1), torch.stack([v, -v], 1)
    ),
    "grad of each sample": lambda call, q, k, v: vmap(grad(loss_of(call), argnums=(0, 1, 2)))(q, k, v),
    "jacrev": lambda call, q, k, v: jacrev(call, argnums=1)(q[:1, :1, :2], k[:1, :1], v[:1, :1]),
    "jvp": lambda call, q, k, v: jvp(call, (q, k, v), (q.cos(), k.sin(), v.cos())),
    "grad of grad": lambda call, q, k, v: grad(
        lambda q: grad(loss_of(call), argnums=1)(q, k, v).square().sum()
    )(q),
}


def loss_of(call):
    return lambda *given: call(*given).square().sum()


@each_backend
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("transform", FUNCTORCH)
def test_attention_functorch_gives_torchs_values(backend, transform, options):
    """Of its unfused kernel: the fused one on a CPU has neither forward mode nor second derivatives."""
    if transform == "jacrev" and "attn_mask" in options:
        options = {"attn_mask": options["attn_mask"][:2]}
    tensors = drawn()

    def call(function):
        return lambda *qkv: function(*qkv, **options)

    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        expected = FUNCTORCH[transform](call(stock), *tensors)
    with pyarch.backend(backend):
        close(FUNCTORCH[transform](call(ours), *tensors), expected, 1e-4)


@each_backend
def test_attention_functorch_takes_our_own_options(backend):
    """Window, softcap, sinks, weights and lse, by both modes, against the definition."""
    operands = Case(9, 11, left=3, right=2, softcap=2.0, bias="hqk", sinks=True).operands(torch.float32)
    _, options = arguments_of(operands)

    def mine(query, key, value):
        out, weights, lse = ours(query, key, value, **options, return_weights="mean", return_lse=True)
        return out.sum(-1).square() + lse, weights.square()

    def theirs(query, key, value):
        result = composed(operands._replace(query=query, key=key, value=value))
        return result.out.sum(-1).square() + result.lse, result.probabilities.mean(1).square()

    tangents = tuple(each.cos() for each in operands[:3])
    with pyarch.backend(backend):
        found = jvp(mine, operands[:3], tangents)
        slopes = grad(lambda *qkv: sum(each.sum() for each in mine(*qkv)), argnums=(0, 1, 2))(*operands[:3])
    close(found, jvp(theirs, operands[:3], tangents))
    expected = grad(lambda *qkv: sum(each.sum() for each in theirs(*qkv)), argnums=(0, 1, 2))(*operands[:3])
    close(slopes, expected)


@each_backend
@pytest.mark.parametrize("dual", range(4))
def test_attention_forward_mode(backend, dual):
    """A tangent of query, key, value or bias reaches the output."""
    tensors = [*drawn(), torch.randn(3, 9, 11)]
    tangents = []
    for function, engine in ((ours, backend), (stock, "auto")):
        with (
            torch.autograd.forward_ad.dual_level(),
            pyarch.backend(engine),
            nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
        ):
            given = list(tensors)
            given[dual] = torch.autograd.forward_ad.make_dual(given[dual], given[dual].cos())
            result = torch.autograd.forward_ad.unpack_dual(function(*given))
            tangents.append(result.tangent)
    assert tangents[1].any()
    close(*tangents)


# ------------------------------------------------------------------------------------ higher derivatives

TWICE = table(
    Case(5, 7),
    Case(5, 7, causal=True, heads=4, kv_heads=2, value_dim=3),
    Case(9, 9, left=2, right=1, bias="hqk"),
    Case(5, 7, mask="bqk", lost=True, sinks=True, softcap=2.0, bias="bk"),
    Case(5, 7, padding=True, lost=True, global_tokens=1, left=1, right=1),
    Case(5, 7, distance="h", heads=4, kv_heads=2, left=3, right=3),
)


def penalty(function, leaves):
    """Gradients of the squared gradients of every leaf."""
    leaves = [each.detach().requires_grad_() for each in leaves]
    first = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves, create_graph=True)
    return [*first, *torch.autograd.grad(sum(each.square().sum() for each in first), leaves)]


@cases(TWICE)
@each_backend
def test_attention_double_backward(backend, case):
    """A gradient penalty, as the definition gives it in float64."""
    operands = case.operands(torch.float32)
    _, options = arguments_of(operands)
    present = [each is not None for each in operands.differentiable]
    leaves = [each for each in operands.differentiable if each is not None]

    def placed(given):
        found = iter(given)
        return [next(found) if there else None for there in present]

    def mine(*given):
        query, key, value, *others = placed(given)
        others = dict(zip(("bias", "sinks", "distance_bias"), others, strict=True))
        return ours(query, key, value, **options | others)

    def theirs(*given):
        return composed(operands.as_dtype(torch.float64).with_leaves(placed(given))).out

    with pyarch.backend(backend):
        found = penalty(mine, leaves)
    expected = penalty(theirs, wide(leaves))
    assert all(each.any() for each in expected)
    for got, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-5 * exact.abs().max().item())


@each_backend
@pytest.mark.parametrize("trained", range(4))
def test_attention_double_backward_of_some(backend, trained):
    """A penalty on one leaf's gradient alone, the others frozen."""
    tensors, results = [*drawn(), torch.randn(3, 9, 11)], []
    for function, engine in ((ours, backend), (stock, "auto")):
        leaves = [each.clone().requires_grad_(place == trained) for place, each in enumerate(tensors)]
        with pyarch.backend(engine), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            (first,) = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves[trained], create_graph=True)
            results.append(torch.autograd.grad(first.square().sum(), leaves[trained])[0])
    assert results[1].any()
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4 * results[1].abs().max().item())


@each_backend
def test_attention_double_backward_with_dropout_keeps_the_pattern(backend):
    """Both derivatives see the probabilities that the forward kept."""
    query, key, value = (each.requires_grad_() for each in drawn(20, 30))
    with pyarch.backend(backend):
        out, weights = ours(query, key, value, dropout_p=0.5, return_weights="heads")
        close(weights @ value, out)
        (first,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), query)
    kept = (weights != 0).double() / 0.5
    wide_ = [each.detach().double().requires_grad_() for each in (query, key, value)]
    exact_out = ((wide_[0] @ wide_[1].mT * 8**-0.5).softmax(-1) * kept) @ wide_[2]
    (exact_first,) = torch.autograd.grad(exact_out.square().sum(), wide_[0], create_graph=True)
    (exact,) = torch.autograd.grad(exact_first.square().sum(), wide_[0])
    close(first.double(), exact_first, 1e-4)
    close(second.double(), exact, 1e-4)


# ------------------------------------------------------------------------------------ autograd's machinery


class Net(nn.Module):
    """Self-attention between two projections."""

    def __init__(self, function, **options):
        super().__init__()
        torch.manual_seed(1)
        self.packed, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.function, self.options = function, options

    def forward(self, x):
        heads = self.packed(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        return self.out(self.function(*heads.unbind(0), **self.options).transpose(1, 2).flatten(2))


def results_of(model, x):
    """Output and gradients of input and parameters."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y, x.grad, *(each.grad for each in model.parameters())]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@each_backend
def test_attention_activation_checkpointing(backend, reentrant, dropout):
    """Computed again in the backward, with the same dropout, which follows torch's generator."""
    model, x = Net(ours, dropout_p=dropout, is_causal=True), torch.randn(2, 9, 12)
    seen = []
    with pyarch.backend(backend):
        torch.manual_seed(5)
        expected = results_of(model, x)
        torch.manual_seed(5)
        with dispatch.recording(lambda op, call, chosen: seen.append((op.name, chosen.name))):
            found = results_of(Recomputed(model, use_reentrant=reentrant), x)
    close(found, expected)
    assert seen.count(("attention_forward", backend)) == 2
    assert seen.count(("attention_backward", backend)) == 1
    if not dropout:
        close(found, results_of(Net(stock, is_causal=True), x))


@each_backend
def test_attention_selective_checkpointing_keeps_the_operator(backend):
    """A policy that saves our operator and recomputes all else runs it once."""

    def policy(context, func, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if func is FORWARD_OP else CheckpointPolicy.PREFER_RECOMPUTE

    model, x, seen = Net(ours), torch.randn(2, 9, 12), []
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    with pyarch.backend(backend), dispatch.recording(lambda op, *_: seen.append(op.name)):
        found = results_of(Recomputed(model, use_reentrant=False, context_fn=contexts), x)
    close(found, results_of(Net(stock), x))
    assert seen.count("attention_forward") == 1


class Recomputed(nn.Module):
    """The model with its activations computed again in the backward."""

    def __init__(self, model, **settings):
        super().__init__()
        self.model = model
        self.settings = settings

    def forward(self, x):
        return checkpoint(self.model, x, **self.settings)


@each_backend
def test_attention_saved_tensors_may_be_moved(backend):
    """What autograd keeps for the backward goes through its hooks."""
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.clone()

    tensors = drawn()
    with pyarch.backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        found = outcome(ours, tensors)
    assert packed
    close(found, outcome(stock, tensors))


@each_backend
def test_attention_backward_twice_needs_the_graph_kept(backend):
    leaves = [each.requires_grad_() for each in drawn()]
    with pyarch.backend(backend):
        loss = ours(*leaves).square().sum()
        loss.backward(retain_graph=True)
        first = leaves[1].grad.clone()
        loss.backward()
        close(leaves[1].grad, 2 * first)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


@each_backend
@pytest.mark.parametrize("changed", ["query", "key", "value", "bias"])
def test_attention_notices_what_changed_before_the_backward(backend, changed):
    tensors = dict(zip(("query", "key", "value", "bias"), [*drawn(), torch.randn(3, 9, 11)], strict=True))
    leaves = {name: each.clone().requires_grad_() for name, each in tensors.items()}
    given = {name: each * 1 for name, each in leaves.items()}
    with pyarch.backend(backend):
        out = ours(**given)
        with torch.no_grad():
            given[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.square().sum().backward()


@each_backend
def test_attention_anomaly_mode_and_hooks(backend):
    """A hook on the output sees its gradient, and anomaly detection finds nothing to say."""
    leaves, seen = [each.requires_grad_() for each in drawn()], []
    with pyarch.backend(backend), torch.autograd.detect_anomaly(check_nan=True):
        out = ours(*leaves, is_causal=True)
        out.register_hook(lambda gradient: seen.append(gradient.shape))
        out.sum().backward()
    assert seen == [out.shape] and all(each.grad.any() for each in (leaves[2],))


@each_backend
def test_attention_from_many_threads(backend):
    """Python threads that train at once, each with its own tensors, agree with one after the other."""
    many = [drawn(33, 35) for _ in range(8)]

    def train(tensors):
        with pyarch.backend(backend):
            return outcome(lambda *qkv: ours(*qkv, is_causal=True), tensors)

    expected = [train(tensors) for tensors in many]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(train, many))
    for mine, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


@each_backend
def test_attention_double_use_of_one_output(backend):
    """Two losses on one result add up their gradients."""
    tensors = drawn()

    def twice(function):
        def run(*qkv):
            out = function(*qkv)
            return out.square() + 3 * out

        return run

    with pyarch.backend(backend):
        close(outcome(twice(ours), tensors), outcome(twice(stock), tensors))
