"""One forward and backward of a model, and what three such passes say of each other by the tolerance rule."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor, nn

from pyarch.copies import same_randomness
from pyarch.nested import Arguments, floating_tensors, map_tensors
from pyarch.tolerance import NEGLIGIBLE, allowed, error, scale
from pyarch.verify_report import Comparison


@dataclass
class Cotangents:
    """Random dense gradients of outputs, the same for every pass, drawn once for each name."""

    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))
    drawn: dict[str, Tensor] = field(default_factory=dict)

    def of(self, name: str, output: Tensor) -> Tensor:
        """The gradient of an output, rounded to the dtype of the first pass that asked."""
        if name not in self.drawn:
            values = torch.randn(output.shape, generator=self.generator, dtype=torch.float64)
            self.drawn[name] = values.to(output.dtype)
        return self.drawn[name].to(output)


@dataclass(frozen=True)
class Results:
    """Outputs and gradients of one pass, by name."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def run(
    module: nn.Module,
    arguments: Arguments,
    cotangents: Cotangents,
    backward: bool,
    cast: Callable[[Tensor], Tensor] = Tensor.clone,
) -> Results:
    """Run a copy forward and, if asked, backward from dense cotangents on every floating output.

    Args:
        module: its parameters' gradients are overwritten.
        arguments: left as they are; floating ones become leaves whose gradients are results.
        cotangents: the gradients of the outputs.
        backward: whether to run it.
        cast: applied to each argument first.
    """
    module.zero_grad(set_to_none=True)
    arguments = map_tensors(lambda tensor: cast(tensor.detach()), arguments)
    leaves = {}
    if backward:
        leaves = dict([*floating_tensors(arguments[0], "input"), *floating_tensors(arguments[1], "input")])
        for leaf in leaves.values():
            leaf.requires_grad_()
    # The clones let a model write into its inputs.
    args, kwargs = map_tensors(torch.clone, arguments)
    torch.clear_autocast_cache()
    with same_randomness(), torch.inference_mode(False), torch.set_grad_enabled(backward):
        outputs = dict(floating_tensors(module(*args, **kwargs), "output"))
        if backward:
            _propagate(outputs, cotangents)
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    gradients.update((name, parameter.grad) for name, parameter in module.named_parameters())
    present = {name: _dense(gradient) for name, gradient in gradients.items() if gradient is not None}
    return Results({name: output.detach() for name, output in outputs.items()}, present)


@dataclass(frozen=True)
class NotingErrors:
    """A block whose errors, of any class, get a note of which copy raised them: the traceback may not say."""

    note: str

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception):
            error.add_note(self.note)


@dataclass(frozen=True)
class EndToEnd:
    """A whole model compared.

    Args:
        outputs, gradients: the comparisons.
        noise: torch's own worst error relative to its tensor.
        any_gradient: whether the reference has a gradient different from zero.
        missing: names that some run has and another lacks.
    """

    outputs: list[Comparison]
    gradients: list[Comparison]
    noise: float
    any_gradient: bool
    missing: list[str]


def compare_end_to_end(ours: Results, stocks: list[Results], reference: Results) -> EndToEnd:
    """Compare a whole model.

    torch's own error is the largest of several of its runs, some with parameters moved by a rounding. Its
    worst relative error over all tensors stands in for each: a lone number may be right by luck. A gradient
    may jump where an activation changes side by rounding, in one run and not in another, so the square root
    of the dtype's epsilon is granted; the layers by themselves, on equal inputs, are held to the rule without
    that.
    """
    missing = _keep_shared([ours, *stocks, reference])
    outputs = _stocks([each.outputs for each in stocks], reference.outputs)
    gradients = _stocks([each.gradients for each in stocks], reference.gradients)
    scales = _layer_scales(reference.gradients)
    output_noise = _noise(outputs, reference.outputs, {})
    gradient_noise = _noise(gradients, reference.gradients, scales)
    return EndToEnd(
        _compare(ours.outputs, outputs, reference.outputs, {}, output_noise),
        _compare(ours.gradients, gradients, reference.gradients, scales, gradient_noise, kinks=True),
        max(output_noise, gradient_noise),
        any(scale(each) > 0 for each in reference.gradients.values()),
        missing,
    )


def compare_layer(
    ours: Results, stock: Results, reference: Results
) -> tuple[list[Comparison], list[Comparison]]:
    """Outputs and gradients of one layer by itself: the rule as it stands."""
    _keep_shared([ours, stock, reference])
    largest = max((scale(each) for each in reference.gradients.values()), default=0.0)
    outputs = _stocks([stock.outputs], reference.outputs)
    gradients = _stocks([stock.gradients], reference.gradients)
    scales = dict.fromkeys(reference.gradients, largest)
    return (
        _compare(ours.outputs, outputs, reference.outputs, {}),
        _compare(ours.gradients, gradients, reference.gradients, scales),
    )


