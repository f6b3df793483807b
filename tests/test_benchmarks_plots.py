"""Static pictures of results: all cases on them, the same bytes every time, stale ones found."""

from __future__ import annotations

import copy
import re

import pytest

pytest.importorskip("matplotlib", reason="plots need the package matplotlib")

from benchmarks import plots, results

RECURRENT = results.load(results.RESULTS / "cpu-amd-epyc-zen5-2c" / "2026-11-20-e6ca9921823e-recurrent.json")
WITH_SPEEDUPS = [row for row in RECURRENT["rows"] if "opponent_share" not in row]


def small(count=3, **changes):
    """The first rows of a committed run, each with `changes`."""
    document = copy.deepcopy(RECURRENT)
    document["rows"] = [row | changes for row in document["rows"][:count]]
    return document


def figure_of(document, number=0):
    return list(plots.figures_of(document))[number][1]


def texts_of(figure):
    return [text.get_text() for axes in figure.axes for text in (*axes.get_yticklabels(), *axes.texts)]


def test_plots_write_png_and_svg_named_by_device_and_suite(tmp_path):
    paths = list(plots.write(tmp_path / "new", [small()]))
    stem = "cpu-amd-epyc-zen5-2c-recurrent-speedup"
    assert [path.name for path in paths] == [f"{stem}.png", f"{stem}.svg"]
    assert paths[0].read_bytes().startswith(b"\x89PNG") and b"<svg" in paths[1].read_bytes()


def test_plots_are_the_same_bytes_again_and_name_no_date_of_drawing(tmp_path):
    first, second = (list(plots.write(tmp_path / name, [small()])) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert b"dc:date" not in first[1].read_bytes()


def test_plots_show_every_case_and_figure():
    texts = texts_of(figure_of(RECURRENT))
    for row in WITH_SPEEDUPS:
        assert plots.shortened(row["case"]) in texts
        assert f"{row['speedup']['median']:.2f}" in texts


def test_plots_show_rows_slower_than_torch_in_a_colour_of_their_own():
    document = small(2)
    document["rows"][1]["speedup"] = {"median": 0.8, "low": 0.75, "high": 0.85}
    figure = figure_of(document)
    colours = [patch.get_facecolor() for patch in figure.axes[0].patches]
    from matplotlib.colors import to_rgba

    assert colours.count(to_rgba(plots.SLOWER)) == 1
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "slower than torch (1 of 2)" in labels


def test_plots_leave_out_failures_and_overhead_but_not_the_rest():
    document = small(3)
    document["rows"][0] = {"case": "x", "pass": "all", "failure": "y", "allocator": "steady", "isa": "native"}
    document["rows"][1] |= {"pass": "overhead", "added_us": {"median": 1.0}}
    assert len(figure_of(document).axes[0].patches) == 1


def test_plots_of_a_document_without_a_measured_row_are_none(tmp_path):
    assert list(plots.write(tmp_path, [small(0)])) == []


def test_plots_draw_the_roofline_where_both_ceilings_are_known():
    document = small(3, roofline={"intensity": 2.0, "bound": "memory", "share": 0.5}, gflop_per_s=20.0)
    assert not plots.roofs(document, document["rows"])
    document["environment"]["ceilings"] = {"copy_gb_per_s": 20.0, "matmul_fp32_gflop_per_s": 200.0}
    roofs = plots.roofs(document, document["rows"])
    assert list(roofs.values()) == [[(1.0, 20.0), (10.0, 200.0), (20.0, 200.0)]]
    names = [name for name, _ in plots.figures_of(document)]
    assert [name.rpartition("-")[2] for name in names] == ["speedup", "roofline"]


def test_plots_of_a_merged_run_are_one_a_suite(tmp_path):
    document = small(4)
    document["suite"] = "all"
    for row, suite in zip(document["rows"], ("conv", "conv", "recurrent", "recurrent"), strict=True):
        row["suite"] = suite
    names = [re.sub(".*-2c-", "", name) for name, _ in plots.figures_of(document)]
    assert names == ["conv-speedup", "recurrent-speedup"]


def test_plots_regenerate_finds_stale_missing_and_left_over_pictures(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "plots"
    monkeypatch.setattr(plots, "newest", lambda source: [small(2)])
    assert plots.regenerate(check=True, folder=folder) == 1
    assert plots.regenerate(folder=folder) == 0
    assert plots.regenerate(check=True, folder=folder) == 0
    (folder / "gone.svg").write_text("<svg/>")
    picture = next(folder.glob("cpu*.svg"))
    picture.write_text("<svg/>")
    capsys.readouterr()
    assert plots.regenerate(check=True, folder=folder) == 1
    told = capsys.readouterr().err
    assert "gone.svg" in told and picture.name in told and "python -m benchmarks plots" in told
    assert plots.regenerate(folder=folder) == 0 and not (folder / "gone.svg").exists()


def test_plots_committed_are_those_of_the_newest_tables():
    """By name: drawing them all takes long, and `python -m benchmarks plots --check` compares their bytes."""
    expected = {
        f"{name}.{extension}"
        for document in plots.newest()
        for name, _ in plots.figures_of(document)
        for extension in plots.FORMATS
    }
    assert {path.name for path in plots.PLOTS.iterdir() if path.suffix[1:] in plots.FORMATS} == expected
