"""What a run measures: its settings, and the cases and passes they select. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from benchmarks.suites import SUITES, Suite

# Seconds of timing for each pass of each case, per variant.
BUDGETS = {"quick": 0.3, "table": 1.0, "full": 3.0, "sweep": 0.25}
OPPONENTS = ("eager", "compile")


@dataclass(frozen=True)
class Settings:
    """The settings of a run that its measuring processes share; `versus` is how the stock side runs."""

    suite_name: str
    extent: str = "table"
    device: str = "cpu"
    dtype: str | None = None
    filter: str = ""
    passes: tuple[str, ...] = ()
    backend: str = "auto"
    versus: str = "eager"
    commit: str | None = None
    budget_seconds: float | None = None

    @property
    def suite(self) -> Suite:
        return SUITES[self.suite_name]

    @property
    def budget(self) -> float:
        return BUDGETS[self.extent] if self.budget_seconds is None else self.budget_seconds

    @property
    def chosen_passes(self) -> tuple[str, ...]:
        return self.passes or self.suite.passes[self.device]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        fields = json.loads(text)
        return cls(**fields | {"passes": tuple(fields["passes"])})


def selected_cases(settings: Settings) -> list:
    """The suite's cases of the extent and device whose dtype, name and passes agree with the settings."""
    suite = settings.suite
    cases = suite.sweep() if settings.extent == "sweep" else suite.tables[settings.device]
    return [
        case
        for case in cases
        if settings.dtype in (None, case.dtype)
        and settings.filter.lower() in case.name.lower()
        and passes_of(settings, case)
    ]


def passes_of(settings: Settings, case) -> list[str]:
    """The chosen passes that the case has."""
    only = getattr(case, "only", ())
    return [name for name in settings.chosen_passes if not only or name in only]


def overhead_case(settings: Settings):
    """The tiny call whose Python overhead ends a run of a whole table, or None."""
    case = settings.suite.overhead
    if case is None or settings.extent == "sweep" or settings.dtype not in (None, case.dtype):
        return None
    return case if settings.filter.lower() in f"overhead {case.name}" else None
