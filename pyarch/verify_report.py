"""What `verify` found: comparisons with float64, backends used, times; as a table, as JSON, as an error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from pyarch.report import Table, as_json, milliseconds, times

SCHEMA = "pyarch.verify/1"


@dataclass(frozen=True)
class Comparison:
    """One tensor: errors are largest absolute differences to the reference.

    Args:
        name: what was compared, "output['logits']" or a parameter's name.
        error: of the swapped model.
        stock_error: of torch's own, in the same dtype.
        allowed: the largest error that the tolerance rule grants.
        nan: the share of values that are NaN in torch's own and in float64; of these only the places are
            compared.
        left_out: the share that is not compared: there torch's own overflows, or float64 alone gives NaN.
        is_hollow: whether these two are all of it, so that there is no number to compare.
    """

    name: str
    error: float
    stock_error: float
    allowed: float
    nan: float = 0.0
    left_out: float = 0.0
    is_hollow: bool = False

    @property
    def ratio(self) -> float:
        """The error in units of the allowed one: at most 1 where the rule is kept."""
        if self.kept:
            return self.error / self.allowed if self.allowed else 0.0
        return self.error / self.allowed if 0 < self.allowed < math.inf else math.inf

    @property
    def kept(self) -> bool:
        """Whether the rule is kept; an infinite tolerance, of torch's own in another shape, says nothing."""
        return self.error <= self.allowed < math.inf

    def __str__(self) -> str:
        errors = f"error {self.error:.2e}, torch's own {self.stock_error:.2e}"
        return f"{self.name}: {errors}, allowed {self.allowed:.2e}"


@dataclass(frozen=True)
class Timing:
    """Median seconds of one pass, stock and swapped measured in turns."""

    stock: float
    swapped: float

    @property
    def speedup(self) -> float:
        return self.stock / self.swapped


@dataclass(frozen=True)
class Work:
    """What one call of a layer costs, by itself on the input it met first in the model.

    Args:
        inputs: shapes and dtypes, "2x197x768 float32".
        flop: operations of the convolutions and matrix products in the forward of torch's own layer, two a
            multiplication with its addition; masked pairs count. None where they cannot be counted.
        bytes: of inputs, parameters and outputs, each once: the least that a forward moves.
        timing: "forward" and, with a backward, "step", stock and swapped.
    """

    inputs: str
    flop: int | None
    bytes: int
    timing: dict[str, Timing]

    @property
    def intensity(self) -> float | None:
        """FLOP per byte of the forward."""
        return self.flop / self.bytes if self.flop and self.bytes else None

    def rate(self, seconds: float) -> float | None:
        """GFLOP/s of a forward that takes `seconds`."""
        return self.flop / seconds / 1e9 if self.flop else None


@dataclass(frozen=True)
class LayerResult:
    """One swapped layer.

    Args:
        name, kind: its name and class.
        calls: how often the model ran it.
        forward, backward: the backends used, "-" where a pass never came.
        outputs, gradients: the layer by itself on the input it met in the model, with random dense
            cotangents.
        work: what a call costs, where layers were timed and this one was called.
    """

    name: str
    kind: str
    calls: int
    forward: str
    backward: str
    outputs: tuple[Comparison, ...] = ()
    gradients: tuple[Comparison, ...] = ()
    work: Work | None = None

    @property
    def worst(self) -> Comparison | None:
        """The comparison nearest to, or farthest beyond, its tolerance."""
        return worst_of((*self.outputs, *self.gradients))


@dataclass(frozen=True)
class Ceilings:
    """The most that memory and arithmetic of a device gave.

    Args:
        copy_gb_per_s: bytes read and written by a large copy.
        matmul_gflop_per_s: of the faster of two square matrix products, in `dtype`, two operations a
            multiplication with its addition.
        dtype: of the product.
    """

    copy_gb_per_s: float
    matmul_gflop_per_s: float
    dtype: str

    @property
    def ridge(self) -> float:
        """The FLOP per byte from which on arithmetic is the bound and memory is not."""
        return self.matmul_gflop_per_s / self.copy_gb_per_s

    def at(self, intensity: float) -> float:
        """The GFLOP/s that work of so many FLOP per byte can reach at most."""
        return min(self.matmul_gflop_per_s, self.copy_gb_per_s * intensity)


@dataclass(frozen=True)
class VerifyReport:
    """The proof, or what is wrong with it.

    Args:
        dtype: of the model's first floating parameter.
        layers: one result a swapped layer.
        outputs, gradients: of the whole model, end to end.
        timing: "forward" and, with a backward, "step" (forward and backward); empty where nothing was timed.
        problems: why `ok` is False.
        notes: what was done to make the runs comparable.
        ceilings: of the device in the model's dtype, measured where layers were timed.
    """

    dtype: str
    layers: tuple[LayerResult, ...]
    outputs: tuple[Comparison, ...]
    gradients: tuple[Comparison, ...]
    timing: dict[str, Timing] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    ceilings: Ceilings | None = None

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def worst(self) -> Comparison | None:
        """The comparison nearest to, or farthest beyond, its tolerance."""
        everything = [*self.outputs, *self.gradients]
        for layer in self.layers:
            everything += [*layer.outputs, *layer.gradients]
        return worst_of(everything)

    def assert_ok(self) -> VerifyReport:
        """Return the report itself.

        Raises:
            AssertionError: the verification failed; the text holds every problem.
        """
        if not self.ok:
            raise AssertionError("verify failed:\n  " + "\n  ".join(self.problems))
        return self

    def table(self) -> Table:
        """The report as a table; `str(report)` is its plain text."""
        rows = [_layer_row(layer) for layer in self.layers]
        model = ("(the model)", "", "", "", *_cells(self.outputs), *_cells(self.gradients))
        return Table(
            f"verification ({self.dtype}) {'ok' if self.ok else 'FAILED'}",
            ("layer", "class", "forward", "backward", *_ERROR_COLUMNS),
            [*rows, model],
            (*(f"PROBLEM {each}" for each in self.problems), *self._timing_lines(), *self.notes),
        )

    def __str__(self) -> str:
        return str(self.table())

    def as_dict(self) -> dict:
        """The report as plain lists, dicts and texts."""
        return {"schema": SCHEMA, "ok": self.ok, **asdict(self)}

    def to_json(self) -> str:
        return as_json(self.as_dict())

    def _timing_lines(self) -> list[str]:
        return [
            f"{name}: {milliseconds(each.stock)} -> {milliseconds(each.swapped)}, {times(each.speedup)}"
            for name, each in self.timing.items()
        ]


_ERROR_COLUMNS = (
    ">output error",
    ">torch's own",
    ">of allowed",
    ">gradient error",
    ">torch's own",
    ">of allowed",
)


def worst_of(comparisons: Iterable[Comparison]) -> Comparison | None:
    """The comparison with the largest share of its tolerance."""
    return max(comparisons, key=lambda each: each.ratio, default=None)


def _layer_row(layer: LayerResult) -> tuple[str, ...]:
    named = layer.name or "(the model)", layer.kind, layer.forward, layer.backward
    return (*named, *_cells(layer.outputs), *_cells(layer.gradients))


def _cells(comparisons: tuple[Comparison, ...]) -> tuple[str, str, str]:
    worst = worst_of(comparisons)
    if worst is None:
        return "-", "-", "-"
    return f"{worst.error:.1e}", f"{worst.stock_error:.1e}", f"{worst.ratio:.2f}"
