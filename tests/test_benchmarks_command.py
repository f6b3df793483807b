"""The benchmarks' command from end to end over simulated processes: options, files, verdicts, isolation."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import beforehand, command, comparison, conv, environment, results, run, watch, worker
from benchmarks.__main__ import main
from benchmarks.measure import Rounds, spread, summary
from benchmarks.peers import PEERS
from benchmarks.plan import Settings, overhead_case, passes_of, selected_cases
from benchmarks.suites import SUITES, WrongResult

OPERATOR = "benchmarks"

# -------------------------------------------------------------------------------------------------- options


@pytest.fixture
def plans(monkeypatch) -> list:
    """What the command line asks benchmarks.command to run, one entry a call."""
    asked = []
    monkeypatch.setattr(command, "run", lambda *arguments: asked.append(arguments) or 0)
    return asked


def test_lists_take_commas_and_repeats(plans):
    words = "all --quick --dtype fp32,bf16 --pass full,fwd --pass fwd --vs stock,flex,compile --vs openvino"
    assert main(words.split()) == 0
    ((settings, *_),) = [[*suites] for suites, *_ in plans]
    assert settings.dtypes == ("fp32", "bf16")
    assert settings.passes == ("fwd", "fwd+bwd")
    assert settings.peers == ("flex", "compile", "openvino")
    assert [each.suite_name for each in plans[0][0]] == list(SUITES)
    assert {each.extent for each in plans[0][0]} == {"quick"}


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_takes_every_option(suite, plans):
    words = (
        f"{suite} --full --device cuda --filter x --pass fwd+bwd,bwd --backend triton --vs eager --threads 3 "
        "--allocator both --isa avx2 --isa native --budget 0.5 --commit abc --json a.json --csv a.csv "
        "--html a.html --plot plots --save --compare old.json --force --fail-under 0.97"
    )
    assert main(words.split()) == 0
    (((settings,), machine, outputs, demands),) = plans
    assert (settings.suite_name, settings.extent, settings.device) == (suite, "full", "cuda")
    assert (settings.filter, settings.passes, settings.peers) == ("x", ("bwd", "fwd+bwd"), ())
    assert (settings.backend, settings.commit, settings.budget) == ("triton", "abc", 0.5)
    assert machine == run.Machine(("steady", "default"), ("avx2", "native"), 3)
    assert (outputs.json, outputs.csv, outputs.html, outputs.plot) == ("a.json", "a.csv", "a.html", "plots")
    assert outputs.save and demands.compare == "old.json" and demands.force and demands.fail_under == 0.97


def test_plain_commands_have_plain_defaults(plans):
    assert main(["conv"]) == 0
    (((settings,), machine, outputs, demands),) = plans
    assert settings == Settings("conv")
    assert machine == run.Machine() and outputs == outputs.__class__() and demands == demands.__class__()
    assert settings.chosen_passes == ("fwd", "fwd+bwd")


def test_every_peer_can_be_asked_for(plans):
    assert main(["conv", "--vs", ",".join(PEERS)]) == 0
    assert plans[0][0][0].peers == tuple(PEERS)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--dtype fp64", "unknown 'fp64', there are fp32, bf16, fp16"),
        ("--pass forward", "unknown 'forward', there are full, fwd, bwd, fwd+bwd"),
        ("--vs stock,tvm", "unknown 'tvm', there are stock, eager, compile"),
        ("--threads 0", "'0' is no number of threads"),
        ("--threads two", "'two' is no number of threads"),
        ("--budget -1", "'-1' is no number of seconds"),
        ("--patience 0", "'0' is no number of seconds above 0"),
        ("--fail-under nan", "'nan' is no ratio"),
        ("--force", "--force needs --compare"),
        ("--quick --full", "not allowed with argument"),
        ("--device tpu", "invalid choice"),
    ],
)
def test_bad_values_are_refused_by_name(words, reason, plans, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["all", *words.split()])
    assert ended.value.code == 2 and plans == []
    assert reason in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- simulated processes

ENVIRONMENT = {
    "device": "cpu-test-2c",
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef",
    "dirty": False,
    "cpu": {"model": "Test CPU", "cores": 2},
    "gpu": None,
    "threads": 2,
    "affinity": [0, 1],
    "load_average": [0.1, 0.1, 0.1],
    "torch": "2.13.0",
    "pyarch": "clone",
    "torch_cpu_capability": "AVX512",
    "cpu_kernels": "avx512",
    "libraries": [],
    "allocator_variables": {},
}
# Of a shared machine: how much a whole process is off, and each round of it.
PROCESS_NOISE, ROUND_NOISE, ROUNDS = 0.01, 0.05, 60


class Simulation:
    """Stands for measuring processes: every row is drawn, ours is `slowdown` times its usual time."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.slowdown = 1.0
        self.speedup = 2.0
        self.asked: list[Settings] = []
        self.interrupted_in: str | None = None

    def process(self, settings: Settings, variant: dict, first: int, variables: dict) -> tuple[int, dict]:
        self.asked.append(settings)
        cases = selected_cases(settings)
        places = [(case.name, name) for case in cases for name in passes_of(settings, case)]
        if (tiny := overhead_case(settings)) is not None:
            places.append((tiny.name, "overhead"))
        code = 0
        if settings.suite_name == self.interrupted_in:
            places, code = places[:1], watch.INTERRUPTED
        ceiling = {"copy_gb_per_s": 20.0 + len(self.asked)}
        rows = [{"case": case, "pass": name} | self.row() | variant for case, name in places]
        return code, {"environment": ENVIRONMENT | {"ceilings": ceiling}, "next": len(cases), "rows": rows}

    def row(self) -> dict:
        off = self.random.gauss(1.0, PROCESS_NOISE)

        def drawn(ms: float) -> list[float]:
            return [ms * 1e-3 * self.random.gauss(1.0, ROUND_NOISE) for _ in range(ROUNDS)]

        rounds = Rounds(
            {"stock": drawn(self.speedup), "ours": drawn(off * self.slowdown)}, {"stock": 0.0, "ours": 0.0}
        )
        return {
            "stock": summary(rounds.seconds["stock"]),
            "ours": summary(rounds.seconds["ours"]),
            "pairs": ROUNDS,
            "speedup": spread(rounds.ratios("stock", "ours")),
            "backend": {"forward": "cpu"},
            "goal": None,
            "met": None,
        }


