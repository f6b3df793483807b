"""What a forward-only runtime is given: the stock module as a function of row-major tensors."""

from __future__ import annotations

import copy
import importlib
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

import torch
from torch import Tensor, nn

from benchmarks.peers import stock_module
from benchmarks.suites import Absent
from benchmarks.twins import Twins


class Exported(nn.Module):
    """A copy of the stock module in evaluation, on tensors as they lie in memory.

    Runtimes take row-major arrays: a channels-last input is given as the view (N, H, W, C) that it is,
    without a copy, the permutation is part of what is exported, and so is the way back of an output like it.
    """

    def __init__(self, twins: Twins, case) -> None:
        super().__init__()
        self.stock = copy.deepcopy(stock_module(twins, case)).eval().requires_grad_(False)
        self.function = twins.forward
        self.orders = [memory_order(each) for each in twins.inputs]

    def forward(self, *arrays: Tensor) -> tuple[Tensor, ...]:
        paired = zip(arrays, self.orders, strict=True)
        inputs = tuple(each.permute(backward(order)) if moves(order) else each for each, order in paired)
        order = self.orders[0]
        return tuple(
            each.permute(order) if moves(order) and each.dim() == len(order) else each
            for each in self.function(self.stock, inputs)
        )

    def arrays(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The inputs as row-major views of their own memory."""
        paired = zip(inputs, self.orders, strict=True)
        return tuple(each.detach().permute(order).contiguous() for each, order in paired)

    def restored(self, outputs: list[Tensor]) -> tuple[Tensor, ...]:
        """A runtime's outputs with their dimensions where torch has them."""
        order = self.orders[0]
        return tuple(
            each.permute(backward(order)) if moves(order) and each.dim() == len(order) else each
            for each in outputs
        )


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions from the outermost in memory to the innermost."""
    return tuple(sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim)))


def backward(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(dim) for dim in range(len(order)))


def moves(order: tuple[int, ...]) -> bool:
    return order != tuple(range(len(order)))


def forward_on_cpu_alone(name: str, packages: Sequence[str], twins: Twins, pass_name: str) -> None:
    """Import a forward-only runtime's packages; Absent where one is missing, and for what it cannot run."""
    if pass_name != "fwd":
        raise Absent(f"{name} runs the forward alone")
    if (device := twins.inputs[0].device.type) != "cpu":
        raise Absent(f"{name} is timed on CPUs, not on {device}")
    try:
        for package in packages:
            importlib.import_module(package)
    except ImportError as error:
        raise Absent(f"{name}: {error}") from error


@contextmanager
def tracing() -> Iterator[None]:
    """No grad, nothing printed, and torch's transformer modules as the operators they consist of."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
