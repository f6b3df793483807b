"""The suites of microbenchmarks as data: their cases, passes, and the class that measures them. No torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks import attention_cases, conv_cases, recurrent_cases


class Absent(Exception):
    """What a case is to be timed against does not run on this machine: nothing measured, nothing failed."""


@dataclass(frozen=True)
class Suite:
    """One operator family.

    A case has `name`, `dtype` and `goals` (pass name -> Goal), and `only` where it has not every pass; the
    rest is between the cases and `benchmark`, the "module:class" of a benchmarks.benchmark.Benchmark, which
    the measuring process alone imports. `tables` and `passes` are by device; `overhead`, where there is one,
    is a call so small that only Python is left.
    """

    name: str
    what: str
    benchmark: str
    tables: dict[str, tuple]
    passes: dict[str, tuple[str, ...]]
    sweep: Callable[[], Iterable]
    overhead: Any = None

    @property
    def all_passes(self) -> list[str]:
        """Every pass that some device times, in order."""
        longest_first = sorted(self.passes.values(), key=len, reverse=True)
        return list(dict.fromkeys(name for names in longest_first for name in names))

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