@pytest.fixture
def simulation(monkeypatch) -> Simulation:
    made = Simulation()
    monkeypatch.setattr(run, "measuring_process", made.process)
    monkeypatch.setattr(beforehand, "identity", lambda device, machine: ENVIRONMENT)
    return made


def test_all_suites_end_in_one_document(simulation, tmp_path, capsys):
    path = tmp_path / "made" / "all.json"
    assert main(["all", "--quick", "--json", str(path)]) == 0
    document = results.load(path)
    assert (document["suite"], document["extent"], document["versus"]) == ("all", "quick", "eager")
    assert list(dict.fromkeys(row["suite"] for row in document["rows"])) == list(SUITES)
    assert len({(row["suite"], row["case"], row["pass"]) for row in document["rows"]}) == len(
        document["rows"]
    )
    assert document["environment"]["ceilings"] == {"copy_gb_per_s": 25.0}
    assert [each["ceilings"] for each in document["environment"]["variants"]] == [{"copy_gb_per_s": 25.0}]
    assert document["wall_seconds"] >= 0
    text = capsys.readouterr().out
    assert text.count("Test CPU (cpu-test-2c), 2 threads on cores 0,1") == len(SUITES)
    last = next(line for line in text.splitlines() if line.startswith("attention, conv, recurrent: "))
    assert f" {len(document['rows'])} rows, 0 losses" in last and "; measured in 0 min " in last
    assert [each.name for each in path.parent.iterdir()] == ["all.json"]


def test_every_kind_of_file_is_written_from_one_run(simulation, tmp_path, capsys):
    files = {kind: tmp_path / f"run.{kind}" for kind in ("json", "csv", "html")}
    words = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    assert main(["all", "--filter", "bf16", *words, "--plot", str(tmp_path / "plots")]) == 0
    rows = results.load(files["json"])["rows"]
    assert len(files["csv"].read_text().splitlines()) == len(rows) + 1
    assert rows[0]["case"] in files["html"].read_text()
    charts = {path.suffix for path in (tmp_path / "plots").iterdir()}
    assert charts == {".png", ".svg"}
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("results written to")]
    assert len(told) == 3 + len(list((tmp_path / "plots").iterdir()))


