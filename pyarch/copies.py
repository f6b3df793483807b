"""Copies of a model to experiment on: as torch's own, in float64, without dropout, with the same random
numbers.

Nothing here changes the model that it copies.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from pyarch.nn.drop_in import CONFIG_ATTRIBUTE, DropIn
from pyarch.swap_report import undo

# Where modules keep the probability that they drop something.
DROPOUT_ATTRIBUTES = (
    "dropout",
    "dropout_p",
    "dropout_prob",
    "attention_dropout",
    "activation_dropout",
    "drop_prob",
    "layerdrop",
)


def duplicate(model: nn.Module, share_parameters: bool = False) -> nn.Module:
    """A deep copy without gradients.

    Args:
        model: left as it is.
        share_parameters: let the copy hold the same parameters, for a run that does not write them.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        for value in vars(module).values():
            # Such as the weight that weight_norm computes, also in a recurrent layer's list: torch refuses to
            # copy it.
            for each in value if isinstance(value, list) else (value,):
                if isinstance(each, Tensor) and not each.is_leaf:
                    memo[id(each)] = each.detach().clone()
    if share_parameters:
        memo.update((id(parameter), parameter) for parameter in model.parameters())
        return copy.deepcopy(model, memo)
    duplicated = copy.deepcopy(model, memo)
    for parameter in duplicated.parameters():
        parameter.grad = None
    return duplicated


def swapped_layers(model: nn.Module) -> dict[str, DropIn]:
    """The layers of pyarch in a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DropIn)}


def make_stock(model: nn.Module) -> nn.Module:
    """Give every swapped layer of a copy its former class; returns the copy.

    A class that a user derived from a drop-in has no former one, nor has a layer with options of its own:
    such a layer runs on torch's own operator.
    """
    for module in model.modules():
        if not undo(module) and isinstance(module, DropIn):
            vars(module)[CONFIG_ATTRIBUTE] = replace(module.pyarch_config, backend="torch")
    return model


def make_stock_layer(layer: DropIn) -> nn.Module:
    """Make one swapped layer of a copy compute by torch's own operator what it computes; returns the copy.

    A layer with a pattern stays itself, since its former class does not know the pattern: it gives torch's
    operator the mask.
    """
    if not layer.pyarch_config.has_pattern:
        return make_stock(layer)
    vars(layer)[CONFIG_ATTRIBUTE] = replace(layer.pyarch_config, backend="torch")
    return layer


def make_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the floating parameters and buffers of a copy; returns the copy."""
    return model._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def silence_dropout(model: nn.Module) -> list[str]:
    """Set every dropout of a copy in training mode to 0; returns the names of the modules that had one."""
    silenced = []
    for name, module in model.named_modules():
        attributes = DROPOUT_ATTRIBUTES
        if "drop" in type(module).__name__.lower() or "depth" in type(module).__name__.lower():
            attributes = (*DROPOUT_ATTRIBUTES, "p")
        drops = [each for each in attributes if _is_probability(vars(module).get(each))]
        for attribute in drops:
            setattr(module, attribute, 0.0)
        if drops and module.training:
            silenced.append(name or "(the model)")
    return silenced


def jitter(model: nn.Module) -> nn.Module:
    """Move every floating parameter of a copy by up to one rounding; returns the copy."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                step = torch.finfo(parameter.dtype).eps
                parameter.mul_(1 + step * (2 * torch.rand_like(parameter) - 1))
    return model


@contextmanager
def same_randomness(seed: int = 0) -> Iterator[None]:
    """Draw the same random numbers in every such block, and leave the generators outside as they were."""
    on_gpu = torch.cuda.is_initialized()
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpu else ()):
        # torch.manual_seed would also seed GPUs that nobody has used yet.
        (torch.manual_seed if on_gpu else torch.default_generator.manual_seed)(seed)
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


def _is_probability(value: object) -> bool:
    return isinstance(value, float) and 0 < value <= 1
