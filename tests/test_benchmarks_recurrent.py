"""The recurrent suite of the benchmarks: its cases, how they are built, and a tiny run from end to end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import pyarch
from benchmarks import check, recurrent, results
from benchmarks.environment import ROOT
from benchmarks.measure import Rounds
from benchmarks.recurrent_cases import (
    CELL,
    CPU_TABLE,
    CUDA_TABLE,
    EXPANDED,
    PACKED,
    STREAMING,
    SWEEP_AXES,
    SWEEP_CELL_SIZES,
    SWEEP_COUNT,
    SWEEP_MAX_MS,
    RecurrentCase,
    stock_ms,
    sweep_cases,
)
from benchmarks.twins import call_of
from benchmarks.twins import results as results_of

OPERATOR = "benchmarks"

SMALL = {
    "LSTM": RecurrentCase("LSTM", 3, 2, 4),
    "GRU": RecurrentCase("GRU", 3, 2, 4, input=5, layers=2, directions=2),
    "RNN": RecurrentCase("RNN", 3, 2, 4),
    "proj": RecurrentCase("LSTM", 3, 2, 4, proj=3),
    "expanded": RecurrentCase("LSTM", 3, 2, 4, form=EXPANDED),
    "streaming": RecurrentCase("LSTM", 1, 2, 4, layers=2, form=STREAMING),
    "streaming GRU": RecurrentCase("GRU", 1, 2, 4, form=STREAMING),
    "cell": RecurrentCase("LSTM", 3, 2, 4, form=CELL),
    "GRU cell": RecurrentCase("GRU", 3, 2, 4, form=CELL),
    "packed": RecurrentCase("LSTM", 16, 3, 4, form=PACKED),
}
each_small = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)


# ---------------------------------------------------------------------------------------------------- cases


def test_names_tell_what_differs():
    assert SMALL["GRU"].name == "GRU T3 B2 H4 I5 2 layers bidirectional fp32"
    assert SMALL["proj"].name == "LSTM T3 B2 H4 proj3 fp32"
    assert SMALL["expanded"].name == "LSTM T3 B2 H4 fp32 output.sum()"


def test_the_table_has_each_form_and_dtype_of_the_goals():
    assert {case.form for case in CPU_TABLE} >= {EXPANDED, STREAMING, CELL, PACKED}
    assert {case.dtype for case in CPU_TABLE} == {"fp32", "bf16"}
    assert {case.mode for case in CPU_TABLE} == {"GRU", "RNN", "LSTM"}
    without_goals = [case.form for case in (*CPU_TABLE, *CUDA_TABLE) if not case.goals]
    assert without_goals == [EXPANDED, CELL]


def test_lengths_of_packed_sequences_fall_from_all_steps_to_an_eighth():
    assert RecurrentCase("LSTM", 16, 3, 4, form=PACKED).lengths == (16, 9, 2)
    assert RecurrentCase("LSTM", 16, 3, 4).lengths == (16, 16, 16)
    assert RecurrentCase("LSTM", 16, 1, 4, form=PACKED).lengths == (16,)


def test_products_are_those_of_the_weights():
    """Each weight matrix is met once a row, in the forward; written out for an LSTM with projection."""
    case = RecurrentCase("LSTM", 5, 2, 4, input=3, proj=2, layers=2, directions=2)
    module = recurrent.make_module(case, "cpu")
    matrices = sum(weight.numel() for name, weight in module.named_parameters() if "weight" in name)
    assert case.products("fwd") == 2 * 5 * 2 * matrices
    assert case.products("fwd+bwd") == 3 * case.products("fwd")


def test_products_of_packed_sequences_leave_the_padding_out():
    packed = RecurrentCase("GRU", 16, 3, 4, form=PACKED)
    padded = RecurrentCase("GRU", 16, 3, 4)
    assert packed.products("fwd") * 48 == padded.products("fwd") * 27


def test_sweep_reaches_every_value_of_every_axis_within_its_time():
    cases = list(sweep_cases())
    assert cases == list(sweep_cases())
    cells = [case for case in cases if case.form == CELL]
    cases = [case for case in cases if case.form != CELL]
    assert len(cases) == SWEEP_COUNT and len(cells) == 3 * 2 * len(SWEEP_CELL_SIZES)
    for axis, values in SWEEP_AXES.items():
        assert {getattr(case, axis) for case in cases} >= set(values)
    assert all(stock_ms(case) <= SWEEP_MAX_MS for case in cases)
    assert max(case.steps * case.layers for case in cases if case.hidden == 512) >= 16


# --------------------------------------------------------------------------------------------------- building


@each_small
def test_twins_have_equal_parameters_and_different_classes(case):
    twins = recurrent.build(case, "cpu")
    stock, ours = dict(twins.stock.named_parameters()), dict(twins.ours.named_parameters())
    assert list(stock) == list(ours)
    assert all(torch.equal(stock[name], ours[name]) and stock[name] is not ours[name] for name in stock)
    kinds = {type(module).__module__.partition(".")[0] for module in twins.ours.modules()}
    assert kinds - {"benchmarks"} == {"pyarch"}
    assert twins.cotangent.shape[:1] == twins.inputs[0].shape[:1]
    assert twins.cotangent.ne(0).all()


def test_the_expanded_gradient_is_that_of_a_sum():
    twins = recurrent.build(SMALL["expanded"], "cpu")
    assert set(twins.cotangent.stride()) == {0}
    output, _ = twins.stock(twins.inputs[0])
    (wanted,) = torch.autograd.grad(output.sum(), twins.inputs[0])
    assert torch.equal(call_of("fwd+bwd", twins, twins.stock)()[0], wanted)


def test_streaming_gives_the_states_that_it_was_given():
    twins = recurrent.build(SMALL["streaming"], "cpu")
    source, h0, c0 = twins.inputs
    output, (h_n, c_n) = twins.stock(source, (h0, c0))
    found = results_of(twins, twins.stock, gradients=False)
    torch.testing.assert_close(tuple(found.values()), (output, h_n, c_n))
    assert (output - twins.stock(source)[0]).abs().max() > 0.01


def test_a_cell_loop_is_the_layer_of_the_same_weights():
    twins = recurrent.build(SMALL["cell"], "cpu")
    layer = nn.LSTM(4, 4)
    cell = dict(twins.stock.cell.named_parameters())
    layer.load_state_dict({f"{name}_l0": weight for name, weight in cell.items()})
    output, _ = layer(twins.inputs[0])
    torch.testing.assert_close(results_of(twins, twins.stock, gradients=False)["output"], output)


def test_packed_sequences_are_unsorted_and_have_the_lengths_of_the_case():
    case = RecurrentCase("LSTM", 64, 16, 4, form=PACKED)
    torch.manual_seed(0)
    packed = recurrent.packed_in_shuffled_order(torch.randn(64, 16, 4), case.lengths)
    _, lengths = nn.utils.rnn.pad_packed_sequence(packed)
    assert sorted(lengths.tolist(), reverse=True) == list(case.lengths) != lengths.tolist()
    assert len(packed.data) == sum(case.lengths)


@each_small
def test_results_are_within_the_rule(case):
    twins = recurrent.build(case, "cpu")
    exact = check.exact_results(twins, gradients=True)
    with pyarch.backend("reference"):
        found = check.checked(twins, exact, gradients=True)
    assert set(found.errors) == {*twins.outputs, *twins.leaves(twins.stock)}
    assert found.backends == {"forward": "reference", "backward": "reference"}
    assert all(each["ours"] < 1e-5 for each in found.errors.values())


# ------------------------------------------------------------------------------------------------------- rows


@pytest.fixture
def quick(monkeypatch):
    """A benchmark whose rates and times are given, not measured: 100 GFLOP/s, stock 2 ms, ours 1 ms."""
    measured = recurrent.RecurrentBenchmark("cpu", 0.0)
    monkeypatch.setattr(measured.matmul, "at", lambda size, dtype: 100.0)
    monkeypatch.setattr(measured.copy_speed, "beyond_cache", lambda: 10.0)
    monkeypatch.setattr(measured, "in_turn", two_to_one)
    return measured


def two_to_one(calls: dict) -> Rounds:
    """Times as if the first of the calls took 2 ms, the others 1 ms."""
    first, *others = calls
    return Rounds({first: [2e-3] * 5} | {name: [1e-3] * 5 for name in others}, dict.fromkeys(calls, 0.0))


def test_figures_of_a_row(quick):
    case = RecurrentCase("GRU", 100, 1, 64)
    figures = quick.figures(case, "fwd", 2.0, {"gflop_per_s": 50.0})
    assert figures == {"us_a_step": pytest.approx(20.0), "matmul_share": 0.5}
    assert quick.ceilings() == {
        "copy_gb_per_s": 10.0,
        "matmul_fp32_gflop_per_s": 100.0,
        "matmul_bf16_gflop_per_s": 100.0,
    }


def test_packed_rows_compare_each_side_with_its_own_padded_batch(quick, monkeypatch):
    timed = []

    def in_turn(calls):
        timed.append([call().shape[0] for call in calls.values()])
        return two_to_one(calls)

    monkeypatch.setattr(quick, "in_turn", in_turn)
    monkeypatch.setattr(recurrent, "call_of", lambda name, twins, module: lambda: twins.inputs[0])
    ratios = quick.of_padded(SMALL["packed"], "fwd+bwd")
    rows = sum(SMALL["packed"].lengths)
    assert timed == [[rows, 16], [rows, 16]]
    assert {side: each["median"] for side, each in ratios.items()} == {"stock": 2.0, "ours": 2.0}


def test_rows_name_the_backends_of_each_pass_and_judge_the_goal(quick):
    goals = CPU_TABLE[1].goals
    case = RecurrentCase("GRU", 3, 2, 4, goals={"fwd": goals["fwd"], "fwd+bwd": goals["fwd+bwd"]})
    with pyarch.backend("reference"):
        inference, training = quick.rows(case, ["fwd", "fwd+bwd"])
    assert inference["backend"] == {"forward": "reference"}
    assert training["backend"] == {"forward": "reference", "backward": "reference"}
    assert set(inference["error"]) == {"output", "h_n"}
    assert {"grad_input", "grad_weight_hh_l0"} <= set(training["error"])
    assert (inference["met"], training["met"]) == (False, False)
    assert inference["goal"] == {"metric": "speedup", "value": 5.2}
    weights = 12 * (4 + 4) + 2 * 12
    assert inference["flop"] == 2 * 3 * 2 * 12 * (4 + 4)
    assert inference["bytes"] == 4 * (3 * 2 * 4 + weights + 3 * 2 * 4 + 2 * 4)
    assert training["peak_mib"]["ours"] > 0 and training["launch_us"] > 0


@each_small
def test_the_least_work_is_the_same_kind_of_call(case):
    tiny = recurrent.one_step(case)
    twins = recurrent.build(tiny, "cpu")
    assert (tiny.mode, tiny.form, tiny.layers, tiny.directions) == (
        case.mode,
        case.form,
        case.layers,
        case.directions,
    )
    assert tiny.products("fwd") <= case.products("fwd")
    assert twins.forward(twins.ours, twins.inputs)[0].isfinite().all()


# ------------------------------------------------------------------------------------------------- end to end


@pytest.mark.slow
def test_a_tiny_run_writes_a_whole_results_file(tmp_path):
    path = tmp_path / "run.json"
    arguments = ["recurrent", "--filter", "streaming", "--budget", "0.01", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    document = results.load(path)
    assert document["suite"] == "recurrent"
    assert document["environment"]["ceilings"]["matmul_fp32_gflop_per_s"] > 1
    assert [row["pass"] for row in document["rows"]] == ["fwd", "fwd+bwd"]
    for row in document["rows"]:
        assert row["us_a_step"] == pytest.approx(row["ours"]["median_ms"] * 1e3)
        assert 0 < row["matmul_share"] < 2
        assert row["goal"]["metric"] == "speedup"
    assert "LSTM T1 B1 H256 2 layers" in done.stdout
