"""Every kernel is compiled by the audit, called on a GPU and watched by the sanitizer; its calls work.

What a GPU would launch is noted by interpreter, not run.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import torch  # noqa: E402

import pyarch  # noqa: E402
from benchmarks import audit, sanitizer  # noqa: E402
from benchmarks.sanitizer_calls import CALLS, watched  # noqa: E402
from pyarch.triton_kernels import recurrent, recurrent_persistent  # noqa: E402
from pyarch.triton_kernels.launch import Launch  # noqa: E402
from tests import gpu_calls  # noqa: E402
from tests import recurrent_persistent_cases as persistent_cases  # noqa: E402

KERNELS = Path(__file__).resolve().parent.parent / "triton_kernels"
DEFINED = re.compile(r"^@triton\.jit.*\n(?:@.*\n)*def (\w+_kernel)\(", re.MULTILINE)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(not INTERPRETED, reason="interpreter tests run with TRITON_INTERPRET=1")


def kernels_of_the_audit() -> set[str]:
    """The names of all kernels that the compile audit builds."""
    return {
        launch.kernel.__name__
        for operator in audit.OPERATORS
        for case in audit.cases_of(operator)
        for launch in case.launches("sm_90")
    }


def kernels_of_the_source() -> set[str]:
    """The names of all kernels: what triton.jit makes of them and the host launches."""
    sources = (path.read_text(encoding="utf-8") for path in KERNELS.glob("*.py"))
    return {name for source in sources for name in DEFINED.findall(source)}


@pytest.fixture
def launched(monkeypatch) -> set[str]:
    """The kernels launched in a test, planned as for a GPU, where programs wait for each other; none runs."""
    names: set[str] = set()
    for module in (recurrent, recurrent_persistent):
        monkeypatch.setattr(module, "place_of", lambda device: recurrent_persistent.Place("default", 64))
    monkeypatch.setattr(recurrent_persistent, "need_resident", lambda launch, device: None)
    monkeypatch.setattr(Launch, "run", lambda self, device: names.add(self.kernel.__name__))
    return names


def test_sanitizer_kernels_are_those_of_the_audit():
    assert len(kernels_of_the_source()) > 20
    assert kernels_of_the_audit() == kernels_of_the_source()


@interpreter
def test_sanitizer_calls_launch_every_kernel(launched):
    for call in watched("cpu", "fp32").values():
        call()
    assert launched == kernels_of_the_source()


@interpreter
def test_sanitizer_gpu_tests_launch_every_kernel(launched):
    """The calls of test_gpu_operators.py and the layers of test_gpu_persistent.py, forward and backward."""
    with pyarch.backend("triton"):
        for call in gpu_calls.CALLS.values():
            call.outcome(call.leaves(torch.float32, "cpu"))
    for mode in persistent_cases.MODES:
        problem = persistent_cases.Problem.drawn(persistent_cases.Case(mode, 20), torch.float32, "cpu")
        persistent_cases.kernels(problem, problem.incoming())
    assert launched == kernels_of_the_source()


@interpreter
@pytest.mark.parametrize("name", CALLS)
def test_sanitizer_call_works(name):
    made = watched("cpu", "fp32")[name]()
    given = [each for each in made if each is not None]
    assert given and all(each.isfinite().all() for each in given)


@interpreter
@pytest.mark.parametrize("name", ["conv 1-D causal", "rnn persistent", "decode window, sinks"])
def test_sanitizer_process_says_what_it_launched(name, capsys):
    assert sanitizer.main(["--device", "cpu", "--dtypes", "fp16", "--calls", f"{name} fp16"]) == 0
    (line,) = sanitizer.finished_lines(capsys.readouterr().out)
    assert line["call"] == f"{name} fp16" and line["finite"]
    assert set(line["kernels"]) <= kernels_of_the_audit() and line["kernels"]


@interpreter
def test_sanitizer_process_goes_on_behind_a_call_that_fails(monkeypatch, capsys):
    from benchmarks import sanitizer_calls

    def failing(draw):
        raise RuntimeError("no such luck")

    broken = type("Broken", (), {"run": staticmethod(failing)})
    calls = {"broken": broken, "conv": CALLS["conv 1-D causal"]}
    monkeypatch.setattr(sanitizer_calls, "CALLS", calls)
    assert sanitizer.main(["--device", "cpu", "--dtypes", "fp32", "--calls"]) == 1
    first, second = sanitizer.finished_lines(capsys.readouterr().out)
    assert first["failure"] == "RuntimeError: no such luck" and "failure" not in second


# ------------------------------------------------------------------------------------ the driver


LOG = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
========= ERROR SUMMARY: 3 errors
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""


def test_sanitizer_counts_what_the_tools_count():
    assert sanitizer.errors_in(LOG) == 5 and sanitizer.errors_in("") == 0


def test_sanitizer_reads_no_half_line():
    assert sanitizer.finished_lines('noise\n{"call": "a", "kernels": []}\n{"call": "b", "ker') == [
        {"call": "a", "kernels": []}
    ]


def test_sanitizer_goes_on_behind_a_call_that_kills_its_process(monkeypatch):
    """The first process finishes a, dies in b; the second finishes c and loses the device in d."""
    replies = [
        (-11, [{"call": "a", "kernels": ["k"]}], "========= ERROR SUMMARY: 1 error\n"),
        (
            0,
            [
                {"call": "c", "kernels": ["k"], "lost": False},
                {"call": "d", "kernels": [], "failure": "illegal access", "lost": True},
            ],
            "========= ERROR SUMMARY: 0 errors\n",
        ),
        (None, [], ""),
    ]
    asked = []

    def process(tool, calls, dtypes, deadline):
        asked.append(list(calls))
        return replies.pop(0)

    monkeypatch.setattr(sanitizer, "watched_process", process)
    part = sanitizer.watch_share("memcheck", list("abcde"), ["bf16"], 0.0)
    assert asked == [list("abcde"), list("cde"), ["e"]]
    assert part["errors"] == 1 and part["kernels"] == {"k"}
    assert part["failures"]["b"].startswith("the process ended with status -11")
    assert part["failures"]["d"] == "illegal access"
    assert part["failures"]["e"] == "not finished within the time limit"


@pytest.mark.parametrize(
    ("tool", "failures"), [("memcheck", {"a": "the tool gave no summary"}), ("plain", {})]
)
def test_sanitizer_believes_no_tool_without_a_summary(tool, failures, monkeypatch):
    def process(tool, calls, dtypes, deadline):
        return 0, [{"call": each, "kernels": ["k"]} for each in calls], "Error: could not attach"

    monkeypatch.setattr(sanitizer, "watched_process", process)
    assert sanitizer.watch_share(tool, ["a"], ["bf16"], 0.0)["failures"] == failures


@pytest.mark.parametrize(("errors", "status"), [(0, 0), (2, 1)])
def test_sanitizer_writes_its_summary(errors, status, monkeypatch, tmp_path, capsys):
    def process(tool, calls, dtypes, deadline):
        counted = 0 if tool == sanitizer.PLAIN else errors
        return 0, [{"call": each, "kernels": ["k"]} for each in calls], f"ERROR SUMMARY: {counted} errors"

    monkeypatch.setattr(sanitizer, "missing_here", lambda: None)
    monkeypatch.setattr(sanitizer, "watched_process", process)
    path = tmp_path / "sanitizer.json"
    assert sanitizer.main(["--json", str(path), "--tools", "memcheck", "synccheck"]) == status
    document = json.loads(path.read_text())
    assert list(document["tools"]) == ["plain", "memcheck", "synccheck"]
    every = 2 * len(CALLS)
    assert {tool["calls"] for tool in document["tools"].values()} == {every}
    assert document["tools"]["memcheck"]["errors"] == errors * sanitizer.SHARES["memcheck"]
    assert "memcheck" in capsys.readouterr().out


def test_sanitizer_says_that_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sanitizer.main([]) == sanitizer.NO_GPU
    assert "no CUDA GPU that torch sees" in capsys.readouterr().err


def test_sanitizer_says_that_its_tool_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitizer.shutil, "which", lambda *_, **__: None)
    assert sanitizer.main([]) == sanitizer.NO_GPU
    assert "no compute-sanitizer on the PATH" in capsys.readouterr().err
