"""A short training run with and without pyarch gives the same loss curve."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyarch import models
from tests.model_cases import EXPECTED, KERNELS, each_model, layers_to_swap, need, running, swap, tiny

STEPS = 10
SEEDS = (0, 1, 2)

# A loss of fp32 carries a few roundings, and ten steps at these rates hardly amplify them: two of torch's own
# algorithms differ by 2 eps on these models, a single frozen weight by more than 110 eps.
CURVE_TOLERANCE = 16 * torch.finfo(torch.float32).eps

# What a layer, or a model without layers to swap, loses the gradient of: the first of these that it has.
FROZEN = ("weight", "weight_hh", "weight_hh_l0", "in_proj_weight", "qkv.weight", "encoder_bias.table.weight")


def train(name: str, model: nn.Module, seed: int) -> tuple[list[float], list[list[torch.Tensor]]]:
    """Run a few steps of SGD; return each step's loss, and which side every ReLU and pooling was on."""
    module, config = models.load(name), models.config(name, "tiny")
    losses, sides = [], []
    for kinked in model.modules():
        if isinstance(kinked, (nn.ReLU, nn.ReLU6, nn.MaxPool2d)):
            kinked.register_forward_hook(lambda *call: sides[-1].append(side(*call)))
    optimizer = torch.optim.SGD(
        [each for each in model.parameters() if each.requires_grad], EXPECTED[name].rate
    )
    for step in range(STEPS):
        sides.append([])
        inputs, target = module.batch(config, seed=100 * seed + step)
        optimizer.zero_grad()
        loss = module.loss(model(*inputs), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, sides


def side(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    """On which piece of a piecewise linear function each element was."""
    if isinstance(module, nn.MaxPool2d):
        sizes = (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
        return F.max_pool2d(*args, *sizes, return_indices=True)[1]
    return (output > 0) & (output < 6)


def comparable(one: list[list[torch.Tensor]], other: list[list[torch.Tensor]]) -> int:
    """Steps up to and with the first in which a ReLU or a pooling is on another side.

    There the loss is still the same, being continuous, but its gradient jumps: from the next step on, the two
    runs train different functions, however close to the kink the activation was.
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
@each_model
def test_training_follows_the_stock_loss_curve(name, backend):
    need(backend)
    with running(name, backend):
        runs = [curve_distance(name, seed, lambda model: swap(name, model, backend)) for seed in SEEDS]
    assert sum(steps for steps, _ in runs) > STEPS, "too little of the curves compares"
    assert max(distance for _, distance in runs) <= CURVE_TOLERANCE


@each_model
def test_training_check_sees_a_layer_without_gradient(name):
    """The tolerance above would catch one layer that loses the gradient of one weight."""

    def freeze_last(model: nn.Module) -> None:
        *_, last = [model, *layers_to_swap(model).values()]
        weights = dict(last.named_parameters())
        name = next(name for name in FROZEN if name in weights)
        weights[name].requires_grad_(False)

    assert all(curve_distance(name, seed, freeze_last)[1] > 5 * CURVE_TOLERANCE for seed in SEEDS)
