"""Two models timed in turns, so that what disturbs the machine disturbs both."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from pyarch.nested import Arguments, floating_tensors
from pyarch.passes import Cotangents
from pyarch.verify_report import Timing

BUDGET_SECONDS = 2.0
FEWEST_ROUNDS = 4
MOST_ROUNDS = 100


def time_passes(
    stock: nn.Module,
    ours: nn.Module,
    arguments: Arguments,
    backward: bool,
    budget: float | None = None,
) -> dict[str, Timing]:
    """Median seconds of "forward" (no gradients) and, with `backward`, of "step" (forward and backward).

    Args:
        stock, ours: two models, or two layers; the gradients of their parameters are overwritten.
        arguments: of both; the gradients of those that ask for one are overwritten.
        backward: whether to time the step too.
        budget: seconds for each of the two, `BUDGET_SECONDS` where None; a few rounds run in any case.
    """
    forwards = (lambda: _forward(stock, arguments)), (lambda: _forward(ours, arguments))
    timing = {"forward": in_turns(*forwards, budget)}
    if backward:
        cotangents = Cotangents()
        steps = (
            (lambda: _step(stock, arguments, cotangents)),
            (lambda: _step(ours, arguments, cotangents)),
        )
        timing["step"] = in_turns(*steps, budget)
    return timing


def in_turns(stock: Callable[[], None], ours: Callable[[], None], budget: float | None = None) -> Timing:
    """Median seconds of two functions, run alternately."""
    return Timing(*map(_median, rounds((stock, ours), BUDGET_SECONDS if budget is None else budget)))


def rounds(
    calls: Sequence[Callable[[], None]], budget: float, patience: float = math.inf
) -> list[list[float]]:
    """Seconds of each call in each round, run alternately and each first as often as the others.

    Args:
        calls: what is timed.
        budget: seconds for all; a few rounds run in any case.
        patience: where one round takes longer, its times stand and none is run again.
    """
    first = [[_seconds(call)] for call in calls]
    if sum(seconds for (seconds,) in first) > patience:
        return first
    seconds: list[list[float]] = [[] for _ in calls]
    deadline = time.perf_counter() + budget
    for turn in range(MOST_ROUNDS):
        # The clock decides, not a guess from the first round, which the machine may have disturbed.
        if turn >= FEWEST_ROUNDS and time.perf_counter() >= deadline:
            break
        places = range(len(calls))
        for place in places if turn % 2 else reversed(places):
            seconds[place].append(_seconds(calls[place]))
    return seconds


def _median(values: list[float]) -> float:
    """The middle value, the upper one of two. (The standard module costs every import of pyarch 2 ms.)"""
    return sorted(values)[len(values) // 2]


def _seconds(call: Callable[[], None]) -> float:
    finish()
    start = time.perf_counter()
    call()
    finish()
    return time.perf_counter() - start


def _forward(model: nn.Module, arguments: Arguments) -> None:
    with torch.no_grad():
        model(*arguments[0], **arguments[1])


def _step(model: nn.Module, arguments: Arguments, cotangents: Cotangents) -> None:
    model.zero_grad(set_to_none=True)
    for _, argument in floating_tensors(arguments, "input"):
        argument.grad = None
    torch.clear_autocast_cache()
    with torch.enable_grad():
        outputs = dict(floating_tensors(model(*arguments[0], **arguments[1]), "output"))
        reached = {name: output for name, output in outputs.items() if output.requires_grad}
        if reached:
            grads = [cotangents.of(name, output) for name, output in reached.items()]
            torch.autograd.backward(list(reached.values()), grads)


def finish() -> None:
    """Wait for the GPU, where one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
