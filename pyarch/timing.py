"""Two models timed in turns, so that what disturbs the machine disturbs both."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from pyarch.nested import Arguments, floating_tensors
from pyarch.passes import Cotangents
from pyarch.verify_report import Timing

BUDGET_SECONDS = 2.0
WARM_UPS = 1
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
    """Median seconds of two functions, run alternately and each first as often as the other."""
    budget = BUDGET_SECONDS if budget is None else budget
    for _ in range(WARM_UPS):
        stock()
        ours()
    seconds: dict[Callable, list[float]] = {stock: [_seconds(stock)], ours: [_seconds(ours)]}
    deadline = time.perf_counter() + budget
    for turn in range(MOST_ROUNDS):
        # The clock decides, not a guess from the first round, which the machine may have disturbed.
        if turn >= FEWEST_ROUNDS and time.perf_counter() >= deadline:
            break
        for each in (stock, ours) if turn % 2 else (ours, stock):
            seconds[each].append(_seconds(each))
    return Timing(_median(seconds[stock]), _median(seconds[ours]))


def _median(values: list[float]) -> float:
    """The middle value, the upper one of two. (The standard module costs every import of pyarch 2 ms.)"""
    return sorted(values)[len(values) // 2]


def _seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _forward(model: nn.Module, arguments: Arguments) -> None:
    with torch.no_grad():
        model(*arguments[0], **arguments[1])
    finish()


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
    finish()


def finish() -> None:
    """Wait for the GPU, where one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
