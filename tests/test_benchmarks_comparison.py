"""Runs beside each other: noise is not flagged, a slowdown is, and what does not compare is refused."""

from __future__ import annotations

import copy
import itertools
import math
import random
import re

import pytest
from rich.console import Console

from benchmarks import comparison, results
from benchmarks.comparison import FEWEST_ROWS, SLOWER, compare, middle_and_interval
from benchmarks.results import ResultsError

REAL = sorted((results.RESULTS / "cpu-intel-xeon-2c").glob("*-attention.json"))
SLOWDOWN = 1.15


def document(rows, suite="conv", **environment):
    facts = {"device": "cpu-a-2c", "threads": 2, "torch_cpu_capability": "AVX512", "cpu_kernels": "avx512"}
    return {"schema": 1, "suite": suite, "environment": facts | environment, "rows": rows}


def row(case, speedup, width=0.02, pass_name="fwd", **more):
    spread = {"median": speedup, "low": speedup * (1 - width), "high": speedup * (1 + width)}
    variant = {"allocator": "steady", "isa": "native"}
    return {"case": case, "pass": pass_name, "speedup": spread} | variant | more


def noisy(seed, between=0.02, width=0.015, count=40, suite="conv"):
    """A run of `count` rows whose true speedups are the same for every seed.

    Its noise between processes has heavy tails: one row in ten is off by three times as much.
    """
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        scale = between * (3 if draw.random() < 0.1 else 1)
        speedup = (1 + number % 7) * math.exp(draw.gauss(0, scale) + draw.gauss(0, width / 2))
        rows.append(row(f"case {number}", speedup, width, pass_name=("fwd", "fwd+bwd")[number % 2]))
    return document(rows, suite)


def slowed(run, factor=SLOWDOWN, keep=lambda each: True):
    """The same run with our side's times longer by `factor` in the rows that `keep` chooses."""
    run = copy.deepcopy(run)
    for each in run["rows"]:
        if not each.get("failure") and keep(each):
            each["speedup"] = {name: value / factor for name, value in each["speedup"].items()}
    return run


def printed(changes):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(changes.table())
    return capture.get()


# ------------------------------------------------------------------------------------------------- noise


def test_comparison_of_a_run_with_itself_finds_nothing():
    changes = compare(noisy(0), noisy(0))
    assert not changes.slower and not any(change.verdict for change in changes.rows)
    assert not any(shift.verdict for shift in changes.shifts)


def test_comparison_of_equal_commits_flags_nothing_in_most_runs():
    """Of 100 runs of an equal commit, few have a row that looks slower; measured again, hardly any has."""
    alone = again = 0
    for seed in range(100):
        old, *runs = (noisy(3 * seed + number) for number in range(3))
        changes = [compare(old, run) for run in runs]
        assert not any(shift.verdict == SLOWER for each in changes for shift in each.shifts)
        alone += bool(changes[0].slower)
        again += bool(set(changes[0].slower) & set(changes[1].slower))
    assert alone <= 25 and again <= 4


def test_comparison_finds_a_slowdown_of_everything_in_every_noise():
    for between in (0.01, 0.03, 0.08):
        for seed in range(20):
            old, new = noisy(2 * seed, between), slowed(noisy(2 * seed + 1, between))
            changes = compare(old, new)
            assert changes.shifts[0].verdict == SLOWER
            assert {case for _, case, _ in changes.slower} == {each["case"] for each in old["rows"]}


def test_comparison_finds_a_slowdown_of_one_row_on_a_quiet_machine():
    found = 0
    for seed in range(20):
        old, new = noisy(2 * seed, 0.01, 0.01), noisy(2 * seed + 1, 0.01, 0.01)
        changes = compare(old, slowed(new, keep=lambda each: each["case"] == "case 7"))
        found += ("conv", "case 7", "fwd+bwd") in changes.slower
        assert not any(shift.verdict for shift in changes.shifts)
    assert found >= 15


def test_comparison_sees_one_slower_row_among_many_that_became_faster():
    faster = slowed(noisy(2), 1 / 2, keep=lambda each: int(each["case"].split()[1]) < 20)
    changes = compare(noisy(1), slowed(faster, 2, keep=lambda each: each["case"] == "case 30"))
    assert ("conv", "case 30", "fwd") in changes.slower


def test_comparison_finds_a_slowdown_of_one_pass():
    changes = compare(noisy(1), slowed(noisy(2), keep=lambda each: each["pass"] == "fwd+bwd"))
    verdicts = {shift.pass_name: shift.verdict for shift in changes.shifts}
    assert verdicts["fwd+bwd"] == SLOWER and verdicts["fwd"] == ""


def test_comparison_calls_what_is_faster_faster():
    changes = compare(slowed(noisy(1)), noisy(2))
    assert changes.shifts[0].verdict == "faster" and not changes.slower


@pytest.mark.parametrize("old, new", list(itertools.permutations(range(3), 2)))
def test_comparison_of_real_runs_on_a_busy_machine(old, new):
    """Three committed runs of nearly one commit, an hour apart: at most two of their rows are flagged."""
    old, new = (results.load(REAL[place]) for place in (old, new))
    changes = compare(old, new)
    assert len(changes.slower) <= 2 and not any(shift.verdict for shift in changes.shifts)
    assert compare(old, slowed(new)).shifts[0].verdict == SLOWER


