"""One architecture on one length: stock and swapped timed in turns, their memory, and where they refuse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyarch.comparison.architectures import Architecture, swapped
from pyarch.comparison.generation import state_for
from pyarch.comparison.question import Question
from pyarch.peak_memory import peak_bytes
from pyarch.timing import medians

# A call that takes longer is not repeated, a shorter one until so many seconds are spent on it.
PATIENCE_SECONDS = 4.0
BUDGET_SECONDS = 0.25
# Many tokens are timed as one: a single one is shorter than what disturbs the machine.
TOKENS_AT_A_TIME = 8
LARGEST_MASK = 2**30
NOT_SWAPPED = "not swapped"
# What torch and our kernels raise for sizes, dtypes and memory that they do not have.
REFUSALS = (RuntimeError, ValueError, MemoryError)


@dataclass(frozen=True)
class Side:
    """What stock or pyarch took on one length; None for what was not measured.

    Args:
        forward: median seconds of a call without gradients.
        step: of a forward and a backward to the input and all parameters.
        token: of one more token of every sequence, with the state kept.
        memory: the most bytes that a first training step holds beyond parameters and input, masks and
            gradients included.
        state: bytes kept for generating, of all sequences.
        refused: why there are no figures.
    """

    forward: float | None = None
    step: float | None = None
    token: float | None = None
    memory: int | None = None
    state: int | None = None
    refused: str = ""


@dataclass(frozen=True)
class Row:
    """One architecture on sequences of `length` tokens."""

    length: int
    stock: Side
    pyarch: Side


def measure(architecture: Architecture, question: Question, length: int) -> Row:
    """Both sides on one length; what fails becomes the reason of its side."""
    torch.manual_seed(0)
    try:
        stock = architecture.build()
    except ValueError as error:
        return Row(length, Side(refused=str(error)), Side(refused=str(error)))
    modules = {"stock": stock, "pyarch": swapped(stock)}
    x = torch.randn(question.batch, length, question.width)
    x = x.to(question.device, question.dtype).requires_grad_()
    ready, sides = {}, {}
    for name, module in modules.items():
        trial = None if module is None else Trial(module.to(question.device, question.dtype), x)
        refused = NOT_SWAPPED if trial is None else trial.refusal(architecture.is_causal)
        if refused:
            sides[name] = Side(refused=refused)
        else:
            ready[name] = trial
    sides.update(_timed(ready, architecture.is_causal))
    return Row(length, **sides)


class Trial:
    """One side at one length, to be called again and again."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module, self.x = module, x
        self.cotangent = torch.randn_like(x)
        self.state = None
        self.memory = 0

    def refusal(self, generates: bool) -> str:
        """Run everything once and weigh the first step; the reason in words where that fails."""
        mask_bytes = getattr(self.module, "mask_bytes", lambda *_: 0)
        needed = mask_bytes(self.x.shape[1], self.x.element_size())
        if needed > LARGEST_MASK:
            sizes = f"{needed / 2**30:.3g} GiB, more than the {LARGEST_MASK / 2**30:.3g} GiB that one may"
            return f"skipped: its mask would take {sizes}"
        try:
            # Workspaces and compiled kernels that stay are no part of a step.
            self._step_on(self.x[:, :1].detach().requires_grad_())
            self.release()
            self.memory = peak_bytes(self.step, self.x.device)
            self.forward()
            if generates:
                self.state = state_for(self.module, self.x.shape[1])
                with torch.no_grad():
                    self.state.read(self.x.detach())
                self.tokens()
        except REFUSALS as error:
            self.release()
            self.state = None
            first_line = str(error).strip().partition("\n")[0]
            return f"failed: {first_line or type(error).__name__}"
        return ""

    def forward(self) -> None:
        with torch.no_grad():
            self.module(self.x)

    def step(self) -> None:
        self._step_on(self.x)

    def tokens(self) -> None:
        """Generate some tokens; each attends to, or is convolved with, a full state."""
        token = self.x[:, :1].detach()
        with torch.no_grad():
            for _ in range(TOKENS_AT_A_TIME):
                self.state.step(token)

    def release(self) -> None:
        """Let go of all gradients."""
        self.module.zero_grad(set_to_none=True)
        self.x.grad = None

    def _step_on(self, x: Tensor) -> None:
        self.release()
        self.module(x).backward(self.cotangent[:, : x.shape[1]])


def _timed(trials: dict[str, Trial], generates: bool) -> dict[str, Side]:
    calls = ("forward", "step", "tokens") if generates else ("forward", "step")
    seconds = {}
    for call in calls:
        both = [getattr(trial, call) for trial in trials.values()]
        seconds[call] = medians(both, BUDGET_SECONDS, PATIENCE_SECONDS)
    sides = {}
    for place, (name, trial) in enumerate(trials.items()):
        token = seconds["tokens"][place] / TOKENS_AT_A_TIME if generates else None
        kept = sum(each.numel() * each.element_size() for each in trial.state.tensors) if generates else None
        forward, step = seconds["forward"][place], seconds["step"][place]
        sides[name] = Side(forward, step, token, trial.memory, kept)
    return sides
