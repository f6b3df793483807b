"""The proof that a swapped model computes what it did, in outputs and gradients, and the speedup."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyarch import dispatch
from pyarch.ceilings import measured_ceilings
from pyarch.copies import (
    duplicate,
    jitter,
    make_dtype,
    make_stock,
    make_stock_layer,
    same_randomness,
    silence_dropout,
    swapped_layers,
)
from pyarch.explain import explain_plain_attention
from pyarch.in_context import class_in_context, has_context
from pyarch.layer_work import work_of
from pyarch.nested import Arguments, as_arguments, floating_tensors, in_dtype, map_tensors, positional
from pyarch.nn.drop_in import DropIn
from pyarch.observation import PLAIN_ATTENTION, Observed, observing
from pyarch.passes import Cotangents, EndToEnd, NotingErrors, compare_end_to_end, compare_layer, run
from pyarch.swap import SDPA_HINT, checked_model, swap
from pyarch.timing import time_passes
from pyarch.verify_nan import consequence_of_nan, lacks_numbers, named_comparisons, where_no_number
from pyarch.verify_report import Ceilings, Comparison, LayerResult, VerifyReport

KERNELS = frozenset(dispatch.BACKENDS) - {"torch", "reference"}
# Beyond this relative error of torch's own the comparison end to end says little.
LOUD = 0.1
MOST_PROBLEMS_LISTED = 10
BY_OURS = "raised by the swapped copy of the {}; torch's own ran"


@dataclass(frozen=True)
class _Wish:
    """What a caller of `verify` asked for, under its names."""

    backward: bool
    reference_dtype: torch.dtype
    timing: bool
    layer_times: bool


def verify(
    model: nn.Module,
    inputs: Tensor | tuple | list | Mapping,
    *,
    stock: nn.Module | None = None,
    backward: bool = True,
    reference_dtype: torch.dtype = torch.float64,
    timing: bool = True,
    layer_times: bool = False,
) -> VerifyReport:
    """Prove outputs and gradients of a swapped model against float64, and time it beside the stock one.

    End to end, a float64 copy, the stock model and the swapped model run on the same inputs and random dense
    gradients of every floating output. Then every swapped layer runs by itself on the input it met. Errors
    keep the rule of `pyarch.tolerance`. All of it happens on copies: parameters, buffers, gradients, modes
    and random generators of yours stay as they are.

    Args:
        model: swapped already, or stock (then a copy is swapped). Swapped with `sdpa`, its plain calls of
            torch's scaled_dot_product_attention are together one layer of the report.
        inputs: a tensor, a tuple or list of arguments, or a dict of named arguments.
        stock: what to compare with, where that is not `model` with its swap undone: such as a model of the
            same parameters that is given masks, while in `model` rules state their pattern.
        backward: also compare the gradients of parameters and floating inputs.
        reference_dtype: of the reference; float32 on a device that has no float64.
        timing: also measure both models, in turns.
        layer_times: also measure every swapped layer by itself, on the input it met, and what the device can
            do at most; it takes about half a second a layer.

    Returns:
        VerifyReport. `report.ok` is False on an error beyond tolerance, when no layer ran a kernel of ours,
        and when no gradient is different from zero; `report.problems` says which. `report.assert_ok()` raises
        then.

    Raises:
        TypeError: `inputs` is none of these, or `model` or `stock` is no module.
    """
    arguments = as_arguments(inputs)
    with same_randomness():
        return _proof(model, stock, arguments, _Wish(backward, reference_dtype, timing, layer_times))


def _proof(model: nn.Module, stock: nn.Module | None, arguments: Arguments, wish: _Wish) -> VerifyReport:
    ours, notes, problems = _prepared(model)
    layers = swapped_layers(ours)
    stock = make_stock(duplicate(ours if stock is None else checked_model(stock)))
    silence_dropout(stock)
    end_to_end, observed = _end_to_end(ours, stock, arguments, wish)
    results = tuple(_layer_result(name, layer, observed[name], wish) for name, layer in layers.items())
    if has_context(ours):
        results += (_plain_result(observed[PLAIN_ATTENTION], wish),)
    problems += _problems(results, end_to_end, wish.backward)
    if results and not _ran_a_kernel(results):
        problems.append(f"no layer ran a kernel of ours: {_why_not(layers, observed)}")
    notes += _notes(results, end_to_end, wish.backward)
    return VerifyReport(
        _dtype_name(model),
        results,
        tuple(end_to_end.outputs),
        tuple(end_to_end.gradients),
        time_passes(stock, ours, map_tensors(_own, arguments), wish.backward) if wish.timing else {},
        tuple(problems),
        tuple(notes),
        _ceilings(model, arguments) if wish.layer_times else None,
    )


# -------------------------------------------------------------------------------- the runs


def _prepared(model: nn.Module) -> tuple[nn.Module, list[str], list[str]]:
    """A swapped copy without dropout, what was done to it, and what is wrong with it already."""
    inner = checked_model(model)
    notes = [] if inner is model else ["the wrapper of torch.compile was left aside"]
    ours = duplicate(inner)
    silenced = silence_dropout(ours)
    if silenced:
        notes.append(f"dropout set to 0 in {', '.join(silenced)}")
    problems = []
    if not swapped_layers(ours) and not has_context(ours):
        report = swap(ours, min_swaps=0)
        notes.append(f"the model was not swapped; a copy was: {len(report.swapped)} layers")
        if not report.swapped:
            reasons = dict.fromkeys(record.reason for record in report.skipped)
            problems.append(
                f"nothing to swap: {'; '.join(reasons) or 'no layer of a family that pyarch has'}"
            )
            notes.append(f"if the model calls F.scaled_dot_product_attention itself: {SDPA_HINT}")
    return ours, notes, problems


def _end_to_end(
    ours: nn.Module, stock: nn.Module, arguments: Arguments, wish: _Wish
) -> tuple[EndToEnd, dict[str, Observed]]:
    """Run the whole model in each variant, on copies of `stock`, and compare."""
    cotangents = Cotangents()
    # torch's own run comes first: the cotangents are rounded to its dtype.
    stocks = [run(duplicate(stock), arguments, cotangents, wish.backward)]
    stocks.append(run(jitter(duplicate(stock)), arguments, cotangents, wish.backward))
    dtype = wish.reference_dtype
    reference_model = make_dtype(duplicate(stock), dtype)
    with NotingErrors(f"raised by the copy of the model in {dtype}, which verify compares with"):
        reference = run(reference_model, arguments, cotangents, wish.backward, in_dtype(dtype))
    with NotingErrors(BY_OURS.format("model")), observing(swapped_layers(ours)) as observed:
        mine = run(ours, arguments, cotangents, wish.backward)
    return compare_end_to_end(mine, stocks, reference), observed


def _layer_result(name: str, layer: DropIn, observed: Observed, wish: _Wish) -> LayerResult:
    """The layer by itself on its first input: swapped, stock and reference, from its present state."""
    stock = make_stock_layer(duplicate(layer))
    return _alone(name, type(layer).__name__, layer, stock, observed, wish)


class _PlainAttention(nn.Module):
    """torch's function as a layer."""

    def forward(self, *args, **kwargs) -> Tensor:
        return F.scaled_dot_product_attention(*args, **kwargs)


