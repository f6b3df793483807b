"""The acceptance on a GPU, rehearsed without one: its steps, their limits, and what it writes."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import acceptance, acceptance_results
from benchmarks.acceptance import Step


def script(text: str, **settings) -> dict:
    return dict(arguments=("-c", text), limit=20, **settings)


def run(steps: list[Step], folder, *arguments: str, monkeypatch) -> tuple[int, list[dict]]:
    monkeypatch.setattr(acceptance, "steps_of", lambda *_: steps)
    code = acceptance.main(["--results", str(folder), *arguments])
    return code, json.loads((folder / "acceptance.json").read_text())["steps"]


def test_acceptance_goes_on_behind_what_fails(tmp_path, monkeypatch, capsys):
    """A step that fails, one that hangs deaf to SIGTERM, one that passes."""
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    deaf += "print('deaf', flush=True); time.sleep(60)"
    monkeypatch.setattr(acceptance, "GRACE", 1)
    steps = [
        Step("fails", **script("print('a wrong number'); raise SystemExit(3)")),
        Step("hangs", ("-c", deaf), 3),
        Step("passes", **script("print('fine')")),
    ]
    code, rows = run(steps, tmp_path, monkeypatch=monkeypatch)
    assert code == 1
    assert [row["outcome"] for row in rows] == ["failed", "out of time", "passed"]
    assert rows[0]["tail"].strip().endswith("a wrong number") and "deaf" in rows[1]["tail"]
    assert "fine" in (tmp_path / "log.txt").read_text() and "a wrong number" in capsys.readouterr().out


def test_acceptance_passes_when_every_step_does(tmp_path, monkeypatch):
    code, rows = run([Step("passes", **script("pass"))], tmp_path, monkeypatch=monkeypatch)
    assert code == 0 and rows[0]["outcome"] == "passed"


def test_acceptance_keeps_its_time(tmp_path, monkeypatch):
    steps = [Step("slow", **script("import time; time.sleep(60)")), Step("late", **script("pass"))]
    monkeypatch.setattr(acceptance, "RESERVE", 0)
    code, rows = run(steps, tmp_path, "--limit", "2", monkeypatch=monkeypatch)
    assert code == 1 and [row["outcome"] for row in rows] == ["out of time", "no time"]


def test_acceptance_takes_steps_by_name(tmp_path, monkeypatch):
    steps = [Step("one", **script("pass")), Step("other", **script("pass"))]
    code, rows = run(steps, tmp_path, "--only", "other", monkeypatch=monkeypatch)
    assert code == 0 and [row["step"] for row in rows] == ["other"]
    with pytest.raises(SystemExit):
        acceptance.main(["--results", str(tmp_path), "--only", "another"])


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("print('no CUDA GPU'); raise SystemExit(1)", "rehearsed"),
        ("raise SystemExit(1)", "failed"),
        ("pass", "failed"),
    ],
)
def test_acceptance_rehearsal_wants_the_missing_gpu_named(text, outcome, tmp_path, monkeypatch):
    _, rows = run([Step("step", **script(text))], tmp_path, "--rehearse", monkeypatch=monkeypatch)
    assert rows[0]["outcome"] == outcome


def test_acceptance_counts_what_steps_wrote(tmp_path):
    (tmp_path / "tests.jsonl").write_text(
        '{"outcome": "passed"}\n{"outcome": "failed"}\n{"outcome": "passed"}\n'
    )
    (tmp_path / "conv.json").write_text(json.dumps({"rows": [{"failure": "x"}, {"case": "y"}]}))
    tools = {"memcheck": {"errors": 2, "failures": {"call": "why"}}}
    (tmp_path / "sanitizer.json").write_text(json.dumps({"tools": tools}))

    def counts(name):
        return acceptance_results.counts_of(tmp_path / name)

    assert counts("tests.jsonl") == {"passed": 2, "failed": 1}
    assert counts("conv.json") == {"rows": 2, "failures": 1}
    assert counts("sanitizer.json") == {"memcheck": 3} and counts("absent.json") == {}


def test_acceptance_writes_few_files_and_in_one_folder(tmp_path):
    steps = acceptance.steps_of(tmp_path, "0123456789abcdef", tmp_path)
    files = [step.file for step in steps if step.file] + ["acceptance.json", "log.txt"]
    assert len(set(files)) == len(files) == 8
    assert all(str(tmp_path) in file for file in files[:-2])
    assert sum(step.limit for step in steps) < 600


def test_acceptance_tests_are_all_that_need_a_gpu():
    from benchmarks.acceptance import PERSISTENT, ROOT, gpu_test_files

    files = gpu_test_files()
    marked = {
        f"tests/{path.name}"
        for path in ROOT.glob("tests/test_*.py")
        if re.search(r"^@(pytest\.mark\.gpu|on_gpu|large\(\d+\))$", path.read_text(), re.MULTILINE)
    }
    assert len(set(files)) == len(files) and PERSISTENT not in files
    assert marked <= {*files, PERSISTENT}


def test_acceptance_lists_tests_that_time_did_not_reach(tmp_path, monkeypatch):
    """A session that was killed while it wrote a line."""
    log = tmp_path / "tests.jsonl"
    lines = [{"collected": ["a", "b", "c"]}, {"test": "b", "outcome": "passed"}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"test": "a", "outco'
    step = Step("tests", ("-c", f"open({str(log)!r}, 'w').write({text!r})"), 20, str(log))
    _, (row,) = run([step], tmp_path, monkeypatch=monkeypatch)
    assert row["counts"] == {"passed": 1, "not reached": 2}
    assert [(line["test"], line["outcome"]) for line in acceptance_results.lines_of(log)] == [
        ("b", "passed"), ("a", "not reached"), ("c", "not reached"),
    ]  # fmt: skip


def test_acceptance_gives_the_last_step_asked_for_all_the_time(tmp_path, monkeypatch):
    steps = [Step(name, ("-c", "import time; time.sleep(2)"), 0.1) for name in ("one", "other", "last")]
    monkeypatch.setattr(acceptance, "GRACE", 1)
    _, rows = run(steps, tmp_path, "--only", "one", "other", monkeypatch=monkeypatch)
    assert [row["outcome"] for row in rows] == ["out of time", "passed"]


def test_acceptance_takes_no_results_of_an_earlier_run(tmp_path, monkeypatch):
    (tmp_path / "old.jsonl").write_text('{"test": "a", "outcome": "passed"}\n')
    step = Step("fails", ("-c", "raise SystemExit(1)"), 20, str(tmp_path / "old.jsonl"))
    _, (row,) = run([step], tmp_path, monkeypatch=monkeypatch)
    assert row["outcome"] == "failed" and row["counts"] == {}


def test_acceptance_tells_a_step_how_long_it_has(tmp_path, monkeypatch):
    step = Step("told", ("-c", "import sys; print(sys.argv[1:])"), 20, told_limit=True)
    _, (row,) = run([step], tmp_path, monkeypatch=monkeypatch)
    assert "['--limit', '15']" in row["tail"]


def test_acceptance_shows_no_results_of_an_earlier_run_where_there_is_no_time(tmp_path, monkeypatch):
    (tmp_path / "old.jsonl").write_text('{"test": "a", "outcome": "passed"}\n')
    step = Step("late", ("-c", "pass"), 20, str(tmp_path / "old.jsonl"))
    _, (row,) = run([step], tmp_path, "--limit", "0", monkeypatch=monkeypatch)
    assert row["outcome"] == "no time" and row["counts"] == {}


def test_acceptance_keeps_what_an_interrupted_step_wrote(tmp_path, monkeypatch, hears_ctrl_c):
    """Ctrl-C comes from within the step, which is then asked to end and counted as far as it came."""
    log, asked = tmp_path / "tests.jsonl", tmp_path / "asked"
    lines = [{"collected": ["a", "b"]}, {"test": "b", "outcome": "passed"}]
    text = f"""
