"""pyarch.nn's attention layers are torch's modules: parameters, random numbers, copies, files, training."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import pyarch
from tests.attention_modules_cases import (
    SETTINGS,
    E,
    H,
    L,
    N,
    attention,
    compare,
    drawn,
    each_backend,
    fresh_dynamo,
    hidden,
    operands,
    operators_of,
    outcome,
    pair,
)

OPERATOR = "attention"
WIDTH, HEADS, INNER = E, H, 24
LAYERS = {
    "MultiheadAttention": (WIDTH, HEADS),
    "TransformerEncoderLayer": (WIDTH, HEADS, INNER, 0.0),
    "TransformerDecoderLayer": (WIDTH, HEADS, INNER, 0.0),
}
# How many tensors each class is called with.
TAKES = {"MultiheadAttention": 3, "TransformerEncoderLayer": 1, "TransformerDecoderLayer": 2}
each_class = pytest.mark.parametrize("name", LAYERS)
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def layers(name, **settings):
    return pair(name, *LAYERS[name], **settings)


def data(name, dtype=torch.float32):
    return [drawn(L, N, WIDTH, dtype=dtype) for _ in range(TAKES[name])]


def first_of(results):
    return results[0] if isinstance(results, tuple) else results


# ------------------------------------------------------------------------------------ construction


@each_setting
def test_attention_modules_start_as_torchs(settings):
    """The same keys, the same numbers from the same seed in the same order, the same attributes."""
    built, states = [], []
    for library in (pyarch.nn, nn):
        torch.manual_seed(7)
        built.append(library.MultiheadAttention(E, **{"num_heads": H, **settings}))
        states.append(torch.get_rng_state())
    ours, stock = built
    assert torch.equal(*states), "another count of random numbers was drawn"
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in stock.state_dict().items())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in stock.named_parameters()]
    assert vars(ours).keys() == vars(stock).keys() and repr(ours) == repr(stock)
    torch.manual_seed(8)
    ours._reset_parameters()
    torch.manual_seed(8)
    stock._reset_parameters()
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in stock.state_dict().items())


KEYS = {
    "plain": ["in_proj_weight", "in_proj_bias"],
    "no bias": ["in_proj_weight"],
    "vdim": ["q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"],
    "kdim, no bias": ["q_proj_weight", "k_proj_weight", "v_proj_weight"],
    "bias of keys and values": ["in_proj_weight", "in_proj_bias", "bias_k", "bias_v"],
}


@pytest.mark.parametrize("setting", KEYS)
def test_attention_modules_keys(setting):
    ours = pyarch.nn.MultiheadAttention(E, H, **SETTINGS[setting])
    out = ["out_proj.weight"] if "no bias" in setting else ["out_proj.weight", "out_proj.bias"]
    assert sorted(ours.state_dict()) == sorted([*KEYS[setting], *out])


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"norm_first": True, "batch_first": True}])
def test_transformer_layers_start_as_torchs(name, settings):
    built, states = [], []
    for library in (pyarch.nn, nn):
        torch.manual_seed(7)
        built.append(getattr(library, name)(WIDTH, HEADS, INNER, **settings))
        states.append(torch.get_rng_state())
    ours, stock = built
    assert torch.equal(*states), "another count of random numbers was drawn"
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in stock.state_dict().items())
    assert vars(ours).keys() == vars(stock).keys() and repr(ours) == repr(stock)


@each_class
def test_attention_modules_take_device_and_dtype(name):
    ours = getattr(pyarch.nn, name)(*LAYERS[name], device="meta", dtype=torch.bfloat16)
    assert all(each.is_meta and each.dtype == torch.bfloat16 for each in ours.parameters())


# ------------------------------------------------------------------------------------ copies and files


@each_class
def test_attention_modules_deepcopy_is_ours_and_its_own(name):
    ours, _ = layers(name)
    duplicate, inputs = copy.deepcopy(ours), data(name)
    assert type(duplicate) is getattr(pyarch.nn, name)
    torch.testing.assert_close(outcome(duplicate, *inputs), outcome(ours, *inputs), rtol=0, atol=0)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.zero_()
    assert not torch.equal(first_of(duplicate(*inputs)), first_of(ours(*inputs)))
    assert operators_of(duplicate, *inputs)


@each_class
def test_attention_modules_copies_and_files_keep_the_options(name):
    """No class of torch's computes a window, so the file of such a layer holds pyarch's class."""
    ours = getattr(pyarch.nn, name)(*LAYERS[name], window=(1, 1))
    x = drawn(L, N, WIDTH)
    inputs = [x] * TAKES[name]
    expected = first_of(ours(*inputs))
    stock = getattr(nn, name)(*LAYERS[name])
    stock.load_state_dict(ours.state_dict())
    assert not torch.allclose(first_of(stock(*inputs)), expected, atol=1e-3), "the window hides nothing"
    for duplicate in (copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(duplicate) is type(ours)
        assert torch.equal(first_of(duplicate(*inputs)), expected)
    assert list(ours.state_dict()) == list(stock.state_dict())


@each_class
def test_attention_modules_pickle_as_stock(name):
    ours, stock = layers(name)
    text = pickle.dumps(ours)
    assert b"pyarch" not in text
    loaded = pickle.loads(text)
    assert [type(each) for each in loaded.modules()] == [type(each) for each in stock.modules()]
    inputs = data(name)
    torch.testing.assert_close(outcome(loaded, *inputs), outcome(stock, *inputs), rtol=0, atol=0)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    fresh = layers(name)[0]
    fresh.load_state_dict(torch.load(file, weights_only=True))
    compare(fresh, stock, *inputs)


def test_attention_modules_load_the_state_of_an_old_file():
    """Files of torch 1.1 do not know whether the widths agree."""
    ours, stock = attention()
    old = {key: value for key, value in ours.__getstate__().items() if key != "_qkv_same_embed_dim"}
    layer = object.__new__(type(ours))
    layer.__setstate__(old)
    assert layer._qkv_same_embed_dim
    compare(layer, stock, *operands(stock))


# ------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=lambda cls: cls.__name__)
@each_class
@each_backend
def test_attention_modules_train_as_stock_does(backend, name, optimizer):
    losses, inputs = [], data(name)
    for layer in layers(name):
        steps = optimizer(layer.parameters(), lr=0.02)
        with pyarch.backend(backend):
            for _ in range(5):
                steps.zero_grad()
                loss = (first_of(layer(*inputs)) - 1).square().mean()
                loss.backward()
                steps.step()
                losses.append(loss.detach())
    torch.testing.assert_close(losses[5:], losses[:5])
    assert losses[4] < losses[0]


@each_class
def test_attention_modules_take_frozen_and_new_parameters(name):
    inputs, results = data(name), []
    for layer in layers(name):
        inner = layer if name == "MultiheadAttention" else layer.self_attn
        torch.manual_seed(1)
        inner.in_proj_weight = nn.Parameter(torch.randn_like(inner.in_proj_weight) / 4, requires_grad=False)
        results.append(outcome(layer, *inputs))
        assert not any("in_proj_weight" in key and "self" in key for key in results[-1])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


REWRITES = {
    "weight_norm": lambda layer, key: parametrizations.weight_norm(layer, key),
    "weight_norm of old": lambda layer, key: weight_norm(layer, key),
    "spectral_norm": lambda layer, key: parametrizations.spectral_norm(layer, key),
    "spectral_norm of old": lambda layer, key: spectral_norm(layer, key),
    "pruning": lambda layer, key: prune.l1_unstructured(layer, key, 0.5),
    "parametrization": lambda layer, key: parametrize.register_parametrization(layer, key, nn.Tanh()),
}
# torch reads out_proj without calling it, so that the hooks of the older ways never run there.
REWRITTEN = [(place, name) for name in REWRITES for place in ("in_proj_weight", "k_proj_weight")]
REWRITTEN += [("out_proj", name) for name in ("weight_norm", "spectral_norm", "parametrization")]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("place, rewrite", REWRITTEN, ids=lambda value: value)
def test_attention_modules_read_the_weights_at_every_call(place, rewrite):
    """In training mode, where spectral_norm takes one more step of its iteration at every reading."""
    rewritten = []
    for layer in attention(**({"kdim": 6} if place == "k_proj_weight" else {})):
        torch.manual_seed(0)
        owner, key = (layer.out_proj, "weight") if place == "out_proj" else (layer, place)
        REWRITES[rewrite](owner, key)
        rewritten.append(layer)
    ours, stock = rewritten
    inputs = operands(stock)

    def both():
        results = [outcome(layer, *inputs) for layer in (ours, stock)]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
        return results[0]["output"]

    before = both()
    with torch.no_grad():
        for layer in rewritten:
            for parameter in layer.parameters():
                parameter.add_(0.25)
    assert not torch.allclose(both(), before)
    assert operators_of(ours, *inputs), "torch's own forward ran"


# ------------------------------------------------------------------------------------ torch's transforms


@each_class
def test_attention_modules_follow_functional_call(name):
    ours, stock = layers(name)
    other = {key: torch.randn_like(value) / 3 for key, value in stock.state_dict().items()}
    other = {key: value.requires_grad_() for key, value in other.items()}
    inputs, results = data(name), []
    for layer in (ours, stock):
        output = first_of(functional_call(layer, other, tuple(inputs)))
        results.append([output, *torch.autograd.grad(output.square().sum(), other.values())])
        results[-1].append(first_of(layer(*inputs)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


def loss_of(call):
    return lambda parameters, x: call(parameters, x).square().sum()


FUNCTORCH = {
    "grad": lambda call, parameters, x: grad(loss_of(call), argnums=(0, 1))(parameters, x),
    "vmap over inputs": lambda call, parameters, x: vmap(call, (None, 0))(parameters, torch.stack([x, -x])),
    "vmap over parameters": lambda call, parameters, x: vmap(call, (0, None))(
        {name: torch.stack([each, -each]) for name, each in parameters.items()}, x
    ),
    "grad of each copy": lambda call, parameters, x: vmap(grad(loss_of(call)), (None, 0))(
        parameters, torch.stack([x, -x])
    ),
    "jacrev": lambda call, parameters, x: jacrev(call, argnums=1)(parameters, x),
    "jvp": lambda call, parameters, x: jvp(functools.partial(call, parameters), (x,), (x.cos(),)),
    "grad of grad": lambda call, parameters, x: grad(
        lambda x: grad(loss_of(call), argnums=1)(parameters, x).square().sum()
    )(x),
}


def outcome_or_error(run):
    """What a call returns, or the type and text of its error."""
    try:
        return run()
    except (RuntimeError, NotImplementedError) as error:
        return type(error).__name__, str(error)


@each_backend
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "output"])
@pytest.mark.parametrize("transform", FUNCTORCH)
def test_attention_modules_functorch_is_torchs(backend, transform, need_weights):
    """The same values where torch has them; where it has none, its error or the right values."""
    ours, stock = attention()
    parameters = {name: each.detach() for name, each in stock.named_parameters()}
    mask = hidden(4, 4)

    def call(layer):
        def run(parameters, x):
            keywords = {"need_weights": need_weights, "attn_mask": mask}
            return functional_call(layer, parameters, (x, x, x), keywords)[0]

        return run

    x = drawn(4, 2, E)
    expected = outcome_or_error(lambda: FUNCTORCH[transform](call(stock), parameters, x))
    with pyarch.backend(backend):
        got = outcome_or_error(lambda: FUNCTORCH[transform](call(ours), parameters, x))
    if is_error(expected) and got != expected:
        # torch's fused operator lacks this transform; its formula step by step, with weights, has it.
        need_weights = True
        expected = FUNCTORCH[transform](call(stock), parameters, x)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3) if not is_error(got) else None
    assert is_error(got) == is_error(expected), got


def is_error(result):
    return isinstance(result, tuple) and isinstance(result[0], str)


@each_backend
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "output"])
def test_attention_modules_double_backward(backend, need_weights):
    """A gradient penalty; torch's flash operator on a CPU has none, its step by step formula has."""
    ours, stock = attention()
    inputs, results = operands(stock), []
    for layer in (ours, stock):
        leaves = [each.clone().requires_grad_() for each in inputs]
        with pyarch.backend(backend if layer is ours else "auto"):
            output = layer(*leaves, need_weights=need_weights if layer is ours else True)[0]
            first = torch.autograd.grad(output.pow(3).sum(), leaves, create_graph=True)
        second = sum(each.square().sum() for each in first)
        results.append(torch.autograd.grad(second, layer.in_proj_weight)[0])
    assert results[1].abs().max() > 1
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3 * results[1].abs().max().item())


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "output"])
def test_attention_modules_autocast_casts_as_torch_does(backend, dtype, need_weights):
    ours, stock = attention()
    inputs = operands(stock)
    mask = {"attn_mask": hidden(L, inputs[1].shape[0]), "need_weights": need_weights}
    results = []
    for layer in (ours, stock):
        with torch.autocast("cpu", dtype=dtype), pyarch.backend(backend if layer is ours else "auto"):
            results.append(outcome(layer, *inputs, **mask))
    for name, wanted in results[1].items():
        assert results[0][name].dtype == wanted.dtype, name
    coarse = {name: 0.05 * each.abs().max().item() for name, each in results[1].items()}
    for name, wanted in results[1].items():
        torch.testing.assert_close(results[0][name], wanted, rtol=0, atol=coarse[name], msg=name)