def _plain_result(observed: Observed, wish: _Wish) -> LayerResult:
    """The same of the first plain call of attention."""
    ours = class_in_context(_PlainAttention)()
    named = PLAIN_ATTENTION, "function"
    return _alone(*named, ours, _PlainAttention(), observed, wish)


def _alone(
    name: str,
    kind: str,
    layer: nn.Module,
    stock_layer: nn.Module,
    observed: Observed,
    wish: _Wish,
) -> LayerResult:
    outputs: list[Comparison] = []
    gradients: list[Comparison] = []
    work = None
    if observed.arguments is not None:
        cotangents = Cotangents()
        with observed.autocast():
            stock = run(duplicate(stock_layer), observed.arguments, cotangents, wish.backward)
            with NotingErrors(BY_OURS.format(f"layer {name!r}")):
                mine = run(duplicate(layer), observed.arguments, cotangents, wish.backward)
            exact = make_dtype(duplicate(stock_layer), wish.reference_dtype)
            cast = in_dtype(wish.reference_dtype)
            reference = run(exact, observed.arguments, cotangents, wish.backward, cast)
            if wish.layer_times:
                work = work_of(layer, stock_layer, observed.arguments, wish.backward)
        outputs, gradients = compare_layer(mine, stock, reference)
    return LayerResult(
        name,
        kind,
        observed.calls,
        observed.forward_backend,
        observed.backward_backend,
        tuple(outputs),
        tuple(gradients),
        work,
    )


