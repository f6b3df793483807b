"""pyarch.nn.Conv1d, Conv2d, Conv3d are torch's modules: torch's own inputs, copies, files, training."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import fusion, parametrizations, parametrize, prune, weight_norm

import pyarch
from pyarch import dispatch
from tests.conv_cases import CPU_BACKENDS, EVERY_KERNELS

OPERATOR = "depthwise_conv"
OURS = {"Conv1d": pyarch.nn.Conv1d, "Conv2d": pyarch.nn.Conv2d, "Conv3d": pyarch.nn.Conv3d}
LAZY = {"LazyConv1d": nn.LazyConv1d, "LazyConv2d": nn.LazyConv2d, "LazyConv3d": nn.LazyConv3d}
each_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)


@pytest.fixture(autouse=True)
def the_backend_runs_here(request):
    """Skip, quoting the refusal, where the asked backend cannot run on this machine."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend")
    if name == "cpu" and (problem := pyarch.native.serving()[1]):
        pytest.skip(problem)


def pair(dimensions=2, **settings):
    """A stock layer and ours with the same numbers."""
    settings = {"in_channels": 4, "out_channels": 8, "kernel_size": 3, "groups": 4, **settings}
    stock = getattr(nn, f"Conv{dimensions}d")(**settings)
    ours = OURS[f"Conv{dimensions}d"](**settings)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def image(dimensions=2, channels=4):
    return torch.randn(2, channels, *[9] * dimensions)


def outcome(layer, input, grad=None):
    """Output and gradients by name; the input's gradient too."""
    layer.zero_grad()
    input = input.detach().clone().requires_grad_()
    output = layer(input)
    output.backward(torch.ones_like(output) if grad is None else grad)
    return {"output": output, "input": input.grad, **{n: p.grad for n, p in layer.named_parameters()}}


