"""One architecture on one length: stock and swapped timed in turns, their memory, and where they refuse."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median, quantiles

import torch
from torch import Tensor, nn

from pyarch.comparison.architectures import Architecture, swapped
from pyarch.comparison.generation import state_for
from pyarch.comparison.question import Question
from pyarch.peak_memory import peak_bytes
from pyarch.timing import rounds

# A call that takes longer is not repeated.
PATIENCE_SECONDS = 4.0
# Many tokens are timed as one: a single one is shorter than what disturbs the machine.
TOKENS_AT_A_TIME = 8
# The times of a Side: the call that is timed and how often that does it.
TIMED = {"forward": ("forward", 1), "step": ("step", 1), "token": ("tokens", TOKENS_AT_A_TIME)}
# What was measured once may be off by so much either way: times on a shared machine are.
ASSUMED_SPREAD = 1.05
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
        spread: of each time that was measured more than once, the seconds that 20 % and 80 % of its rounds
            took less than.
    """

    forward: float | None = None
    step: float | None = None
    token: float | None = None
    memory: int | None = None
    state: int | None = None
    refused: str = ""
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)

    def interval(self, figure: str) -> tuple[float, float]:
        """Within which a figure that is there lies: a time in its spread; bytes are exact."""
        value = getattr(self, figure)
        if figure not in TIMED:
            return value, value
        return self.spread.get(figure, (value / ASSUMED_SPREAD, value * ASSUMED_SPREAD))


@dataclass(frozen=True)
class Row:
    """One architecture on sequences of `length` tokens."""

    length: int
    stock: Side
    pyarch: Side


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two intervals share more than an end, so that which figure is the larger is not settled."""
    return one[0] < other[1] and other[0] < one[1]


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
    sides.update(_timed(ready, architecture.is_causal, question.budget))
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


def _timed(trials: dict[str, Trial], generates: bool, budget: float) -> dict[str, Side]:
    """All figures of the sides that run, each time measured in turns."""
    seconds = {name: {} for name in trials}
    for figure, (call, times) in TIMED.items():
        if figure == "token" and not generates:
            continue
        both = [getattr(trial, call) for trial in trials.values()]
        for name, taken in zip(trials, rounds(both, budget, PATIENCE_SECONDS), strict=True):
            seconds[name][figure] = [each / times for each in taken]
    return {name: _side(trial, seconds[name]) for name, trial in trials.items()}


def _side(trial: Trial, seconds: dict[str, list[float]]) -> Side:
    kept = trial.state and sum(each.numel() * each.element_size() for each in trial.state.tensors)
    medians = {figure: median(taken) for figure, taken in seconds.items()}
    spread = {}
    for figure, taken in seconds.items():
        if len(taken) > 1:
            low, *_, high = quantiles(taken, n=5, method="inclusive")
            spread[figure] = low, high
    return Side(**medians, memory=trial.memory, state=kept, spread=spread)
