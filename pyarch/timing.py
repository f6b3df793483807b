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


def time_passes(stock: nn.Module, ours: nn.Module, arguments: Arguments, backward: bool) -> dict[str, Timing]:
    """Median seconds of "forward" (no gradients) and, with `backward`, of "step" (forward and backward)."""
    timing = {"forward": in_turns(lambda: _forward(stock, arguments), lambda: _forward(ours, arguments))}
    if backward:
        cotangents = Cotangents()
        timing["step"] = in_turns(
            lambda: _step(stock, arguments, cotangents), lambda: _step(ours, arguments, cotangents)
        )
    return timing


def in_turns(stock: Callable[[], None], ours: Callable[[], None]) -> Timing:
    """Median seconds of two functions, run alternately and each first as often as the other."""
    for _ in range(WARM_UPS):
        stock()
        ours()
    seconds: dict[Callable, list[float]] = {stock: [_seconds(stock)], ours: [_seconds(ours)]}
    round_seconds = seconds[stock][0] + seconds[ours][0]
    rounds = int(min(MOST_ROUNDS, max(FEWEST_ROUNDS, BUDGET_SECONDS / round_seconds)))
    for turn in range(rounds):
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
    _finish()


def _step(model: nn.Module, arguments: Arguments, cotangents: Cotangents) -> None:
    model.zero_grad(set_to_none=True)
    torch.clear_autocast_cache()
    with torch.enable_grad():
        outputs = dict(floating_tensors(model(*arguments[0], **arguments[1]), "output"))
        reached = {name: output for name, output in outputs.items() if output.requires_grad}
        if reached:
            grads = [cotangents.of(name, output) for name, output in reached.items()]
            torch.autograd.backward(list(reached.values()), grads)
    _finish()


def _finish() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
