"""What a comparison says: advice from figures alone, tables, JSON, the page in a browser, the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pyarch import __main__ as cli
from pyarch.comparison import measure, run
from pyarch.comparison.advice import advise, binary
from pyarch.comparison.command import DEFAULT
from pyarch.comparison.measure import Row, Side
from pyarch.comparison.page import page_of
from pyarch.comparison.question import Question
from pyarch.comparison.reach import Reach
from pyarch.comparison.report import Report
from pyarch.comparison.results import Compared, Comparison, refusals
from tests.browser import browser, read

__all__ = ["browser", "read"]  # fixtures

OPERATOR = "comparison"
ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
MS = 1e-3
SMALL = ["--seq", "4,9", "--batch", "1", "--width", "8", "--heads", "1,3", "--window", "2", "--kernel", "3"]
SMALL += ["--device", "cpu", "--budget", "0"]
NAMES = [
    "vanilla RNN",
    "GRU",
    "LSTM",
    "BiLSTM",
    "attention (1 head)",
    "attention (3 heads)",
    "windowed attention (3 heads)",
    "depthwise conv",
    "separable conv",
    "full conv",
]


def side(step: float, token: float | None = None, memory: float = 1, off: float = 0.01) -> Side:
    """A side in milliseconds and MiB; most rounds of a time are off by less than the share `off`."""
    times = {"forward": step * MS / 3, "step": step * MS} | ({} if token is None else {"token": token * MS})
    spread = {name: (value * (1 - off), value * (1 + off)) for name, value in times.items()}
    return Side(**times, memory=round(memory * MIB), state=64, spread=spread)


def compared(name, family, parameters, rows, reach, note="") -> Compared:
    rows = tuple(Row(length, *sides) for length, sides in zip((100, 200), rows, strict=True))
    return Compared(name, family, note, parameters, (10, 20), rows, Reach(tuple(reach)))


FLAT = [1.0] * 200
FADING = [0.5**distance for distance in range(200)]
GRU = compared(
    "GRU", "recurrent", 75, [(side(20, 2, 5), side(6, 1, 4)), (side(40, 2, 10), side(12, 1, 8))], FADING
)
LSTM = compared(
    "LSTM", "recurrent", 100, [(side(13, 3, 9), side(12, 2, 7)), (side(26, 3, 18), side(25, 2, 14))], FADING
)
ATTENTION = compared(
    "attention", "attention", 80, [(side(9, 4, 4), side(10, 5, 2)), (side(36, 8, 16), side(40, 10, 4))], FLAT
)
CONV = compared(
    "full conv",
    "convolution",
    500,
    [(side(30, 7, 3), Side(refused="not swapped")), (side(60, 7, 6), Side(refused="not swapped"))],
    [1.0, 1.0, 1.0] + [0.0] * 197,
    note="3 taps",
)
FOUND = Comparison(Question(lengths=(100, 200)), {"device": "a CPU"}, (GRU, LSTM, ATTENTION, CONV))


@pytest.fixture
def fast(monkeypatch):
    """Timing that takes no time."""
    monkeypatch.setattr("pyarch.timing.FEWEST_ROUNDS", 1)


# -------------------------------------------------------------------------------- advice


def advice() -> dict[str, tuple[str, str]]:
    return {each.purpose: (each.choice, each.reason) for each in advise(FOUND)}


def test_comparison_advises_on_training_with_figures():
    choice, reason = advice()["training speed"]
    assert choice == "GRU"
    assert reason == (
        "12 ms a training step with pyarch, where torch takes 40 ms (3.33x), 2.08x faster than LSTM (25 ms), "
        "with 25 % fewer parameters. Its gradient falls below 1 % beyond 7 tokens."
    )


def test_comparison_advises_on_far_reach():
    choice, reason = advice()["training speed, with every token in reach"]
    assert choice == "attention"
    assert reason == (
        "36 ms a training step with torch, where pyarch takes 40 ms (0.90x). "
        "Its gradient reaches all 199 tokens before."
    )
    choice, reason = advice()["far reach"]
    assert choice == "attention"
    assert "still 100 % of its largest at 199 tokens before" in reason
    assert reason.endswith("the next, GRU, falls below 1 % beyond 7.")
    twice = replace(FOUND, compared=(GRU, ATTENTION, replace(LSTM, reach=ATTENTION.reach)))
    (far,) = (each for each in advise(twice) if each.purpose == "far reach")
    assert far.choice == "LSTM"
    assert far.reason.endswith("Of 2 that reach so far its training step is the fastest, 25 ms.")


def test_comparison_advises_on_latency_and_memory():
    assert advice()["generation latency"][0] == "GRU"
    choice, reason = advice()["memory"]
    assert choice == "attention"
    assert reason.startswith("4 MiB in a training step with pyarch, where torch takes 16 MiB (4.00x), ")
    assert "1.50x less than full conv (6 MiB), with 84 % fewer parameters." in reason
    assert advice()["memory, among recurrent layers"][0] == "GRU"


def test_comparison_says_what_pyarch_gains():
    choice, reason = advice()["largest gain by pyarch, training speed"]
    assert choice == "GRU"
    assert reason == (
        "torch over pyarch: GRU 3.33x (3.27x to 3.40x), LSTM 1.04x (1.02x to 1.06x), "
        "attention 0.90x (0.88x to 0.92x)."
    )
    choice, reason = advice()["largest gain by pyarch, memory"]
    assert choice == "attention" and reason == "torch over pyarch: attention 4.00x, LSTM 1.29x, GRU 1.25x."


def test_comparison_names_no_gain_where_pyarch_loses():
    losses = [each for each in advise(replace(FOUND, compared=(ATTENTION,))) if "training" in each.purpose]
    assert (losses[-1].purpose, losses[-1].choice) == ("largest gain by pyarch, training speed", "none")
    assert losses[-1].reason == "torch over pyarch: attention 0.90x (0.88x to 0.92x)."
    assert losses[-1].settled


def test_comparison_does_not_settle_that_there_is_no_gain():
    rows = GRU.rows[0], Row(200, side(39.6), side(40, off=0.09))
    (gain,) = (
        each
        for each in advise(replace(FOUND, compared=(replace(GRU, rows=rows),)))
        if each.purpose == "largest gain by pyarch, training speed"
    )
    assert (gain.choice, gain.settled) == ("none", False)
    assert gain.reason.startswith("torch over pyarch: GRU 0.99x (0.90x to 1.10x). A quiet machine")


def test_comparison_does_not_advise_the_same_twice():
    assert "training speed, among recurrent layers" not in advice()


def test_comparison_calls_near_figures_equal():
    near = replace(LSTM, name="near", rows=tuple(replace(row, pyarch=side(12.3)) for row in GRU.rows))
    found = replace(FOUND, compared=(GRU, near))
    (first,) = (each for each in advise(found) if each.purpose == "training speed")
    assert "equal to near (12.3 ms) within 5 %" in first.reason


def varied(like: Compared, name: str, step: float, off: float) -> Compared:
    """The architecture under another name with other training steps of pyarch."""
    rows = tuple(replace(row, pyarch=side(step, off=off)) for row in like.rows)
    return replace(like, name=name, rows=rows)


def test_comparison_does_not_settle_what_overlaps():
    """12 ms, of which most rounds take up to 12.12 ms, beside 12.6 ms, of which some take 11.97 ms."""
    found = replace(FOUND, compared=(GRU, varied(LSTM, "near", 12.6, off=0.05), CONV))
    first = advise(found)[0]
    assert (first.purpose, first.choice, first.settled) == ("training speed", "GRU or near", False)
    assert first.reason == (
        "A training step: GRU 12 ms (11.9 ms to 12.1 ms) with pyarch, near 12.6 ms (12 ms to 13.2 ms) with "
        "pyarch. near may be from 1.01x faster to 1.11x slower than GRU. A quiet machine may "
        "settle it; longer runs (--budget) know the spread better. "
        "GRU: its gradient falls below 1 % beyond 7 tokens. "
        "near: its gradient falls below 1 % beyond 7 tokens."
    )
    assert str(first).startswith("Training speed: GRU or near, not settled. A training step: ")
    told = json.loads(Report(found).to_json())["advice"][0]
    assert (told["choice"], told["settled"]) == ("GRU or near", False)
    assert "GRU or near, not settled" in str(Report(found).table())
    assert "GRU or near, not settled" in page_of(found).html()


def test_comparison_settles_the_same_figures_with_less_spread():
    found = replace(FOUND, compared=(GRU, varied(LSTM, "near", 12.6, off=0.01)))
    first = advise(found)[0]
    assert (first.choice, first.settled) == ("GRU", True) and "settle" not in first.reason


def test_comparison_names_all_that_overlap_once():
    near = [varied(GRU, f"near {step}", step, off=0.05) for step in (12.2, 12.5, 30)]
    said = [each for each in advise(replace(FOUND, compared=(GRU, *near))) if "training" in each.purpose]
    assert said[0].choice == "GRU, near 12.2 or near 12.5" and not said[0].settled
    assert "among recurrent" not in " ".join(each.purpose for each in said)


def test_comparison_assumes_a_spread_of_what_was_measured_once():
    def beside(step: float) -> str:
        once = tuple(replace(row, pyarch=replace(side(step), spread={})) for row in LSTM.rows)
        return advise(replace(FOUND, compared=(GRU, replace(LSTM, rows=once))))[0].choice

    assert beside(12.5) == "GRU or LSTM" and beside(13) == "GRU"


def test_comparison_says_where_both_sides_are_within_their_spread():
    rows = GRU.rows[0], Row(200, side(41), side(40, off=0.05))
    found = replace(FOUND, compared=(replace(GRU, name="close", rows=rows),))
    said = {each.purpose: each for each in advise(found)}
    assert "where torch takes 41 ms (1.02x, within their spread)" in said["training speed"].reason
    gain = said["largest gain by pyarch, training speed"]
    assert (gain.choice, gain.settled) == ("close", False)
    assert gain.reason == (
        "torch over pyarch: close 1.02x (0.97x to 1.09x). "
        "A quiet machine may settle it; longer runs (--budget) know the spread better."
    )


def test_comparison_does_not_settle_whose_gain_is_the_largest():
    other = varied(GRU, "other", 12.1, off=0.01)
    said = {each.purpose: each for each in advise(replace(FOUND, compared=(GRU, other, LSTM)))}
    gain = said["largest gain by pyarch, training speed"]
    assert (gain.choice, gain.settled) == ("GRU or other", False) and gain.reason.endswith(
        "the spread better."
    )


def test_comparison_does_not_settle_which_of_far_reach_is_the_fastest():
    near = replace(varied(GRU, "near", 36.5, off=0.05), reach=ATTENTION.reach)
    said = {each.purpose: each for each in advise(replace(FOUND, compared=(ATTENTION, near)))}
    far = said["far reach"]
    assert (far.choice, far.settled) == ("attention or near", False)
    assert far.reason.endswith(
        "Of 2 that reach so far which training step is the fastest is not settled: near may be from 1.05x "
        "faster to 1.08x slower than attention. A quiet machine may settle it; longer runs (--budget) "
        "know the spread better."
    )


def test_comparison_does_not_doubt_equal_bytes():
    said = {each.purpose: each for each in advise(replace(FOUND, compared=(GRU, replace(GRU, name="twin"))))}
    assert said["memory"].settled and "equal to twin (8 MiB) within 5 %" in said["memory"].reason


@pytest.mark.parametrize("count, words", [(80, "20 % fewer"), (130, "30 % more"), (320, "3.2x the")])
def test_comparison_counts_parameters_beside_speed(count, words):
    quick = replace(GRU, parameters=count)
    found = replace(FOUND, compared=(quick, LSTM))
    assert f"faster than LSTM (25 ms), with {words} parameters." in advise(found)[0].reason


def test_comparison_minds_what_a_choice_lacks():
    alone = replace(FOUND, compared=(CONV,))
    assert all(each.reason.endswith("Mind: 3 taps.") for each in advise(alone)[:3])
    assert "60 ms a training step with torch alone." in advise(alone)[0].reason


def test_comparison_advises_nothing_without_figures():
    failed = tuple(Row(length, Side(refused="failed: x"), Side(refused="failed: x")) for length in (100, 200))
    nothing = replace(FOUND, compared=(replace(GRU, rows=failed, reach=None),))
    assert advise(nothing) == [] and not nothing.ok
    assert refusals(nothing) == ["GRU, stock: failed: x", "GRU, pyarch: failed: x"]


# -------------------------------------------------------------------------------- tables


def test_comparison_as_tables():
    time, costs, traits, said = Report(FOUND).table().tables
    assert time.rows[4][:5] == ("200", "GRU", "13.3 ms ±1%", "4 ms ±1%", "3.33x")
    assert time.rows[4][5:] == ("40 ms ±1%", "12 ms ±1%", "3.33x")
    assert costs.rows[6] == (
        "200",
        "attention",
        "8 ms ±1%",
        "10 ms ±1%",
        "0.80x",
        "0.0625 KiB",
        "16 MiB",
        "4 MiB",
        "4.00x",
    )
    assert traits.rows[2][:5] == ("attention", "80", "2e-08", "all 199", "all 199")
    assert traits.rows[2][5:] == ("~T^2.0", "~T^2.0", "~T^1.0", "~T^1.0", "~T^2.0", "~T^1.0")
    assert traits.rows[3][5:7] == ("~T^1.0", "-") and "full conv, pyarch: not swapped" in traits.notes
    assert said.notes[0].startswith("- Training speed: GRU. 12 ms")


def test_comparison_tables_mark_speedups_that_are_not_settled():
    rows = GRU.rows[0], Row(200, side(41, token=2, off=0.03), replace(side(40, token=1), spread={}))
    time, costs, *_ = Report(replace(FOUND, compared=(replace(GRU, rows=rows),))).table().tables
    assert time.rows[1][5:] == ("41 ms ±3%", "40 ms once", "1.02x ?")
    assert costs.rows[1][2:5] == ("2 ms ±3%", "1 ms once", "2.00x")
    assert any("not settled" in note for note in time.notes)


def test_comparison_shows_growth_only_of_several_lengths():
    once = replace(
        FOUND,
        question=Question(lengths=(100,)),
        compared=tuple(replace(each, rows=each.rows[:1], flop=(10,)) for each in FOUND.compared),
    )
    traits = Report(once).table().tables[2]
    assert len(traits.columns) == len(traits.rows[0]) == 5 and "~T^" not in str(traits)
    assert not [each for each in page_of(once).sections if "over length" in each.title]


def test_comparison_names_the_lengths_of_a_refusal():
    partly = replace(GRU, rows=(GRU.rows[0], replace(GRU.rows[1], stock=Side(refused="skipped: large"))))
    assert refusals(replace(FOUND, compared=(partly,))) == ["GRU, stock at 200 tokens: skipped: large"]


def test_comparison_counts_nothing_of_what_could_not_be_built():
    refused = tuple(Row(length, Side(refused="odd"), Side(refused="odd")) for length in (100, 200))
    unbuilt = replace(GRU, name="odd", parameters=None, flop=(None, None), rows=refused, reach=None)
    found = replace(FOUND, compared=(GRU, unbuilt))
    assert Report(found).table().tables[2].rows[1] == ("odd", *["-"] * 10)
    (sheet,) = (each for each in page_of(found).sections if each.title == "Architectures")
    assert sheet.rows[1][1:3] == (None, None) and page_of(found).html()
    assert json.loads(Report(found).to_json())["architectures"][1]["rows"][0]["flop"] is None


def test_comparison_sizes_for_people():
    assert [binary(each) for each in (64, 2048, 3.5 * MIB, 200 * MIB, 2**31)] == [
        "0.0625 KiB",
        "2 KiB",
        "3.5 MiB",
        "200 MiB",
        "2 GiB",
    ]


# -------------------------------------------------------------------------------- the command


def test_comparison_from_the_command_line(capsys, fast, tmp_path):
    page = tmp_path / "deep" / "page.html"
    assert cli.main(["compare", *SMALL, "--json", "--html", str(page)]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["schema"] == "pyarch.compare/1" and document["ok"]
    assert document["question"]["lengths"] == [4, 9] and document["machine"]["torch"] == torch.__version__
    found = {each["name"]: each for each in document["architectures"]}
    assert list(found) == NAMES
    assert found["GRU"]["rows"][1]["pyarch"]["step"] > 0 and found["GRU"]["reach"]["tokens"] == 9
    assert set(found["GRU"]["growth"]["pyarch"]) == {"forward", "step", "token", "memory"}
    refused = found["attention (3 heads)"]
    assert refused["parameters"] is refused["reach"] is None
    assert refused["rows"][0]["stock"]["refused"] == "width 8 is no multiple of 3 heads"
    assert found["windowed attention (3 heads)"]["rows"][0]["pyarch"]["refused"]
    assert {each["purpose"] for each in document["advice"]} >= {
        "training speed",
        "generation latency",
        "memory",
    }
    progress = captured.err.splitlines()
    assert progress[0].startswith("[1/20] vanilla RNN, 4 tokens") and len(progress) == 21
    assert "GRU" in page.read_text()


def test_comparison_in_text(capsys, fast):
    assert cli.main(["compare", *SMALL, "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    for text in ("time of a call: batch 1, width 8, bfloat16", "generation and memory", "architectures"):
        assert text in out
    assert "what these figures say of 9 tokens\n- Training speed: " in out


def test_comparison_defaults_are_the_questions():
    options = cli._parser().parse_args(["compare"])
    assert (options.seq, options.batch, options.width) == (DEFAULT.lengths, DEFAULT.batch, DEFAULT.width)
    assert (options.heads, options.window, options.kernel) == (DEFAULT.heads, DEFAULT.window, DEFAULT.kernel)


def test_comparison_sorts_lengths():
    assert cli._parser().parse_args(["compare", "--seq", "512,128,512"]).seq == (128, 512)


@pytest.mark.parametrize(
    "options, text",
    [
        (["--seq", "128,x"], "--seq: got '128,x', needs lengths such as 128,512,2048, each at least 2"),
        (["--seq", "1"], "each at least 2"),
        (["--seq", ""], "needs lengths"),
        (["--heads", "0,8"], "--heads: got '0,8', needs whole numbers such as 1,8,16, each at least 1"),
        (["--batch", "0"], "--batch: got '0', needs a whole number of at least 1"),
        (["--width", "-3"], "needs a whole number of at least 1"),
        (["--kernel", "3.5"], "needs a whole number of at least 1"),
        (["--window", "-1"], "needs a whole number of at least 0"),
        (["--budget", "-1"], "--budget: got '-1', needs a number of seconds"),
        (["--budget", "long"], "needs a number of seconds"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--html", "."], "is a folder"),
    ],
)
def test_comparison_explains_bad_options(capsys, options, text):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", *options])
    assert stopped.value.code == 2 and text in capsys.readouterr().err


def test_comparison_of_nothing_that_runs_fails(capsys, fast, monkeypatch):
    monkeypatch.setattr(measure, "swapped", lambda stock: None)
    monkeypatch.setattr(measure.Trial, "refusal", lambda trial, generates: "failed: no luck")
    assert cli.main(["compare", *SMALL]) == 1
    assert "GRU, stock: failed: no luck" in capsys.readouterr().out


def test_comparison_interrupted_writes_nothing(capsys, fast, monkeypatch, tmp_path):
    measured = run.measure

    def interrupted(architecture, question, length):
        if architecture.name == "LSTM":
            raise KeyboardInterrupt
        return measured(architecture, question, length)

    monkeypatch.setattr(run, "measure", interrupted)
    assert cli.main(["compare", *SMALL, "--html", str(tmp_path / "page.html")]) == 130
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith("interrupted\n")
    assert not list(tmp_path.iterdir())


def test_comparison_interrupted_from_a_shell(tmp_path):
    command = [sys.executable, "-m", "pyarch", "compare", "--html", str(tmp_path / "page.html")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=one_thread(),
        # A shell starts what it runs in the background deaf to Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stderr.readline().startswith("[1/33] vanilla RNN, 128 tokens")
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and out == "" and errors.endswith("interrupted\n")
    assert not list(tmp_path.iterdir())


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


# -------------------------------------------------------------------------------- the page


def test_comparison_page_holds_every_figure():
    titles = [each.title for each in page_of(FOUND).sections]
    assert titles == [
        "What to choose for 200 tokens",
        "Training step at 200 tokens",
        "Generated token at 200 tokens",
        "Memory of a training step at 200 tokens",
        "Training step over length, pyarch",
        "Training step over length, stock",
        "Generated token over length, pyarch",
        "Generated token over length, stock",
        "Memory of a training step over length, pyarch",
        "Memory of a training step over length, stock",
        "How far the gradient reaches",
        "All figures",
        "Architectures",
        "Remarks",
        "Measured on",
    ]
    bars = page_of(FOUND).sections[1]
    assert bars.series == {
        "stock": pytest.approx([40, 26, 36, 60]),
        "pyarch": [pytest.approx(12), pytest.approx(25), pytest.approx(40), None],
    }
    sheet = page_of(FOUND).sections[11]
    assert sheet.columns[6:9] == [">step ms", ">step p20", ">step p80"]
    assert ">memory p20" not in sheet.columns
    assert sheet.rows[0][6:9] == pytest.approx((20.0, 19.8, 20.2))
    reach = page_of(FOUND).sections[10]
    assert set(reach.series) == {"GRU", "LSTM", "attention", "full conv", "0.9^d", "1.1^d"}
    assert reach.series["full conv"] == [(1, 1.0), (2, 1.0)]
    assert min(share for _, share in reach.series["GRU"]) >= 1e-6


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_comparison_page_in_a_browser(read, tmp_path, theme):
    page_of(FOUND).write(tmp_path / "page.html")
    opened = read(tmp_path / "page.html", color_scheme=theme, viewport={"width": 390, "height": 844}).page
    assert opened.locator("h1").inner_text() == "Architectures over sequences"
    assert opened.locator("svg, canvas").count() >= 10
    assert "12 ms a training step with pyarch" in opened.locator("body").inner_text()
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
