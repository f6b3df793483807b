"""One depthwise-convolution case measured: stock and swapped module, errors, times, bytes, backends."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

import pyarch
from benchmarks.conv_cases import OVERHEAD_LIMIT_US, ConvCase, Goal
from benchmarks.copy_speed import CopySpeed
from benchmarks.cuda import EventTimer, fastest_stock
from benchmarks.measure import Pairs, Timer, cpu_timer, paired_times, spread, summary
from pyarch import dispatch, tolerance

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODULES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
COMPARED = ("output", "grad_input", "grad_weight", "grad_bias")
KERNEL_BACKENDS = ("triton", "cuda", "cpu")
# Stock is plainly wrong where its error passes this share of the largest exact value.
BROKEN_SHARE = 0.5


class WrongResult(ArithmeticError):
    """Ours is further from float64 than the tolerance rule allows."""


@dataclass(frozen=True)
class Pair:
    """The stock module, its swapped copy, and the tensors both are given."""

    stock: nn.Module
    ours: nn.Module
    input: Tensor
    cotangent: Tensor


def swapped(module: nn.Module) -> nn.Module:
    """A copy of `module` as `pyarch.swap` re-types it."""
    ours = copy.deepcopy(module)
    pyarch.swap(ours)
    return ours


def build(case: ConvCase, device: str) -> Pair:
    """Modules, input and a dense cotangent in the output's own memory format, from a fixed seed."""
    torch.manual_seed(0)
    kind, dtype = MODULES[len(case.spatial)], DTYPES[case.dtype]
    stock = kind(
        case.channels,
        case.channels,
        case.kernel,
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        groups=case.channels,
        device=device,
        dtype=dtype,
    )
    source = torch.randn(case.batch, case.channels, *case.spatial, device=device, dtype=dtype)
    if case.channels_last:
        source = source.contiguous(memory_format=CHANNELS_LAST[source.dim()])
    source.requires_grad_()
    with torch.no_grad():
        cotangent = torch.randn_like(stock(source))
    return Pair(stock, swapped(stock), source, cotangent)


