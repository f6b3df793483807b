"""The suites of microbenchmarks as data: their cases, passes, and the class that measures them. No torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks import attention_cases, conv_cases, recurrent_cases

# Forward, backward of one graph, and both together.
PASSES = ("fwd", "bwd", "fwd+bwd")


class Absent(Exception):
    """What a case is to be timed against does not run on this machine: nothing measured, nothing failed."""


class WrongResult(ArithmeticError):
    """Ours is further from float64 than the tolerance rule allows, or a peer computes something else."""


def reason_of(error: Exception) -> str:
    """The kind of an error and its first line; of a failed torch.compile those of what failed in it."""
    error = getattr(error, "inner_exception", error)
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}"


@dataclass(frozen=True)
class Suite:
    """One operator family.

    A case has `name`, `dtype`, `quick` (part of --quick) and `goals` (pass name -> Goal), and `only` where it
    has not every pass; the rest is between the cases and `benchmark`, the "module:class" of a
    benchmarks.benchmark.Benchmark, which the measuring process alone imports. `tables`, and the `passes` that
    are timed when none are asked for, are by device; `overhead`, where there is one, is a call so small that
    only Python is left.
    """

    name: str
    what: str
    benchmark: str
    tables: dict[str, tuple]
    passes: dict[str, tuple[str, ...]]
    sweep: Callable[[], Iterable]
    overhead: Any = None

    def load(self) -> type:
        module, name = self.benchmark.split(":")
        return getattr(importlib.import_module(module), name)


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "attention",
            "attention, stock operators and modules and ours in turn",
            "benchmarks.attention:AttentionBenchmark",
            attention_cases.TABLES,
            attention_cases.PASSES,
            attention_cases.sweep_cases,
            attention_cases.OVERHEAD_CASE,
        ),
        Suite(
            "conv",
            "depthwise convolution, stock and swapped modules in turn",
            "benchmarks.conv:ConvBenchmark",
            conv_cases.TABLES,
            conv_cases.PASSES,
            conv_cases.sweep_cases,
            conv_cases.OVERHEAD_CASE,
        ),
        Suite(
            "recurrent",
            "RNN, LSTM, GRU and their cells, stock and swapped modules in turn",
            "benchmarks.recurrent:RecurrentBenchmark",
            recurrent_cases.TABLES,
            recurrent_cases.PASSES,
            recurrent_cases.sweep_cases,
        ),
    )
}
