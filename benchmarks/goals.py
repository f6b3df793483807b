"""What a measured row should reach, and whether it does. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

KERNEL_BACKENDS = ("triton", "cuda", "cpu")


@dataclass(frozen=True)
class Goal:
    """The figure a pass should reach: the name of one of METRICS, and its bound."""

    metric: str
    value: float


@dataclass(frozen=True)
class Metric:
    """A figure of a row, the text of a goal in it, and whether the goal is the least or the most."""

    figure: Callable[[dict], float]
    text: str
    is_least: bool


METRICS = {
    "speedup": Metric(lambda row: row["speedup"]["median"], ">= {:g}x", True),
    "copy_share": Metric(lambda row: row["copy_share"], ">= {:.0%} copy", True),
    "us": Metric(lambda row: row["ours"]["median_ms"] * 1e3, "<= {:g} us", False),
    "us_a_step": Metric(lambda row: row["us_a_step"], "<= {:g} us/step", False),
    "of_padded": Metric(lambda row: row["of_padded"]["ours"]["median"], "<= {:g} padded", False),
    "of_itself": Metric(
        lambda row: row["opponent_share"] / row["speedup"]["median"], "<= {:g} itself", False
    ),
    "added_us": Metric(lambda row: row["added_us"]["median"], "<= +{:g} us", False),
}


def is_met(goal: Goal, row: dict) -> bool:
    """Whether a row reaches its goal; what asks for more than equal speed must be done by our kernels."""
    metric = METRICS[goal.metric]
    figure = metric.figure(row)
    reached = figure >= goal.value if metric.is_least else figure <= goal.value
    may_be_stock = goal.metric == "added_us" or (goal.metric == "speedup" and goal.value <= 1.0)
    return reached and (may_be_stock or by_kernels(row))


def by_kernels(row: dict) -> bool:
    """Whether kernels of ours ran every pass of a row; each may name several backends, joined by "+"."""
    return all(name in KERNEL_BACKENDS for names in row["backend"].values() for name in names.split("+"))


def goal_text(goal: dict) -> str:
    """A goal, as it stands in a results file, in words."""
    return METRICS[goal["metric"]].text.format(goal["value"])
