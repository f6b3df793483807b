"""The attention suite of the benchmarks: its cases, how they are built, and a tiny run from end to end."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import pyarch
from benchmarks import attention, attention_modules, check, readme, results, run, table, worker
from benchmarks.attention import build
from benchmarks.attention_blocks import block_twins, source_shape
from benchmarks.attention_cases import (
    BIAS,
    CONTEXT,
    CPU_TABLE,
    CUDA_TABLE,
    DENSE,
    DROPOUT,
    FLASH,
    FLEX,
    LAYER,
    LENGTHS,
    MAPS,
    MASKED,
    MISTRAL,
    MODULES,
    OPERATIONS_PER_MS,
    OVERHEAD_CASE,
    PADDING,
    PIECES,
    SWEEP_AXES,
    SWEEP_COUNT,
    SWEEP_MAX_MS,
    SWIN,
    UNMASKED,
    WEIGHTS,
    AttentionCase,
    sweep_cases,
)
from benchmarks.attention_modules import Formula, InPieces, Ours, Stock, pattern
from benchmarks.environment import ROOT, cpu_words
from benchmarks.goals import Goal, is_met
from benchmarks.measure import Rounds
from benchmarks.plan import Settings, passes_of, selected_cases
from benchmarks.roofline import minimum_bytes
from benchmarks.suites import Absent
from benchmarks.twins import results as results_of
from pyarch.nn.drop_in import DropIn
from pyarch.peak_memory import peak_bytes

OPERATOR = "benchmarks"

PLAIN = AttentionCase(2, 2, 9, 4)
WINDOWED = replace(PLAIN, window=(3, 0), is_causal=True)
SMALL = {
    "plain": PLAIN,
    "causal": replace(PLAIN, is_causal=True),
    "cross": replace(PLAIN, keys=7, value_dim=3),
    "causal, fewer keys": replace(PLAIN, keys=5, is_causal=True),
    "grouped": replace(PLAIN, heads=4, kv_heads=2),
    "window": replace(WINDOWED, window=(2, 1), is_causal=False),
    "window vs masked": replace(WINDOWED, against=MASKED),
    "window vs dense": replace(WINDOWED, against=DENSE),
    "bias": replace(PLAIN, form=BIAS),
    "dropout": replace(PLAIN, queries=40, form=DROPOUT),
    "padding": replace(PLAIN, form=PADDING, against=UNMASKED),
    "weights": replace(PLAIN, form=WEIGHTS),
    "maps": replace(PLAIN, form=MAPS),
    "layer": replace(PLAIN, form=LAYER),
    "swin": replace(PLAIN, form=SWIN),
    "mistral": AttentionCase(2, 4, 9, 4, kv_heads=2, window=(3, 0), is_causal=True, form=MISTRAL),
    "context": replace(PLAIN, form=CONTEXT),
    "lengths": replace(PLAIN, batch=3, queries=40, form=LENGTHS),
    "bf16": replace(PLAIN, dtype="bf16"),
}
each_small = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
each_operator = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in SMALL.items() if case.form not in MODULES]
)
each_batched = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name) for name, case in SMALL.items() if case.form not in (*MODULES, LENGTHS)],
)


# ---------------------------------------------------------------------------------------------------- cases


def test_names_tell_what_differs():
    assert SMALL["cross"].name == "B2 H2 T9 S7 D4 Dv3 fp32"
    assert SMALL["grouped"].name == "B2 H4 Hk2 T9 D4 fp32"
    assert SMALL["window vs masked"].name == "B2 H2 T9 D4 window 3,0 causal fp32 vs masked SDPA"
    assert SMALL["padding"].name == "B2 H2 T9 D4 fp32 padding mask vs itself without mask"
    assert SMALL["layer"].name == "TransformerEncoderLayer B2 H2 T9 D4 fp32"


# What the project promises on a CPU: times faster than stock, forward and forward + backward.
PROMISED = {
    "B1 H8 T1024 D64 fp32": (1.25, 1.3),
    "B1 H8 T1024 D64 causal fp32": (1.75, 1.7),
    "B1 H8 T1024 D64 bf16": (2.35, 2),
    "B1 H8 T1024 D64 causal bf16": (3, 2.2),
    "B1 H8 T1024 D64 fp16": (1.9, 8),
    "B8 H8 T128 D64 fp32": (1.5, 1.4),
    "B8 H8 T128 D64 bf16": (2.5, 4),
    "B1 H4 T4096 D64 window 256,0 causal fp32 vs masked SDPA": (18, 12),
    "B1 H4 T4096 D64 window 256,0 causal fp32 vs dense SDPA": (9, 8),
    "B1 H8 T512 D64 fp32 learned bias": (2, 1.8),
    "B1 H8 T1024 D64 fp32 dropout": (2, 2),
    "B1 H8 T1024 D64 Dv128 fp32": (2, 2),
    "MultiheadAttention need_weights B1 H8 T1024 D64 fp32": (1.5, None),
    "MultiheadAttention need_weights of each head B1 H8 T1024 D64 fp32": (1.5, None),
    "TransformerEncoderLayer B1 H8 T1024 D64 fp32": (2, None),
    "Swin block B4 H3 T49 D32 fp32": (1.5, 1.5),
    "Mistral attention B1 H8 Hk2 T4096 D64 window 511,0 causal fp32": (5, 5),
    "B8 H8 T512 D64 fp32 unequal lengths": (1.8, 1.8),
    "B1 H8 T1 S4096 D64 fp32": (1.3, None),
    "B1 H8 T1 S4096 D64 bf16": (1.3, None),
    "B1 H32 Hk8 T1 S4096 D128 fp32": (1.3, None),
    "B1 H32 Hk8 T1 S4096 D128 bf16": (1.3, None),
}


def test_the_goals_are_those_that_are_promised():
    against_torch = [case for case in CPU_TABLE if case.against not in (UNMASKED, PIECES, FLEX)]
    speedups = {case.name: case.goals for case in against_torch if case.goals}
    assert [case.form for case in against_torch if not case.goals] == [CONTEXT]
    assert set(speedups) == set(PROMISED)
    for name, wanted in PROMISED.items():
        found = (speedups[name].get(pass_name) for pass_name in ("fwd", "fwd+bwd"))
        assert tuple(goal and goal.value for goal in found) == wanted
        assert {goal.metric for goal in speedups[name].values()} == {"speedup"}


def test_masks_without_effect_and_long_windows_are_held_to_our_own_time():
    own = [case for case in CPU_TABLE if case.against in (UNMASKED, PIECES)]
    assert [(case.queries, case.against) for case in own] == [
        (8192, PIECES),
        (16384, PIECES),
        (32768, PIECES),
        (1024, UNMASKED),
    ]
    assert all(set(case.goals.values()) == {Goal("of_itself", 1.1)} for case in own)
    assert {case.dtype for case in CPU_TABLE} == {"fp32", "bf16", "fp16"}


def test_what_is_compiled_comes_last_and_runs_forward_alone():
    assert [case.against == FLEX for case in CPU_TABLE] == [False] * (len(CPU_TABLE) - 1) + [True]
    settings = Settings("attention")
    assert passes_of(settings, CPU_TABLE[-1]) == ["fwd"]
    assert passes_of(settings, CPU_TABLE[0]) == ["fwd", "fwd+bwd"]
    chosen = selected_cases(Settings("attention", passes=("fwd+bwd",)))
    assert chosen == [case for case in CPU_TABLE if "fwd+bwd" in (case.only or ("fwd+bwd",))]
    assert CPU_TABLE[-1] not in chosen


def test_goals_are_for_passes_that_a_case_has():
    for case in (*CPU_TABLE, *CUDA_TABLE):
        assert not case.only or set(case.goals) <= set(case.only)


@each_operator
def test_visible_pairs_are_those_of_the_definition(case):
    counted = 0
    for query in range(case.queries):
        for key in range(case.key_count):
            left, right = case.window or (case.queries, case.key_count)
            in_window = query - left <= key <= query + right
            counted += in_window and (key <= query or not case.is_causal)
    assert case.visible_pairs == counted > 0
    assert int(pattern(case, "cpu").sum()) == counted


def test_products_count_visible_pairs_alone():
    """Written out: 2 operations for each pair and feature; 2 products forward, 5 backward."""
    pairs = 1 + 2 + 3 + 4 * 6
    assert WINDOWED.products("fwd") == 2 * 2 * 2 * pairs * (4 + 4)
    assert WINDOWED.products("bwd") == 2 * 2 * 2 * pairs * 5 * 4
    assert WINDOWED.products("fwd+bwd") == WINDOWED.products("fwd") + WINDOWED.products("bwd")
    cross = SMALL["cross"]
    assert cross.products("bwd") - cross.products("fwd") == 2 * 2 * 2 * 9 * 7 * (2 * 4 + 3)


@pytest.mark.parametrize("name", ["weights", "maps", "layer", "swin", "mistral"])
def test_products_of_modules_are_those_of_their_weights_too(name):
    case = SMALL[name]
    assert case.form in MODULES
    module, _ = block_twins(case, "cpu")
    weights = dict(module.named_parameters())
    matrices = sum(
        each.numel() for name, each in weights.items() if each.dim() == 2 and "bias_table" not in name
    )
    tokens = math.prod(source_shape(case)[:-1])
    attended = replace(case, form="", batch=case.sequences)
    assert case.products("fwd") - attended.products("fwd") == 2 * tokens * matrices
    assert case.products("bwd") - attended.products("bwd") == 4 * tokens * matrices


def test_unequal_lengths_are_spread_and_count_their_own_pairs():
    case = AttentionCase(4, 2, 128, 8, form=LENGTHS)
    assert case.lengths == [32, 64, 96, 128]
    assert case.products("fwd") == 2 * 2 * (32**2 + 64**2 + 96**2 + 128**2) * (8 + 8)
    assert AttentionCase(1, 2, 128, 8, form=LENGTHS).lengths == [32]


def test_minimum_bytes_count_each_tensor_once():
    case = AttentionCase(3, 4, 1, 8, keys=11, kv_heads=2, value_dim=5, dtype="bf16")
    query, key, value, output = 3 * 4 * 8, 3 * 2 * 11 * 8, 3 * 2 * 11 * 5, 3 * 4 * 5
    twins = build(case, "cpu")
    assert minimum_bytes("fwd", twins, [output]) == 2 * (query + key + value + output)
    assert minimum_bytes("bwd", twins, [output]) == 2 * (output + 2 * (query + key + value))


def test_sweep_reaches_every_value_of_every_axis_within_its_time():
    cases = list(sweep_cases())
    assert cases == list(sweep_cases())
    assert len(cases) == SWEEP_COUNT
    for axis, values in SWEEP_AXES.items():
        assert {getattr(case, axis) for case in cases} >= set(values)
    assert all(case.products("fwd+bwd") <= SWEEP_MAX_MS * OPERATIONS_PER_MS for case in cases)
    assert max(case.batch * case.heads for case in cases) == 64


# --------------------------------------------------------------------------------------------------- building


@each_small
def test_results_are_within_the_rule(case):
    twins = build(case, "cpu")
    exact = check.exact_results(twins, gradients=True)
    with pyarch.backend("reference"):
        found = check.checked(twins, exact, gradients=True)
    assert set(found.errors) == {*twins.outputs, *twins.leaves(twins.stock)}
    assert {"forward", "backward"} <= set(found.backends)
    assert set(found.backends.values()) == {"reference"}
    assert all(each["ours"] < (1e-4 if case.dtype == "fp32" else 0.1) for each in found.errors.values())


@each_small
def test_twins_are_torch_and_ours_with_a_dense_gradient(case):
    twins = build(case, "cpu")
    assert twins.cotangent.ne(0).all()
    assert twins.cotangent.shape == twins.forward(twins.stock, twins.inputs)[0].shape
    if case.form == MISTRAL:
        implementations = (twin.config._attn_implementation for twin in (twins.stock, twins.ours))
        assert tuple(implementations) == ("sdpa", "pyarch")
    elif case.form in MODULES:
        inside = "attention" if case.form == SWIN else ""
        ours, stock = (twin.get_submodule(inside) for twin in (twins.ours, twins.stock))
        assert isinstance(ours, DropIn) and not isinstance(stock, DropIn)
    else:
        wanted = ["query", "key", "value", "bias"][: 4 if case.form == BIAS else 3]
        assert list(twins.leaves(twins.ours)) == [f"grad_{name}" for name in wanted]


@each_batched
def test_the_plain_formula_is_torchs_operator_on_the_visible_pairs(case, monkeypatch):
    """In blocks of four queries, its gradients too; dropout has no counterpart in torch."""
    if case.form == DROPOUT:
        case = replace(case, form="")
    monkeypatch.setattr(attention_modules, "ROWS", 4)
    twins = build(replace(case, dtype="fp32"), "cpu")
    exact = twins.cast(torch.float64)
    found = results_of(exact, exact.stock, gradients=True)
    query, key, value, *bias = exact.inputs
    mask = torch.zeros(case.queries, case.key_count, dtype=torch.float64)
    mask = mask.masked_fill(~pattern(case, "cpu"), -torch.inf) + (bias[0] if bias else 0.0)
    output = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=case.kv_heads is not None)
    gradients = torch.autograd.grad(output, exact.inputs, exact.cotangent)
    torch.testing.assert_close(tuple(found.values()), (output.detach(), *gradients))
    assert isinstance(exact.stock, Formula)


def test_the_plain_formula_keeps_what_ours_keeps(monkeypatch):
    monkeypatch.setattr(attention_modules, "ROWS", 16)
    twins = build(SMALL["dropout"], "cpu")
    with pyarch.backend("reference"):
        ours = results_of(twins, twins.ours, gradients=True)
    torch.testing.assert_close(ours, results_of(twins, twins.truth, gradients=True))
    assert (ours["output"] - results_of(twins, twins.stock, gradients=False)["output"]).abs().max() > 0.01


def test_a_window_beside_dense_attention_is_compared_with_the_formula():
    twins = build(SMALL["window vs dense"], "cpu")
    assert twins.standard is twins.truth
    dense, windowed = (results_of(twins, module, False)["output"] for module in (twins.stock, twins.truth))
    assert (dense - windowed).abs().max() > 0.01
    masked = build(SMALL["window vs masked"], "cpu")
    assert masked.standard is masked.stock
    torch.testing.assert_close(results_of(masked, masked.stock, False)["output"], windowed)


def test_pieces_are_sequences_of_their_own(monkeypatch):
    monkeypatch.setattr(attention, "PIECE", 4)
    case = AttentionCase(1, 3, 12, 8, window=(2, 0), is_causal=True, against=PIECES)
    twins = build(case, "cpu")
    assert isinstance(twins.stock, InPieces)
    with pyarch.backend("reference"):
        output = results_of(twins, twins.stock, gradients=False)["output"]
    whole = Stock(replace(case, queries=4, against=MASKED), "cpu")
    wanted = [whole(*(each[:, :, first : first + 4] for each in twins.inputs)) for first in (0, 4, 8)]
    torch.testing.assert_close(output, torch.cat(wanted, 2).detach())


def test_padding_without_padding_is_a_mask_all_the_same():
    twins = build(SMALL["padding"], "cpu")
    assert twins.ours.padding is not None and not twins.ours.padding.any()
    assert isinstance(twins.stock, Ours) and twins.stock.padding is None


# ------------------------------------------------------------------------------------------- absent opponents


@pytest.fixture
def without_flex(monkeypatch):
    def refuses(case, device):
        raise RuntimeError("no C++ compiler found\nand more")

    monkeypatch.setattr(attention, "Flex", refuses)


def test_an_opponent_that_does_not_run_here_is_absent(without_flex):
    with pytest.raises(Absent, match="compiled FlexAttention: RuntimeError: no C.. compiler found$"):
        build(replace(WINDOWED, against=FLEX), "cpu")


def test_a_kernel_that_refuses_is_absent():
    with pytest.raises(Absent, match="SDPA flash: RuntimeError"):
        build(replace(PLAIN, value_dim=3, against=FLASH), "cpu")


def test_an_absent_opponent_is_a_row_and_no_failure(without_flex, capsys):
    def rows():
        return attention.AttentionBenchmark("cpu", 0.0).rows(replace(WINDOWED, against=FLEX), ["fwd"])

    (row,) = worker.finished_rows("window vs FlexAttention", rows)
    assert row["absent"] and "no C++ compiler" in row["failure"]
    assert not run.is_failure(row)
    (failed,) = worker.finished_rows("broken", lambda: 1 / 0)
    assert run.is_failure(failed) and "absent" not in failed
    assert table.sum_up([], [row, failed], sweep=False).endswith("1 failed; 1 without an opponent here")


# ------------------------------------------------------------------------------------------------------- rows


@pytest.fixture
def quick(monkeypatch):
    """A benchmark whose rates and times are given, not measured: 100 GFLOP/s, stock 2 ms, ours 1 ms."""
    measured = attention.AttentionBenchmark("cpu", 0.0)
    rates = {torch.float32: 100.0, torch.bfloat16: 200.0}
    monkeypatch.setattr(measured.matmul, "at", lambda size, dtype: rates[dtype])
    monkeypatch.setattr(measured.copy_speed, "beyond_cache", lambda: 10.0)
    monkeypatch.setattr(measured, "in_turn", two_to_one)
    return measured


def two_to_one(calls: dict) -> Rounds:
    """Times as if the first of the calls took 2 ms, the others 1 ms."""
    first, *others = calls
    return Rounds({first: [2e-3] * 5} | {name: [1e-3] * 5 for name in others}, dict.fromkeys(calls, 0.0))


def figures_of(quick, case: AttentionCase, gflop_per_s: float = 50.0, gb_per_s: float = 5.0) -> dict:
    return quick.figures(case, "fwd", 2.0, {"gflop_per_s": gflop_per_s, "gb_per_s": gb_per_s})


def test_figures_of_a_row(quick):
    assert figures_of(quick, AttentionCase(1, 2, 100, 16)) == {"matmul_share": 0.5}
    assert quick.ceilings() == {
        "copy_gb_per_s": 10.0,
        "matmul_fp32_gflop_per_s": 100.0,
        "matmul_bf16_gflop_per_s": 200.0,
    }


def test_float16_on_a_cpu_is_a_share_of_float32(quick):
    case = AttentionCase(1, 2, 100, 16, dtype="fp16")
    assert figures_of(quick, case)["matmul_share"] == 0.5
    assert figures_of(quick, replace(case, dtype="bf16"))["matmul_share"] == 0.25


def test_one_query_is_a_share_of_the_copy_speed(quick):
    case = AttentionCase(1, 8, 1, 64, keys=4096)
    assert figures_of(quick, case)["copy_share"] == 0.5


def test_our_own_time_is_compared_by_visible_pair(quick):
    case = replace(CPU_TABLE[7], queries=8192, against=PIECES)
    share = figures_of(quick, case)["opponent_share"]
    assert share == pytest.approx(1 - 256 * 257 / 2 / case.visible_pairs)
    row = {"opponent_share": share, "speedup": {"median": 0.95}, "backend": {"forward": "cpu"}}
    assert is_met(Goal("of_itself", share / 0.95), row)
    assert not is_met(Goal("of_itself", share / 0.96), row)
    assert figures_of(quick, SMALL["padding"])["opponent_share"] == 1.0


def test_rows_name_the_backends_of_each_pass_and_judge_the_goal(quick):
    case = replace(PLAIN, goals=CPU_TABLE[0].goals)
    with pyarch.backend("reference"):
        inference, training = quick.rows(case, ["fwd", "fwd+bwd"])
    assert inference["backend"] == {"forward": "reference"}
    assert training["backend"] == {"forward": "reference", "backward": "reference"}
    assert set(inference["error"]) == {"output"}
    assert set(training["error"]) == {"output", "grad_query", "grad_key", "grad_value"}
    assert (inference["met"], training["met"]) == (False, False)
    assert inference["goal"] == {"metric": "speedup", "value": 1.25}
    assert training["peak_mib"]["stock"] > 0 and training["peak_mib"]["ours"] > 0
    pairs = 2 * 2 * 2 * 9 * 9
    assert (inference["flop"], training["flop"]) == (pairs * 8, pairs * 28)
    assert inference["gflop_per_s"] == pytest.approx(pairs * 8 / 1e-3 / 1e9)
    assert inference["bytes"] == 4 * 4 * 2 * 2 * 9 * 4
    assert inference["matches"] and inference["launch_us"] > 0 and inference["compile_s"] is None
    assert inference["peers"] == {}


def test_stock_on_a_gpu_is_the_fastest_kernel_that_takes_the_call(monkeypatch):
    """The choice alone, on a CPU, whose operator has two of the kernels and refuses the others."""
    seconds = {"flash": 3.0, "math": 1.0}
    timed = []

    def timer(function, calls):
        function()
        return seconds[timed[-1]]

    def forward(self, *sources):
        timed.append(self.kernel)
        return honest(self, *sources)

    honest = Stock.forward
    monkeypatch.setattr(Stock, "forward", forward)
    measured = attention.AttentionBenchmark("cpu", 0.0)
    measured.device, measured.timer = "cuda", timer
    call, kernel = measured.stock_call("fwd", build(PLAIN, "cpu"))
    call()
    assert kernel == timed[-1] == "math"
    assert {"flash", "cudnn", "efficient", "math"} <= set(timed)
    assert measured.stock_call("fwd", build(replace(PLAIN, against=FLASH), "cpu"))[1] == "flash"


@each_small
def test_the_least_work_is_the_same_kind_of_call(case):
    tiny = attention.two_tokens(case)
    twins = build(tiny, "cpu")
    assert (tiny.form, tiny.window, tiny.is_causal, tiny.dtype) == (
        case.form,
        case.window,
        case.is_causal,
        case.dtype,
    )
    assert type(twins.ours) is type(build(case, "cpu").ours)
    assert tiny.products("fwd") <= case.products("fwd")
    assert twins.forward(twins.ours, twins.inputs)[0].isfinite().all()


def test_the_overhead_of_a_call_is_measured(quick):
    with pyarch.backend("reference"):
        row = quick.overhead_row(OVERHEAD_CASE)
    assert row["goal"] == {"metric": "added_us", "value": 15.0}
    assert row["pairs"] >= 5


def test_peak_memory_is_what_lives_at_a_time():
    def run():
        first, second = torch.zeros(256, 1024), torch.zeros(256, 1024)
        del first
        return second, torch.zeros(256, 1024)

    assert 2 << 20 <= peak_bytes(run, torch.device("cpu")) < 2.1 * (1 << 20)


MEASURED = {
    "stock": {"median_ms": 4.0},
    "ours": {"median_ms": 4.4},
    "speedup": {"median": 4.0 / 4.4},
    "opponent_share": 1.0,
    "peak_mib": {"stock": 16.0, "ours": 2.0},
}


def test_rows_beside_ourselves_are_no_losses_and_say_their_share():
    assert not table.is_loss(MEASURED)
    assert table.is_loss({name: MEASURED[name] for name in ("stock", "ours", "speedup")})
    assert table.of_itself_cell(MEASURED) == "1.10"
    assert table.peak_cell(MEASURED) == "2 / 16"
    cell = readme.speed_cell(MEASURED, "-")
    assert cell == "4 -> 4.4, **0.91x**, 1.10 of its time for as much work, 16 -> 2 MiB"


def test_matrix_tiles_of_a_cpu_are_told():
    cpu = {"model": "Test CPU", "instruction_sets": ["avx2", "amx_bf16"]}
    assert cpu_words(cpu) == "Test CPU with AMX"
    assert cpu_words(cpu | {"instruction_sets": ["avx2"]}) == cpu_words({"model": "Test CPU"}) == "Test CPU"


# ------------------------------------------------------------------------------------------------- end to end


@pytest.mark.slow
def test_a_tiny_run_writes_a_whole_results_file(tmp_path):
    path = tmp_path / "run.json"
    arguments = ["attention", "--filter", "B8 H8 T128 D64 fp32", "--budget", "0.01", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    document = results.load(path)
    assert document["suite"] == "attention"
    assert [row["pass"] for row in document["rows"]] == ["fwd", "fwd+bwd"]
    for row in document["rows"]:
        assert row["gflop_per_s"] > 0 and 0 < row["matmul_share"] < 2
        assert row["goal"]["metric"] == "speedup"
        assert min(row["peak_mib"].values()) >= 2
        assert row["roofline"]["bound"] in ("memory", "compute") and row["roofline"]["share"] > 0
    assert "B8 H8 T128 D64 fp32" in done.stdout
