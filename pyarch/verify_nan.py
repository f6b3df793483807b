"""What `verify` says of a model that gives NaN or overflows by itself: once, and what is left of the proof.

A value that is NaN in float64 too is compared by its place alone; one of 16 bits that overflowed, not at all.
"""

from __future__ import annotations

from collections.abc import Callable

from pyarch.passes import EndToEnd
from pyarch.verify_report import Comparison, LayerResult

MOST_NAMES = 3


def named_comparisons(layers: tuple[LayerResult, ...], end_to_end: EndToEnd) -> list[tuple[str, Comparison]]:
    """Every comparison and what it is of."""
    named = [("model", each) for each in (*end_to_end.outputs, *end_to_end.gradients)]
    for layer in layers:
        named += [(f"layer {layer.name!r}", each) for each in (*layer.outputs, *layer.gradients)]
    return named


def where_no_number(layers: tuple[LayerResult, ...], end_to_end: EndToEnd) -> list[str]:
    """Where there is NaN to compare by its place, and where nothing, a sentence each."""
    nan = _where(layers, end_to_end, lambda each: each.nan)
    left_out = _where(layers, end_to_end, lambda each: each.left_out)
    found = []
    if nan:
        found.append(f"torch's own model gives NaN too, in {nan}: there only the places of NaN are compared")
    if left_out:
        found.append(
            f"not compared: torch's own overflows there, or differs from float64 in being NaN, in {left_out}"
        )
    return found


def _where(
    layers: tuple[LayerResult, ...], end_to_end: EndToEnd, share: Callable[[Comparison], float]
) -> str:
    outputs = [f"{each.name} ({_percent(share(each))} of it)" for each in end_to_end.outputs if share(each)]
    places = [_shortened(outputs)] if outputs else []
    gradients = sum(share(each) > 0 for each in end_to_end.gradients)
    if gradients:
        places.append(f"{gradients} of {len(end_to_end.gradients)} gradients")
    inside = [layer.name for layer in layers if any(map(share, (*layer.outputs, *layer.gradients)))]
    if inside:
        places.append(f"{len(inside)} of {len(layers)} layers ({_shortened(list(map(repr, inside)))})")
    return ", ".join(places)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "under 1%"


def consequence_of_nan(layers: tuple[LayerResult, ...], end_to_end: EndToEnd, backward: bool) -> str | None:
    """Why such a model is not proven, ours differing beside NaN or no number being left; None where it is."""
    named = named_comparisons(layers, end_to_end)
    different = [f"{owner}: {each.name}" for owner, each in named if each.nan and not each.kept]
    if different:
        return f"ours has NaN elsewhere, or other numbers beside it, in {_shortened(different)}"
    for kind, comparisons in (("output", end_to_end.outputs), ("gradient", end_to_end.gradients)):
        if comparisons and all(each.is_hollow for each in comparisons):
            return f"no {kind} has a number left to compare"
    if backward and not end_to_end.any_gradient and lacks_numbers(end_to_end.gradients):
        return "no gradient has a number left that is not zero"
    return None


def lacks_numbers(comparisons: list[Comparison]) -> bool:
    """Whether some values of them are NaN or not compared."""
    return any(each.nan or each.left_out for each in comparisons)


def _shortened(names: list[str]) -> str:
    rest = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")
