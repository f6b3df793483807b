"""Rows of the benchmarks: peers beside stock, a slower ours, GPUs by stand-ins, and the machine's state."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import beside, check, conv, cuda, environment
from benchmarks.beside import Beside
from benchmarks.conv_cases import ConvCase
from benchmarks.measure import Rounds
from benchmarks.peers import Prepared
from benchmarks.suites import Absent, reason_of

OPERATOR = "benchmarks"

SMALL = ConvCase(2, 3, (9,), 3, padding=1)

# ------------------------------------------------------------------------------------------------------ peers


class Peers:
    """Stands for benchmarks.peers: `right` computes what torch does, the others do not come so far."""

    def prepare(self, name, twins, pass_name, case):
        if name == "absent":
            raise Absent("not installed")
        if name == "broken":
            raise RuntimeError("cannot export")

        def outputs():
            with torch.no_grad():
                (output,) = twins.forward(twins.stock, twins.inputs)
            wrong = {"nan": output * float("nan"), "other": output + output.abs().max()}
            return (wrong.get(name, output + 0.25),)

        def call():
            if name == "late" and self.is_timing:
                raise RuntimeError("lost its device")
            return name

        return Prepared(call, outputs, 1.5)

    is_timing = False


@pytest.fixture
def peers(monkeypatch) -> Peers:
    made = Peers()
    monkeypatch.setattr(beside, "peers", made)
    return made


def small_row(names: tuple[str, ...], in_turn) -> dict:
    measured = conv.ConvBenchmark("cpu", 0.0, names)
    measured.copy_speed.moving = lambda size: 10.0
    measured.matmul.at = lambda size, dtype: 100.0
    measured.in_turn = in_turn
    (row,) = measured.rows(SMALL, ["fwd"])
    return row


def drawn_times(calls: dict) -> Rounds:
    times = {"stock": 4e-3, "ours": 1e-3, "right": 3e-3}
    return Rounds({name: [times[name]] * 5 for name in calls}, dict.fromkeys(calls, 0.0))


def test_peers_stand_beside_stock_and_the_rest_is_text(peers):
    row = small_row(("right", "absent", "broken", "nan", "other"), drawn_times)
    assert row["speedup"]["median"] == 4.0
    right = row["peers"].pop("right")
    assert (right["median_ms"], right["p20_ms"], right["p80_ms"]) == (3.0, 3.0, 3.0)
    assert right["speedup"] == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert right["compile_s"] == 1.5 and right["error"] == pytest.approx(0.25, rel=1e-5)
    assert row["peers"].pop("other")["failure"].startswith("WrongResult: its error is ")
    assert row["peers"] == {
        "absent": {"absent": "not installed"},
        "broken": {"failure": "RuntimeError: cannot export"},
        "nan": {"failure": "ArithmeticError: its output is not finite, or of another shape"},
    }


def test_a_reason_is_one_line_and_of_a_failed_compilation_what_failed_in_it():
    class BackendCompilerFailed(RuntimeError):
        inner_exception = TypeError("no kernel\nand a long trace")

    assert reason_of(BackendCompilerFailed("backend raised:\n...")) == "TypeError: no kernel"
    assert reason_of(ValueError("\nfirst\nsecond")) == "ValueError: first"
    assert reason_of(MemoryError()) == "MemoryError: "


def test_a_peer_that_fails_while_it_is_timed_does_not_spoil_the_row(peers):
    def in_turn(calls):
        peers.is_timing = True
        for call in calls.values():
            call()
        return drawn_times(calls)

    row = small_row(("late", "right"), in_turn)
    assert row["speedup"]["median"] == 4.0
    assert set(row["peers"]) == {"late", "right"}
    assert all("lost its device" in peer["failure"] for peer in row["peers"].values())


def test_without_peers_a_failure_of_ours_is_the_rows():
    def in_turn(calls):
        raise RuntimeError("ours")

    measured = conv.ConvBenchmark("cpu", 0.0)
    measured.in_turn = in_turn
    with pytest.raises(RuntimeError, match="ours"):
        measured.beside_peers({}, Beside({}, {}, {}))


# --------------------------------------------------------------------------------- a slower ours, and the GPU


class Slowed(conv.ConvBenchmark):
    """Ours with a share of its own time added, as a regression would."""

    def our_call(self, pass_name, twins):
        call = super().our_call(pass_name, twins)
        return lambda: (call(), clock.pass_by(0.15))


class Clock:
    """A clock that only the calls move: stock's takes 2, ours 1."""

    seconds = 0.0

    def pass_by(self, seconds: float) -> None:
        self.seconds += seconds


