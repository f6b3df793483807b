"""The tensors inside what models take and give: by themselves and in tuples, lists, mappings, dataclasses and
packed sequences.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

Arguments = tuple[tuple, dict]


def as_arguments(inputs: Tensor | PackedSequence | tuple | list | Mapping) -> Arguments:
    """What a user calls inputs, as positional and named arguments of a forward.

    Raises:
        TypeError: neither a tensor or packed sequence, nor a tuple or list of arguments, nor a mapping of
            named ones.
    """
    if isinstance(inputs, Tensor | PackedSequence):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    raise TypeError(
        f"inputs: got {type(inputs).__name__}, needs a tensor, a tuple of arguments or a dict of named ones"
    )


def positional(module: nn.Module, arguments: Arguments) -> tuple:
    """The arguments of a call of `module`, named ones and defaults too, in the order of its forward."""
    args, kwargs = arguments
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.args


def map_tensors(function: Callable[[Tensor], Tensor], arguments: Arguments) -> Arguments:
    """The same arguments with every tensor replaced; of a packed sequence its data.

    What is one tensor twice stays one: a layer may see by that that a sequence attends to itself.
    """
    known: dict[int, Tensor] = {}

    def replaced(value: Tensor | PackedSequence) -> Tensor | PackedSequence:
        if isinstance(value, PackedSequence):
            return PackedSequence(function(value.data), *value[1:])
        if id(value) not in known:
            known[id(value)] = function(value)
        return known[id(value)]

    kinds = (Tensor, PackedSequence)
    return pytree.tree_map_only(kinds, replaced, arguments, is_leaf=lambda value: isinstance(value, kinds))


def floating_tensors(value: object, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every floating tensor inside a value, with the expression that reaches it."""
    if isinstance(value, Tensor):
        if value.is_nested:
            yield f"{name}.values()", value.values()
        elif value.is_floating_point():
            yield name, value
    elif isinstance(value, PackedSequence):
        yield from floating_tensors(value.data, f"{name}.data")
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from floating_tensors(each, f"{name}[{key!r}]")
    elif isinstance(value, tuple | list):
        for index, each in enumerate(value):
            yield from floating_tensors(each, f"{name}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from floating_tensors(getattr(value, field.name), f"{name}.{field.name}")


def in_dtype(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A cast of floating tensors that leaves every other alone."""
    return lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor
