"""Results as a page: committed files of every age, failures and peers, and one look in a browser."""

from __future__ import annotations

import copy

import pytest

from benchmarks import results
from benchmarks.results_page import MOST_CASES, SLOWER, page_of
from pyarch.page import Bars, Scatter, Sheet
from tests.browser import browser, read  # noqa: F401

COMMITTED = sorted(results.RESULTS.glob("*/*.json"))
ATTENTION = results.RESULTS / "cpu-intel-xeon-2c" / "2026-11-21-23dc3f739d7f-attention.json"
VARIANT = {"allocator": "steady", "isa": "native"}
LARGEST_PAGE = 3 << 20


def rich_document():
    """A merged run with every key that rows may have: peers, a roofline, a failure, an absent opponent."""
    document = copy.deepcopy(results.load(ATTENTION))
    rows = document["rows"][:4]
    document["suite"] = "all"
    document["environment"]["ceilings"]["copy_gb_per_s"] = 20.0
    peer = {"median_ms": 4.0, "p20_ms": 3.9, "p80_ms": 4.1, "error": 1e-6, "compile_s": 0.5}
    peer["speedup"] = {"median": 2.0, "low": 1.9, "high": 2.1}
    for row in rows:
        row |= {"suite": "attention", "launch_us": 12.0, "compile_s": 0.1, "gb_per_s": 3.0, "matches": True}
        row["roofline"] = {"intensity": 30.0, "bound": "compute", "share": 0.7}
        row["peers"] = {
            "onnxruntime": peer,
            "flex": {"absent": "no <b>backward</b>"},
            "compile": {"failure": "x"},
        }
    rows[1]["speedup"] = {"median": 0.8, "low": 0.7, "high": 0.9}
    rows[2]["speedup"] = {"median": 1.01, "low": 0.9, "high": 1.1}
    failure = {"suite": "conv", "case": "1-D k4", "pass": "all", "failure": "out of memory"} | VARIANT
    document["rows"] = [*rows, failure, failure | {"case": "2-D k3", "failure": "no kernel", "absent": True}]
    return document


def sections_of(document):
    return {section.title: section for section in page_of(document).sections}


def column(sheet, title):
    return [row[list(sheet.columns).index(title)] for row in sheet.rows]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_page_of_committed_results_has_every_row_and_its_speedup(path):
    document = results.load(path)
    page = page_of(document)
    sheet = page.sections[-1]
    assert len(sheet.rows) == len(document["rows"])
    assert column(sheet, ">speedup") == [row["speedup"]["median"] for row in document["rows"]]
    assert len(page.html().encode()) < LARGEST_PAGE
    assert any(isinstance(section, Bars) for section in page.sections)


def test_page_shows_bars_of_every_pass_with_the_slower_rows_marked():
    document = rich_document()
    bars = sections_of(document)["attention: speedup over torch"]
    first, second = (document["rows"][number]["case"] for number in (0, 2))
    assert list(bars.names) == [SLOWER + first, second]
    assert bars.series["forward + backward"][0] == 0.8 and bars.axis.log
    assert "1 of 4 rows are slower than torch" in bars.note


def test_page_shows_times_before_and_after_beside_peers():
    bars = sections_of(rich_document())["attention: time of a call, forward"]
    assert list(bars.series) == ["torch", "pyarch", "onnxruntime"]
    assert bars.series["onnxruntime"] == [4.0, 4.0]


def test_page_says_why_a_peer_did_not_run():
    sheet = sections_of(rich_document())["attention: peers that did not run"]
    assert sheet.rows[0][2:] == ("steady native", "flex", "absent", "no <b>backward</b>")
    assert column(sheet, "what").count("failure") == 4
    assert "<b>backward</b>" not in page_of(rich_document()).html()