clock = Clock()


@pytest.mark.parametrize(("kind", "ratio"), [(conv.ConvBenchmark, 2.0), (Slowed, 2 / 1.15)])
def test_a_slower_ours_shows_in_the_ratio_to_stock(kind, ratio, monkeypatch):
    def call_of(pass_name, twins, module):
        return lambda: clock.pass_by(2.0 if module is twins.stock else 1.0)

    def timer(call, calls):
        start = clock.seconds
        for _ in range(calls):
            call()
        return (clock.seconds - start) / calls

    monkeypatch.setattr("benchmarks.benchmark.call_of", call_of)
    measured = kind("cpu", 0.0)
    measured.timer = timer
    measured.copy_speed.moving = lambda size: 10.0
    measured.matmul.at = lambda size, dtype: 100.0
    (row,) = measured.rows(SMALL, ["fwd"])
    assert row["speedup"]["median"] == pytest.approx(ratio)


def test_the_cost_of_calling_is_measured_once_a_kind_and_none_where_it_is_refused(monkeypatch):
    measured = conv.ConvBenchmark("cpu", 0.0)
    built = []
    honest = measured.build
    monkeypatch.setattr(measured, "build", lambda case: built.append(case) or honest(case))
    wide = ConvCase(2, 5, (90,), 3, padding=1)
    first, again = (measured.launch_us(case, "fwd", list) for case in (SMALL, wide))
    assert first == again > 0 and built == [conv.one_point(SMALL)]

    def refuses(pass_name, twins):
        raise NotImplementedError("cpu: too small")

    monkeypatch.setattr(measured, "our_call", refuses)
    assert measured.launch_us(SMALL, "fwd+bwd", list) is None


def test_graphs_are_timed_on_a_gpu_and_refusals_are_told(monkeypatch):
    measured = conv.ConvBenchmark("cpu", 0.0)
    monkeypatch.setattr("benchmarks.benchmark.paired_times", lambda calls, *_, **__: drawn_times(calls))
    assert measured.on_gpu("fwd", list, list) == {}
    measured.device = "cuda"
    assert measured.on_gpu("bwd", list, list) == {}
    monkeypatch.setattr(cuda, "captured", lambda call: call)
    graph = measured.on_gpu("fwd", list, list)["graph"]
    assert (graph["stock"]["median_ms"], graph["ours"]["median_ms"]) == (4.0, 1.0)
    assert graph["speedup"]["median"] == 4.0

    def refuses(call):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda, "captured", refuses)
    refusal = measured.on_gpu("fwd+bwd", list, list)["graph"]
    assert refusal == {"failure": "operation not permitted when stream is capturing"}


def test_enqueuing_is_timed_without_the_waiting(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(len(calls)))
    calls: list[None] = []
    assert cuda.enqueue_seconds(lambda: calls.append(None)) > 0
    assert waited == [number * cuda.ENQUEUED_CALLS for number in range(cuda.TRIALS + 1)]


def test_the_state_of_a_gpu_is_what_nvidia_smi_tells(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '580.82, 1980, 3201, 1980, 3201, [N/A], 31'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    state = environment.gpu_state("")
    assert list(state) == list(environment.GPU_STATE)
    assert (state["driver"], state["sm_mhz"], state["power_limit_w"]) == ("580.82", 1980.0, None)
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert environment.gpu_state("") is None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert environment.gpu_state("") is None


def test_the_versions_of_peers_are_noted():
    found = environment.versions(["torch", "no-such-package"])
    assert found["torch"] and found["no-such-package"] is None


def test_the_clock_of_a_cpu_is_noted_where_it_can_be_read(monkeypatch):
    facts = environment.cpu_facts()
    assert facts["mhz"] is None or facts["mhz"] > 0
    assert "governor" in facts
    monkeypatch.setattr(environment, "GOVERNOR", "/no/such/file")
    assert environment.cpu_facts()["governor"] is None


@pytest.mark.parametrize("first, warm, expected", [(2.5, 0.5, 2.0), (0.4, 0.5, 0.0)])
def test_only_a_gpu_compiles_in_the_first_call(monkeypatch, first, warm, expected):
    monkeypatch.setattr(check, "timed_results", lambda twins, gradients: ({}, warm))
    on_gpu, on_cpu = (SimpleNamespace(cotangent=SimpleNamespace(is_cuda=each)) for each in (True, False))
    assert check.compile_seconds(on_gpu, True, first) == expected
    assert check.compile_seconds(on_cpu, True, first) is None