@pytest.mark.unpoisoned
def test_attention_modules_compile_whole():
    """One graph for two lengths and any backend; test_attention_swap.py compiles transformer layers."""
    fresh_dynamo()
    ours, stock = attention()
    ours.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    for length, backend in ((5, "auto"), (7, "reference")):
        x = drawn(length, N, E)
        with pyarch.backend(backend):
            compare(ours, stock, x, x, x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@each_class
@each_backend
def test_attention_modules_hooks_see_what_they_see_on_stock(backend, name):
    seen, inputs = [], data(name)
    for layer in layers(name):
        start = len(seen)
        for module in layer.modules():
            module.register_forward_pre_hook(
                lambda module, given: seen.append(("pre", type(module).__name__))
            )
            module.register_forward_hook(
                lambda module, given, output: seen.append((type(module).__name__, first_of(output).detach()))
            )
        layer.register_full_backward_hook(lambda module, given, got: seen.append(("back", got[0].detach())))
        with pyarch.backend(backend):
            first_of(layer(*[each.clone().requires_grad_() for each in inputs])).square().sum().backward()
        assert len(seen) > start + 2
    mine, theirs = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert [name for name, _ in mine] == [name for name, _ in theirs]
    torch.testing.assert_close(
        [each for _, each in mine if not isinstance(each, str)],
        [each for _, each in theirs if not isinstance(each, str)],
        rtol=1e-4,
        atol=1e-4,
    )


# ------------------------------------------------------------------------------------ TorchScript


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*deprecated")
@each_class
def test_attention_modules_are_scripted_after_restore(name):
    model = nn.Sequential(layers(name)[1]).eval()
    report = pyarch.swap(model)
    with pytest.raises(TypeError, match="restore"):
        torch.jit.script(model[0])
    report.restore()
    inputs = data(name)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model[0])(*inputs), model[0](*inputs))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated", "ignore::torch.jit.TracerWarning")
@each_class
def test_attention_modules_are_traced_as_torchs_own(name):
    """The trace holds no operator of pyarch, so that it loads where pyarch is not installed."""
    ours, stock = layers(name)
    inputs = tuple(data(name))
    traced = torch.jit.trace(ours, inputs)
    assert not any("pyarch" in node.kind() for node in traced.inlined_graph.nodes())
    torch.testing.assert_close(first_of(traced(*inputs)), first_of(stock(*inputs)), rtol=1e-4, atol=1e-5)
