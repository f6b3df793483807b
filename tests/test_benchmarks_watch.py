"""A case that hangs: its process is killed with all that it started, it is a row, the others are measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import results, run, watch
from benchmarks.__main__ import main
from benchmarks.plan import PATIENCE, Settings
from benchmarks.watch import INTERRUPTED, NO_ANSWER, watched

OPERATOR = "benchmarks"
VARIANT = {"allocator": "steady", "isa": "native"}
FOREVER = 600.0
# A shell that waits for a child of its own, as a compiler does for its parts; it tells both numbers.
WITH_CHILD = "sleep 600 & echo $$ $! > {told}; wait"

# Stands for benchmarks.worker without its imports: it goes through the cases and falls asleep in "b", as far
# as it is asked for peers (`hangs`: "peers"), in any case ("always") or not; then it ends with `status`.
SLEEPER = """
import json, os, pathlib, subprocess, sys, time
settings, path, first = json.loads(sys.argv[1]), sys.argv[3], int(sys.argv[4])
document = {{"schema": 1, "suite": "conv", "environment": dict.fromkeys({facts}, "known"), "rows": []}}
names = [name for name, _ in settings["only"]] or ["a", "b", "c"]
for number in range(first, len(names)):
    name = names[number]
    pathlib.Path(path).write_text(json.dumps(document | {{"next": number}}))
    if name == "b" and (settings["peers"] or {hangs!r} == "always"):
        child = subprocess.Popen(["sleep", "600"])
        pathlib.Path({told!r}).write_text(f"{{os.getpid()}} {{child.pid}}")
        time.sleep(600)
    row = {{"case": name, "pass": "fwd", "allocator": "steady", "isa": "native"}}
    row |= {{side: {{"median_ms": 1.0}} for side in ("stock", "ours")}}
    document["rows"].append(row | {{"speedup": dict.fromkeys(("median", "low", "high"), 1.0)}})
pathlib.Path(path).write_text(json.dumps(document | {{"next": len(names)}}))
sys.exit({status})
"""


def shell(told: Path) -> list[str]:
    return ["/bin/sh", "-c", WITH_CHILD.format(told=told)]


def is_running(number: int) -> bool:
    """Whether the process exists and is no zombie that its new parent has not yet asked for."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_all_gone(told: Path) -> None:
    numbers = [int(word) for word in told.read_text().split()]
    deadline = time.monotonic() + 10
    while any(map(is_running, numbers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(numbers) == 2 and not any(map(is_running, numbers))


# ---------------------------------------------------------------------------------------------- the process


@pytest.mark.parametrize("status", [0, 3])
def test_a_process_that_ends_tells_its_status(tmp_path, status):
    assert watched(["/bin/sh", "-c", f"exit {status}"], {}, tmp_path / "signs", FOREVER) == status


def test_a_silent_process_is_killed_with_its_children(tmp_path):
    start = time.monotonic()
    assert watched(shell(tmp_path / "told"), dict(os.environ), tmp_path / "signs", 1.0) == NO_ANSWER
    assert 1.0 <= time.monotonic() - start < 20
    assert_all_gone(tmp_path / "told")


def test_a_process_that_gives_signs_may_take_longer_than_patience(tmp_path):
    signs = tmp_path / "signs"
    touching = f"for turn in 1 2 3 4 5 6 7 8; do touch {signs}; sleep 0.25; done; exit 5"
    assert watched(["/bin/sh", "-c", touching], dict(os.environ), signs, 1.5) == 5


def test_children_of_a_process_that_ended_by_itself_end_too(tmp_path):
    told = tmp_path / "told"
    leaving = ["/bin/sh", "-c", f"sleep 600 & echo $$ $! > {told}; exit 3"]
    assert watched(leaving, dict(os.environ), tmp_path / "signs", FOREVER) == 3
    assert_all_gone(told)


def assert_ends_with_its_parent(command: list[str], told: Path, sign: Path) -> None:
    """Start the command from a process that is killed as soon as the command gives its sign."""
    start = f"child = subprocess.Popen({command!r}, start_new_session=True)"
    tell = f"pathlib.Path({str(told)!r}).write_text(f'{{os.getpid()}} {{child.pid}}')"
    text = f"import os, pathlib, subprocess, time; {start}; {tell}; time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", text], cwd=watch.ROOT)
    deadline = time.monotonic() + 60
    while not (sign.exists() and told.exists()) and time.monotonic() < deadline:
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    _, child = map(int, told.read_text().split())
    try:
        assert sign.exists()
        assert_all_gone(told)
    finally:
        if is_running(child):
            os.killpg(child, signal.SIGKILL)


def test_a_process_can_ask_to_end_with_its_parent(tmp_path):
    sign = tmp_path / "sign"
    text = "import pathlib, time; from benchmarks.watch import end_with_parent; end_with_parent(); "
    text += f"pathlib.Path({str(sign)!r}).touch(); time.sleep(600)"
    assert_ends_with_its_parent([sys.executable, "-c", text], tmp_path / "told", sign)