def _keep_shared(runs: list[Results]) -> list[str]:
    """Drop from the runs what not all of them have; returns its names."""
    missing = []
    for kind in ("outputs", "gradients"):
        tensors = [getattr(each, kind) for each in runs]
        unshared = set().union(*tensors) - set(tensors[0]).intersection(*tensors)
        for each in tensors:
            for name in unshared:
                each.pop(name, None)
        missing += sorted(unshared)
    return missing


@dataclass(frozen=True)
class _Stock:
    """What torch's own runs say of one tensor.

    Args:
        known: the places where all of them and the reference are finite, or not in the same way. Elsewhere
            torch's own overflows, or float64 is not defined, and there is nothing to hold ours to.
        error: the largest of their errors in these places.
    """

    known: Tensor
    error: float


def _stocks(stocks: list[dict[str, Tensor]], reference: dict[str, Tensor]) -> dict[str, _Stock]:
    return {name: _stock([stock[name] for stock in stocks], wanted) for name, wanted in reference.items()}


def _stock(results: list[Tensor], wanted: Tensor) -> _Stock:
    if any(result.shape != wanted.shape for result in results):
        return _Stock(torch.ones_like(wanted, dtype=torch.bool), float("inf"))
    known = torch.stack([_agree_on_being_finite(result, wanted) for result in results]).all(0)
    return _Stock(known, max(_known_error(result, wanted, known) for result in results))


def _agree_on_being_finite(result: Tensor, wanted: Tensor) -> Tensor:
    """Where both are finite, both NaN, or both the same infinity."""
    not_finite = (result.isnan() & wanted.isnan()) | (result.isinf() & (result == wanted))
    return (result.isfinite() & wanted.isfinite()) | not_finite


def _known_error(result: Tensor, wanted: Tensor, known: Tensor) -> float:
    """The error in the known places; infinite for a tensor of another shape."""
    if result.shape != wanted.shape:
        return float("inf")
    return error(torch.where(known, result.double(), wanted.double()), wanted)


def _noise(stocks: dict[str, _Stock], reference: dict[str, Tensor], scales: dict[str, float]) -> float:
    """The worst relative error of torch's own; a tensor whose error has no measure says nothing of others."""
    relative = (
        stocks[name].error / (scale(wanted, scales.get(name, 0.0)) or 1.0)
        for name, wanted in reference.items()
        if math.isfinite(stocks[name].error)
    )
    return max(relative, default=0.0)


def _compare(
    ours: dict[str, Tensor],
    stocks: dict[str, _Stock],
    reference: dict[str, Tensor],
    scales: dict[str, float],
    noise: float = 0.0,
    kinks: bool = False,
) -> list[Comparison]:
    comparisons = []
    for name, wanted in reference.items():
        dtype, layer_scale, stock = ours[name].dtype, scales.get(name, 0.0), stocks[name]
        limit = allowed(stock.error, wanted, dtype, layer_scale, noise)
        if kinks:
            limit = max(limit, torch.finfo(dtype).eps ** 0.5 * scale(wanted, layer_scale))
        nan = stock.known & wanted.isnan()
        comparisons.append(
            Comparison(
                name,
                _known_error(ours[name], wanted, stock.known),
                stock.error,
                limit,
                nan=_share(nan),
                left_out=_share(~stock.known),
                is_hollow=wanted.numel() > 0 and not (stock.known & ~nan).any().item(),
            )
        )
    return comparisons


def _share(places: Tensor) -> float:
    return places.sum().item() / max(1, places.numel())


def _layer_scales(gradients: dict[str, Tensor]) -> dict[str, float]:
    """For each gradient the largest of its layer, or of the model where the whole layer's are negligible.

    The inputs together are a layer.
    """
    layers = {name: "input" if name.startswith("input") else name.rpartition(".")[0] for name in gradients}
    largest: dict[str, float] = defaultdict(float)
    for name, gradient in gradients.items():
        largest[layers[name]] = max(largest[layers[name]], scale(gradient))
    of_model = max(largest.values(), default=0.0)
    negligible = {layer for layer, value in largest.items() if value < NEGLIGIBLE * of_model}
    return {name: of_model if layer in negligible else largest[layer] for name, layer in layers.items()}


def _propagate(outputs: dict[str, Tensor], cotangents: Cotangents) -> None:
    reached = {name: output for name, output in outputs.items() if output.requires_grad}
    if reached:
        grads = [cotangents.of(name, output) for name, output in reached.items()]
        torch.autograd.backward(list(reached.values()), grads)


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.layout != torch.strided else gradient
