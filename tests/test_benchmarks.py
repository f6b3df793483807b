"""The benchmark harness: cases, statistics, environments, and tiny runs from end to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest
import torch

import pyarch
from benchmarks import benchmark, check, conv, results, run, table
from benchmarks.conv_cases import (
    CPU_TABLE,
    CUDA_TABLE,
    OVERHEAD_CASE,
    SWEEP_AXES,
    SWEEP_COUNT,
    ConvCase,
    sweep_cases,
)
from benchmarks.cuda import fastest_stock
from benchmarks.environment import (
    ALLOCATORS,
    INSTRUCTION_SETS,
    ROOT,
    device_slug,
    process_environment,
)
from benchmarks.even_spread import evenly_spread
from benchmarks.goals import METRICS, Goal, goal_text, is_met
from benchmarks.matmul_speed import MatmulSpeed
from benchmarks.measure import Rounds, cpu_timer, median_interval, paired_times, quantile, spread, summary
from benchmarks.plan import Settings, left_out, overhead_case, passes_of, selected_cases
from benchmarks.roofline import minimum_bytes, rates, roofline
from benchmarks.suites import PASSES, SUITES, WrongResult
from benchmarks.twins import Twins

# ---------------------------------------------------------------------------------------------------- cases


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_cases_have_names_of_their_own(suite):
    for cases in (*suite.tables.values(), list(suite.sweep())):
        assert len({case.name for case in cases}) == len(cases) > 0


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_goals_are_for_passes_that_are_measured(suite):
    for device, cases in suite.tables.items():
        assert any(case.goals for case in cases)
        for case in cases:
            assert set(case.goals) <= set(suite.passes[device]) <= set(PASSES)
            assert all(goal.metric in METRICS for goal in case.goals.values())


def test_evenly_spread_points_fill_every_cell_and_repeat_themselves():
    axes = {"few": (1, 2, 3), "many": tuple(range(10))}
    points = list(islice(evenly_spread(axes), 300))
    assert points == list(islice(evenly_spread(axes), 300))
    hits = Counter((point["few"], point["many"]) for point in points)
    assert len(hits) == 30 and 6 <= min(hits.values()) and max(hits.values()) <= 14


@pytest.mark.parametrize("case", [*CPU_TABLE, OVERHEAD_CASE], ids=lambda case: case.name)
def test_case_output_size_is_torchs(case):
    module = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[len(case.spatial)](
        1, 1, case.kernel, stride=case.stride, padding=case.padding, dilation=case.dilation, device="meta"
    )
    output = module(torch.empty(1, 1, *case.spatial, device="meta"))
    assert tuple(output.shape[2:]) == case.output_spatial


def test_every_table_case_has_goals_for_known_passes():
    assert all(set(case.goals) == {"fwd", "fwd+bwd"} for case in CPU_TABLE)
    assert all(case.goals for case in CUDA_TABLE[:10])


def test_minimum_bytes_counts_each_tensor_once():
    case = ConvCase(2, 3, (10,), 3, dtype="bf16")
    source, parameters, output = 2 * 3 * 10, 3 * 3 + 3, 2 * 3 * 8
    twins = conv.build(case, "cpu")
    forward, backward, both = (minimum_bytes(name, twins, [output]) for name in PASSES)
    assert forward == 2 * (source + parameters + output)
    assert backward == 2 * (2 * source + 2 * parameters + output)
    assert both == forward + backward


def test_products_of_a_convolution_are_those_of_its_taps():
    case = ConvCase(2, 3, (10, 10), 3, stride=2, padding=1)
    assert case.output_spatial == (5, 5)
    assert [case.products(name) for name in PASSES] == [2 * 2 * 3 * 25 * 9 * factor for factor in (1, 2, 3)]


@pytest.mark.parametrize("case", CPU_TABLE, ids=lambda case: case.name)
def test_the_least_convolution_is_the_same_kind_of_call(case):
    tiny = conv.one_point(case)
    twins = conv.build(tiny, "cpu")
    assert min(twins.cotangent.shape[2:]) >= 1 and type(twins.ours) is not type(twins.stock)
    assert tiny.products("fwd") <= case.products("fwd")
    assert (tiny.kernel, tiny.stride, tiny.dilation) == (case.kernel, case.stride, case.dilation)


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_quick_leaves_out_cases_but_no_kind_of_case(suite):
    """Every dtype, form, pass, mode, layout and opponent of the whole table is in the quick one."""
    whole, quick = (selected_cases(Settings(suite.name, extent=extent)) for extent in ("table", "quick"))
    assert left_out(Settings(suite.name, extent="quick")) == len(whole) - len(quick)
    assert left_out(Settings(suite.name, extent="sweep")) == left_out(Settings(suite.name)) == 0
    for kind in ("dtype", "form", "mode", "layout", "against", "only", "is_causal", "stride", "dilation"):
        if hasattr(whole[0], kind):
            assert {getattr(case, kind) for case in quick} == {getattr(case, kind) for case in whole}, kind
    on_gpu = [selected_cases(Settings(suite.name, extent=each, device="cuda")) for each in ("table", "quick")]
    assert on_gpu[0] == on_gpu[1]


def test_a_run_can_be_of_named_rows_alone():
    first, second = (case.name for case in CPU_TABLE[:2])
    settings = Settings("conv", only=((first, "fwd"), (second, "fwd+bwd")))
    assert [(case.name, passes_of(settings, case)) for case in selected_cases(settings)] == [
        (first, ["fwd"]),
        (second, ["fwd+bwd"]),
    ]
    assert overhead_case(settings) is None
    assert overhead_case(Settings("conv", only=((OVERHEAD_CASE.name, "overhead"),))) is OVERHEAD_CASE


def test_sweep_reaches_every_value_of_every_axis_and_repeats_itself():
    cases = list(sweep_cases())
    assert cases == list(sweep_cases())
    assert len(cases) == SWEEP_COUNT
    for axis in ("channels", "kernel", "stride", "dilation", "batch", "dtype"):
        assert {getattr(case, axis) for case in cases} == set(SWEEP_AXES[axis])
    planes = [case for case in cases if len(case.spatial) == 2]
    assert {case.spatial[0] for case in planes} == set(SWEEP_AXES["size"])
    assert {case.layout for case in planes} == set(SWEEP_AXES["format"])
    assert {len(case.spatial) for case in cases} == {1, 2, 3}


def test_selection_by_text_dtype_and_device():
    chosen = selected_cases(Settings("conv", filter="dil2", dtypes=("fp32",)))
    assert [case.dilation for case in chosen] == [2, 2]
    assert selected_cases(Settings("conv", device="cuda"))[0] == CUDA_TABLE[0]
    assert selected_cases(Settings("conv", filter="no such case")) == []
    assert {case.mode for case in selected_cases(Settings("recurrent", filter="gru"))} == {"GRU"}


def test_the_overhead_ends_whole_tables_of_suites_that_have_one():
    assert overhead_case(Settings("conv")) is OVERHEAD_CASE
    assert overhead_case(Settings("conv", filter="overhead")) is OVERHEAD_CASE
    for other in (
        {"extent": "sweep"},
        {"dtypes": ("bf16",)},
        {"filter": "k31"},
    ):
        assert overhead_case(Settings("conv", **other)) is None
    assert overhead_case(Settings("recurrent")) is None


def test_settings_survive_their_json():
    settings = Settings(
        "recurrent",
        extent="quick",
        dtypes=("bf16",),
        passes=("fwd",),
        only=(("a", "fwd"), ("b", "bwd")),
        budget_seconds=0.5,
        peers=("compile",),
    )
    assert Settings.from_json(settings.to_json()) == settings


def test_every_suite_has_a_benchmark():
    assert all(issubclass(suite.load(), benchmark.Benchmark) for suite in SUITES.values())


# ---------------------------------------------------------------------------------------------------- goals


def row_of(backend: str, stock_ms: float = 2.0, ours_ms: float = 1.0) -> dict:
    return {
        "ours": {"median_ms": ours_ms},
        "speedup": {"median": stock_ms / ours_ms},
        "us_a_step": ours_ms * 10,
        "of_padded": {"ours": {"median": ours_ms}, "stock": {"median": stock_ms}},
        "backend": {"forward": backend, "backward": "cpu"},
    }


@pytest.mark.parametrize(
    ("goal", "just_met", "just_missed"),
    [
        (Goal("speedup", 2.0), row_of("cpu"), row_of("cpu", ours_ms=1.01)),
        (Goal("us", 1000.0), row_of("cpu"), row_of("cpu", ours_ms=1.01)),
        (Goal("us_a_step", 10.0), row_of("cpu"), row_of("cpu", ours_ms=1.01)),
        (Goal("of_padded", 1.0), row_of("triton"), row_of("triton", ours_ms=1.01)),
        (Goal("speedup", 1.0), row_of("torch", ours_ms=2.0), row_of("torch", ours_ms=2.01)),
    ],
    ids=lambda value: f"{value.metric} {value.value:g}" if isinstance(value, Goal) else "",
)
def test_a_goal_is_met_up_to_its_bound(goal, just_met, just_missed):
    assert is_met(goal, just_met) is True
    assert is_met(goal, just_missed) is False


@pytest.mark.parametrize("served_by", ["torch", "stock", "reference", "cpu+torch"])
def test_more_than_equal_speed_must_come_from_kernels_of_ours(served_by):
    assert is_met(Goal("speedup", 1.5), row_of("cpu"))
    assert not is_met(Goal("speedup", 1.5), row_of(served_by))
    assert not is_met(Goal("of_padded", 1.1), row_of(served_by))


def test_goals_are_told_in_words():
    assert goal_text({"metric": "us_a_step", "value": 2.5}) == "<= 2.5 us/step"
    assert goal_text({"metric": "copy_share", "value": 0.9}) == ">= 90% copy"


# ----------------------------------------------------------------------------------------------- statistics


def test_quantile_interpolates_between_order_statistics():
    values = [4.0, 1.0, 3.0, 2.0]
    assert quantile(values, 0.0) == 1.0
    assert quantile(values, 1.0) == 4.0
    assert quantile(values, 0.5) == 2.5
    assert quantile(values, 0.2) == pytest.approx(1.6)
    assert quantile([7.0], 0.8) == 7.0


def test_median_interval_of_a_hundred_values():
    low, high = median_interval([float(value) for value in range(100)])
    assert (low, high) == (40.0, 60.0)
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_speedup_is_the_median_of_paired_ratios_not_the_ratio_of_medians():
    rounds = Rounds({"stock": [2.0, 8.0, 30.0], "ours": [1.0, 2.0, 10.0]}, {"stock": 0, "ours": 0})
    ratios = rounds.ratios("stock", "ours")
    assert ratios == [2.0, 4.0, 3.0] and rounds.count == 3
    assert spread(ratios) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert rounds.added_us("stock", "ours") == [-1e6, -6e6, -20e6]
    assert summary(rounds.seconds["stock"])["median_ms"] == 8000.0


def test_paired_times_alternates_the_order_and_leaves_the_warm_up_out():
    calls = []
    seconds = {"stock": 3e-3, "ours": 1e-3}

    def timer(function, count):
        name = function()
        calls.append((name, count))
        return seconds[name]

    both = {"stock": lambda: "stock", "ours": lambda: "ours"}
    rounds = paired_times(both, 0.0, timer, sample_seconds=4e-3)
    assert rounds.seconds == {"stock": [3e-3] * 5, "ours": [1e-3] * 5}
    warm, timed = calls[:-10], calls[-10:]
    assert len(warm) >= 6 and {count for _, count in warm} == {1}
    assert timed[:4] == [("stock", 2), ("ours", 4), ("ours", 4), ("stock", 2)]


def test_any_number_of_callables_take_turns_at_being_first_and_then_go_backward():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("stock", "ours", "flex", "openvino")}

    def timer(function, count):
        function()
        return {"stock": 4.0, "ours": 1.0, "flex": 3.0, "openvino": 2.0}[order[-1]]

    rounds = paired_times(calls, 0.0, timer, sample_seconds=0)
    assert rounds.count == 5 and set(rounds.seconds) == set(rounds.faults) == set(calls)
    timed = order[-20:]
    assert [timed[4 * turn : 4 * turn + 4] for turn in range(5)] == [
        ["stock", "ours", "flex", "openvino"],
        ["ours", "flex", "openvino", "stock"],
        ["flex", "openvino", "stock", "ours"],
        ["openvino", "stock", "ours", "flex"],
        ["openvino", "flex", "ours", "stock"],
    ]
    assert rounds.ratios("stock", "ours") == [4.0] * 5
    assert rounds.ratios("openvino", "ours") == [2.0] * 5


def test_the_roofline_by_hand():
    """2 GFLOP, 1 GB, 100 ms: 20 GFLOP/s, 10 GB/s; 2 operations a byte, at 30 GB/s at most 60 GFLOP/s."""
    attained = rates(2_000_000_000, 1_000_000_000, 100.0)
    assert attained == {
        "flop": 2_000_000_000,
        "bytes": 1_000_000_000,
        "gflop_per_s": pytest.approx(20.0),
        "gb_per_s": pytest.approx(10.0),
    }
    assert roofline(attained, 140.0, 30.0) == {
        "intensity": 2.0,
        "bound": "memory",
        "share": pytest.approx(20 / 60),
    }
    assert roofline(attained, 40.0, 30.0) == {
        "intensity": 2.0,
        "bound": "compute",
        "share": pytest.approx(20 / 40),
    }


def test_stock_on_a_gpu_is_the_fastest_kernel_torch_lets_one_choose():
    seconds = {"auto": 3.0, "native": 1.0}

    def kernel_in_force():
        kernel = getattr(torch.backends.cudnn, "depthwise_kernel", "auto")
        if kernel not in seconds:
            raise RuntimeError("cuDNN refuses")
        return kernel

    fastest, name = fastest_stock(kernel_in_force, lambda function, calls: seconds[function()])
    assert name == fastest() == ("native" if hasattr(torch.backends.cudnn, "depthwise_kernel") else "auto")
    assert kernel_in_force() == "auto"


# --------------------------------------------------------------------------------------------------- one case


RESULTS_OF_A_CONVOLUTION = ("output", "grad_input", "grad_weight", "grad_bias")


def small_twins() -> Twins:
    return conv.build(ConvCase(2, 3, (9,), 3, padding=1), "cpu")


def checked(twins: Twins, gradients: bool = True) -> check.Check:
    return check.checked(twins, check.exact_results(twins, gradients), gradients)


def test_errors_name_every_result_and_the_backends():
    with pyarch.backend("reference"):
        found = checked(small_twins())
    assert tuple(found.errors) == RESULTS_OF_A_CONVOLUTION
    assert all(0 <= each["ours"] < 1e-5 and 0 <= each["stock"] < 1e-5 for each in found.errors.values())
    assert found.backends == {"forward": "reference", "backward": "reference"}
    assert found.compile_s is None


def test_inference_is_judged_by_its_own_call():
    twins = small_twins()
    with pyarch.backend("reference"):
        found = checked(twins, gradients=False)
    assert tuple(found.errors) == ("output",)
    assert found.backends == {"forward": "reference"}
    assert not twins.stock.training and not twins.ours.training


def test_wrong_results_of_ours_are_refused_not_timed():
    twins = small_twins()
    with torch.no_grad():
        twins.ours.weight += 0.01
    with pytest.raises(WrongResult, match="output: error"):
        checked(twins)


def test_wrong_results_of_stock_do_not_excuse_ours(monkeypatch):
    twins = small_twins()
    honest = check.results

    def stock_gives_nan(asked, module, gradients):
        found = honest(asked, module, gradients)
        if module is not twins.stock:
            return found
        return {name: each * float("nan") for name, each in found.items()}

    monkeypatch.setattr(check, "results", stock_gives_nan)
    errors = checked(twins).errors
    assert {name: each["stock"] for name, each in errors.items()} == dict.fromkeys(RESULTS_OF_A_CONVOLUTION)
    assert table.error_cell(errors).endswith("/ wrong")
    with torch.no_grad():
        twins.ours.weight += 0.01
    with pytest.raises(WrongResult, match="output: error"):
        checked(twins)


def test_the_matmul_rate_is_that_of_the_best_size_at_its_shortest_time():
    fastest = {8: 2e-6, 16: 4e-6}
    sizes_timed = []

    def timer(function, calls):
        size = function().shape[0]
        sizes_timed.append(size)
        return fastest[size] * (1 + len(sizes_timed) % 3)

    speed = MatmulSpeed("cpu", timer, sizes=(8, 16))
    assert speed.of(torch.float32) == pytest.approx(2 * 16**3 / 4e-6 / 1e9)
    assert set(sizes_timed) == {8, 16}
    timed = len(sizes_timed)
    assert speed.of(torch.float32) and len(sizes_timed) == timed
    assert MatmulSpeed("cpu", cpu_timer, sizes=(8,)).of(torch.bfloat16) > 0


# --------------------------------------------------------------------------------------------- environments


def test_process_environment_holds_exactly_the_asked_switches(monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    plain = process_environment("default", "native", None)
    switches = {name for state in (*ALLOCATORS.values(), *INSTRUCTION_SETS.values()) for name in state}
    assert not switches & set(plain)
    chosen = process_environment("steady", "avx2", 3)
    assert chosen["MALLOC_TOP_PAD_"] == ALLOCATORS["steady"]["MALLOC_TOP_PAD_"]
    assert chosen["ATEN_CPU_CAPABILITY"] == chosen["PYARCH_CPU_ISA"] == "avx2"
    assert chosen["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("vendor", "model", "family", "number", "expected"),
    [
        ("AuthenticAMD", "AMD EPYC", 26, 2, "cpu-amd-epyc-zen5-2c"),
        ("AuthenticAMD", "AMD EPYC 9R14 96-Core Processor", 25, 0x11, "cpu-amd-epyc-9r14-96-core-zen4-2c"),
        (
            "GenuineIntel",
            "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
            6,
            143,
            "cpu-intel-xeon-platinum-8481c-2-70ghz-2c",
        ),
    ],
)
def test_device_slug_names_the_cpu(vendor, model, family, number, expected):
    cpu = {"vendor": vendor, "model": model, "family": family, "model_number": number, "cores": 2}
    assert device_slug("cpu", cpu) == expected


# ----------------------------------------------------------------------------------------------- end to end


def scripted_processes(monkeypatch, *outcomes):
    """Let benchmarks.run meet processes that end as told; return the list of cases they are started from."""
    starts = []
    script = iter(outcomes)

    def measuring_process(settings, variant, first, environment):
        starts.append(first)
        return next(script)

    monkeypatch.setattr(run, "measuring_process", measuring_process)
    return starts


def part_of_run(following: int, *cases: str) -> dict:
    environment = dict.fromkeys(run.VARIANT_FACTS, "known")
    return {"environment": environment, "next": following, "rows": [{"case": case} for case in cases]}


VARIANT = {"allocator": "steady", "isa": "native"}


def test_a_process_that_dies_becomes_a_row_and_the_next_case_runs(monkeypatch):
    starts = scripted_processes(monkeypatch, (-11, part_of_run(1, "a")), (0, part_of_run(3, "c")))
    document = {"environment": {}, "rows": []}
    assert run.measure_variant(Settings("conv"), VARIANT, ["a", "b", "c"], document, {}) is False
    assert starts == [0, 2]
    assert [row["case"] for row in document["rows"]] == ["a", "b", "c"]
    assert document["rows"][1]["failure"] == "the measuring process ended with status -11"
    assert len(document["environment"]["variants"]) == 1


def test_a_case_that_a_process_dies_in_is_measured_again_without_peers(monkeypatch):
    asked = []
    script = iter(((-11, part_of_run(1, "a")), (0, part_of_run(1, "b")), (0, part_of_run(3, "c"))))
    monkeypatch.setattr(run, "measuring_process", lambda *given: asked.append(given) or next(script))
    settings = Settings("conv", peers=("compile", "openvino"), passes=("fwd",))
    document = {"environment": {}, "rows": []}
    assert run.measure_variant(settings, VARIANT, ["a", "b", "c"], document, {}) is False
    assert [row["case"] for row in document["rows"]] == ["a", "b", "c"]
    died = {"failure": "the measuring process ended with status -11"}
    assert document["rows"][1] == {"case": "b", "peers": {"compile": died, "openvino": died}}
    assert [(each.peers, each.only, first) for each, _, first, _ in asked] == [
        (settings.peers, (), 0),
        ((), (("b", "fwd"),), 0),
        (settings.peers, (), 2),
    ]


@pytest.mark.parametrize("code, is_interrupted, rows", [(-11, False, ["b"]), (130, True, [])])
def test_a_case_that_dies_without_peers_too_is_a_row(monkeypatch, code, is_interrupted, rows):
    scripted_processes(monkeypatch, (-11, part_of_run(0)), (code, part_of_run(0)), (0, part_of_run(2)))
    document = {"environment": {}, "rows": []}
    settings = Settings("conv", peers=("compile",))
    assert run.measure_variant(settings, VARIANT, ["b", "c"], document, {}) is is_interrupted
    assert [row["case"] for row in document["rows"] if "status -11" in row["failure"]] == rows


def test_a_process_that_cannot_start_is_one_row(monkeypatch):
    starts = scripted_processes(monkeypatch, (1, {"environment": {}, "rows": []}))
    document = {"environment": {}, "rows": []}
    assert run.measure_variant(Settings("conv"), VARIANT, ["a", "b"], document, {}) is False
    assert starts == [0]
    assert [(row["case"], row["isa"]) for row in document["rows"]] == [("start", "native")]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks", "conv", *arguments]


@pytest.mark.slow
def test_a_tiny_run_writes_a_whole_results_file(tmp_path):
    path = tmp_path / "run.json"
    arguments = [
        "--filter",
        "16^3",
        "--budget",
        "0.01",
        "--allocator",
        "both",
        "--commit",
        "abc",
        "--json",
        str(path),
    ]
    done = subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    document = results.load(path)
    assert document["environment"]["commit"] == "abc"
    assert document["environment"]["ceilings"]["copy_gb_per_s"] > 0
    assert (document["suite"], document["versus"]) == ("conv", "eager")
    assert [each["allocator"] for each in document["environment"]["variants"]] == ["steady", "default"]
    assert [(row["pass"], row["allocator"]) for row in document["rows"]] == [
        ("fwd", "steady"),
        ("fwd+bwd", "steady"),
        ("fwd", "default"),
        ("fwd+bwd", "default"),
    ]
    for row in document["rows"]:
        assert (
            row["pairs"] >= 5
            and row["stock"]["p20_ms"] <= row["stock"]["median_ms"] <= row["stock"]["p80_ms"]
        )
        assert row["speedup"]["low"] <= row["speedup"]["median"] <= row["speedup"]["high"]
    assert [row["goal"] is not None for row in document["rows"]] == [True, True, False, False]
    assert set(document["rows"][1]["error"]) == {"output", "grad_input", "grad_weight", "grad_bias"}
    assert set(document["rows"][1]["backend"]) == {"forward", "backward"}
    assert "3-D k3 2x64x16^3" in done.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.slow
def test_a_refused_backend_becomes_rows_with_the_refusal(tmp_path):
    path = tmp_path / "run.json"
    arguments = ["--filter", "16^3", "--budget", "0.01", "--backend", "cuda", "--json", str(path)]
    done = subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (row,) = results.load(path)["rows"]
    assert row["failure"].startswith("NotImplementedError") and "refuses this call" in row["failure"]
    assert "FAILED 3-D" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_keeps_the_finished_rows(tmp_path, ending):
    path = tmp_path / "run.json"
    # A second for each case: the signal comes long before the last one.
    arguments = ["--filter", "56^2 fp32", "--budget", "1", "--pass", "fwd", "--json", str(path)]
    # What a shell starts in the background ignores Ctrl-C, and hands that on to every process it starts: it
    # must end when it is terminated all the same.
    in_background = ending == signal.SIGTERM
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if in_background else signal.default_int_handler)
    process = subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, before)
    finished = next(line for line in process.stderr if line.startswith("[1/"))
    process.send_signal(ending)
    process.communicate(timeout=120)
    assert "fwd" in finished
    assert process.returncode == 130
    rows = results.load(path)["rows"]
    assert 1 <= len(rows) < len(selected_cases(Settings("conv", filter="56^2 fp32")))