def test_saving_writes_a_file_a_suite(simulation, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert main(["all", "--save"]) == 0
    assert sorted(path.name for path in tmp_path.glob("cpu-test-2c/*")) == [
        f"2026-01-02-0123456789ab-{suite}.json" for suite in sorted(SUITES)
    ]
    assert [each["suite"] for each in results.newest_per_device("conv", tmp_path)] == ["conv"]


def test_quick_runs_that_left_cases_out_are_no_tables(simulation, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert main(["attention", "--quick", "--save"]) == 0
    (path,) = tmp_path.glob("cpu-test-2c/*")
    assert path.name.endswith("-attention-quick.json") and results.load(path)["left_out"] > 0
    assert results.newest_per_device("attention", tmp_path) == []


@pytest.mark.parametrize("words", ["--filter k31", "--pass fwd", "--dtype bf16"])
def test_runs_of_chosen_cases_or_passes_are_no_tables(simulation, tmp_path, monkeypatch, words):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert main(["conv", *words.split(), "--save"]) == 0
    assert [path.name[-9:] for path in tmp_path.glob("cpu-test-2c/*")] == ["part.json"]
    assert results.newest_per_device("conv", tmp_path) == []


def test_an_interrupted_run_is_no_table(simulation, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    simulation.interrupted_in = "conv"
    assert main(["conv", "--save"]) == 130
    assert [path.name[-9:] for path in tmp_path.glob("cpu-test-2c/*")] == ["part.json"]
    assert results.newest_per_device("conv", tmp_path) == []


def test_a_suite_that_cannot_start_is_named(simulation, monkeypatch, capsys):
    monkeypatch.setattr(run, "measuring_process", lambda *_: (-11, {"environment": {}, "rows": []}))
    assert main(["all"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"FAILED {suite}, start: the measuring process ended with status -11" for suite in SUITES
    ]


def test_interrupt_keeps_the_finished_rows_of_all_suites(simulation, tmp_path):
    first, second, _ = SUITES
    simulation.interrupted_in = second
    path = tmp_path / "all.json"
    assert main(["all", "--json", str(path), "--compare", str(old_results(path, simulation))]) == 130
    suites = [row["suite"] for row in results.load(path)["rows"]]
    assert suites.count(second) == 1 and set(suites) == {first, second}


def old_results(near, simulation: Simulation, **changes):
    """A results file of all suites, measured by a simulation of its own."""
    path = near.parent / "old.json"
    own = Simulation(seed=99)
    documents = []
    for name in SUITES:
        _, part = own.process(Settings(name), {"allocator": "steady", "isa": "native"}, 0, {})
        documents.append(
            {"schema": 1, "suite": name, "extent": "table", "versus": "eager"}
            | {"environment": part["environment"] | changes, "rows": part["rows"]}
        )
    results.write(path, results.merged(documents))
    return path


# --------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize("seed", range(5))
def test_a_repeat_flags_nothing(simulation, tmp_path, seed):
    old = old_results(tmp_path / "new.json", simulation)
    simulation.random.seed(seed)
    assert main(["all", "--compare", str(old)]) == 0


def test_a_process_that_is_lucky_in_a_row_does_not_stand_as_its_speed(simulation, tmp_path):
    """Seen on a shared machine: 1.9x in one process, 1.5x in every other one: no repeat could be right."""
    path = tmp_path / "old.json"
    lucky, honest = [], simulation.process

    def process(settings, *arguments):
        code, part = honest(settings, *arguments)
        if not lucky:
            lucky.append(settings)
            part["rows"][3]["speedup"] = {name: 1.25 * x for name, x in part["rows"][3]["speedup"].items()}
        return code, part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "measuring_process", process)
        assert main(["conv", "--json", str(path)]) == 0
    assert main(["conv", "--compare", str(path)]) == 0


def test_fifteen_percent_are_flagged_after_measuring_again(simulation, tmp_path, capsys):
    old = old_results(tmp_path / "new.json", simulation)
    simulation.slowdown = 1.15
    assert main(["conv", "--compare", str(old)]) == 1
    text = capsys.readouterr().err
    whole, later, *again = simulation.asked
    assert later == whole and not whole.only
    # Two tries of two visits.
    assert len(again) == 4 and all(each.only and not each.peers for each in again)
    for case in selected_cases(whole):
        for name in passes_of(whole, case):
            assert f"| {case.name} | {name}" in text


def test_what_was_slower_once_is_not_believed(simulation, tmp_path, monkeypatch):
    old = old_results(tmp_path / "new.json", simulation)
    simulation.slowdown = 1.15
    honest = simulation.process

    def unlucky_once(settings, *arguments):
        simulation.slowdown = 1.0 if settings.only else 1.15
        return honest(settings, *arguments)

    monkeypatch.setattr(run, "measuring_process", unlucky_once)
    assert main(["conv", "--compare", str(old)]) == 0
    assert len(simulation.asked) in (4, 6)


@pytest.mark.parametrize(
    "text", [None, "{", '{"schema": 1, "suite": "conv", "environment": {}, "rows": [{}]}']
)
def test_old_results_that_cannot_be_read_are_one_error_before_anything(simulation, tmp_path, capsys, text):
    path = tmp_path / "old.json"
    if text is not None:
        path.write_text(text)
    assert main(["all", "--compare", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"results file {path}" in line
    assert simulation.asked == []


def test_other_devices_are_refused_unless_forced(simulation, tmp_path, capsys):
    old = old_results(tmp_path / "new.json", simulation, device="cpu-other-64c")
    assert main(["conv", "--compare", str(old)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the runs are of different devices, cpu-other-64c and cpu-test-2c: ")
    assert "--force" in line and simulation.asked == []
    assert main(["conv", "--compare", str(old), "--force"]) == 0
    assert simulation.asked


def test_another_number_of_threads_is_refused_before_anything(simulation, tmp_path, capsys):
    old = old_results(tmp_path / "new.json", simulation, threads=64)
    assert main(["conv", "--compare", str(old)]) == 2
    assert "different numbers of threads, 64 and 2" in capsys.readouterr().err
    assert simulation.asked == []


@pytest.mark.parametrize("words", ["conv --force", "all --isa avx2", "attention --pass bwd --filter window"])
def test_old_results_of_other_rows_are_refused_before_anything(simulation, tmp_path, capsys, words):
    old = tmp_path / "old.json"
    assert main(["attention", "--pass", "fwd", "--json", str(old)]) == 0
    simulation.asked.clear()
    capsys.readouterr()
    assert main([*words.split(), "--compare", str(old)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the older run has none of the rows that are to be measured")
    assert simulation.asked == []


def test_planned_rows_are_those_that_are_measured(simulation, tmp_path):
    machine = run.Machine(("steady", "default"), ("native", "avx2"))
    plans = [Settings(suite, extent="quick", passes=("fwd",)) for suite in SUITES]
    documents, interrupted = command.measured_suites(plans, machine, shown=False)
    found = list(comparison.measured(results.merged(documents)))
    assert sorted(beforehand.planned(plans, machine)) == sorted(found) and not interrupted


def test_a_machine_is_known_before_anything_is_measured(monkeypatch):
    """A process under the variables of the run tells what the results of such a run say."""
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.delenv("PYARCH_CPU_ISA", raising=False)
    here = run.Machine(allocators=("default",), threads=torch.get_num_threads())
    assert beforehand.identity("cpu", here) == environment.identity("cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    told = beforehand.identity("cpu", run.Machine(instruction_sets=("avx2",), threads=1))
    assert told["device"] == environment.device_slug("cpu", environment.cpu_facts())
    assert (told["threads"], told["torch_cpu_capability"]) == (1, "AVX2")
    assert set(told) == {name for name, _ in comparison.SAME}


def test_ctrl_c_before_anything_is_measured_is_said(simulation, tmp_path, monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    old = tmp_path / "old.json"
    assert main(["conv", "--json", str(old)]) == 0
    monkeypatch.setattr(beforehand, "refuse", stop)
    capsys.readouterr()
    assert main(["conv", "--compare", str(old)]) == 130
    assert capsys.readouterr().err.startswith("interrupted: ")


def test_a_machine_without_a_gpu_is_said_before_anything(simulation, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    plans, machine = [Settings("conv", device="cuda")], run.Machine()
    old = {"suite": "conv", "environment": {}, "rows": []}
    old["rows"] = [
        {"case": case, "pass": name, "allocator": allocator, "isa": isa, "speedup": {}}
        for _, case, name, allocator, isa in beforehand.planned(plans, machine)
    ]
    with pytest.raises(results.ResultsError, match="cannot tell what would be measured on, device=cuda: "):
        beforehand.refuse(old, plans, machine, force=False)


def test_a_file_that_cannot_be_written_is_said_before_anything(simulation, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["conv", "--json", str(tmp_path / "file" / "run.json")]) == 2
    assert "cannot write results" in capsys.readouterr().err
    assert simulation.asked == []


@pytest.mark.parametrize("interrupted", ["json", "csv", "html", "plot"])
def test_ctrl_c_while_files_are_written_leaves_whole_ones(
    simulation, tmp_path, monkeypatch, capsys, interrupted
):
    """Each kind of file in turn is interrupted while its temporary neighbour is written."""

    def stop(*arguments, **keywords):
        raise KeyboardInterrupt

    stopped = {
        "json": (results.json, "dump"),
        "csv": (csv.DictWriter, "writerows"),
        "html": (Path, "write_bytes"),
        "plot": (Figure, "savefig"),
    }
    files = {kind: tmp_path / f"run.{kind}" for kind in ("json", "csv", "html")}
    for path in files.values():
        path.write_text("old")
    words = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    monkeypatch.setattr(*stopped[interrupted], stop)
    assert main(["conv", "--filter", "bf16", *words, "--plot", str(tmp_path / "plots")]) == 130
    monkeypatch.undo()
    told = capsys.readouterr()
    assert told.err.splitlines() == ["interrupted: files that are not named above are not written"]
    order = [*files, "plot"]
    done = order[: order.index(interrupted)]
    for kind, path in files.items():
        assert (path.read_text() == "old") == (kind not in done)
        assert (f"results written to {path}" in told.out) == (kind in done)
    assert {path.name for path in tmp_path.iterdir()} == {"plots", *(path.name for path in files.values())}
    assert not list((tmp_path / "plots").iterdir())


@pytest.mark.parametrize("kind", ["json", "csv", "html"])
def test_a_folder_in_the_place_of_a_file_is_said_before_anything(simulation, tmp_path, capsys, kind):
    assert main(["conv", f"--{kind}", str(tmp_path)]) == 2
    assert f"{tmp_path} is a folder" in capsys.readouterr().err
    assert simulation.asked == []


def test_plots_without_matplotlib_are_refused_before_anything(simulation, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["conv", "--plot", str(tmp_path)]) == 2
    assert "needs matplotlib, pip install '.[plots]'" in capsys.readouterr().err
    assert simulation.asked == []


def test_rows_below_the_least_speedup_are_named(simulation, capsys):
    assert main(["conv", "--fail-under", "0.97"]) == 0
    assert "BELOW" not in capsys.readouterr().err
    simulation.speedup = 0.8
    assert main(["conv", "--filter", "16^3", "--fail-under", "0.97"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("BELOW 0.97x")]
    assert [line.split(" | ")[1] for line in lines] == ["3-D k3 2x64x16^3 fp32 NCDHW"] * 2


# -------------------------------------------------------------------------------------------------- isolation


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"
        ),
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nIncluding non-PyTorch memory ..."),
    ],
)
def test_want_of_memory_becomes_a_row_after_those_that_are_done(error):
    def rows():
        yield {"case": "wide", "pass": "fwd"}
        raise error

    done, failed = worker.finished_rows("wide", rows)
    assert done == {"case": "wide", "pass": "fwd"}
    assert failed["case"] == "wide" and failed["failure"].startswith("out of memory: ")
    assert "\n" not in failed["failure"] and run.is_failure(failed)


def test_torch_says_what_is_taken_for_want_of_memory():
    (row,) = worker.finished_rows("huge", lambda: [torch.empty(1 << 60, dtype=torch.uint8)])
    assert row["failure"].startswith("out of memory: ")


def test_other_errors_keep_their_kind_and_wrong_results_do_not_match():
    def wrong():
        raise WrongResult("output: error 1")

    (row,) = worker.finished_rows("a", wrong)
    assert row == {"case": "a", "pass": "all", "failure": "WrongResult: output: error 1", "matches": False}
    (row,) = worker.finished_rows("a", lambda: 1 / 0)
    assert row["failure"] == "ZeroDivisionError: division by zero" and "matches" not in row


def test_a_case_without_memory_does_not_end_the_run(tmp_path, monkeypatch):
    """The worker in this process: the first case raises in its second pass, the next one is measured."""

    class Short(conv.ConvBenchmark):
        def ceilings(self):
            return {}

        def row(self, case, pass_name, twins, check):
            if case.padding == 15 and pass_name == "fwd+bwd":
                raise MemoryError("no more")
            return self.__class__.measured | {"case_seen": case.name}

        measured = Simulation().row()

    monkeypatch.setattr(SUITES["conv"].__class__, "load", lambda suite: Short)
    monkeypatch.setattr(worker, "PREFAULT_BYTES", 1)
    path = tmp_path / "rows.json"
    settings = Settings("conv", filter="2x64x", only=tuple(named("2x64x28^2 fp32 NCHW", "2x64x16^3")))
    variant = json.dumps({"allocator": "steady", "isa": "native"})
    assert worker.main([settings.to_json(), variant, str(path), "0"]) == 0
    found = [(row["pass"], row.get("failure")) for row in results.load(path)["rows"]]
    assert found == [("fwd", None), ("all", "out of memory: no more"), ("fwd", None), ("fwd+bwd", None)]


def named(*parts: str):
    for case in selected_cases(Settings("conv")):
        if any(part in case.name for part in parts):
            yield from ((case.name, name) for name in ("fwd", "fwd+bwd"))


def test_no_selected_case_is_said(capsys):
    assert main(["all", "--filter", "no such case"]) == 2
    assert "no case agrees with the filter" in capsys.readouterr().err
