"""The rules of a session on a GPU, on a session of made-up tests whose GPU is played by a module."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import gpu_session

pytest.importorskip("xdist", reason="pytest-xdist is not installed")

ROOT = Path(__file__).resolve().parent.parent

# A launch, and a "GPU" that is lost for good after one test: what the driver does to a process.
SOURCE = """
import time
import pytest
import torch
from tests import gpu_session
from pyarch.triton_kernels.launch import Launch

class Kernel:
    __name__ = "made_up_kernel"
    def __getitem__(self, grid):
        return lambda **arguments: None

LAUNCH = Launch(Kernel(), 3, {"x_ptr": torch.zeros(2, 5)}, {"BLOCK_M": 16}, {"num_warps": 4})
lost = []

def answer():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

gpu_session.wait_for_gpu = answer
gpu = pytest.mark.gpu

@gpu
def test_first():
    LAUNCH.run(torch.device("cpu"))

@gpu
def test_fails_by_itself():
    LAUNCH.run(torch.device("cpu"))
    assert False, "a wrong number"

@gpu
def test_loses_the_gpu():
    LAUNCH.run(torch.device("cpu"))
    lost.append(True)

@gpu
@pytest.mark.timeout(3, method="thread")
def test_hangs():
    LAUNCH.run(torch.device("cpu"))
    time.sleep(60)

@gpu
def test_last():
    assert not lost

@pytest.mark.skip(reason="no CUDA GPU")
@gpu
def test_skipped():
    pass
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> tuple[str, dict[str, list[dict]]]:
    """What such a session prints and logs, by the name of the test."""
    folder = tmp_path_factory.mktemp("session")
    (folder / "test_made_up.py").write_text(SOURCE)
    log = folder / "log.jsonl"
    command = [sys.executable, "-m", "pytest", "-p", "tests.gpu_session", "-q", "-n", "1", "-m", "gpu"]
    command += ["--dist=load", "--maxschedchunk=1", "--max-worker-restart", "9", "--gpu-log", str(log)]
    command += ["-o", "markers=gpu: needs a GPU"]
    command += ["--rootdir", str(folder), "-c", os.devnull, "-p", "no:cacheprovider", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    lines: dict[str, list[dict]] = {}
    first, *others = map(json.loads, log.read_text().splitlines())
    lines["collected"] = [first]
    for line in others:
        lines.setdefault(line["test"].partition("::")[2], []).append(line)
    return run.stdout + run.stderr, lines


def outcomes(session, name: str) -> list[str]:
    return [line["outcome"] for line in session[1][name]]


@pytest.mark.slow
def test_gpu_session_runs_every_test(session):
    assert outcomes(session, "test_first") == ["passed"]
    assert outcomes(session, "test_last") == ["passed"]
    assert outcomes(session, "test_skipped") == ["skipped"]


@pytest.mark.slow
def test_gpu_session_says_first_what_will_run(session):
    (line,) = session[1]["collected"]
    names = [test.partition("::")[2] for test in line["collected"]]
    assert set(names) == set(session[1]) - {"collected"} and len(set(names)) == len(names)


class Item:
    """What the order of tests depends on."""

    def __init__(self, nodeid: str):
        self.nodeid, self.name = nodeid, nodeid.partition("::")[2]


def test_gpu_session_runs_bfloat16_of_every_file_first():
    dtypes = ("fp32", "fp16", "bf16")
    many = [f"a.py::test_many[{dtype}-{n}]" for dtype in dtypes for n in range(8)]
    few = [f"b.py::test_few[{n}-torch.{dtype}]" for n in range(2) for dtype in ("float32", "bfloat16")]
    others = ["c.py::test_follows_tf32", "c.py::test_plain"]
    ordered = [item.nodeid for item in gpu_session.in_order(list(map(Item, many + few + others)))]
    assert sorted(ordered) == sorted(many + few + others)
    first = ordered[:11]
    assert not any(re.search("fp32|fp16|tf32|[.]float32", each) for each in first)
    assert "b.py::test_few[0-torch.bfloat16]" in first[:4] and "c.py::test_plain" in first[4:8]
    assert "b.py::test_few[0-torch.float32]" in ordered[11:19]


def test_gpu_session_order_gives_every_function_its_share():
    items = [Item(f"a.py::test_{name}[{n}]") for name in "xyz" for n in range(10)]
    half = [item.name[:6] for item in gpu_session.in_order(items)[:15]]
    assert {half.count(f"test_{name}") for name in "xyz"} == {5}


def test_gpu_session_failure_keeps_no_memory():
    """What a failed test held is gone once its report is made, though the failure itself is kept."""
    held = []

    def fails():
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise AssertionError("a wrong number")

    item = SimpleNamespace(
        get_closest_marker=lambda name: name == "gpu", config=SimpleNamespace(getoption=lambda name: False)
    )
    call = pytest.CallInfo.from_call(fails, "call")
    report = SimpleNamespace(failed=True, sections=[])
    hook = gpu_session.Watch(Path("unused")).pytest_runtest_makereport(item, call)
    next(hook)
    assert held[0]() is not None
    with pytest.raises(StopIteration):
        hook.send(report)
    assert held[0]() is None and call.excinfo is not None


@pytest.mark.slow
def test_gpu_session_failure_lists_the_launches(session):
    (line,) = session[1]["test_fails_by_itself"]
    assert "a wrong number" in line["reason"]
    assert line["launches"] == ["made_up_kernel[3] BLOCK_M=16 num_warps=4 | x_ptr=(2, 5):float32"]


@pytest.mark.slow
def test_gpu_session_ends_the_worker_that_lost_its_gpu(session):
    """The test itself fails with the error, and again as its worker's end; the next finds a fresh process."""
    first, second = session[1]["test_loses_the_gpu"]
    assert "illegal memory access" in first["reason"] and "crashed while running" in second["reason"]
    assert first["launches"][0].startswith("made_up_kernel")


@pytest.mark.slow
def test_gpu_session_ends_a_worker_that_hangs(session):
    (line,) = session[1]["test_hangs"]
    assert line["outcome"] == "failed" and "crashed while running" in line["reason"]
    assert line["launches"][0].startswith("made_up_kernel")
