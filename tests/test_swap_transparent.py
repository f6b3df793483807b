"""swap changes the class of a layer and nothing else: tensors, hooks, copies, files, wrappers."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import pyarch
from pyarch.nn.drop_in import CONFIG_ATTRIBUTE
from tests.swap_cases import RECORDED, Wide, depthwise, image, net, operators_of

OPERATOR = "swap"


def codes(report):
    return {record.name: record.code for record in report.skipped}


# -------------------------------------------------------------------------------- nothing else changes


def snapshot(model):
    """Everything of a model that swap might disturb: classes, attributes, tensors by identity, hooks."""
    return [
        (
            name,
            type(module),
            {key: id(value) for key, value in vars(module).items()},
            list(module._forward_hooks),
        )
        for name, module in model.named_modules()
    ]


def test_swap_restore_is_exact():
    model, x = net(), image()
    model[0].register_forward_hook(lambda module, inputs, output: output + 1)
    model[3].weight.requires_grad_(False)
    model.eval()
    before, state, printed, output = snapshot(model), copy.deepcopy(model.state_dict()), repr(model), model(x)
    report = pyarch.swap(model, backend="reference")
    assert repr(model) == printed
    report.restore()
    assert snapshot(model) == before
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(model(x), output)
    report.restore()
    assert snapshot(model) == before


def test_swap_keeps_parameters_buffers_hooks_flags_and_state_dict():
    model = nn.Sequential(depthwise(), nn.BatchNorm2d(4))
    parameters, keys = list(map(id, model.parameters())), list(model.state_dict())
    called = []
    model[0].register_forward_pre_hook(lambda *_: called.append("pre"))
    model[0].register_forward_hook(lambda *_: called.append("post"))
    model[0].register_full_backward_hook(lambda *_: called.append("backward"))
    model[0].bias.requires_grad_(False)
    model[0].eval()
    pyarch.swap(model)
    model(image()).sum().backward()
    assert list(map(id, model.parameters())) == parameters and list(model.state_dict()) == keys
    assert called == ["pre", "post", "backward"]
    assert model[0].bias.grad is None and model[0].weight.grad is not None
    assert not model[0].training and model[1].training


def test_swap_leaves_an_optimizer_at_work():
    torch.manual_seed(1)
    ours, stock, x = net(), None, image()
    stock = copy.deepcopy(ours)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in (ours, stock)]
    pyarch.swap(ours)
    for _ in range(3):
        for model, optimizer in zip((ours, stock), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_swap_stores_one_attribute_only_where_the_config_is_not_the_default():
    plain, named = depthwise(), depthwise()
    attributes = set(vars(plain))
    pyarch.swap(plain)
    report = pyarch.swap(named, backend="torch")
    assert set(vars(plain)) == attributes
    assert set(vars(named)) - attributes == {CONFIG_ATTRIBUTE}
    report.restore()
    assert set(vars(named)) == attributes


def test_swapped_restores_at_the_end_and_after_an_error():
    model = net()
    with pyarch.swapped(model) as report:
        assert type(model[0]) is pyarch.nn.Conv2d and len(report.swapped) == 2
    assert type(model[0]) is nn.Conv2d
    with pytest.raises(RuntimeError, match="inside"), pyarch.swapped(model):
        raise RuntimeError("inside")
    assert type(model[0]) is nn.Conv2d


def test_swap_state_dict_round_trip():
    model, other, x = net(), net(), image()
    pyarch.swap(model)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))
    model.load_state_dict(net().state_dict(), strict=True)
    assert type(model[0]) is pyarch.nn.Conv2d


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy])
def test_swap_copies_stay_swapped(duplicate):
    model = depthwise()
    pyarch.swap(model, backend="reference")
    twin = duplicate(model)
    assert type(twin) is pyarch.nn.Conv2d
    assert operators_of(twin, image()) == [(RECORDED, "reference")]
    assert (twin.weight is model.weight) == (duplicate is copy.copy)


def test_swap_a_whole_model_is_saved_as_stock():
    model, x = net(), image()
    pyarch.swap(model, backend="torch")
    file = io.BytesIO()
    torch.save(model, file)
    assert b"pyarch" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded[0]) is nn.Conv2d and CONFIG_ATTRIBUTE not in vars(loaded[0])
    assert torch.equal(loaded(x), model(x))
    assert type(model[0]) is pyarch.nn.Conv2d


def test_swap_saved_weights_load_safely():
    model = net()
    pyarch.swap(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    net().load_state_dict(torch.load(file, weights_only=True))


def test_swap_serves_functional_call():
    model, x = depthwise(), image()
    pyarch.swap(model)
    other = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    wanted = nn.functional.conv2d(x, other["weight"], other["bias"], groups=4)
    torch.testing.assert_close(torch.func.functional_call(model, other, (x,)), wanted)


# -------------------------------------------------------------------------------- classes of the user


def test_swap_retypes_a_plain_subclass_and_keeps_what_it_is():
    model = nn.Sequential(Wide(4), Wide(4))
    x, printed = image(), repr(model)
    output = model(x)
    report = pyarch.swap(model)
    assert isinstance(model[0], Wide) and isinstance(model[0], pyarch.nn.Conv2d)
    assert type(model[0]) is type(model[1]), (
        "one class for all layers of it, or torch.compile would recompile"
    )
    assert repr(model) == printed and model[0].label == "wide"
    assert len(operators_of(model, x)) == 2
    torch.testing.assert_close(model(x), output)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=False)[0]) is Wide
    report.restore()
    assert type(model[0]) is Wide


def test_swap_leaves_a_users_class_over_a_drop_in():
    class Mine(pyarch.nn.Conv2d):
        pass

    model = nn.Sequential(depthwise(), depthwise(cls=Mine))
    report = pyarch.swap(model)
    assert codes(report) == {"1": "already"}
    report.restore()
    assert type(model[1]) is Mine


# -------------------------------------------------------------------------------- parametrized layers


class Scaled(nn.Module):
    def forward(self, weight):
        return 3 * weight


REPARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": torch.nn.utils.spectral_norm,
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", Scaled()),
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("cls", [nn.Conv2d, Wide])
@pytest.mark.parametrize("apply", REPARAMETRIZATIONS.values(), ids=REPARAMETRIZATIONS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_swap_serves_reparametrized_layers(apply, cls):
    layer = Wide(4) if cls is Wide else depthwise()
    layer = apply(layer).eval()
    x, original, state = image(), type(layer), list(layer.state_dict())
    output = layer(x)
    report = pyarch.swap(layer)
    assert len(operators_of(layer, x)) == 1
    torch.testing.assert_close(layer(x), output)
    assert list(layer.state_dict()) == state and type(layer).__name__ == original.__name__
    layer(x).sum().backward()
    assert any(parameter.grad is not None for parameter in layer.parameters())
    report.restore()
    assert type(layer) is original
    assert torch.equal(layer(x), output)


@pytest.mark.parametrize("cls", [nn.Conv2d, Wide])
def test_swap_lets_a_parametrization_go_and_come(cls):
    layer = Wide(4) if cls is Wide else depthwise()
    parametrize.register_parametrization(layer, "weight", Scaled())
    report = pyarch.swap(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert isinstance(layer, pyarch.nn.Conv2d) and "Parametrized" not in type(layer).__name__
    parametrize.register_parametrization(layer, "weight", Scaled())
    assert len(operators_of(layer, image())) == 1
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(image() * 0), layer(image() * 0)) and len(operators_of(twin, image())) == 1
    report.restore()
    assert not isinstance(layer, pyarch.nn.Conv2d) and parametrize.is_parametrized(layer, "weight")
    assert not isinstance(copy.deepcopy(layer), pyarch.nn.Conv2d)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is cls


def test_swap_restores_a_layer_that_was_parametrized_further():
    layer = depthwise()
    parametrize.register_parametrization(layer, "weight", Scaled())
    report = pyarch.swap(layer)
    parametrize.register_parametrization(layer, "bias", Scaled())
    x = image()
    output = layer(x)
    report.restore()
    assert not isinstance(layer, pyarch.nn.Conv2d)
    torch.testing.assert_close(layer(x), output)


def test_swap_a_parametrized_layer_cannot_be_pickled_as_in_torch():
    layer = parametrizations.weight_norm(depthwise())
    pyarch.swap(layer)
    with pytest.raises(RuntimeError, match="parametrized modules"):
        torch.save(layer, io.BytesIO())


# -------------------------------------------------------------------------------- torch's own wrappers


def test_swap_reaches_into_a_compiled_model():
    model, x = net(), image()
    compiled = torch.compile(model, backend="eager")
    output = compiled(x)
    report = pyarch.swap(compiled, backend="reference")
    assert [record.name for record in report.swapped] == ["0", "3"]
    assert operators_of(compiled, x) == [(RECORDED, "reference")] * 2
    torch.testing.assert_close(compiled(x), output)
    report.restore()
    assert operators_of(compiled, x) == []


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_swap_refuses_classes_of_fully_shard_by_name(one_process):
    model = net()
    torch.distributed.fsdp.fully_shard(model[0], mesh=one_process)
    (record,) = [each for each in pyarch.swap(model).skipped if each.name == "0"]
    assert record.code == "fully-sharded" and record.reason == "FSDPConv2d is a class of fully_shard"
    assert record.hint == "call pyarch.swap(model) before fully_shard(...)"


def test_swap_comes_before_fully_shard(one_process):
    model, x = net(), image()
    output = model(x)
    report = pyarch.swap(model)
    torch.distributed.fsdp.fully_shard(model[0], mesh=one_process)
    assert len(operators_of(model, x)) == 2
    torch.testing.assert_close(model(x), output)
    with pytest.raises(RuntimeError, match="'0' became a FSDPConv2d after the swap"):
        report.restore()
    assert type(model[3]) is pyarch.nn.Conv2d