def outputs_and_gradients(module: nn.Module, source: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
    """What COMPARED names."""
    output = module(source)
    gradients = torch.autograd.grad(output, (source, module.weight, module.bias), cotangent)
    return output.detach(), *gradients


def errors_and_backends(pair: Pair) -> tuple[dict[str, dict], dict[str, str]]:
    """Largest absolute error of each side against float64, for each of COMPARED; and who ran ours.

    Stock's error is None where its result is plainly wrong; its float32 result rounded to the dtype is then
    what the tolerance rule compares with. Raises WrongResult when ours breaks the rule: wrong is not timed.
    """
    exact = cast_results(pair, torch.float64)
    stock = outputs_and_gradients(pair.stock, pair.input, pair.cotangent)
    decided: dict[str, str] = {}

    def note(op: dispatch.Op, call: dispatch.Call, backend: dispatch.Backend) -> None:
        decided[op.name.rpartition("_")[2]] = backend.name

    with dispatch.recording(note):
        ours = outputs_and_gradients(pair.ours, pair.input, pair.cotangent)

    errors = {}
    largest_gradient = max(gradient.abs().max().item() for gradient in exact[1:])
    for index, name in enumerate(COMPARED):
        wanted, dtype = exact[index], stock[index].dtype
        own, theirs = tolerance.error(ours[index], wanted), tolerance.error(stock[index], wanted)
        broken = theirs > BROKEN_SHARE * wanted.abs().max().item()
        sound = cast_results(pair, torch.float32)[index].to(dtype) if broken else stock[index]
        layer_scale = 0.0 if name == "output" else largest_gradient
        limit = tolerance.allowed(tolerance.error(sound, wanted), wanted, dtype, layer_scale)
        if own > limit:
            raise WrongResult(f"{name}: error {own:.3e}, stock's {theirs:.3e}, allowed {limit:.3e}")
        errors[name] = {"ours": own, "stock": None if broken else theirs}
    return errors, decided


def cast_results(pair: Pair, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What COMPARED names, by the stock module on the same values in another dtype."""
    source = pair.input.detach().to(dtype).requires_grad_()
    return outputs_and_gradients(copy.deepcopy(pair.stock).to(dtype), source, pair.cotangent.to(dtype))


def call_of(pass_name: str, module: nn.Module, pair: Pair) -> Callable[[], object]:
    """The call that is timed: "fwd" wants no grad, "bwd" keeps one graph and repeats its backward."""
    source, cotangent = pair.input, pair.cotangent
    leaves = (source, module.weight, module.bias)
    if pass_name == "fwd":
        return lambda: module(source)
    if pass_name == "bwd":
        output = module(source)
        return lambda: torch.autograd.grad(output, leaves, cotangent, retain_graph=True)
    return lambda: torch.autograd.grad(module(source), leaves, cotangent)


class ConvBenchmark:
    """Measures cases on one device, each pass within a time budget, and says what it found as rows."""

    def __init__(self, device: str, budget_seconds: float) -> None:
        self.device = device
        self.budget_seconds = budget_seconds
        self.timer: Timer = EventTimer() if device == "cuda" else cpu_timer
        self.copy_speed = CopySpeed(device, self.timer)

    def rows(self, case: ConvCase, passes: list[str]) -> list[dict]:
        """One row a pass."""
        pair = build(case, self.device)
        errors, backends = errors_and_backends(pair)
        return [self.row(case, pass_name, pair, errors, backends) for pass_name in passes]

    def row(self, case: ConvCase, pass_name: str, pair: Pair, errors: dict, backends: dict) -> dict:
        pairs, stock_kernel = self.time(pass_name, pair)
        stock, ours, speedup = summary(pairs.stock), summary(pairs.ours), spread(pairs.ratios)
        moved = case.minimum_bytes(pass_name)
        gb_per_s = moved / (ours["median_ms"] * 1e-3) / 1e9
        compared = COMPARED[:1] if pass_name == "fwd" else COMPARED
        used = {"fwd": ("forward",), "bwd": ("backward",)}.get(pass_name, ("forward", "backward"))
        row = {
            "stock": stock | {"faults": pairs.stock_faults, "kernel": stock_kernel},
            "ours": ours | {"faults": pairs.ours_faults},
            "pairs": len(pairs.stock),
            "speedup": speedup,
            "bytes": moved,
            "gb_per_s": gb_per_s,
            "copy_share": gb_per_s / self.copy_speed.beyond_cache(),
            "copy_share_like_size": gb_per_s / self.copy_speed.like(moved),
            "error": {name: errors[name] for name in compared},
            "backend": {name: backends.get(name, "stock") for name in used},
        }
        goal = case.goals.get(pass_name)
        return row | {"goal": goal and asdict(goal), "met": goal and is_met(goal, row)}

    def time(self, pass_name: str, pair: Pair) -> tuple[Pairs, str]:
        with torch.set_grad_enabled(pass_name != "fwd"):
            stock, kernel = call_of(pass_name, pair.stock, pair), "auto"
            ours = call_of(pass_name, pair.ours, pair)
            if self.device == "cuda":
                stock, kernel = fastest_stock(stock, self.timer)
                return paired_times(stock, ours, self.budget_seconds, self.timer, sample_seconds=0), kernel
            return paired_times(stock, ours, self.budget_seconds, self.timer), kernel

    def overhead_row(self, case: ConvCase) -> dict:
        """What a swapped module adds to a call too small to matter, without grad, in microseconds."""
        pair = build(case, self.device)
        with torch.no_grad():
            stock, ours = call_of("fwd", pair.stock, pair), call_of("fwd", pair.ours, pair)
            pairs = paired_times(stock, ours, self.budget_seconds, cpu_timer)
        added = spread(pairs.added_us)
        return {
            "stock": summary(pairs.stock),
            "ours": summary(pairs.ours),
            "pairs": len(pairs.stock),
            "speedup": spread(pairs.ratios),
            "added_us": added,
            "goal": asdict(Goal("added_us", OVERHEAD_LIMIT_US)),
            "met": added["median"] <= OVERHEAD_LIMIT_US,
        }


def is_met(goal: Goal, row: dict) -> bool:
    """Whether a row reaches its goal; a speedup above 1 must come from kernels of ours in every pass."""
    if goal.metric == "us":
        return row["ours"]["median_ms"] * 1e3 <= goal.value
    if goal.metric == "copy_share":
        return row["copy_share"] >= goal.value
    by_kernels = all(name in KERNEL_BACKENDS for name in row["backend"].values())
    return row["speedup"]["median"] >= goal.value and (by_kernels or goal.value <= 1.0)
