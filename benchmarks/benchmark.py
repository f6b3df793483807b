"""Measures the cases of a suite on one device: errors and backends first, then times, as rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from benchmarks.goals import is_met
from benchmarks.measure import Pairs, Timer, cpu_timer, paired_times, spread, summary
from benchmarks.twins import Results, Twins, call_of, results
from pyarch import dispatch, tolerance

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PARTS = {"fwd": ("forward",), "bwd": ("backward",), "fwd+bwd": ("forward", "backward")}
# Stock is plainly wrong where its error passes this share of the largest exact value.
BROKEN_SHARE = 0.5


class WrongResult(ArithmeticError):
    """Ours is further from float64 than the tolerance rule allows."""


class Benchmark(ABC):
    """What every suite measures alike; a suite says how a case is built and what bounds its speed."""

    def __init__(self, device: str, budget_seconds: float, versus: str = "eager") -> None:
        self.device = device
        self.budget_seconds = budget_seconds
        self.versus = versus
        self.timer: Timer = cpu_timer
        if device == "cuda":
            from benchmarks.cuda import EventTimer

            self.timer = EventTimer()

    @abstractmethod
    def build(self, case) -> Twins:
        """Both modules, the inputs and the cotangent of a case, from a fixed seed."""

    @abstractmethod
    def ceilings(self) -> dict:
        """What this machine reaches at best, measured in this run; part of the environment."""

    @abstractmethod
    def figures(self, case, pass_name: str, ours_ms: float) -> dict:
        """What the suite adds to a row."""

    def rows(self, case, passes: list[str]) -> list[dict]:
        """One row a pass."""
        twins = self.build(case)
        wants_gradients = {pass_name: pass_name != "fwd" for pass_name in passes}
        exact = exact_results(twins, any(wants_gradients.values()))
        found = {each: errors_and_backends(twins, exact, each) for each in set(wants_gradients.values())}
        return [self.row(case, name, twins, *found[wants_gradients[name]]) for name in passes]

    def row(self, case, pass_name: str, twins: Twins, errors: dict, backends: dict) -> dict:
        pairs, stock_kernel = self.time(pass_name, twins)
        ours = summary(pairs.ours)
        row = {
            "stock": summary(pairs.stock) | {"faults": pairs.stock_faults, "kernel": stock_kernel},
            "ours": ours | {"faults": pairs.ours_faults},
            "pairs": len(pairs.stock),
            "speedup": spread(pairs.ratios),
            **self.figures(case, pass_name, ours["median_ms"]),
            "error": errors,
            "backend": {part: backends.get(part, "stock") for part in PARTS[pass_name]},
        }
        goal = case.goals.get(pass_name)
        return row | {"goal": goal and asdict(goal), "met": goal and is_met(goal, row)}

    def time(self, pass_name: str, twins: Twins) -> tuple[Pairs, str]:
        """Times of both sides in turn, and which of torch's kernels stood for stock."""
        with torch.set_grad_enabled(pass_name != "fwd"):
            stock, kernel = self.stock_call(pass_name, twins)
            ours = call_of(pass_name, twins, twins.ours)
            return self.paired(stock, ours), kernel

    def paired(self, stock: Callable[[], object], ours: Callable[[], object]) -> Pairs:
        """`paired_times` of this device; a GPU's timer takes one call a sample."""
        if self.device == "cuda":
            return paired_times(stock, ours, self.budget_seconds, self.timer, sample_seconds=0)
        return paired_times(stock, ours, self.budget_seconds, self.timer)

    def stock_call(self, pass_name: str, twins: Twins) -> tuple[Callable[[], object], str]:
        """The stock side's call, compiled where that is asked, and the name of its kernel."""
        if self.versus == "compile":
            # A fresh start for each: torch gives a function up that it has compiled too often.
            torch.compiler.reset()
            torch._dynamo.config.allow_rnn = True
            return call_of(pass_name, twins, torch.compile(twins.stock)), "compiled"
        return call_of(pass_name, twins, twins.stock), "auto"

    def overhead_row(self, case) -> dict:
        """What a swapped module adds to a call too small to matter, without grad, in microseconds."""
        twins, goal = self.build(case), case.goals["overhead"]
        with torch.no_grad():
            stock, ours = (call_of("fwd", twins, module) for module in (twins.stock, twins.ours))
            pairs = paired_times(stock, ours, self.budget_seconds, cpu_timer)
        row = {
            "stock": summary(pairs.stock),
            "ours": summary(pairs.ours),
            "pairs": len(pairs.stock),
            "speedup": spread(pairs.ratios),
            "added_us": spread(pairs.added_us),
        }
        return row | {"goal": asdict(goal), "met": is_met(goal, row)}


def exact_results(twins: Twins, gradients: bool) -> Results:
    """The results of torch's module on the same values in float64."""
    exact = twins.cast(torch.float64)
    return results(exact, exact.stock, gradients)


def errors_and_backends(
    twins: Twins, exact: Results, gradients: bool
) -> tuple[dict[str, dict], dict[str, str]]:
    """Largest absolute error of each side against float64, result by result; and who ran ours.

    Raises WrongResult when ours breaks the rule: wrong is not timed.
    """
    stock = results(twins, twins.standard, gradients)
    decided: dict[str, list[str]] = {}

    def note(op: dispatch.Op, call: dispatch.Call, backend: dispatch.Backend) -> None:
        decided.setdefault(op.name.rpartition("_")[2], []).append(backend.name)

    with dispatch.recording(note):
        ours = results(twins, twins.ours, gradients)

    errors = {}
    for group in (twins.outputs, [name for name in stock if name not in twins.outputs]):
        errors |= held_to_the_rule(twins, group, stock, ours, exact)
    return errors, {part: "+".join(sorted(set(names))) for part, names in decided.items()}


def held_to_the_rule(
    twins: Twins, group: Sequence[str], stock: Results, ours: Results, exact: Results
) -> dict[str, dict]:
    """The errors of all outputs, or of all gradients, by the tolerance rule as `pyarch.verify` applies it.

    Stock's error is None where its result is plainly wrong; its float32 result rounded to the dtype is then
    what the rule compares with. Torch's worst relative error in the group is its noise: a result of few
    elements may be right by luck. Raises WrongResult when ours breaks the rule.
    """
    of_gradients = group != twins.outputs
    broken = {name for name in group if is_broken(stock[name], exact[name])}
    sound = stock
    if broken:
        in_float32 = twins.cast(torch.float32)
        rounded = results(in_float32, in_float32.stock, of_gradients)
        sound = stock | {name: rounded[name].to(stock[name].dtype) for name in broken}
    sizes = {name: exact[name].abs().max().item() for name in group}
    layer_scale = max(sizes.values(), default=0.0) if of_gradients else 0.0
    theirs = {name: tolerance.error(sound[name], exact[name]) for name in group}
    relative = (theirs[name] / (tolerance.scale(exact[name], layer_scale) or 1.0) for name in group)
    noise = max(relative, default=0.0)
    errors = {}
    for name in group:
        own = tolerance.error(ours[name], exact[name])
        limit = tolerance.allowed(theirs[name], exact[name], stock[name].dtype, layer_scale, noise)
        if own > limit:
            raise WrongResult(f"{name}: error {own:.3e}, stock's {theirs[name]:.3e}, allowed {limit:.3e}")
        errors[name] = {"ours": own, "stock": None if name in broken else theirs[name]}
    return errors


def is_broken(result: torch.Tensor, exact: torch.Tensor) -> bool:
    return tolerance.error(result, exact) > BROKEN_SHARE * exact.abs().max().item()
