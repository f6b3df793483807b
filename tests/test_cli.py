"""The command line: info, demo, check; tables, JSON, exit status, errors that say what is needed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import pyarch
from pyarch import __main__ as cli
from pyarch import check, models, native, report
from pyarch.check import InputSpec, SpecError, read_input
from pyarch.report import Table

OPERATOR = "cli"


@pytest.fixture
def fast(monkeypatch):
    """Timing and ceilings that take no time."""
    monkeypatch.setattr("pyarch.timing.BUDGET_SECONDS", 0.0)
    monkeypatch.setattr("pyarch.timing.FEWEST_ROUNDS", 1)
    monkeypatch.setattr("pyarch.layer_work.BUDGET_SECONDS", 0.0)
    monkeypatch.setattr("pyarch.ceilings.COPY_BYTES", 1 << 20)
    monkeypatch.setattr("pyarch.ceilings.PRODUCT_SIZES", {"cpu": (64,)})


@pytest.fixture
def needs_cpu_kernels():
    refusal = native.serving()[1]
    if refusal:
        pytest.skip(refusal)


@pytest.fixture
def net_file(tmp_path, monkeypatch):
    """A folder to stand in that holds the user's module."""
    (tmp_path / "users_net.py").write_text(
        textwrap.dedent(
            """
            from torch import nn

            def build():
                return nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU())

            class Words(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.table = nn.Embedding(5, 4)
                    self.layer = nn.Conv1d(4, 4, 3, groups=4)

                def forward(self, ids, scale):
                    return self.layer(self.table(ids).transpose(1, 2) * scale)

            ready = build()
            count = 3

            def sized(width):
                return None

            def broken():
                raise ValueError("the user's own")

            def text():
                return "text"

            class Failing(nn.Module):
                def forward(self, x):
                    return self.reshaped(x)

                def reshaped(self, x):
                    return x.reshape(7, 7)
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("users_net", None)
    sys.path[:] = [each for each in sys.path if each != str(tmp_path)]


# -------------------------------------------------------------------------------- info


def test_cli_info_from_a_shell():
    root = Path(pyarch.__file__).parent.parent
    command = [sys.executable, "-m", "pyarch", "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["package"] == str(root / "pyarch")


def test_cli_info_as_a_table(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("pyarch\n") and torch.__version__ in out


# -------------------------------------------------------------------------------- demo


@pytest.mark.operator("conv", "cpu")
def test_cli_demo_of_every_model(capsys, fast, needs_cpu_kernels, tmp_path):
    page = tmp_path / "page.html"
    # What `auto` leaves to torch depends on the machine, and may be all of a model as small as these.
    with pyarch.backend("cpu"):
        options = ["--size", "tiny", "--device", "cpu", "--json", "--html", str(page)]
        assert cli.main(["demo", *options]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert [each["model"] for each in document["models"]] == list(models.names())
    assert document["ok"] and document["machine"]["torch"] == torch.__version__
    for each in document["models"]:
        assert each["ok"] and each["layers"], each["model"]
        # A frozen teacher has no backward.
        assert {layer["backward"] for layer in each["layers"]} - {"-"} == {"cpu"}, each["model"]
        assert set(each["timing"]) == {"forward", "step"}
        for layer in each["layers"]:
            assert layer["work"]["flop"], (each["model"], layer["name"])
            # A frozen layer's step is its forward.
            assert all(0 < side for passed in layer["work"]["timing"].values() for side in passed.values())
    assert captured.err.splitlines()[0] == f"[1/{len(models.names())}] {models.names()[0]}"
    html = page.read_text()
    assert len(html) < 3e6 and all(f"{name}: The swapped layers" in html for name in models.names())


def test_cli_demo_fails_when_no_kernel_of_ours_runs(capsys, fast):
    with pyarch.backend("reference"):
        assert cli.main(["demo", "mamba", "--size", "tiny", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM mamba: no layer ran a kernel of ours" in out
    (row,) = [line for line in out.splitlines() if line.startswith("mamba")]
    assert row.split()[2] == "reference" and row.endswith("NO")


def test_cli_demo_refuses_unknown_names(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", "alexnet"])
    assert stopped.value.code == 2 and "convnext" in capsys.readouterr().err


def test_cli_demo_without_a_gpu_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", "--device", "cuda"])
    assert stopped.value.code == 2 and "torch sees no GPU" in capsys.readouterr().err


def test_cli_interrupt_ends_with_130(capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "demonstrate", interrupted)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# -------------------------------------------------------------------------------- check


@pytest.mark.operator("conv", "cpu")
@pytest.mark.parametrize("spec", ["users_net:build", "users_net:ready"])
def test_cli_check_of_a_users_model(capsys, fast, net_file, needs_cpu_kernels, spec):
    assert cli.main(["check", spec, "--input", "2,4,9,9", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("verification (float32) ok")


@pytest.mark.operator("conv", "cpu")
def test_cli_check_of_integers_in_bfloat16(capsys, fast, net_file, needs_cpu_kernels):
    options = [
        "--input",
        "2,9:int64:5",
        "--input",
        "1",
        "--dtype",
        "bfloat16",
        "--eval",
        "--json",
        "--device",
        "cpu",
    ]
    assert cli.main(["check", "users_net:Words", *options]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["dtype"] == "bfloat16" and document["layers"][0]["forward"] == "cpu"
    assert "input[1]" in [each["name"] for each in document["gradients"]]


def test_cli_check_forward_only(capsys, fast, net_file):
    cli.main(
        ["check", "users_net:build", "--input", "2,4,9,9", "--forward-only", "--json", "--device", "cpu"]
    )
    document = json.loads(capsys.readouterr().out)
    assert document["gradients"] == [] and set(document["timing"]) == {"forward"}


def test_cli_check_fails_a_model_with_nothing_to_swap(capsys, fast):
    assert cli.main(["check", "torch.nn:ReLU", "--input", "3"]) == 1
    assert "PROBLEM nothing to swap" in capsys.readouterr().out


@pytest.mark.parametrize(
    "spec, text",
    [
        ("users_net", "needs MODULE:FACTORY"),
        (":build", "needs MODULE:FACTORY"),
        ("nowhere:build", "no module 'nowhere' in"),
        ("nowhere.deep:build", "no module 'nowhere' in"),
        ("users_net:absent", "users_net has no 'absent'"),
        ("users_net:count", "is int, needs a model or what makes one"),
        ("users_net:sized", "missing a required argument: 'width'"),
        ("users_net:text", "gave str, needs a torch.nn.Module"),
    ],
)
def test_cli_check_explains_a_bad_model(capsys, net_file, spec, text):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", spec, "--input", "3"])
    assert stopped.value.code == 2 and text in capsys.readouterr().err


OWN_ERRORS = {
    "in the factory": (
        "users_net:broken",
        "making users_net:broken raised ValueError:",
        ["in broken"],
        "ValueError: the user's own",
    ),
    "in the forward": (
        "users_net:Failing",
        "running users_net:Failing with --input 3 raised RuntimeError:",
        ["in forward", "in reshaped"],
        "RuntimeError: shape '[7, 7]' is invalid for input of size 3",
    ),
    "in an import": (
        "needs_more:build",
        "importing needs_more:build raised ModuleNotFoundError:",
        ["in <module>"],
        "ModuleNotFoundError: No module named 'not_there_at_all'",
    ),
}


@pytest.mark.parametrize("spec, line, places, error", OWN_ERRORS.values(), ids=OWN_ERRORS)
def test_cli_check_shows_the_users_own_errors_from_their_file_on(capsys, net_file, spec, line, places, error):
    file = net_file / f"{spec.partition(':')[0]}.py"
    if not file.exists():
        file.write_text("import not_there_at_all\n")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", spec, "--input", "3", "--json", "--device", "cpu"])
    captured = capsys.readouterr()
    said = captured.err.splitlines()
    assert stopped.value.code == 1 and captured.out == ""
    assert said[:2] == [line, "Traceback (most recent call last):"] and said[-1] == error
    frames = [each.strip() for each in said if each.startswith("  File ")]
    assert all(f'File "{file}"' in frame for frame in frames)
    assert [frame.rpartition(", ")[2] for frame in frames] == places


def test_cli_check_shows_what_torch_refuses_without_frames_of_ours(capsys, net_file):
    """A model of torch's layers alone has no file of the user's."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", "users_net:build", "--input", "2,5,9,9", "--device", "cpu"])
    said = capsys.readouterr().err
    assert stopped.value.code == 1
    assert said.startswith("running users_net:build with --input 2,5,9,9 raised RuntimeError:\nTraceback")
    assert "expected input[2, 5, 9, 9] to have 4 channels" in said.splitlines()[-1]
    package = str(Path(pyarch.__file__).parent)
    assert package not in said and "container.py" in said


