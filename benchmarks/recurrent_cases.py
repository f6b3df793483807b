"""The recurrent cases as data: layers, sequences and the goals they are held to.

Legend: T steps, B batch, H hidden size, I input size (H where not said). A case is one whole module, with
biases; its initial states are zeros but where it streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from benchmarks.even_spread import evenly_spread
from benchmarks.goals import Goal

PASSES = {"cpu": ("fwd", "fwd+bwd"), "cuda": ("fwd", "fwd+bwd")}

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}

# What a case feeds its module with, and which gradient comes back.
SEQUENCE = ""
EXPANDED = "output.sum()"
STREAMING = "streaming"
CELL = "cell loop"
PACKED = "packed"
SHORTEST_PACKED = 8


@dataclass(frozen=True)
class RecurrentCase:
    """One recurrent module over sequences.

    `form` is SEQUENCE (a padded batch and a dense gradient), EXPANDED (the gradient of `output.sum()`, one
    element expanded), STREAMING (initial states given), CELL (the cell's module called once a step) or PACKED
    (a PackedSequence of lengths from T down to T / SHORTEST_PACKED). `quick`: part of --quick.
    """

    mode: str
    steps: int
    batch: int
    hidden: int
    input: int | None = None
    proj: int = 0
    layers: int = 1
    directions: int = 1
    dtype: str = "fp32"
    form: str = SEQUENCE
    goals: dict[str, Goal] = field(default_factory=dict)
    quick: bool = True

    @property
    def name(self) -> str:
        words = [self.mode, f"T{self.steps}", f"B{self.batch}", f"H{self.hidden}"]
        words += [f"I{self.input}"] * (self.input is not None) + [f"proj{self.proj}"] * (self.proj > 0)
        words += [f"{self.layers} layers"] * (self.layers > 1) + ["bidirectional"] * (self.directions == 2)
        return " ".join([*words, self.dtype, self.form]).strip()

    @property
    def input_size(self) -> int:
        return self.hidden if self.input is None else self.input

    @property
    def lengths(self) -> tuple[int, ...]:
        """Steps of each sequence, longest first."""
        if self.form != PACKED:
            return (self.steps,) * self.batch
        shortest = self.steps / SHORTEST_PACKED
        share = (self.steps - shortest) / max(self.batch - 1, 1)
        return tuple(round(self.steps - share * place) for place in range(self.batch))

    def products(self, pass_name: str) -> int:
        """Floating-point operations of the matrix products, two for each multiplication with its addition.

        A step of one direction multiplies input and h by the gates' weights, and projects o * tanh(c).
        The backward has twice as many: one product for the gradient of each factor.
        """
        gates, width = GATES[self.mode] * self.hidden, self.proj or self.hidden
        input_sizes = [self.input_size] + [self.directions * width] * (self.layers - 1)
        weights = sum(gates * (size + width) + self.hidden * self.proj for size in input_sizes)
        forward = 2 * sum(self.lengths) * self.directions * weights
        return forward * {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[pass_name]


def speedups(forward: float, both: float) -> dict[str, Goal]:
    return {"fwd": Goal("speedup", forward), "fwd+bwd": Goal("speedup", both)}


# Goals: times faster than stock, paired in one run with a steady allocator on two AVX-512 cores.
CPU_TABLE = (
    RecurrentCase("GRU", 100, 1, 64, goals=speedups(15, 20)),
    RecurrentCase("GRU", 128, 1, 256, goals=speedups(5.2, 8.5)),
    RecurrentCase("GRU", 128, 16, 256, goals=speedups(2.05, 2.2)),
    RecurrentCase("GRU", 128, 64, 512, goals=speedups(1.4, 1.35)),
    RecurrentCase("RNN", 100, 1, 64, goals=speedups(8, 10)),
    RecurrentCase("RNN", 128, 16, 256, goals=speedups(2.0, 2.2)),
    RecurrentCase("RNN", 128, 64, 512, goals=speedups(1.4, 1.35)),
    RecurrentCase("LSTM", 100, 1, 64, goals=speedups(2.8, 1.8)),
    RecurrentCase("LSTM", 128, 1, 256, goals=speedups(1.25, 1.3)),
    RecurrentCase("LSTM", 128, 16, 256, goals=speedups(1.0, 1.1)),
    RecurrentCase("LSTM", 128, 64, 512, goals=speedups(1.0, 1.05)),
    RecurrentCase("LSTM", 128, 16, 256, dtype="bf16", goals=speedups(1.0, 1.2)),
    RecurrentCase("LSTM", 128, 16, 256, dtype="bf16", form=EXPANDED),
    RecurrentCase("GRU", 128, 16, 256, dtype="bf16", goals=speedups(2.8, 3.2)),
    RecurrentCase("LSTM", 64, 1, 128, proj=64, goals=speedups(3, 6)),
    RecurrentCase("GRU", 77, 5, 200, layers=2, directions=2, goals=speedups(2.5, 3)),
    RecurrentCase("LSTM", 1, 1, 256, layers=2, form=STREAMING, goals=speedups(3, 2)),
    RecurrentCase("LSTM", 64, 1, 128, form=CELL, goals={"fwd+bwd": Goal("speedup", 2)}),
    RecurrentCase("LSTM", 128, 16, 256, form=PACKED, goals={"fwd+bwd": Goal("of_padded", 1.1)}),
)

# Goals: times faster than nn.LSTM or nn.GRU on the same card; fp32 follows torch's tf32 switch on both sides.
CUDA_TABLE = (
    RecurrentCase("LSTM", 512, 32, 256, dtype="bf16", goals=speedups(2.5, 2)),
    RecurrentCase("LSTM", 512, 16, 512, dtype="bf16", goals=speedups(2.5, 2)),
    RecurrentCase("LSTM", 512, 16, 1024, dtype="bf16", goals=speedups(2.5, 2)),
    RecurrentCase("LSTM", 1024, 16, 1024, dtype="bf16", goals={"fwd": Goal("us_a_step", 2.5)}),
    RecurrentCase("LSTM", 512, 16, 512, goals=speedups(2.5, 2)),
    RecurrentCase("LSTM", 512, 16, 512, dtype="fp16", goals=speedups(1.0, 1.0)),
    RecurrentCase("LSTM", 256, 17, 193, dtype="bf16", goals=speedups(3, 3)),
    RecurrentCase("LSTM", 256, 1, 512, dtype="bf16", goals=speedups(3, 3)),
    RecurrentCase("LSTM", 512, 16, 512, directions=2, dtype="bf16", goals=speedups(2.5, 2.5)),
    RecurrentCase("LSTM", 512, 16, 512, layers=2, dtype="bf16", goals=speedups(2.5, 2.5)),
    RecurrentCase("LSTM", 512, 32, 512, dtype="bf16", form=PACKED, goals=speedups(4, 4)),
    RecurrentCase("LSTM", 256, 256, 1024, dtype="bf16", goals=speedups(1.0, 1.0)),
    RecurrentCase("GRU", 512, 16, 256, dtype="bf16", goals=speedups(3, 3)),
    RecurrentCase("GRU", 512, 16, 1024, dtype="bf16", goals=speedups(3, 3)),
    RecurrentCase("LSTM", 64, 16, 512, dtype="bf16", form=CELL),
)
TABLES = {"cpu": CPU_TABLE, "cuda": CUDA_TABLE}

SWEEP_AXES = {
    "steps": (1, 2, 5, 16, 33, 64, 100, 128, 192, 256),
    "batch": (1, 1, 2, 3, 5, 8, 16, 17, 32, 64),
    "hidden": (16, 31, 32, 48, 64, 100, 128, 192, 200, 256, 384, 512),
    "input": (None, None, 1, 40, 128, 300),
    "layers": (1, 1, 1, 2, 3),
    "directions": (1, 1, 2),
    "dtype": ("fp32", "fp32", "bf16"),
    "mode": ("LSTM", "GRU", "RNN"),
}
SWEEP_COUNT = 200
SWEEP_MAX_MS = 60.0
# A cell called a few times: modes, dtypes, and batch with hidden size.
SWEEP_CELL_STEPS = 16
SWEEP_CELL_SIZES = ((1, 64), (1, 128), (1, 512), (16, 128), (16, 512), (64, 256), (128, 512))

# A coarse upper bound of torch's training step on two cores: operations and weights move at these rates, and
# each step costs its calls; LSTM has kernels for whole sequences, the others run operator by operator.
OPERATIONS_PER_MS = 1e8
WEIGHT_BYTES_PER_MS = 1e7
STEP_MS = {"LSTM": 0.02, "GRU": 0.15, "RNN": 0.1}
WEIGHT_READS = {"LSTM": 1, "GRU": 3, "RNN": 3}


def sweep_cases(count: int = SWEEP_COUNT) -> Iterator[RecurrentCase]:
    """Yield `count` distinct cases spread evenly over the product of SWEEP_AXES, the same ones every time.

    A case that would take too long loses steps until it does not, so that wide layers are reached too. Cells
    of all sizes of SWEEP_CELL_SIZES follow.
    """
    yield from layer_cases(count)
    for mode, dtype, (batch, hidden) in product(SWEEP_AXES["mode"], ("fp32", "bf16"), SWEEP_CELL_SIZES):
        yield RecurrentCase(mode, SWEEP_CELL_STEPS, batch, hidden, dtype=dtype, form=CELL)


def layer_cases(count: int) -> Iterator[RecurrentCase]:
    seen: set[str] = set()
    for place in evenly_spread(SWEEP_AXES):
        case = RecurrentCase(**place)
        while stock_ms(case) > SWEEP_MAX_MS and case.steps > 1:
            case = replace(case, steps=case.steps // 2)
        if case.name not in seen:
            seen.add(case.name)
            yield case
        if len(seen) == count:
            return


def stock_ms(case: RecurrentCase) -> float:
    """About what a training step of the stock module takes, in milliseconds; rather more than less."""
    weight_bytes = 4 * GATES[case.mode] * case.hidden**2
    step = STEP_MS[case.mode] + WEIGHT_READS[case.mode] * weight_bytes / WEIGHT_BYTES_PER_MS
    steps = case.steps * case.layers * case.directions
    return steps * step + case.products("fwd+bwd") / OPERATIONS_PER_MS
