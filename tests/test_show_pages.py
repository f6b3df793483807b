"""The pages of demo and check: every section with the figures of the report, and how a failure looks."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import pyarch
from pyarch import __main__ as cli
from pyarch import ceilings, demo, layer_work, native, timing
from pyarch.check import check
from pyarch.maps_page import PageMaps
from pyarch.page import Bars, Facts, HeatMaps, Prose, Scatter, Sheet
from pyarch.swap_report import Record
from pyarch.verify_page import sections, summary
from pyarch.verify_report import Comparison, LayerResult, VerifyReport
from tests.swap_cases import depthwise, image

OPERATOR = "cli"
CPU = torch.device("cpu")
HOSTILE = '</script><img src=x onerror="alert(1)">'


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Timing and ceilings that take no time."""
    monkeypatch.setattr(timing, "BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(timing, "FEWEST_ROUNDS", 1)
    monkeypatch.setattr(layer_work, "BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(ceilings, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "PRODUCT_SIZES", {"cpu": (64,)})


@pytest.fixture
def needs_cpu_kernels():
    refusal = native.serving()[1]
    if refusal:
        pytest.skip(refusal)


def shown(*names: str) -> demo.Demo:
    with pyarch.backend("cpu"):
        return demo.demonstrate(names, CPU, "tiny", layer_times=True, maps=4)


def by_title(page) -> dict[str, object]:
    found = {each.title: each for each in page.sections}
    assert len(found) == len(page.sections), "two sections of one title"
    return found


# -------------------------------------------------------------------------------- one model


@pytest.mark.operator("attention", "cpu")
def test_page_of_a_model_with_attention(needs_cpu_kernels):
    result = shown("gpt")
    proof = result.shown[0].proof
    page = result.page()
    parts = by_title(page)
    assert list(parts) == [
        "Whole model, before and after",
        "Each swapped layer, forward, without gradients",
        "Each swapped layer, step: forward and backward",
        "The swapped layers",
        "Roofline of the swapped layers",
        "What one call of each layer computes and moves",
        "Error beside torch's own",
        "Attention, from the real weights",
        "Where this was measured",
    ]
    assert page.title == "gpt: torch and pyarch" and page.lead.startswith("Verified against float64")
    layers = [layer.name for layer in proof.layers]
    assert layers == ["layers.0", "layers.0.self_attn", "layers.1", "layers.1.self_attn"]

    whole = parts["Whole model, before and after"]
    forward, step = proof.timing["forward"], proof.timing["step"]
    assert whole.series["torch"] == [forward.stock * 1e3, step.stock * 1e3]
    assert whole.series["pyarch"] == [forward.swapped * 1e3, step.swapped * 1e3]
    alone = parts["Each swapped layer, step: forward and backward"]
    assert alone.names == layers
    assert alone.series["pyarch"] == [each.work.timing["step"].swapped * 1e3 for each in proof.layers]

    maps = parts["Attention, from the real weights"]
    assert list(maps.maps) == ["layers.0.self_attn", "layers.1.self_attn"]
    heads = torch.tensor(maps.maps["layers.1.self_attn"])
    assert heads.shape == (4, 33, 33)
    torch.testing.assert_close(heads.sum(-1), torch.ones(4, 33))
    assert heads.triu(1).count_nonzero() == 0, "a causal model looks back only"
    assert set(parts["Where this was measured"].pairs) >= {"device", "threads", "torch"}


@pytest.mark.operator("conv", "cpu")
def test_page_of_a_model_with_convolutions(needs_cpu_kernels):
    result = shown("convnext")
    each = result.shown[0]
    parts = by_title(result.page())
    assert not [part for part in parts.values() if isinstance(part, HeatMaps)]

    roofline = parts["Roofline of the swapped layers"]
    layer, point = each.proof.layers[0], roofline.series["pyarch"][0]
    assert point.label == layer.name and point.x == layer.work.flop / layer.work.bytes
    assert point.y == pytest.approx(layer.work.flop / layer.work.timing["forward"].swapped / 1e9)
    roof = each.proof.ceilings
    (left, low), corner, (_, high) = roofline.lines["roof"]
    assert low == left * roof.copy_gb_per_s and high == roof.matmul_gflop_per_s
    assert corner == (roof.ridge, pytest.approx(high))

    errors = parts["Error beside torch's own"]
    drawn = {point.label: (point.x, point.y) for point in errors.series["gradients of layers"]}
    compared = layer.gradients[0]
    assert drawn[f"{layer.name}: {compared.name}"] == (compared.stock_error, compared.error)
    assert "beyond tolerance" not in errors.series

    sheet = parts["The swapped layers"]
    assert [row[0] for row in sheet.rows] == [layer.name for layer in each.proof.layers]
    row = dict(zip(sheet.headings, sheet.rows[0], strict=True))
    assert (row["class"], row["forward on"], row["backward on"]) == ("Conv2d", "cpu", "cpu")
    forward = layer.work.timing["forward"]
    assert row["forward, torch ms"] == forward.stock * 1e3 and row["forward speedup"] == forward.speedup
    assert row["share of allowed"] == layer.worst.ratio

    computed = parts["What one call of each layer computes and moves"]
    row = dict(zip(computed.headings, computed.rows[0], strict=True))
    assert row["MFLOP"] == layer.work.flop * 1e-6 and row["pyarch GFLOP/s"] == point.y

    left_alone = parts["Left alone, and why"]
    row = dict(zip(left_alone.headings, left_alone.rows[0], strict=True))
    assert row["class"] == "torch.nn.Conv2d" and "not depthwise" in row["reason"]
    assert sum(row[1] for row in left_alone.rows) == len(each.skipped)


@pytest.mark.operator("recurrent", "cpu")
def test_page_of_a_recurrent_model(needs_cpu_kernels):
    parts = by_title(shown("bilstm_tagger").page())
    assert parts["Each swapped layer, forward, without gradients"].names == ["lstm"]
    assert parts["Roofline of the swapped layers"].series["pyarch"][0].label == "lstm"


@pytest.mark.operator("attention", "cpu")
def test_page_of_plain_calls_of_attention(needs_cpu_kernels):
    """t5 calls torch's function itself: its calls are one layer, its maps carry the names of the callers."""
    parts = by_title(shown("t5").page())
    assert [row[0] for row in parts["The swapped layers"].rows] == ["F.scaled_dot_product_attention"]
    assert len(parts["Attention, from the real weights"].maps) == 3


# -------------------------------------------------------------------------------- several models


@pytest.mark.operator("conv", "cpu")
def test_page_of_several_models_begins_with_an_overview(needs_cpu_kernels):
    result = shown("mobilenet", "bilstm_tagger")
    page = result.page()
    parts = by_title(page)
    first, second = page.sections[:2]
    assert first.names == ["mobilenet", "bilstm_tagger"]
    assert first.series["step"] == [each.proof.timing["step"].speedup for each in result.shown]
    row = dict(zip(second.headings, second.rows[1], strict=True))
    assert row["model"] == "bilstm_tagger" and row["verified"] == "yes"
    assert row["worst of allowed"] == result.shown[1].proof.worst.ratio
    for name in first.names:
        assert f"{name}: The swapped layers" in parts
    assert isinstance(page.sections[-1], Facts) and page.lead.startswith("2 models")


def test_page_of_several_models_names_those_that_failed():
    good = demo.Shown("good", 1, report())
    bad = demo.Shown("bad", 1, replace(report(), problems=("it is wrong",)))
    page = demo.Demo((good, bad), {}).page()
    assert page.lead == "FAILED: 1 of 2 models are not proven: bad."
    assert page.sections[0] == Prose("Overview: verification FAILED", ["bad: it is wrong"])
    assert page.sections[2].rows[1][-1] == "NO"


# -------------------------------------------------------------------------------- failures and odd figures


def report(*compared: Comparison, **fields) -> VerifyReport:
    layers = (LayerResult("layer", "Conv2d", 1, "cpu", "cpu", compared),)
    return VerifyReport(**{"dtype": "float32", "layers": layers, "outputs": (), "gradients": ()} | fields)


def test_a_failed_verification_stands_at_the_top():
    proof = report(problems=("layer 'layer': output: error 1", "and another"), notes=("dropout set to 0",))
    parts = sections(proof, (), PageMaps())
    assert parts[0] == Prose("Problems: verification FAILED", proof.problems)
    assert parts[-1].lines == ("dropout set to 0",)
    assert summary(proof).startswith("FAILED: ") and "2 problems" in summary(proof)


def test_errors_that_no_logarithm_shows_are_counted():
    kept, exact = Comparison("a", 1e-7, 2e-7, 5e-7), Comparison("b", 0.0, 1e-7, 5e-7)
    broken, nan = Comparison("c", 1e-3, 1e-7, 5e-7), Comparison("d", float("inf"), 1e-7, 5e-7)
    (errors,) = [
        each for each in sections(report(kept, exact, broken, nan), (), PageMaps()) if is_scatter(each)
    ]
    assert {name: [point.label for point in points] for name, points in errors.series.items()} == {
        "outputs of layers": ["layer: a"],
        "beyond tolerance": ["layer: c"],
    }
    assert "Not drawn: 2 of 4" in errors.note


def is_scatter(part: object) -> bool:
    return isinstance(part, Scatter)


def test_a_layer_that_was_not_timed_has_dashes():
    (sheet,) = [each for each in sections(report(), (), PageMaps()) if isinstance(each, Sheet)]
    row = dict(zip(sheet.headings, sheet.rows[0], strict=True))
    assert row["forward, torch ms"] is row["step speedup"] is row["output error"] is None


def test_only_the_slowest_layers_have_bars(monkeypatch):
    monkeypatch.setattr("pyarch.verify_page.MOST_BARS", 2)
    model = nn.Sequential(*(depthwise(padding=1) for _ in range(4)))
    with pyarch.backend("reference"):
        proof = pyarch.verify(model, image(), timing=False, layer_times=True)
    bars = [each for each in sections(proof, (), PageMaps()) if isinstance(each, Bars)]
    for each in bars:
        assert len(each.names) == 2 and each.names == sorted(each.names) and "2 that take" in each.note
    slowest = max(proof.layers, key=lambda layer: layer.work.timing["forward"].stock)
    assert slowest.name in bars[0].names


def test_what_was_left_alone_is_grouped_by_its_reason():
    names = [f"conv{number}" for number in range(9)]
    skipped = [Record(name, (name,), "torch.nn.Conv2d", "", "", "not-depthwise", "dense") for name in names]
    skipped.append(Record("", ("",), "Mine", "", "", "patched", "its forward is patched", "call it plainly"))
    parts = sections(report(), skipped, PageMaps())
    assert [list(row) for row in parts[-1].rows] == [
        ["torch.nn.Conv2d", 9, "dense", None, "conv0, conv1, conv2, conv3, conv4, conv5 and 3 more"],
        ["Mine", 1, "its forward is patched", "call it plainly", "(the model)"],
    ]


def test_hostile_names_are_text(tmp_path):
    model = nn.Sequential()
    model.add_module("<b>layer&", depthwise())
    with pyarch.backend("reference"):
        page = check(HOSTILE, model, (image(),), backward=True, layer_times=True, maps=True).page()
    html = page.html()
    assert HOSTILE not in html and "<b>layer" not in html
    assert "&lt;b&gt;layer&amp;" in html


# -------------------------------------------------------------------------------- from the shell


@pytest.fixture
def own_net(tmp_path, monkeypatch):
    (tmp_path / "shown_net.py").write_text(
        textwrap.dedent(
            """
            from torch import nn

            def build():
                return nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1))
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("shown_net", None)
    sys.path[:] = [each for each in sys.path if each != str(tmp_path)]


CHECK = ["check", "shown_net:build", "--input", "2,4,9,9", "--device", "cpu"]


@pytest.mark.operator("conv", "cpu")
def test_check_writes_a_page(capsys, own_net, needs_cpu_kernels):
    with pyarch.backend("cpu"):
        assert cli.main([*CHECK, "--html", "new/page.html"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("verification (float32) ok") and out.endswith("page: new/page.html\n")
    html = Path("new/page.html").read_text()
    assert "<title>shown_net:build: torch and pyarch</title>" in html and "not depthwise" in html
    assert os.listdir("new") == ["page.html"], "no temporary file is left"


@pytest.mark.operator("conv", "cpu")
def test_page_and_json_together(capsys, own_net, needs_cpu_kernels):
    with pyarch.backend("cpu"):
        assert cli.main([*CHECK, "--html", "page.html", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert captured.err == "page: page.html\n"
    (layer,) = document["layers"]
    assert layer["work"]["timing"].keys() == {"forward", "step"} and layer["work"]["flop"] == 7056
    assert document["ceilings"]["copy_gb_per_s"] > 0 and document["machine"]["threads"] == "1"
    assert [each["name"] for each in document["skipped"]] == ["1"]


def test_a_failed_check_still_writes_its_page(capsys, own_net):
    with pyarch.backend("reference"):
        assert cli.main([*CHECK, "--html", "page.html"]) == 1
    html = Path("page.html").read_text()
    assert "FAILED: " in html and "no layer ran a kernel of ours" in html
    assert html.index("Problems: verification FAILED") < html.index("Whole model, before and after")


def test_a_model_with_nothing_to_swap_has_a_page_too(own_net):
    assert cli.main(["check", "torch.nn:ReLU", "--input", "3", "--html", "page.html"]) == 1
    assert "nothing to swap" in Path("page.html").read_text()


@pytest.mark.parametrize("place", ["file/page.html", "folder"])
def test_a_page_that_cannot_be_written_is_one_clear_error(capsys, own_net, place):
    (own_net / "file").write_text("")
    (own_net / "folder").mkdir()
    with pytest.raises(SystemExit) as stopped:
        cli.main([*CHECK, "--html", place])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "argument --html" in error and ("folder" in error) and place in error


def test_a_page_that_fails_at_the_end_is_an_error_after_the_table(capsys, own_net, monkeypatch):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarch.page.Page.write", full)
    with pytest.raises(SystemExit) as stopped:
        cli.main([*CHECK, "--html", "page.html"])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and "verification" in captured.out
    assert captured.err.splitlines()[-1].endswith("argument --html: page.html: No space left on device")


@pytest.mark.operator("conv", "cpu")
def test_demo_writes_a_page_of_less_than_three_megabytes(capsys, tmp_path, needs_cpu_kernels):
    file = tmp_path / "page.html"
    with pyarch.backend("cpu"):
        assert cli.main(["demo", "vit", "--size", "tiny", "--device", "cpu", "--html", str(file)]) == 0
    assert file.stat().st_size < 3e6 and "Attention, from the real weights" in file.read_text()
