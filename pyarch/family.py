"""What is known of a kind of layer that `swap` re-types: its class, drop-in, and what must hold of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyarch.nn.drop_in import DropIn

# Names that a subclass may not redefine, beside all that the drop-in itself defines.
COMPUTATION = {"forward", "__call__", "_call_impl", "__reduce__", "__init_subclass__"}
# What a drop-in hands on to the class that it replaces.
_HANDED_ON = {"__init__", "extra_repr"}


@dataclass(frozen=True)
class Obstacle:
    """Why a layer is left alone: a code for programs, the reason and the way out for people."""

    code: str
    reason: str
    hint: str = ""


def accepts_any(module: nn.Module) -> Obstacle | None:
    """No obstacle."""
    return None


@dataclass(frozen=True)
class Family:
    """A stock class and its drop-in.

    Args:
        stock, drop_in: the classes.
        overridable: methods of `stock` that hold its computation, beside `forward`.
        obstacle: what keeps a layer of this class from being swapped, or None.
        nominal: inputs that a layer of this class could be called with; they tell the report its likely
            backend.
    """

    stock: type[nn.Module]
    drop_in: type[DropIn]
    overridable: frozenset[str] = frozenset()
    obstacle: Callable[[nn.Module], Obstacle | None] = accepts_any
    nominal: Callable[[nn.Module], tuple[Tensor, ...]] | None = None

    @property
    def protected(self) -> set[str]:
        """Every name that a subclass must not redefine for the drop-in to mean the same."""
        return COMPUTATION | self.overridable | _names_between(self.drop_in, self.stock)


def element_like(weight: Tensor, *shape: int) -> Tensor:
    """A tensor of this shape and the weight's kind that holds one element."""
    return torch.empty((1,) * len(shape), dtype=weight.dtype, device=weight.device).expand(shape)


def _names_between(cls: type, stock: type) -> set[str]:
    """The methods and properties that the classes of a drop-in before its stock class define."""
    before = [base for base in cls.__mro__ if base not in stock.__mro__]
    members = {name: value for base in before for name, value in vars(base).items()}
    kinds = (property, classmethod, staticmethod)
    named = {name for name, value in members.items() if callable(value) or isinstance(value, kinds)}
    return named - _HANDED_ON
