"""Who watches a call: tracing, transforms, autocast, dispatch modes. A plain one may skip the dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from pyarch.dispatch import is_recorded

_PLAIN = frozenset((Tensor, Parameter))
_MOST_REMEMBERED = 4096


class Decisions(dict):
    """Decisions for calls that were checked and found good, by what like calls have in common.

    A check of a small call takes as long as its kernel.
    """

    def remember(self, like: tuple | None, decided: tuple) -> tuple:
        """Keep a decision unless `like` is None, emptied first when full; return it."""
        if like is not None:
            if len(self) >= _MOST_REMEMBERED:
                self.clear()
            self[like] = decided
        return decided


def is_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether nothing but autograd watches: no tracing, no dispatch mode, no subclass among the tensors."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and _PLAIN.issuperset(map(type, tensors))
    )


def is_ordinary(tensors: Iterable[Tensor]) -> bool:
    """Whether a call is plain, nothing transforms or casts it, and nobody is told of its decision."""
    return (
        is_plain(tensors)
        and not is_recorded()
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._is_any_autocast_enabled()
    )


def under_transform() -> bool:
    """Whether forward-mode AD or a functorch transform (vmap, grad, jvp) is running."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def without_autocast(function: Callable, device: torch.device, *arguments):
    """Call a function on tensors that hold already what autocast would have cast."""
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return function(*arguments)
    return function(*arguments)
