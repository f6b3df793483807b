"""What a run measures: its settings, and the cases and passes they select. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from benchmarks.suites import SUITES, Suite

# Seconds of timing for each pass of each case, per variant, over all visits (benchmarks.visits).
BUDGETS = {"quick": 0.3, "table": 1.0, "full": 3.0, "sweep": 0.25}
# Seconds in which a measuring process finishes its next row, beyond the timing: both sides are checked in
# float64, peers exported and compiled. On two busy cores a row beside all four peers takes 32 s at most; on a
# GPU compilers take minutes.
PATIENCE = {"cpu": 180.0, "cuda": 600.0}
QUICK, SWEEP = "quick", "sweep"
VISITS_ON_A_CPU = 2


@dataclass(frozen=True)
class Settings:
    """The settings of a suite's run that its measuring processes share.

    `dtypes`, `passes` and `only`, pairs of a case's name and a pass, choose nothing where empty; `peers` are
    timed beside stock and ours. `patience_seconds`: for the next row, before a process is given up.
    """

    suite_name: str
    extent: str = "table"
    device: str = "cpu"
    dtypes: tuple[str, ...] = ()
    filter: str = ""
    passes: tuple[str, ...] = ()
    only: tuple[tuple[str, str], ...] = ()
    backend: str = "auto"
    peers: tuple[str, ...] = ()
    commit: str | None = None
    budget_seconds: float | None = None
    patience_seconds: float | None = None

    @property
    def suite(self) -> Suite:
        return SUITES[self.suite_name]

    @property
    def visits(self) -> int:
        """How many processes measure each row: a GPU is not shared, and a sweep's rows count together."""
        return VISITS_ON_A_CPU if self.device == "cpu" and self.extent != SWEEP else 1

    @property
    def budget(self) -> float:
        """Seconds for each pass of each case in one visit."""
        whole = BUDGETS[self.extent] if self.budget_seconds is None else self.budget_seconds
        return whole / self.visits

    @property
    def patience(self) -> float:
        """Seconds without a sign that end a process: those of PATIENCE, and twice what a row is timed for."""
        if self.patience_seconds is not None:
            return self.patience_seconds
        return PATIENCE[self.device] + self.budget * (2 + len(self.peers))

    @property
    def chosen_passes(self) -> tuple[str, ...]:
        return self.passes or self.suite.passes[self.device]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        fields = json.loads(text)
        lists = {name: tuple(fields[name]) for name in ("dtypes", "passes", "peers")}
        return cls(**fields | lists | {"only": tuple(tuple(pair) for pair in fields["only"])})


def selected_cases(settings: Settings) -> list:
    """The suite's cases of the extent and device whose dtype, name and passes agree with the settings."""
    return [
        case for case in cases_of_extent(settings) if is_selected(settings, case, passes_of(settings, case))
    ]


def cases_of_extent(settings: Settings) -> list:
    """All cases of the extent and device."""
    suite = settings.suite
    if settings.extent == SWEEP:
        return list(suite.sweep())
    return [case for case in suite.tables[settings.device] if case.quick or settings.extent != QUICK]


def is_selected(settings: Settings, case, passes: list[str], called: str = "") -> bool:
    """Whether the settings choose a case of these passes; `called` is its name where it goes by another."""
    return (
        (not settings.dtypes or case.dtype in settings.dtypes)
        and settings.filter.lower() in (called or case.name).lower()
        and bool(passes)
    )


def passes_of(settings: Settings, case) -> list[str]:
    """The chosen passes that the case has."""
    only = getattr(case, "only", ())
    passes = [name for name in settings.chosen_passes if not only or name in only]
    return [name for name in passes if not settings.only or (case.name, name) in settings.only]


def overhead_case(settings: Settings):
    """The tiny call whose Python overhead ends a run of a whole table, or None."""
    case = settings.suite.overhead
    if case is None or settings.extent == SWEEP:
        return None
    passes = ["overhead"] * (not settings.only or (case.name, "overhead") in settings.only)
    return case if is_selected(settings, case, passes, f"overhead {case.name}") else None


def left_out(settings: Settings) -> int:
    """How many cases of the suite's table are not measured, or not in every pass that is by default."""
    if settings.extent == SWEEP:
        return 0
    default = Settings(settings.suite_name, device=settings.device)
    measured = {case.name: passes_of(settings, case) for case in selected_cases(settings)}
    return sum(
        not set(passes_of(default, case)) <= set(measured.get(case.name, ()))
        for case in cases_of_extent(default)
    )
