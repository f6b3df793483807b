"""What a newcomer reads works: every example runs, every command parses, every name exists."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import pyarch
from benchmarks.__main__ import parser as benchmarks_parser
from pyarch import dispatch, hardware, native
from pyarch.__main__ import _parser as pyarch_parser
from pyarch.__main__ import main as pyarch_main

OPERATOR = "readme"
ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PARSERS = {"pyarch": pyarch_parser, "benchmarks": benchmarks_parser}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def shell_words(text: str) -> list[list[str]]:
    """Every command of the sh blocks and of inline code, split into words, comments left out."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", text)
    separated = [part for line in lines for part in line.partition(" #")[0].split("&&")]
    return [shlex.split(command) for command in separated if command.strip().startswith(("make ", "python "))]


def commands_of(program: str) -> list[list[str]]:
    """The arguments of every `python -m PROGRAM ...` in the README and CONTRIBUTING."""
    words = shell_words(README) + shell_words(CONTRIBUTING)
    return [each[3:] for each in words if each[:3] == ["python", "-m", program]]


def variables() -> dict[str, tuple[str, ...]]:
    """The README's table of environment variables: name -> the values in code type."""
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", README, re.MULTILINE)
    return {name: tuple(re.findall(r"`(.*?)`", values)) for name, values in rows}


@pytest.fixture
def fast(monkeypatch):
    """Timing that takes no time."""
    monkeypatch.setattr("pyarch.timing.BUDGET_SECONDS", 0.0)
    monkeypatch.setattr("pyarch.timing.FEWEST_ROUNDS", 1)


def run(block: str) -> dict:
    """Execute one example in a namespace of its own, which it leaves behind."""
    names: dict = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("block", blocks(README, "python"), ids=lambda block: block.splitlines()[-1][:40])
def test_readme_example_runs(fast, block):
    run(block)


@pytest.mark.operator("readme", "cpu")
def test_readme_first_example_is_proven_and_restored(fast, capsys):
    if native.serving()[1]:
        pytest.skip(native.serving()[1])
    names = run(blocks(README, "python")[0])
    assert names["proof"].ok, names["proof"].problems
    assert [record.name for record in names["report"].swapped] == ["1"]
    assert {type(layer).__module__.partition(".")[0] for layer in names["model"]} == {"torch"}
    assert "verification (float32) ok" in capsys.readouterr().out


def test_readme_and_contributing_name_make_targets_that_exist():
    named = {each[1] for each in shell_words(README) + shell_words(CONTRIBUTING) if each[0] == "make"}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "gpu", "bench", "help"} <= named <= targets


@pytest.mark.parametrize(
    "program, fewest", [("pyarch", {"info", "demo", "check"}), ("benchmarks", {"audit", "conv", "recurrent"})]
)
def test_readme_commands_parse(program, fewest):
    commands = commands_of(program)
    assert fewest <= {command[0] for command in commands}
    for command in commands:
        try:
            PARSERS[program]().parse_args(command)
        except SystemExit as stopped:
            pytest.fail(f"python -m {program} {shlex.join(command)} ends with {stopped.code}")


# What makes a command of the README small enough for a test, and the package that it names.
SMALLER = {"demo": ["--size", "tiny"], "compare": ["--seq", "8,16", "--batch", "2", "--width", "16"]}
NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.Conv2d(4, 4, 3, groups=4))
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", commands_of("pyarch"), ids=shlex.join)
def test_readme_commands_of_pyarch_run(command, fast, tmp_path, monkeypatch, capsys):
    if native.serving()[1]:
        pytest.skip(native.serving()[1])
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("pyarch.layer_work.BUDGET_SECONDS", 0.0)
    # Layers as small as these may be faster on torch's own operators, and nothing would be proven of ours.
    with pyarch.backend("cpu"):
        assert pyarch_main([*command, *SMALLER.get(command[0], [])]) == 0
    written = {path.name for path in tmp_path.iterdir()} - {"mypackage"}
    assert written == {word for word in command if word.endswith(".html")}
    assert capsys.readouterr().out


def test_readme_names_every_environment_variable():
    named = variables()
    # The name pyarch.info is the function; the module stands behind it.
    assert set(importlib.import_module("pyarch.info").VARIABLES) <= set(named)
    assert named["PYARCH_BACKEND"] == dispatch.CHOICES
    assert set(named["PYARCH_CPU_ISA"]) == set(hardware.CPU_INSTRUCTION_SETS)
    spec = importlib.util.spec_from_file_location("pyarch_setup", ROOT / "setup.py")
    build_script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_script)
    assert named["PYARCH_BUILD_EXT"] == build_script.BUILD_CHOICES


def test_readme_says_of_each_layer_whether_it_is_there():
    rows = re.findall(r"^\| (`[A-Z].*?) \|.*\| (yes|not yet) \|$", README, re.MULTILINE)
    there = {name: status == "yes" for names, status in rows for name in re.findall(r"`(\w+)`", names)}
    assert {"Conv1d", "LSTM", "GRUCell", "MultiheadAttention"} <= set(there)
    assert there == {name: hasattr(pyarch.nn, name) for name in there}


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README + CONTRIBUTING)
    assert links and [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_readme_never_tells_to_install_the_unrelated_package():
    assert not re.search(r"pip install (?:-\S+ )*pyarch(?!-kernels)", README + CONTRIBUTING)
