"""The rules of a session on a GPU, on a session of made-up tests whose GPU is played by a module."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    command += ["--max-worker-restart", "9", "--gpu-log", str(log), "-o", "markers=gpu: needs a GPU"]
    command += ["--rootdir", str(folder), "-c", os.devnull, "-p", "no:cacheprovider", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    lines: dict[str, list[dict]] = {}
    for line in map(json.loads, log.read_text().splitlines()):
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