def assert_same(ours, stock):
    assert ours.keys() == stock.keys()
    for name in stock:
        torch.testing.assert_close(
            ours[name], stock[name], rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert ours["output"].stride() == stock["output"].stride()
    assert ours["input"].stride() == stock["input"].stride()


# ------------------------------------------------------------------------------------ torch's own inputs


def inputs_of(name, dtype):
    """Constructor and forward arguments that torch tests its own module with."""
    pytest.importorskip("expecttest", reason="torch's module inputs need the package expecttest")
    from torch.testing._internal.common_modules import module_db

    info = next(info for info in module_db if info.module_cls.__name__ == name)
    return info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
@pytest.mark.parametrize("name", OURS)
@each_backend
def test_conv_modules_on_torchs_inputs(backend, name, depthwise, dtype):
    """As torch has them, and with as many groups as channels."""
    inputs = inputs_of(name, dtype)
    assert len(inputs) >= 4
    for each in inputs:
        channels, outputs, kernel = each.constructor_input.args
        settings = dict(each.constructor_input.kwargs, dtype=dtype)
        if depthwise:
            outputs, settings["groups"] = 2 * channels, channels
        stock = getattr(nn, name)(channels, outputs, kernel, **settings)
        ours = OURS[name](channels, outputs, kernel, **settings)
        ours.load_state_dict(stock.state_dict())
        with pyarch.backend(backend):
            got = outcome(ours, each.forward_input.args[0])
        assert_same(got, outcome(stock, each.forward_input.args[0]))
        assert repr(ours) == repr(stock)


@pytest.mark.parametrize("name", LAZY)
@each_backend
def test_conv_modules_swap_takes_lazy_layers_that_know_their_shapes(backend, name):
    for each in inputs_of(name, torch.float32):
        _, kernel = each.constructor_input.args
        input = each.forward_input.args[0]
        settings = dict(each.constructor_input.kwargs, groups=4)
        stock = LAZY[name](8, kernel, **settings)
        stock(input)
        ours = copy.deepcopy(stock)
        pyarch.swap(nn.Sequential(holder := nn.Sequential(ours)))
        ours = holder[0]
        assert type(ours).stock_class() is type(stock) and type(ours) is not type(stock)
        with pyarch.backend(backend):
            got = outcome(ours, input)
        assert_same(got, outcome(stock, input))


def test_conv_modules_dense_layers_never_reach_dispatch():
    seen = []
    with dispatch.recording(lambda *decision: seen.append(decision)):
        pyarch.nn.Conv2d(4, 8, 3)(image())
        pyarch.nn.Conv2d(4, 8, 3, groups=2)(image())
        assert not seen
        pyarch.nn.Conv2d(4, 8, 3, groups=4)(image())
    assert [op.name for op, _, _ in seen] == ["depthwise_conv_forward"]


# ------------------------------------------------------------------------------------ every setting


SETTINGS = {
    "stride": dict(stride=2, padding=1),
    "dilation": dict(dilation=2, padding=2),
    "kernel 1": dict(kernel_size=1),
    "no bias": dict(bias=False),
    "multiplier 3": dict(out_channels=12),
    "same": dict(padding="same", kernel_size=4),
    "reflect": dict(padding=2, padding_mode="reflect"),
    "replicate": dict(padding=2, padding_mode="replicate"),
    "circular": dict(padding=9, padding_mode="circular"),
    "same, circular": dict(padding="same", kernel_size=4, padding_mode="circular"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@each_backend
def test_conv_modules_settings(backend, dimensions, settings):
    stock, ours = pair(dimensions, **settings)
    input = image(dimensions)
    with pyarch.backend(backend):
        got = outcome(ours, input)
    assert_same(got, outcome(stock, input))


@pytest.mark.parametrize("kernels", EVERY_KERNELS, ids=str)
def test_conv_modules_config_names_the_backend(kernels, monkeypatch):
    kernels.serve(monkeypatch)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    pyarch.swap(model, backend=kernels.name)
    seen = []
    with dispatch.recording(lambda op, call, backend: seen.append(backend.name)):
        model(image()).sum().backward()
        with pyarch.backend("reference"):
            model(image())
    assert seen == [kernels.name, kernels.name, "reference"]


def test_conv_modules_channels_last_model():
    stock, ours = (layer.to(memory_format=torch.channels_last) for layer in pair())
    assert_same(outcome(ours, x := image()), outcome(stock, x))
    assert ours(x).is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------ copies and files


def test_conv_modules_deepcopy_is_ours_and_its_own():
    _, ours = pair()
    duplicate = copy.deepcopy(ours)
    assert type(duplicate) is pyarch.nn.Conv2d and duplicate.weight is not ours.weight
    assert_same(outcome(duplicate, x := image()), outcome(ours, x))


def test_conv_modules_pickle_as_stock():
    stock, ours = pair()
    loaded = pickle.loads(pickle.dumps(ours))
    assert type(loaded) is nn.Conv2d
    assert_same(outcome(loaded, x := image()), outcome(stock, x))


def test_conv_modules_state_dict_round_trip():
    stock, ours = pair()
    assert list(ours.state_dict()) == list(stock.state_dict()) == ["weight", "bias"]
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    fresh = nn.Conv2d(4, 8, 3, groups=4)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh.weight, stock.weight) and torch.equal(fresh.bias, stock.bias)


# ------------------------------------------------------------------------------------ training and rewriting


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=lambda cls: cls.__name__)
@each_backend
def test_conv_modules_train_as_stock_does(backend, optimizer):
    losses = []
    for layer in pair():
        steps, input = optimizer(layer.parameters(), lr=0.05), torch.linspace(-1, 1, 648).view(2, 4, 9, 9)
        with pyarch.backend(backend):
            for _ in range(5):
                steps.zero_grad()
                loss = (layer(input) - 1).square().mean()
                loss.backward()
                steps.step()
                losses.append(loss.detach())
    torch.testing.assert_close(losses[5:], losses[:5])
    assert losses[4] < losses[0]


REWRITES = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm of old": weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Softplus()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
def test_conv_modules_read_the_weight_at_every_call(rewrite):
    layers = []
    for layer in pair():
        torch.manual_seed(0)
        layers.append(rewrite(layer) or layer)
    stock, ours = layers
    before = outcome(ours, x := image())
    assert_same(before, outcome(stock, x))
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.add_(0.25)
    after = outcome(ours, x)
    assert not torch.allclose(after["output"], before["output"])
    assert_same(after, outcome(stock, x))


def test_conv_modules_fuse_with_batch_norm():
    fused = []
    for layer in pair():
        norm = nn.BatchNorm2d(8)
        norm.running_mean.copy_(torch.linspace(-1, 1, 8))
        norm.running_var.copy_(torch.linspace(0.5, 2, 8))
        fused.append(fusion.fuse_conv_bn_eval(layer.eval(), norm.eval()))
    x = image()
    torch.testing.assert_close(fused[1](x), fused[0](x), rtol=1e-4, atol=1e-4)
    assert isinstance(fused[1], pyarch.nn.Conv2d)


def test_conv_modules_follow_dtype():
    stock, ours = pair()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        got, expected = ours.to(dtype)(image().to(dtype)), stock.to(dtype)(image().to(dtype))
        assert got.dtype == expected.dtype == dtype


@pytest.mark.operator("depthwise_conv", "auto")
def test_conv_takes_settings_that_are_lists():
    stock = torch.nn.Conv2d(4, 4, 3, padding=1, groups=4)
    stock.stride, stock.padding, stock.dilation = [1, 2], [1, 0], [2, 1]
    ours = copy.deepcopy(stock)
    pyarch.swap(ours)
    signal = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(ours(signal), stock(signal))
    with torch.no_grad():
        torch.testing.assert_close(ours(signal), stock(signal))
    assert ours.explain(signal)["forward"]


@pytest.mark.operator("depthwise_conv", "auto")
def test_conv_settings_of_numpy_stay_on_our_kernels():
    one, two = np.int64(1), np.int64(2)
    ours = pyarch.nn.Conv2d(16, 16, 3, (two, one), (one, two), (one, two), groups=16)
    plain = pyarch.nn.Conv2d(16, 16, 3, (2, 1), (1, 2), (1, 2), groups=16)
    plain.load_state_dict(ours.state_dict())
    signal = torch.randn(2, 16, 9, 9)
    assert ours.explain(signal) == plain.explain(signal) and len(ours.explain(signal)["forward"]) > 1
    assert torch.equal(ours(signal), plain(signal))