def test_cli_check_shows_where_a_users_file_is_no_python(capsys, net_file):
    (net_file / "no_python.py").write_text("def build(:\n")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", "no_python:build", "--input", "3"])
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and said.startswith("importing no_python:build raised SyntaxError:\n")
    assert said.count("  File ") == 1 and 'no_python.py", line 1' in said


def test_cli_check_does_not_hide_an_error_of_its_own(monkeypatch, net_file):
    def failing(*_, **__):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(cli, "check", failing)
    # Where the error arises is no file of the user's, nor of torch's.
    monkeypatch.setattr("pyarch.check.NOT_THE_USERS", {*check.NOT_THE_USERS, "tests"})
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli.main(["check", "users_net:build", "--input", "2,4,9,9", "--device", "cpu"])


@pytest.mark.parametrize(
    "text", ["", "3,x", "3,-1", "3:int64", "3:int64:0", "3:float32", "3:int64:5:6", "3:int64:x"]
)
def test_cli_check_explains_a_bad_input(text):
    with pytest.raises(SpecError, match="needs SHAPE such as 8,3,224,224"):
        read_input(text)


def test_cli_check_reads_inputs():
    assert read_input("8,3,224,224") == InputSpec((8, 3, 224, 224))
    ids = read_input("2,3:int64:7").draw(torch.float32, torch.device("cpu"))
    assert ids.shape == (2, 3) and ids.dtype == torch.int64 and 0 <= ids.min() and ids.max() < 7


