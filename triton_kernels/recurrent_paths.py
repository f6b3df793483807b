"""Which way a recurrent call runs, from its metadata: resident, persistent or step by step.

"resident": one program a batch tile, the recurrent weight on chip, no waiting (recurrent_resident).
"persistent": the weight spread over programs that wait for one another at every step (recurrent_persistent);
    taken unasked only where a test on such a GPU has proven it.
"step": a product and a pointwise launch a step (recurrent_steps); takes every call.
"""

from . import recurrent_persistent
from .recurrent_persistent import Place
from .recurrent_plan import Layer, refusals_of_resident

PATHS = ("resident", "persistent", "step")


def refusals(path: str, layer: Layer, direction: str, place: Place) -> list[str]:
    """Why a path does not take a layer in a direction ("forward" or "backward"); nothing where it does."""
    if path == "resident":
        return refusals_of_resident(layer, direction)
    if path == "persistent":
        return list(recurrent_persistent.refusals(layer, direction, place))
    return []


def path_of(layer: Layer, direction: str, place: Place) -> str:
    """The path that a call takes when none is asked for.

    A single step, as of a cell, has nothing to keep on chip. Both forms that keep the weight there read it
    once a call instead of once a step; the one without waiting goes first.
    """
    proven = recurrent_persistent.table_of(place.architecture).proven_on is not None
    if layer.steps > 1:
        for path in ("resident", "persistent") if proven else ("resident",):
            if not refusals(path, layer, direction, place):
                return path
    return "step"


def checked_path(path: str, layer: Layer, direction: str, place: Place) -> str:
    """The path that is asked for.

    Raises:
        ValueError: no path of that name.
        NotImplementedError: it refuses the call, with all its reasons.
    """
    if path not in PATHS:
        raise ValueError(f"path={path!r}, needs one of {PATHS}")
    if reasons := refusals(path, layer, direction, place):
        raise NotImplementedError(f"path {path}: {'; '.join(reasons)}")
    return path
