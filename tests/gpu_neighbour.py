"""The persistent recurrent kernels of a layer over and over, in a process of their own.

    python -m tests.gpu_neighbour CASE DEVICE SECONDS

Says "ready" once it has its results, waits for a line, and then prints a line of JSON: how many further runs
it made and which results differed from the first ones in any bit. An expired barrier ends it with an error.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyarch.triton_kernels import recurrent_persistent as persistent
from tests.recurrent_persistent_cases import CASES, LARGE_CASES, Problem, kernels

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Runs:
    """A layer's tensors and the results of its first run."""

    problem: Problem
    incoming: tuple[Tensor | None, ...]
    first: dict[str, Tensor]

    @classmethod
    def of(cls, name: str, device: str) -> Runs:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        problem = Problem.drawn((CASES | LARGE_CASES)[name], dtype, device)
        incoming = problem.incoming()
        return cls(problem, incoming, kernels(problem, incoming))

    def repeated(self, seconds: float) -> dict:
        """Runs for so long, at least one: their number, and the names of results that differed."""
        runs, differing, end = 0, set(), time.monotonic() + seconds
        while runs == 0 or time.monotonic() < end:
            again = kernels(self.problem, self.incoming)
            differing |= {name for name, each in self.first.items() if not torch.equal(each, again[name])}
            runs += 1
        persistent.raise_alarm(self.problem.input.device)
        return {"runs": runs, "differing": sorted(differing)}


def hold_beside_a_neighbour(name: str, device: str, seconds: float) -> None:
    """This process and another one run a layer at the same time: both get the numbers that each got alone."""
    runs = Runs.of(name, device)
    command = [sys.executable, "-m", "tests.gpu_neighbour", name, device, str(seconds)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as neighbour:
        try:
            assert neighbour.stdout.readline() == "ready\n"
            neighbour.stdin.write("go\n")
            neighbour.stdin.flush()
            here = runs.repeated(seconds)
            there = json.loads(neighbour.communicate()[0])
        finally:
            neighbour.kill()
    assert neighbour.returncode == 0
    assert here["runs"] > 0 and there["runs"] > 0
    assert here["differing"] == there["differing"] == []


def main(name: str, device: str, seconds: str) -> None:
    runs = Runs.of(name, device)
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(runs.repeated(float(seconds))))


if __name__ == "__main__":
    main(*sys.argv[1:])
