"""Whole models held to the tolerance rule: one comparison over all outputs, one over all gradients.

Each tensor counts in units of its largest value: the errors of two correct float32 runs are more than a
factor of two apart on some tensor of some model, but not over all of them together.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from tests.compare import NEGLIGIBLE, check


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The floating outputs of a model, and its gradients for random dense cotangents, by name.

    Args:
        model: copied; its forward gives a mapping of names to tensors.
        inputs: floating ones are cast to the dtype of the model's parameters.
    """
    model = copy.deepcopy(model)
    dtype = next(model.parameters()).dtype
    result = model(*(each.to(dtype) if each.is_floating_point() else each for each in inputs))
    outputs = {name: value for name, value in result.items() if torch.is_tensor(value)}
    generator = torch.Generator().manual_seed(2)
    cotangents = [torch.randn(value.shape, generator=generator).to(value.dtype) for value in outputs.values()]
    torch.autograd.backward(list(outputs.values()), cotangents)
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return outputs, gradients


def exponents(reference: dict[str, Tensor]) -> dict[str, int]:
    """The power of two that brings each tensor to about 1; one negligible in its layer takes the layer's."""
    largest = {name: tensor.abs().max().item() for name, tensor in reference.items()}
    layer_largest: dict[str, float] = {}
    for name, value in largest.items():
        layer = name.rpartition(".")[0]
        layer_largest[layer] = max(layer_largest.get(layer, 0.0), value)
    result = {}
    for name, value in largest.items():
        scale = layer_largest[name.rpartition(".")[0]]
        result[name] = math.frexp(scale if value < NEGLIGIBLE * scale else value)[1]
    return result


def joined(tensors: dict[str, Tensor], powers: dict[str, int]) -> Tensor:
    """All tensors as one vector, each divided by its power of two, which rounds nothing."""
    return torch.cat([(tensor * 2.0 ** -powers[name]).flatten() for name, tensor in tensors.items()])


def check_run(name: str, ours: nn.Module, stock: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Hold the outputs and the gradients of a model to the rule of tests/compare.py."""
    reference = run(copy.deepcopy(stock).double(), inputs)
    for what, mine, torchs, exact in zip(
        ("outputs", "gradients"), run(ours, inputs), run(stock, inputs), reference, strict=True
    ):
        assert list(mine) == list(torchs) == list(exact)
        powers = exponents(exact)
        check(f"{name} {what}", joined(mine, powers), joined(torchs, powers), joined(exact, powers))


def layout(model: nn.Module) -> list[tuple[str, type, list[str]]]:
    """Every module's name, class and attributes."""
    return [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
