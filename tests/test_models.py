"""The architectures of pyarch.models: what they say they are, able to learn, the same when swapped."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pyarch
from pyarch import models, native

OPERATOR = "depthwise_conv"
NAMES = models.names()
KERNELS = ("cpu", "reference")

# Counted by hand: depthwise layers at the real and the tiny size, and the shape of the tiny output.
DEPTHWISE = {
    "convnext": (18, 2),
    "mobilenet": (17, 3),
    "aspp": (5, 4),
    "conformer": (16, 2),
    "mamba": (4, 1),
}
OUTPUT_SHAPES = {
    "convnext": (8, 4),
    "mobilenet": (8, 4),
    "aspp": (4, 4, 64, 64),
    "conformer": (4, 75, 4),
    "mamba": (4, 33, 8),
}

# Parameters of the published network with 1000 classes, and the width that its classifier reads.
PUBLISHED = {"convnext": (28_589_128, 768), "mobilenet": (3_504_872, 1280)}


def depthwise_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The depthwise layers by name, found without pyarch."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == module.in_channels > 1
    }


def tiny(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return models.build(name, "tiny")


def need(backend: str) -> None:
    """Skip with the refusal where the C++ kernels cannot serve."""
    if backend == "cpu" and native.serving()[0] is None:
        pytest.skip(native.serving()[1])


# ---------------------------------------------------------------------------------------------- as they come


@pytest.mark.parametrize("ask", [models.load, models.config, models.build])
def test_models_unknown_name_lists_the_names(ask):
    with pytest.raises(ValueError, match="model='resnext' is not known, choose one of convnext, mobilenet"):
        ask("resnext")


def test_models_unknown_size_lists_the_sizes():
    with pytest.raises(ValueError, match="size='huge' is not known, choose one of real, tiny"):
        models.build("convnext", "huge")


@pytest.mark.parametrize("name", NAMES)
def test_models_output_shape(name):
    module, config = models.load(name), models.config(name, "tiny")
    inputs, target = module.batch(config, seed=0)
    output = tiny(name)(*inputs)
    assert output.shape == OUTPUT_SHAPES[name]
    assert output.isfinite().all()
    assert module.loss(output, target).shape == ()


@pytest.mark.parametrize("name", NAMES)
def test_models_hold_the_depthwise_layers_counted_by_hand(name):
    with torch.device("meta"):
        real = models.build(name, "real")
    assert (len(depthwise_layers(real)), len(depthwise_layers(tiny(name)))) == DEPTHWISE[name]


@pytest.mark.parametrize("name", NAMES)
def test_models_call_every_depthwise_layer(name):
    model, called = tiny(name), set()
    for layer, module in depthwise_layers(model).items():
        module.register_forward_hook(lambda *_, layer=layer: called.add(layer))
    model(*models.load(name).inputs(models.config(name, "tiny"), seed=0))
    assert called == set(depthwise_layers(model))


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_real_size_has_the_published_parameters(name):
    with torch.device("meta"):
        model = models.build(name, "real")
    published, width = PUBLISHED[name]
    classes = models.config(name, "real").classes
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters - (width + 1) * classes == published - (width + 1) * 1000


@pytest.mark.parametrize("name", NAMES)
def test_models_follow_their_seeds(name):
    module, config = models.load(name), models.config(name, "tiny")
    first, again, other = tiny(name).state_dict(), tiny(name).state_dict(), tiny(name, seed=1).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)

    (drawn,), target = module.batch(config, seed=0)
    (drawn_again,), target_again = module.batch(config, seed=0)
    assert torch.equal(drawn, drawn_again) and torch.equal(target, target_again)
    assert torch.equal(drawn, module.inputs(config, seed=0)[0])
    assert not torch.equal(drawn, module.batch(config, seed=1)[0][0])


@pytest.mark.parametrize("name", NAMES)
def test_models_learn_their_task(name):
    """Forty steps of Adam, a new batch each, take a quarter off the loss of a batch never trained on."""
    module, config, model = models.load(name), models.config(name, "tiny"), tiny(name)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def unseen_loss() -> float:
        inputs, target = module.batch(config, seed=1000)
        with torch.no_grad():
            return module.loss(model(*inputs), target).item()

    before = unseen_loss()
    for step in range(40):
        inputs, target = module.batch(config, seed=step)
        optimizer.zero_grad()
        module.loss(model(*inputs), target).backward()
        optimizer.step()
    assert unseen_loss() < 0.75 * before


# ---------------------------------------------------------------------------------------------- swapped


@pytest.mark.parametrize("name", NAMES)
def test_swap_takes_every_depthwise_layer(name):
    model = tiny(name)
    found = depthwise_layers(model)
    report = pyarch.swap(model)
    assert {record.name for record in report.swapped} == set(found)
    for module in found.values():
        assert isinstance(module, (pyarch.nn.Conv1d, pyarch.nn.Conv2d))


@pytest.mark.parametrize("name", NAMES)
def test_swap_keeps_parameters_and_state_dict(name):
    model = tiny(name)
    parameters, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    pyarch.swap(model)
    assert [key for key, _ in model.named_parameters()] == list(parameters)
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def verified(name: str, backend: str):
    model = tiny(name)
    pyarch.swap(model, backend=backend)
    inputs = models.load(name).inputs(models.config(name, "tiny"), seed=0)
    return pyarch.verify(model, inputs, timing=False)


@pytest.mark.parametrize("name", NAMES)
def test_verify_passes(name):
    need("cpu")
    verified(name, "cpu").assert_ok()


@pytest.mark.parametrize("name", NAMES)
def test_verify_finds_the_reference_right_but_no_kernel(name):
    (problem,) = verified(name, "reference").problems
    assert problem.startswith("no layer ran a kernel of ours")


@pytest.mark.parametrize("name", NAMES)
def test_restore_is_exact(name):
    module, config, model = models.load(name), models.config(name, "tiny"), tiny(name)
    inputs, target = module.batch(config, seed=0)

    def one_step() -> list[torch.Tensor]:
        """Loss, output, gradients and buffers of a training step on a copy."""
        clone = copy.deepcopy(model)
        output = clone(*inputs)
        loss = module.loss(output, target)
        loss.backward()
        return [loss, output, *(parameter.grad for parameter in clone.parameters()), *clone.buffers()]

    def layout() -> list[tuple[str, type, list[str]]]:
        return [(name, type(each), sorted(vars(each))) for name, each in model.named_modules()]

    before, layout_before = one_step(), layout()
    report = pyarch.swap(model)
    assert layout() != layout_before
    report.restore()
    assert layout() == layout_before
    after = one_step()
    assert len(after) == len(before)
    assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))


# ---------------------------------------------------------------------------------------------- trained

STEPS = 10
RATE = 0.02
SEEDS = (0, 1, 2)

# A loss of fp32 carries a few roundings, and ten steps at this rate hardly amplify them: two of torch's own
# algorithms differ by 2 eps on these models, a single frozen layer by more than 190 eps.
CURVE_TOLERANCE = 16 * torch.finfo(torch.float32).eps


def train(name: str, model: nn.Module, seed: int) -> tuple[list[float], list[list[torch.Tensor]]]:
    """Run a few steps of SGD; return each step's loss, and which side every ReLU was on."""
    module, config = models.load(name), models.config(name, "tiny")
    losses, sides = [], []
    for relu in model.modules():
        if isinstance(relu, (nn.ReLU, nn.ReLU6)):
            relu.register_forward_hook(lambda *call: sides[-1].append((call[-1] > 0) & (call[-1] < 6)))
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], RATE)
    for step in range(STEPS):
        sides.append([])
        inputs, target = module.batch(config, seed=100 * seed + step)
        optimizer.zero_grad()
        loss = module.loss(model(*inputs), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, sides


def comparable(one: list[list[torch.Tensor]], other: list[list[torch.Tensor]]) -> int:
    """Steps up to and with the first in which a ReLU is on another side.

    There the loss is still the same, being continuous, but its gradient jumps: from the next step on, the two
    runs train different functions, however close to zero the activation was.
    """
    for step, (mine, yours) in enumerate(zip(one, other, strict=True)):
        if not all(torch.equal(*pair) for pair in zip(mine, yours, strict=True)):
            return step + 1
    return len(one)


def curve_distance(name: str, seed: int, change) -> tuple[int, float]:
    """Train a model as it is and after `change(model)`: steps that compare, largest relative difference."""
    stock, sides = train(name, tiny(name, seed), seed)
    changed_model = tiny(name, seed)
    change(changed_model)
    changed, changed_sides = train(name, changed_model, seed)
    steps = comparable(sides, changed_sides)
    pairs = zip(stock[:steps], changed[:steps], strict=True)
    return steps, max(abs(one - other) / one for one, other in pairs)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", NAMES)
def test_training_follows_the_stock_loss_curve(name, backend):
    need(backend)
    runs = [curve_distance(name, seed, lambda model: pyarch.swap(model, backend=backend)) for seed in SEEDS]
    assert sum(steps for steps, _ in runs) > STEPS, "too little of the curves compares"
    assert max(distance for _, distance in runs) <= CURVE_TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_training_check_sees_a_layer_without_gradient(name):
    """The tolerance above would catch one depthwise layer whose weight gradient is lost."""

    def freeze_last(model: nn.Module) -> None:
        list(depthwise_layers(model).values())[-1].weight.requires_grad_(False)

    assert all(curve_distance(name, seed, freeze_last)[1] > 5 * CURVE_TOLERANCE for seed in SEEDS)
