"""The ledger itself: it counts what ran, under xdist too, and fails a strict run on a skip nobody allowed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ledger import allowed_skips

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = """
import pytest

OPERATOR = "made_up_conv"

@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("size", [1, 2])
def test_sizes(backend, size):
    if backend == "cpu" and size == 2:
        pytest.skip("{reason}")

@pytest.mark.operator("made_up_gru", "triton")
def test_marked():
    pass

def test_uncounted():
    pass
"""


def run_sample(tmp_path: Path, *options: str, reason: str = "instruction set avx9, this CPU lacks it"):
    """Runs the sample with the ledger as a plugin, far from our own conftest."""
    (tmp_path / "test_sample.py").write_text(SAMPLE.replace("{reason}", reason))
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.ledger", "-p", "no:cacheprovider", *options, "."],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("options", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_ledger_counts_by_backend_and_operator(tmp_path, options):
    result = run_sample(tmp_path, *options)
    assert result.returncode == 0, result.stdout
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if "made_up" in line[:8]}
    assert re.search(r"^operator +cpu +torch +triton$", result.stdout, re.MULTILINE)
    assert rows == {"made_up_conv": ["1", "2", "0"], "made_up_gru": ["0", "0", "1"]}


@pytest.mark.parametrize("options", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_ledger_strict_run_fails_on_an_unknown_skip(tmp_path, options):
    result = run_sample(tmp_path, "--strict-skips", *options, reason="felt like it")
    assert result.returncode == pytest.ExitCode.TESTS_FAILED
    assert "felt like it" in result.stdout


def test_ledger_names_an_unknown_skip_without_failing(tmp_path):
    result = run_sample(tmp_path, reason="felt like it")
    assert result.returncode == 0
    assert "felt like it" in result.stdout


def test_ledger_strict_run_allows_what_is_listed(tmp_path):
    assert run_sample(tmp_path, "--strict-skips").returncode == 0


def test_ledger_reads_patterns_and_leaves_comments_out():
    (pattern,) = allowed_skips("# a comment\n\n  head_dim=\\d+, needs 16  \n")
    assert pattern.fullmatch("head_dim=80, needs 16")
    assert not pattern.fullmatch("head_dim=80, needs 16 or 32")
