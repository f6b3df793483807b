"""What `verify` found as sections of a page: times, the roof, errors, attention maps, the sheet of layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from pyarch.maps_page import PageMaps
from pyarch.page import Axis, Bars, Facts, HeatMaps, Point, Prose, Scatter, Sheet
from pyarch.page.document import Section
from pyarch.report import milliseconds, times
from pyarch.swap_report import Record
from pyarch.verify_report import Ceilings, Comparison, LayerResult, Timing, VerifyReport, Work, worst_of

STOCK, OURS = "torch", "pyarch"
PASSES = {"forward": "forward, without gradients", "step": "step: forward and backward"}
# More bars than these nobody compares; the sheet below them holds every layer.
MOST_BARS = 40
MOST_NAMES = 6
THE_MODEL = "(the model)"

Cell = str | float | None
# Tensors, each with the layer that it belongs to.
Compared = list[tuple[str, Comparison]]


def sections(
    proof: VerifyReport, skipped: Sequence[Record], maps: PageMaps, prefix: str = "", brief: bool = False
) -> list[Section]:
    """The sections of one model.

    Args:
        proof: with its layers timed.
        skipped: what `swap` left alone.
        maps: attention weights, none where the model has no attention.
        prefix: before each title, for a page of several models.
        brief: show the errors of the tensors nearest to their tolerance only, to keep such a page small.
    """
    return [
        *_prose(f"{prefix}Problems: verification FAILED", proof.problems),
        *_whole_model(proof, prefix),
        *_layer_bars(proof, prefix),
        *_layer_sheet(proof, prefix),
        *_roofline(proof, prefix),
        *_work_sheet(proof, prefix),
        *_errors(proof, prefix, brief),
        *_heat_maps(maps, prefix),
        *_skipped(skipped, prefix),
        *_prose(f"{prefix}What was done to compare", proof.notes),
    ]


def summary(proof: VerifyReport) -> str:
    """One or two sentences: whether it is proven, and how much faster."""
    if not proof.ok:
        return f"FAILED: the swapped model is not proven to compute what it did ({_problems(proof)})."
    worst = proof.worst
    nearest = f"; the largest error is {worst.ratio:.2f} of what is allowed" if worst else ""
    gains = [f"{name} {times(each.speedup)}" for name, each in proof.timing.items()]
    faster = f" Speedup over torch: {', '.join(gains)}." if gains else ""
    return f"Verified against float64 in {proof.dtype}: {_layers(proof)} swapped{nearest}.{faster}"


def facts(machine: Mapping[str, str], ceilings: Ceilings | None) -> Facts:
    """What every figure on the page hangs on."""
    pairs = dict(machine)
    if ceilings is not None:
        pairs["large copy, measured now"] = f"{ceilings.copy_gb_per_s:.1f} GB/s"
        pairs["matrix product, measured now"] = f"{ceilings.matmul_gflop_per_s:.0f} GFLOP/s {ceilings.dtype}"
    return Facts("Where this was measured", pairs)


# -------------------------------------------------------------------------------- the sections


def _prose(title: str, lines: Sequence[str]) -> Iterator[Prose]:
    if lines:
        yield Prose(title, lines)


def _whole_model(proof: VerifyReport, prefix: str) -> Iterator[Bars]:
    if proof.timing:
        note = ", ".join(
            f"{name} {milliseconds(each.stock)} -> {milliseconds(each.swapped)}, {times(each.speedup)}"
            for name, each in proof.timing.items()
        )
        names = [PASSES[name] for name in proof.timing]
        title = f"{prefix}Whole model, before and after"
        yield Bars(title, names, _both(proof.timing.values()), Axis("median time", "ms"), note)


def _layer_bars(proof: VerifyReport, prefix: str) -> Iterator[Bars]:
    for name, explained in PASSES.items():
        timed = [each for each in _timed(proof) if name in each.work.timing]
        shown = sorted(timed, key=lambda each: -each.work.timing[name].stock)[:MOST_BARS]
        shown = [each for each in timed if each in shown]
        if shown:
            note = (
                "Each by itself, on the input that it met first. Its time holds that of the layers inside it."
            )
            if len(shown) < len(timed):
                note += f" The {len(shown)} that take longest on torch, of {len(timed)}."
            yield Bars(
                f"{prefix}Each swapped layer, {explained}",
                [_name(each) for each in shown],
                _both(each.work.timing[name] for each in shown),
                Axis("median time", "ms"),
                note,
            )


def _roofline(proof: VerifyReport, prefix: str) -> Iterator[Scatter]:
    counted = [each for each in _timed(proof) if each.work.flop]
    if not counted or proof.ceilings is None:
        return
    rates: dict[str, Callable[[Work], float]] = {
        STOCK: lambda work: work.timing["forward"].stock,
        OURS: lambda work: work.timing["forward"].swapped,
    }
    series = {
        side: [
            Point(each.work.intensity, each.work.rate(seconds(each.work)), _name(each)) for each in counted
        ]
        for side, seconds in rates.items()
    }
    places = [each.work.intensity for each in counted]
    ridge = proof.ceilings.ridge
    ends = [min(*places, ridge) / 2, ridge, max(*places, ridge) * 2]
    note = (
        "Forward. FLOP: convolutions and matrix products of torch's own layer, two a multiplication with its "
        "addition. Bytes: inputs, parameters and outputs, each once. The roof: a large copy and a matrix "
        f"product in {proof.ceilings.dtype}, measured in this run. A layer that skips masked pairs, which "
        "torch computes, may pass it, and one whose tensors stay in the cache."
    )
    yield Scatter(
        f"{prefix}Roofline of the swapped layers",
        series,
        Axis("arithmetic intensity", "FLOP/byte", log=True),
        Axis("rate", "GFLOP/s", log=True),
        {"roof": [(place, proof.ceilings.at(place)) for place in ends]},
        note,
    )


def _work_sheet(proof: VerifyReport, prefix: str) -> Iterator[Sheet]:
    timed = [(each, each.work, each.work.timing["forward"]) for each in _timed(proof)]
    columns = ["layer", "inputs of its first call", ">calls", ">MFLOP", ">MB", ">FLOP/byte"]
    rows = [
        [
            *(_name(layer), work.inputs, layer.calls),
            *(_scaled(work.flop, 1e-6), work.bytes / 1e6, work.intensity),
            *(work.rate(forward.stock), work.rate(forward.swapped)),
        ]
        for layer, work, forward in timed
    ]
    if rows:
        note = "Of one forward. A dash: runs an operator whose arithmetic torch's counter does not see."
        columns += [f">{STOCK} GFLOP/s", f">{OURS} GFLOP/s"]
        yield Sheet(f"{prefix}What one call of each layer computes and moves", columns, rows, note)


def _errors(proof: VerifyReport, prefix: str, brief: bool) -> Iterator[Scatter]:
    compared: dict[str, Compared] = {
        "outputs of the model": [(THE_MODEL, each) for each in proof.outputs],
        "gradients of the model": [(THE_MODEL, each) for each in proof.gradients],
        "outputs of layers": [(_name(layer), each) for layer in proof.layers for each in layer.outputs],
        "gradients of layers": [(_name(layer), each) for layer in proof.layers for each in layer.gradients],
    }
    if brief:
        compared = {name: _nearest(many) for name, many in compared.items()}
    beyond = [(owner, each) for many in compared.values() for owner, each in many if not each.kept]
    series = {name: _points(pair for pair in many if pair[1].kept) for name, many in compared.items()}
    series["beyond tolerance"] = _points(beyond)
    series = {name: points for name, points in series.items() if points}
    if not series:
        return
    total = sum(map(len, compared.values()))
    undrawn = total - sum(map(len, series.values()))
    places = [point.x for points in series.values() for point in points]
    note = (
        "Largest absolute error of each tensor against float64. Below the line pyarch is nearer than torch. "
        "A tensor is kept within twice torch's own error and a rounding or two."
    )
    if brief:
        note += " Of each layer, and of the model, the tensor that is nearest to its tolerance."
    if undrawn:
        note += f" Not drawn: {undrawn} of {total}, whose error is 0 or no number on one side."
    yield Scatter(
        f"{prefix}Error beside torch's own",
        series,
        Axis("torch's own error", log=True),
        Axis("pyarch's error", log=True),
        {"equal": [(min(places), min(places)), (max(places), max(places))]},
        note,
    )


def _heat_maps(maps: PageMaps, prefix: str) -> Iterator[Section]:
    title = f"{prefix}Attention, from the real weights"
    if maps.weights:
        yield HeatMaps(title, maps.weights, note=" ".join(maps.notes))
    else:
        yield from _prose(title, maps.notes)


_SHEET: dict[str, Callable[[LayerResult], Cell]] = {
    "layer": lambda layer: _name(layer),
    "class": lambda layer: layer.kind,
    "forward on": lambda layer: layer.forward,
    "backward on": lambda layer: layer.backward,
    ">forward, torch ms": lambda layer: _milliseconds(layer, "forward", "stock"),
    ">forward, pyarch ms": lambda layer: _milliseconds(layer, "forward", "swapped"),
    ">forward speedup": lambda layer: _speedup(layer, "forward"),
    ">step, torch ms": lambda layer: _milliseconds(layer, "step", "stock"),
    ">step, pyarch ms": lambda layer: _milliseconds(layer, "step", "swapped"),
    ">step speedup": lambda layer: _speedup(layer, "step"),
    ">output error": lambda layer: _figure(layer.outputs, "error"),
    ">torch's output error": lambda layer: _figure(layer.outputs, "stock_error"),
    ">gradient error": lambda layer: _figure(layer.gradients, "error"),
    ">torch's gradient error": lambda layer: _figure(layer.gradients, "stock_error"),
    ">share of allowed": lambda layer: _figure((*layer.outputs, *layer.gradients), "ratio"),
}
_ERRORS = ("output error", "torch's output error", "gradient error", "torch's gradient error")
_FORMATS = {
    **dict.fromkeys(_ERRORS, "{:.1e}"),
    **dict.fromkeys(("forward speedup", "step speedup"), "{:.2f}x"),
    "share of allowed": "{:.2f}",
    **{f"{name}, {side} ms": "{:.3g}" for name in PASSES for side in (STOCK, OURS)},
}


def _layer_sheet(proof: VerifyReport, prefix: str) -> Iterator[Sheet]:
    if proof.layers:
        rows = [[cell(layer) for cell in _SHEET.values()] for layer in proof.layers]
        note = (
            "Errors are those of the tensor that is nearest to its tolerance; share of allowed is at most 1 "
            "where the rule is kept. A dash: not called, not timed or not countable."
        )
        yield Sheet(f"{prefix}The swapped layers", list(_SHEET), rows, note, _FORMATS)


def _skipped(skipped: Sequence[Record], prefix: str) -> Iterator[Sheet]:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for each in skipped:
        groups.setdefault((each.was, each.reason, each.hint), []).append(each.name or THE_MODEL)
    if groups:
        rows = [
            [was, len(names), reason, hint or None, _shortened(names)]
            for (was, reason, hint), names in groups.items()
        ]
        columns = ["class", ">layers", "reason", "way out", "names"]
        yield Sheet(f"{prefix}Left alone, and why", columns, rows)


# -------------------------------------------------------------------------------- figures


def _timed(proof: VerifyReport) -> list[LayerResult]:
    return [layer for layer in proof.layers if layer.work is not None]


def _name(layer: LayerResult) -> str:
    return layer.name or THE_MODEL


def _both(timings: Iterable[Timing]) -> dict[str, list[float]]:
    timings = list(timings)
    return {
        STOCK: [each.stock * 1e3 for each in timings],
        OURS: [each.swapped * 1e3 for each in timings],
    }


def _nearest(compared: Compared) -> Compared:
    """Of each owner the tensor nearest to its tolerance, or farthest beyond."""
    nearest: dict[str, Comparison] = {}
    for owner, each in compared:
        if owner not in nearest or each.ratio > nearest[owner].ratio:
            nearest[owner] = each
    return list(nearest.items())


def _points(compared: Iterable[tuple[str, Comparison]]) -> list[Point]:
    """Those that a logarithmic scale can show."""
    return [
        Point(each.stock_error, each.error, f"{owner}: {each.name}")
        for owner, each in compared
        if all(value > 0 and math.isfinite(value) for value in (each.stock_error, each.error))
    ]


def _milliseconds(layer: LayerResult, name: str, side: str) -> float | None:
    timing = layer.work.timing.get(name) if layer.work else None
    return getattr(timing, side) * 1e3 if timing else None


def _speedup(layer: LayerResult, name: str) -> float | None:
    timing = layer.work.timing.get(name) if layer.work else None
    return timing.speedup if timing else None


def _scaled(value: int | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _figure(comparisons: tuple[Comparison, ...], name: str) -> float | None:
    """One figure of the comparison that is nearest to its tolerance, or farthest beyond."""
    worst = worst_of(comparisons)
    return getattr(worst, name) if worst else None


def _layers(proof: VerifyReport) -> str:
    return f"{len(proof.layers)} layer" + ("s" if len(proof.layers) != 1 else "")


def _problems(proof: VerifyReport) -> str:
    return f"{len(proof.problems)} problem" + ("s" if len(proof.problems) != 1 else "")


def _shortened(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