@pytest.mark.slow
def test_a_measuring_process_ends_with_its_parent(tmp_path):
    settings = Settings("conv", filter="16^3", passes=("fwd",), budget_seconds=300.0)
    variant = json.dumps({"allocator": "default", "isa": "native"})
    arguments = [settings.to_json(), variant, str(tmp_path / "rows.json"), "0"]
    command = [sys.executable, *run.WORKER, *arguments]
    assert_ends_with_its_parent(command, tmp_path / "told", tmp_path / "rows.json")


def test_ctrl_c_ends_a_process_that_does_not_listen(tmp_path, monkeypatch, hears_ctrl_c):
    monkeypatch.setattr(watch, "GRACE_SECONDS", 0.2)
    told = tmp_path / "told"
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    deaf = ["/bin/sh", "-c", "trap '' INT; " + WITH_CHILD.format(told=told)]
    assert watched(deaf, dict(os.environ), tmp_path / "signs", FOREVER) == INTERRUPTED
    assert_all_gone(told)


# -------------------------------------------------------------------------------------------------- the run


@pytest.fixture
def sleeper(tmp_path, monkeypatch):
    """Let the measuring processes be SLEEPER; return what says how it hangs."""

    def hang(how: str, status: int = 0) -> Path:
        told = tmp_path / "told"
        script = SLEEPER.format(facts=list(run.VARIANT_FACTS), told=str(told), hangs=how, status=status)
        monkeypatch.setattr(run, "WORKER", ("-c", script))
        return told

    return hang


def measured_rows(settings: Settings) -> list[dict]:
    document = {"environment": {}, "rows": []}
    assert run.measure_variant(settings, VARIANT, ["a", "b", "c"], document, dict(os.environ)) is False
    return document["rows"]


def test_a_case_that_hangs_becomes_a_row_and_the_others_are_measured(sleeper):
    told = sleeper("always")
    rows = measured_rows(Settings("conv", patience_seconds=2.0))
    assert [row["case"] for row in rows] == ["a", "b", "c"]
    assert [row.get("failure") for row in rows] == [None, "no answer in 2 s", None]
    assert_all_gone(told)


def test_a_case_that_hangs_with_peers_is_measured_without_them(sleeper):
    told = sleeper("peers")
    settings = Settings("conv", passes=("fwd",), peers=("openvino",), patience_seconds=2.0)
    rows = measured_rows(settings)
    assert [row["case"] for row in rows] == ["a", "b", "c"] and not any(map(run.is_failure, rows))
    assert [row.get("peers") for row in rows] == [
        None,
        {"openvino": {"failure": "no answer in 2 s"}},
        None,
    ]
    assert_all_gone(told)


def test_a_process_that_dies_behind_its_last_case_keeps_all_rows(sleeper):
    sleeper("never", status=70)
    rows = measured_rows(Settings("conv"))
    assert [row["case"] for row in rows] == ["a", "b", "c", "end"]
    words = "the measuring process ended with status 70"
    assert [row.get("failure") for row in rows] == [None, None, None, words]


def test_a_case_measured_without_peers_is_kept_where_its_process_dies_behind_it(sleeper):
    sleeper("peers", status=70)
    settings = Settings("conv", passes=("fwd",), peers=("openvino",), patience_seconds=2.0)
    words = "the measuring process ended with status 70"
    rows, interrupted = run.without_peers(settings, VARIANT, "b", dict(os.environ), "no answer")
    assert [(row["case"], row.get("failure")) for row in rows] == [("b", None), ("end", words)]
    assert rows[0]["peers"] == {"openvino": {"failure": "no answer"}} and not interrupted


def test_a_case_that_dies_without_peers_too_has_no_rows(sleeper):
    sleeper("always")
    settings = Settings("conv", passes=("fwd",), peers=("openvino",), patience_seconds=1.0)
    assert run.without_peers(settings, VARIANT, "b", dict(os.environ), "no answer") == ([], False)


def test_patience_grows_with_what_is_timed():
    plain = Settings("conv", device="cuda", budget_seconds=10.0)
    assert plain.patience == PATIENCE["cuda"] + 20
    assert replace(plain, peers=("compile", "flex")).patience == PATIENCE["cuda"] + 40
    on_cpu = Settings("conv")
    assert on_cpu.patience == PATIENCE["cpu"] + 2 * on_cpu.budget
    assert Settings("conv", patience_seconds=7.0).patience == 7.0


@pytest.mark.slow
def test_a_peer_that_hangs_in_its_import(tmp_path, monkeypatch, capsys):
    """The whole command, with a package in openvino's place that never returns."""
    package = tmp_path / "packages" / "openvino"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "run.json"
    words = "conv --filter 16^3 --pass fwd --budget 0.01 --vs openvino --patience 30 --json"
    assert main([*words.split(), str(path)]) == 0
    (row,) = results.load(path)["rows"]
    assert row["peers"] == {"openvino": {"failure": "no answer in 30 s"}}
    assert row["speedup"]["median"] > 0