def test_page_says_in_every_chart_which_variant_is_drawn():
    document = rich_document()
    slow = copy.deepcopy(document["rows"][:4])
    for row in slow:
        row |= {"isa": "avx2", "peers": {"openvino": {"failure": "no answer in 180 s"}}}
        row["speedup"] = {"median": 0.5, "low": 0.4, "high": 0.6}
    document["rows"] += slow
    sections = sections_of(document)
    charts = [each for each in sections.values() if isinstance(each, Bars | Scatter)]
    words = 'Drawn: allocator and instruction set steady native. Under "Every row" also: steady avx2.'
    assert len(charts) >= 5 and all(chart.note.endswith(words) for chart in charts)
    assert min(sections["attention: speedup over torch"].series["forward"]) > 0.5
    missing = sections["attention: peers that did not run"]
    assert column(missing, "variant").count("steady avx2") == column(missing, "peer").count("openvino") == 4
    assert column(sections["Every row"], "variant").count("steady avx2") == 4


def test_page_of_one_variant_does_not_speak_of_variants():
    assert not any("Drawn:" in getattr(each, "note", "") for each in page_of(rich_document()).sections)


def test_page_says_what_compile_seconds_are():
    document = rich_document()
    assert "our first call on a GPU" in sections_of(document)["Every row"].note
    for row in document["rows"]:
        row["compile_s"] = None
    assert "our first call" not in sections_of(document)["Every row"].note


def test_page_shows_the_roofline_under_its_roofs():
    scatter = sections_of(rich_document())["attention: roofline"]
    assert isinstance(scatter, Scatter)
    assert [name.split(":")[0] for name in scatter.lines] == ["fp32"]
    assert {len(points) for points in scatter.series.values()} == {2}


def test_page_shows_errors_beside_torchs_own():
    document = rich_document()
    bars = sections_of(document)["attention: error against float64"]
    worst = max(each["ours"] for row in document["rows"][:2] for each in row["error"].values())
    assert bars.series["pyarch"][0] == worst


def test_page_sheet_has_failures_and_absences():
    sheet = sections_of(rich_document())["Every row"]
    assert isinstance(sheet, Sheet)
    outcomes = column(sheet, "outcome")
    assert outcomes[1:3] == ["slower than torch", "faster than torch, within noise"]
    assert outcomes[4:] == ["FAILED: out of memory", "absent: no kernel"]
    assert column(sheet, ">onnxruntime ms")[4] is None


def test_page_facts_name_the_machine_and_the_commit():
    facts = page_of(rich_document()).sections[0].pairs
    assert facts["commit"].startswith("23dc3f739d7f") and facts["threads"] == "2"
    assert "GB/s" in facts["ceilings"] and "driver" not in facts


def test_page_facts_name_a_gpus_driver_and_clock():
    document = rich_document()
    document["environment"]["gpu"] = {"name": "H200", "state": {"driver": "580.82", "sm_mhz": 1980.0}}
    facts = page_of(document).sections[0].pairs
    assert (facts["device"], facts["driver"], facts["clock at the start"]) == ("H200", "580.82", "1980 MHz")


def test_page_of_a_sweep_draws_the_worst_cases_alone():
    document = results.load(next(path for path in COMMITTED if path.stem.endswith("conv-sweep")))
    bars = sections_of(document)["conv: speedup over torch"]
    least = min(row["speedup"]["median"] for row in document["rows"])
    assert len(bars.names) == MOST_CASES and bars.names[0].startswith(SLOWER)
    assert least in [value for values in bars.series.values() for value in values]
    assert f"The {MOST_CASES} of" in bars.note


def test_page_of_an_empty_run_still_opens():
    document = results.load(ATTENTION) | {"rows": []}
    assert page_of(document).sections[-1].rows == []


@pytest.mark.parametrize("context", [{}, {"color_scheme": "dark", "viewport": {"width": 390, "height": 844}}])
def test_page_opens_in_a_browser_and_sorts(tmp_path, read, context):  # noqa: F811
    path = tmp_path / "results.html"
    page_of(rich_document()).write(path)
    page = read(path, **context).page
    assert page.locator("canvas, svg").count() >= 5
    sheet = page.locator("table").last
    heading = sheet.locator("th", has_text="speedup").first
    heading.scroll_into_view_if_needed()
    heading.locator("button").click()
    first = sheet.locator("tbody tr").first.inner_text()
    heading.locator("button").click()
    assert sheet.locator("tbody tr").first.inner_text() != first