def _own(tensor: Tensor) -> Tensor:
    """A copy for runs that write into gradients of inputs, and perhaps into inputs."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


# -------------------------------------------------------------------------------- the judgement


def _problems(layers: tuple[LayerResult, ...], end_to_end: EndToEnd, backward: bool) -> list[str]:
    named = named_comparisons(layers, end_to_end)
    found = [f"{owner}: {each}" for owner, each in named if not each.kept and not each.nan]
    if len(found) > MOST_PROBLEMS_LISTED:
        found = [
            *found[:MOST_PROBLEMS_LISTED],
            f"and {len(found) - MOST_PROBLEMS_LISTED} more beyond tolerance",
        ]
    consequence = consequence_of_nan(layers, end_to_end, backward)
    if consequence:
        found.insert(0, "; ".join([*where_no_number(layers, end_to_end), consequence]))
    found += [f"{name}: present in one run, missing in another" for name in end_to_end.missing]
    if not end_to_end.outputs:
        found.append("the model returned no floating tensor to compare")
    if backward and not end_to_end.any_gradient and not lacks_numbers(end_to_end.gradients):
        found.append("no gradient is different from zero, so the backward is not proven")
    return found


def _notes(layers: tuple[LayerResult, ...], end_to_end: EndToEnd, backward: bool) -> list[str]:
    notes = []
    if not consequence_of_nan(layers, end_to_end, backward):
        notes += where_no_number(layers, end_to_end)
    if end_to_end.noise > LOUD:
        notes.append(
            f"torch's own error reaches {end_to_end.noise:.0%} of the largest value: "
            "end to end the comparison says little, layer by layer it holds"
        )
    idle = [layer.name for layer in layers if not layer.calls]
    if idle:
        notes.append(f"never called: {', '.join(idle)}")
    return notes


def _ran_a_kernel(layers: tuple[LayerResult, ...]) -> bool:
    used = {name for layer in layers for each in (layer.forward, layer.backward) for name in each.split("+")}
    return not KERNELS.isdisjoint(used)


def _why_not(layers: dict[str, DropIn], observed: dict[str, Observed]) -> str:
    """What the backends said of the first layer that ran."""
    for name, layer in layers.items():
        arguments = observed[name].arguments
        if arguments is not None:
            verdicts = layer.explain(*positional(layer, arguments))["forward"]
            return " | ".join(f"{each.backend}: {each.reason}" for each in verdicts if each.reason)
    arguments = observed[PLAIN_ATTENTION].arguments
    if arguments is not None:
        first = explain_plain_attention(*arguments)[0]
        return " | ".join(f"{each.backend}: {each.reason}" for each in first.verdicts if each.reason)
    return "none of them was called"


def _dtype_name(model: nn.Module) -> str:
    first = _first_parameter(model)
    return "no parameters" if first is None else str(first.dtype).removeprefix("torch.")


def _ceilings(model: nn.Module, arguments: Arguments) -> Ceilings:
    """Of the model's device in its dtype; of its first input's where it has no parameters."""
    first = _first_parameter(model)
    if first is None:
        first = next((tensor for _, tensor in floating_tensors(arguments, "input")), torch.empty(0))
    return measured_ceilings(first.device, first.dtype)


def _first_parameter(model: nn.Module) -> nn.Parameter | None:
    return next((each for each in model.parameters() if each.is_floating_point()), None)
