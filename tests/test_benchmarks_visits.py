"""Rows that several processes measured are told as one."""

from __future__ import annotations

import pytest

from benchmarks import run
from benchmarks.goals import Goal
from benchmarks.plan import BUDGETS, Settings
from benchmarks.visits import joined
from benchmarks.worker import failure_row

VARIANT = {"allocator": "steady", "isa": "native"}


def row(case: str = "a", median: float = 2.0, within: float = 1.1, goal: float | None = None) -> dict:
    speedup = {"median": median, "low": median / within, "high": median * within}
    told = goal and {"metric": Goal("speedup", goal).metric, "value": goal}
    return {
        "case": case,
        "pass": "fwd",
        "speedup": speedup,
        "backend": {"forward": "cpu"},
        "goal": told,
        "met": goal and median >= goal,
    }


def test_the_speedup_of_two_visits_lies_between_and_reaches_over_both():
    (told,) = joined([row(median=2.0)], [row(median=8.0)])
    assert told["speedup"] == pytest.approx({"median": 4.0, "low": 2.0 / 1.1, "high": 8.8})
    (told,) = joined([told], [row(median=1.0)])
    assert told["speedup"] == pytest.approx({"median": 16 ** (1 / 3), "low": 1 / 1.1, "high": 8.8})
    assert [each["median"] for each in told["visits"]] == [2.0, 8.0, 1.0]


def test_a_goal_is_judged_by_all_visits():
    (lucky,) = joined([row(median=3.0, goal=2.5)], [row(median=2.0)])
    (unlucky,) = joined([row(median=2.0, goal=2.5)], [row(median=4.0)])
    assert (lucky["met"], unlucky["met"]) == (False, True)
    assert joined([row()], [row()])[0]["met"] is None


def test_added_time_is_that_of_all_visits_and_so_is_its_goal():
    def tiny(added: float) -> dict:
        told = {"median": added, "low": added - 1, "high": added + 1}
        goal = {"metric": "added_us", "value": 15.0}
        return row() | {"added_us": told, "goal": goal, "met": added <= 15}

    (lucky,) = joined([tiny(14.0)], [tiny(18.0)])
    assert lucky["added_us"] == pytest.approx({"median": 16.0, "low": 13.0, "high": 19.0})
    (unlucky,) = joined([lucky], [tiny(10.0)])
    assert unlucky["added_us"] == pytest.approx({"median": 14.0, "low": 9.0, "high": 19.0})
    assert (lucky["met"], unlucky["met"]) == (False, True)


def test_rows_without_a_later_visit_stay_as_they_are():
    assert joined([row("a"), row("b")], [row("b")])[0] == row("a")


def test_failures_are_told_once_and_those_of_a_later_visit_too():
    failed, later = failure_row("b", "refused"), failure_row("a", "out of memory")
    told = joined([row("a"), failed], [later, failure_row("b", "refused again")])
    assert told == [row("a"), failed, later]


@pytest.mark.parametrize(
    ("settings", "visits"),
    [
        (Settings("conv"), 2),
        (Settings("conv", extent="quick"), 2),
        (Settings("conv", extent="sweep"), 1),
        (Settings("conv", device="cuda"), 1),
    ],
)
def test_the_visits_of_a_row_share_its_budget(settings, visits):
    assert settings.visits == visits
    assert settings.budget * visits == pytest.approx(BUDGETS[settings.extent])


def test_a_run_visits_every_row_twice_and_peers_once(monkeypatch):
    peers = []

    def measure_variant(settings, variant, names, document, environment):
        peers.append(settings.peers)
        document["rows"] += [row(median=2.0 * len(peers)) | variant]
        return False

    monkeypatch.setattr(run, "measure_variant", measure_variant)
    document = {"environment": {}, "rows": [row("of another variant")]}
    settings = Settings("conv", peers=("compile",))
    assert run.visit_variant(settings, VARIANT, ["a"], document, {}) is False
    assert peers == [("compile",), ()]
    other, told = document["rows"]
    assert other == row("of another variant") and len(told["visits"]) == 2


@pytest.mark.parametrize("visit, visits", [(1, None), (2, 2)])
def test_an_interrupt_keeps_what_was_measured(monkeypatch, visit, visits):
    done = []

    def measure_variant(settings, variant, names, document, environment):
        done.append(settings)
        document["rows"] += [row() | variant]
        return len(done) == visit

    monkeypatch.setattr(run, "measure_variant", measure_variant)
    document = {"environment": {}, "rows": []}
    assert run.visit_variant(Settings("conv"), VARIANT, ["a"], document, {}) is True
    (told,) = document["rows"]
    assert len(done) == visit and len(told.get("visits", ())) == (visits or 0)
