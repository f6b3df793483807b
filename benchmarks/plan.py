"""What a run measures: its settings, and the cases and passes they select. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from benchmarks.conv_cases import CPU_TABLE, CUDA_TABLE, OVERHEAD_CASE, ConvCase, sweep_cases

# Seconds of timing for each pass of each case, per variant.
BUDGETS = {"quick": 0.3, "table": 1.0, "full": 3.0, "sweep": 0.25}
DEFAULT_PASSES = {"cpu": ("fwd", "fwd+bwd"), "cuda": ("fwd", "bwd", "fwd+bwd")}


@dataclass(frozen=True)
class Settings:
    """The settings of a run that its measuring processes share."""

    extent: str = "table"
    device: str = "cpu"
    dtype: str | None = None
    filter: str = ""
    passes: tuple[str, ...] = ()
    backend: str = "auto"
    commit: str | None = None
    budget_seconds: float | None = None

    @property
    def budget(self) -> float:
        return BUDGETS[self.extent] if self.budget_seconds is None else self.budget_seconds

    @property
    def chosen_passes(self) -> tuple[str, ...]:
        return self.passes or DEFAULT_PASSES[self.device]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        fields = json.loads(text)
        return cls(**fields | {"passes": tuple(fields["passes"])})


def selected_cases(settings: Settings) -> list[ConvCase]:
    """The cases of the extent and device whose dtype and name agree with the settings, in order."""
    table = CUDA_TABLE if settings.device == "cuda" else CPU_TABLE
    cases = list(sweep_cases()) if settings.extent == "sweep" else list(table)
    return [
        case
        for case in cases
        if settings.dtype in (None, case.dtype) and settings.filter.lower() in case.name.lower()
    ]


def measures_overhead(settings: Settings) -> bool:
    """Whether the run ends with the Python overhead of a tiny call (whole tables only)."""
    named = f"overhead {OVERHEAD_CASE.name}"
    return (
        settings.extent != "sweep"
        and settings.dtype in (None, OVERHEAD_CASE.dtype)
        and settings.filter.lower() in named
    )