# -------------------------------------------------------------------------------- tables


class Terminal(io.StringIO):
    def isatty(self):
        return True


TABLE = Table("title", ("name", ">figure"), [("[bold]a", "1"), ("b", "22")], ("a note",))


def test_table_in_plain_text():
    assert str(TABLE) == "title\nname     figure\n-------  ------\n[bold]a       1\nb            22\na note"
    assert str(Table("title", ("a",), (), ("note",))) == "title\nnote"


def test_table_is_drawn_on_a_terminal_only(capsys, monkeypatch):
    terminal = Terminal()
    TABLE.show(terminal)
    drawn = terminal.getvalue()
    assert "┃" in drawn and "[bold]a" in drawn and drawn.rstrip().endswith("a note")
    TABLE.show()
    assert capsys.readouterr().out == f"{TABLE}\n"
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    without_rich = Terminal()
    TABLE.show(without_rich)
    assert without_rich.getvalue() == f"{TABLE}\n"


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(report.with_progress(("first", "second"))) == ["first", "second"]
    assert "second" in terminal.getvalue() and "[1/2]" not in terminal.getvalue()


def test_durations_and_json_for_people_and_programs():
    assert [report.milliseconds(each) for each in (0.0001234, 0.01, 0.5, 12.0)] == [
        "0.123 ms",
        "10 ms",
        "500 ms",
        "12000 ms",
    ]
    assert json.loads(report.as_json({"a": [float("inf"), float("nan"), 1.5]})) == {"a": ["inf", "nan", 1.5]}