def test_comparison_of_few_rows_assumes_a_spread():
    few = [row("a", 2.0, 0.01), row("b", 3.0, 0.01)]
    changes = compare(document(few), slowed(document(few), 1.2))
    assert [change.verdict for change in changes.rows] == [SLOWER, SLOWER]
    assert not changes.shifts and len(few) < FEWEST_ROWS
    assert not compare(document(few), slowed(document(few), 1.06)).slower


# ------------------------------------------------------------------------------------------------- statistics


def test_comparison_interval_of_the_middle_covers_as_often_as_it_says():
    draw = random.Random(3)
    missed = 0
    for _ in range(400):
        _, low, high = middle_and_interval([draw.gauss(0, 1) for _ in range(20)])
        missed += not low <= 0 <= high
    assert missed <= 8


def test_comparison_middle_ignores_a_wild_value():
    middle, low, high = middle_and_interval([0.1] * 11 + [9.0])
    assert middle == pytest.approx(0.1) and low == pytest.approx(0.1) and high < 9.0


# ------------------------------------------------------------------------------------------------- documents


def test_comparison_refuses_other_devices_unless_forced():
    old, new = document([row("a", 1.0)]), document([row("a", 1.0)], device="cuda-h200")
    with pytest.raises(ResultsError, match="different devices, cpu-a-2c and cuda-h200.*--force"):
        compare(old, new)
    assert len(compare(old, new, force=True).rows) == 1


@pytest.mark.parametrize(
    "fact, words",
    [
        ({"threads": 4}, "numbers of threads, 2 and 4"),
        ({"torch_cpu_capability": "AVX2"}, "instruction sets of torch, AVX512 and AVX2"),
        ({"cpu_kernels": "amx"}, "instruction sets of ours, avx512 and amx"),
    ],
)
def test_comparison_refuses_what_changes_speedups(fact, words):
    with pytest.raises(ResultsError, match=words):
        compare(document([row("a", 1.0)]), document([row("a", 1.0)], **fact))


def test_comparison_refuses_runs_beside_another_stock():
    """Older files name their opponent, or none, which is torch as it runs by default."""
    old, new = document([row("a", 1.0)]), document([row("a", 1.0)]) | {"versus": "eager"}
    assert len(compare(old, new).rows) == 1
    with pytest.raises(ResultsError, match="different opponents, compile and eager"):
        compare(old | {"versus": "compile"}, new)


def test_comparison_says_what_either_run_is_of():
    old = document([row("a", 1.0)], commit="0123456789abcdef", torch="2.12.0", date="2026-01-02", dirty=True)
    new = document([row("a", 1.0)], commit="f" * 40, torch="2.13.0", date="2026-02-03", dirty=False)
    text = printed(compare(old, new))
    assert "old run: commit 0123456789ab with changes, torch 2.12.0, 2026-01-02" in text
    assert "new run: commit ffffffffffff, torch 2.13.0, 2026-02-03" in text


def test_comparison_refuses_when_nothing_is_in_common():
    failed = {"case": "a", "pass": "all", "failure": "out of memory", "allocator": "steady", "isa": "native"}
    with pytest.raises(ResultsError, match="no measured row in common"):
        compare(document([row("a", 1.0)]), document([failed]))


def test_comparison_says_what_is_only_in_one_run():
    changes = compare(document([row("a", 1.0), row("b", 1.0)]), document([row("a", 1.0), row("c", 1.0)]))
    text = printed(changes)
    assert "only in the old run: conv | b | fwd" in text and "only in the new run: conv | c | fwd" in text


def test_comparison_keeps_variants_and_suites_apart():
    """A merged run names the suite in each row; a run of one suite does not."""
    variants = [row("a", 2.0), row("a", 1.0, isa="avx2")]
    merged = document([each | {"suite": "conv"} for each in variants], suite="all")
    changes = compare(document(variants), merged)
    assert [change.key[0] for change in changes.rows] == ["conv", "conv"]
    assert not changes.slower and not changes.only_old


def test_comparison_table_names_the_slower_rows_and_escapes_markup():
    rows = [row(f"[red]case {number}", 2.0, 0.01) for number in range(12)]
    text = printed(compare(document(rows), slowed(document(rows), 1.5)))
    assert "[red]case 3" in text and text.count(SLOWER) >= 13
    assert re.search(r"all passes +12 +-33\.3%", text)


# ------------------------------------------------------------------------------------------------- below


def test_below_takes_rows_whose_whole_interval_is_below():
    rows = [
        row("slow", 0.90, 0.02),
        row("unsure", 0.96, 0.05),
        row("fast", 2.0),
        row("beside itself", 0.5, opponent_share=1.0),
        row("tiny", 0.3, pass_name="overhead", added_us={"median": 5.0}),
        {"case": "broken", "pass": "all", "failure": "x", "allocator": "steady", "isa": "native"},
    ]
    assert [each["case"] for each in comparison.below(document(rows), 0.97)] == ["slow"]
    assert not comparison.below(document(rows), 0.5)


def test_compare_says_nothing_of_suites_that_were_not_measured_again():
    old, new = noisy(1), noisy(1)
    old["rows"] += [row | {"suite": "another"} for row in old["rows"]]
    assert compare(old, new).only_old == []
    old["rows"].append(old["rows"][0] | {"case": "gone"})
    assert [key[1] for key in compare(old, new).only_old] == ["gone"]
