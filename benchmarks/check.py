"""Both sides of a case held against float64 before they are timed: wrong is not timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.suites import WrongResult
from benchmarks.twins import Results, Twins, results
from pyarch import dispatch, tolerance

# Stock is plainly wrong where its error passes this share of the largest exact value.
BROKEN_SHARE = 0.5


@dataclass(frozen=True)
class Check:
    """What a first look at both sides told, in inference or with gradients.

    `exact`: the results in float64. `errors`: the largest absolute error of each side, result by result.
    `backends`: who ran ours, by part. `compile_s`: what our first call on a GPU took more than our second, in
    seconds; None on a CPU, whose kernels are compiled beforehand: there it would be the time of new memory.
    """

    exact: Results
    errors: dict[str, dict]
    backends: dict[str, str]
    compile_s: float | None


def exact_results(twins: Twins, gradients: bool) -> Results:
    """The results of torch's module on the same values in float64."""
    exact = twins.cast(torch.float64)
    return results(exact, exact.stock, gradients)


def checked(twins: Twins, exact: Results, gradients: bool) -> Check:
    """Raises WrongResult when ours breaks the rule."""
    stock = results(twins, twins.standard, gradients)
    decided: dict[str, list[str]] = {}

    def note(op: dispatch.Op, call: dispatch.Call, backend: dispatch.Backend) -> None:
        decided.setdefault(op.name.rpartition("_")[2], []).append(backend.name)

    with dispatch.recording(note):
        ours, first_seconds = timed_results(twins, gradients)
    compile_s = compile_seconds(twins, gradients, first_seconds)

    errors = {}
    for group in (twins.outputs, [name for name in stock if name not in twins.outputs]):
        errors |= held_to_the_rule(twins, group, stock, ours, exact)
    backends = {part: "+".join(sorted(set(names))) for part, names in decided.items()}
    return Check(exact, errors, backends, compile_s)


def compile_seconds(twins: Twins, gradients: bool, first_seconds: float) -> float | None:
    """Seconds that our first call took more than a warm one on a GPU, None on a CPU."""
    if not twins.cotangent.is_cuda:
        return None
    _, warm_seconds = timed_results(twins, gradients)
    return max(0.0, first_seconds - warm_seconds)


def timed_results(twins: Twins, gradients: bool) -> tuple[Results, float]:
    """Our results, and the seconds until they were there."""
    start = time.perf_counter()
    found = results(twins, twins.ours, gradients)
    if twins.cotangent.is_cuda:
        torch.cuda.synchronize()
    return found, time.perf_counter() - start


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
