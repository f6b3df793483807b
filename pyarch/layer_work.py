"""What one call of a swapped layer costs: its time beside torch's own, its arithmetic, the bytes it moves.

Arithmetic is counted by torch's own counter over torch's own layer, run without data on the meta device:
there a fused recurrent layer or attention falls into the matrix products that it consists of.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from pyarch.copies import duplicate, make_stock
from pyarch.nested import Arguments, floating_tensors, map_tensors
from pyarch.timing import time_passes
from pyarch.verify_report import Work

# For each pass of each layer, stock and swapped together.
BUDGET_SECONDS = 0.2
# Operators whose inside the counter can see; every other namespace holds fused ones.
COUNTED_NAMESPACES = {"aten", "prim"}


def work_of(layer: nn.Module, stock: nn.Module, arguments: Arguments, backward: bool) -> Work:
    """Time a layer beside torch's own, count what it computes and moves.

    Args:
        layer, stock: of a copy; the gradients of their parameters are overwritten.
        arguments: of a call in the model, detached; those that require a gradient get one in the step.
        backward: whether to time the step too.
    """
    with torch.no_grad():
        outputs = stock(*arguments[0], **arguments[1])
    inputs = list(_tensors(arguments))
    moved = [*inputs, *stock.parameters(), *(each for _, each in floating_tensors(outputs, "output"))]
    return Work(
        ", ".join(_described(each) for each in inputs),
        flop_of(layer, arguments),
        sum(_bytes(each) for each in moved),
        time_passes(stock, layer, arguments, backward, BUDGET_SECONDS),
    )


def flop_of(layer: nn.Module, arguments: Arguments) -> int | None:
    """Operations of the convolutions and matrix products in a forward of the torch.nn layer behind `layer`.

    Two a multiplication with its addition. Gates, softmax and normalisation are not counted; a masked pair of
    query and key is, as torch's own layer computes it. The masks that rules state are no matter here.

    Returns:
        None where the layer cannot run without data, or runs an operator that is closed to the counter.
    """
    from torch.utils.flop_counter import FlopCounterMode

    plain = make_stock(duplicate(layer)).to("meta")
    try:
        args, kwargs = map_tensors(lambda tensor: tensor.detach().to("meta"), arguments)
        with _Namespaces() as ran, FlopCounterMode(display=False) as counter:
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                plain(*args, **kwargs)
    except (RuntimeError, ValueError):
        # What asks for the values of its inputs cannot run on the meta device.
        return None
    return counter.get_total_flops() if ran.names <= COUNTED_NAMESPACES else None


class _Namespaces(TorchDispatchMode):
    """Keeps the namespaces of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.namespace)
        return func(*args, **(kwargs or {}))


def _tensors(arguments: Arguments) -> Iterator[Tensor]:
    """Every tensor of a call, one that is given twice once."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(keep, arguments)
    yield from found


def _bytes(tensor: Tensor) -> int:
    held = tensor.values() if tensor.is_nested else tensor
    return held.numel() * held.element_size()


def _described(tensor: Tensor) -> str:
    held = tensor.values() if tensor.is_nested else tensor
    return f"{'x'.join(map(str, held.shape)) or 'number'} {str(held.dtype).removeprefix('torch.')}"