import os, pathlib, signal, sys, time
def told(*_):
    pathlib.Path({str(asked)!r}).touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, told)
pathlib.Path({str(log)!r}).write_text({"".join(json.dumps(line) + chr(10) for line in lines)!r})
os.kill(os.getppid(), signal.SIGINT)
time.sleep(60)
"""
    steps = [Step("tests", ("-c", text), 20, str(log)), Step("other", **script("pass"))]
    code, rows = run(steps, tmp_path, monkeypatch=monkeypatch)
    assert code == 1 and [row["outcome"] for row in rows] == ["interrupted"]
    assert rows[0]["counts"] == {"passed": 1, "not reached": 1}
    assert asked.exists()


def test_acceptance_gives_a_hung_suite_up_before_its_time(tmp_path):
    """So that the suite's other cases, and the file, are there when the time is over."""
    from benchmarks.acceptance import SUITES

    steps = {step.name: step for step in acceptance.steps_of(tmp_path, "0123456789abcdef", tmp_path)}
    for name in SUITES:
        arguments = steps[name].arguments
        assert 0 < float(arguments[arguments.index("--patience") + 1]) < steps[name].limit


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_acceptance_rehearses_here(tmp_path, monkeypatch):
    """Every step up to where it says that there is no GPU, the installation too."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert acceptance.main(["--results", str(tmp_path), "--rehearse", "--limit", "800"]) == 0
    rows = json.loads((tmp_path / "acceptance.json").read_text())["steps"]
    assert {row["outcome"] for row in rows} == {"rehearsed"}
    by_name = {row["step"]: row for row in rows}
    assert set(by_name["tests"]["counts"]) == {"skipped"} and by_name["tests"]["counts"]["skipped"] > 1000
