"""A stock module and its swapped twin, what both are given, and what comes out of either."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import pyarch

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Twins:
    """Two modules of equal parameters, and one call that both can answer.

    `forward(module, inputs)` gives the tensors that `outputs` names. Gradients are those of the first output
    under `cotangent`, to the inputs that `learned` names, which come first, and to every parameter. `truth`
    gives the exact results where `stock` is not the module to ask; where it `differs`, computing something
    else than ours, only its time counts, and `truth` stands for it elsewhere.
    """

    stock: nn.Module
    ours: nn.Module
    inputs: tuple[Tensor, ...]
    cotangent: Tensor
    outputs: tuple[str, ...]
    forward: Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]
    learned: tuple[str, ...] = ("input",)
    truth: nn.Module | None = None
    differs: bool = False

    @property
    def standard(self) -> nn.Module:
        """The module whose error in the same dtype ours is compared with."""
        return self.truth if self.differs else self.stock

    def leaves(self, module: nn.Module) -> dict[str, Tensor]:
        """What gradients are taken to, under the gradients' names."""
        parameters = {f"grad_{name}": parameter for name, parameter in module.named_parameters()}
        inputs = zip(self.learned, self.inputs, strict=False)
        return {f"grad_{name}": each for name, each in inputs} | parameters

    def cast(self, dtype: torch.dtype) -> Twins:
        """The same problem, on the same values, in another dtype, with the right module on both sides."""
        truth = copy.deepcopy(self.truth or self.stock).to(dtype)
        inputs = tuple(each.detach().to(dtype) for each in self.inputs)
        for learned in inputs[: len(self.learned)]:
            learned.requires_grad_()
        return replace(
            self,
            stock=truth,
            ours=truth,
            inputs=inputs,
            cotangent=self.cotangent.to(dtype),
            truth=None,
            differs=False,
        )


def twin_modules(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A module that `make` gives, and another with the same parameters, re-typed by `pyarch.swap`."""
    stock, ours = make(), make()
    ours.load_state_dict(stock.state_dict())
    pyarch.swap(ours)
    return stock, ours


def results(twins: Twins, module: nn.Module, gradients: bool) -> Results:
    """Every output of `module` in evaluation, without a graph; or in training, with every gradient."""
    module.train(gradients)
    with torch.set_grad_enabled(gradients):
        outputs = twins.forward(module, twins.inputs)
    named = {name: each.detach() for name, each in zip(twins.outputs, outputs, strict=True)}
    if gradients:
        leaves = twins.leaves(module)
        found = torch.autograd.grad(outputs[0], tuple(leaves.values()), twins.cotangent)
        named |= dict(zip(leaves, found, strict=True))
    return named


def call_of(pass_name: str, twins: Twins, module: nn.Module) -> Callable[[], object]:
    """The call that is timed: "fwd" wants no grad, "bwd" keeps one graph and repeats its backward."""
    module.train(pass_name != "fwd")
    forward, inputs, cotangent = twins.forward, twins.inputs, twins.cotangent
    leaves = tuple(twins.leaves(module).values())
    if pass_name == "fwd":
        return lambda: forward(module, inputs)
    if pass_name == "bwd":
        output = forward(module, inputs)[0]
        return lambda: torch.autograd.grad(output, leaves, cotangent, retain_graph=True)
    return lambda: torch.autograd.grad(forward(module, inputs)[0], leaves, cotangent)
