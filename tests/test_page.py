"""The page as a file: what is escaped, left out and refused, and that only whole files are written."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import random
import re
from html.parser import HTMLParser

import pytest

from pyarch.page import Axis, Bars, Facts, HeatMaps, Lines, Page, Point, Prose, Scatter, Sheet
from pyarch.page.document import asset
from pyarch.page.heat_maps import LARGEST_SIDE, MOST_CELLS, SMALLEST_SIDE, mean, pooled, side_for
from tests import browser
from tests.ledger import ALLOWED_SKIPS, allowed_skips

HOSTILE = '</script><b onclick="x">&amp;\'\N{SNOWMAN}'
MS = Axis("time", "ms")
MAX_BYTES = 3_000_000


class Reading(HTMLParser):
    """The elements of a page, the texts of its scripts, and all its other text."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.in_script = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.in_script = True
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.in_script = self.in_script and tag != "script"

    def handle_data(self, data):
        if self.in_script:
            self.scripts[-1] += data
        else:
            self.texts.append(data)

    @property
    def drawings(self) -> dict:
        return json.loads(self.scripts[0])


def reading(*sections) -> Reading:
    return Reading(Page("title", "lead", sections).html())


def every_section(text: str) -> list:
    """A section of each kind, with this text wherever a text may stand."""
    axis = Axis(text, text)
    return [
        Prose(text, [text]),
        Facts(text, {text: text}),
        Bars(text, [text], {text: [1.0]}, axis, text),
        Scatter(text, {text: [Point(1.0, 1.0, text)]}, axis, axis, {text: [(1.0, 2.0)]}, text),
        Lines(text, {text: [(1.0, 1.0)]}, axis, axis, text),
        HeatMaps(text, {text: [[[0.5]]]}, text, text, text),
        Sheet(text, [text], [[text]], text),
    ]


def test_page_reads_every_name_as_text():
    plain = Reading(Page("plain", "plain", every_section("plain")).html())
    hostile = Reading(Page(HOSTILE, HOSTILE, every_section(HOSTILE)).html())
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert not [attributes for _, attributes in hostile.elements if "onclick" in attributes]
    # Texts arrive whole, and as often as plain ones do.
    assert "".join(hostile.texts).count(HOSTILE) == "".join(plain.texts).count("plain") > 20
    assert hostile.drawings["2"]["names"] == [HOSTILE]
    assert hostile.drawings["5"]["layers"][0]["name"] == HOSTILE


def test_page_asks_for_nothing():
    page = reading(*every_section("plain"))
    asked = [
        (tag, name, value)
        for tag, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "srcset", "data", "action", "href") and not value.startswith(("#", "data:"))
    ]
    assert not asked
    assert "url(" not in asset("assets/page.css") and "@import" not in asset("assets/page.css")


def test_page_policy_allows_its_own_scripts_only():
    page = reading(*every_section("plain"))
    (policy,) = [each["content"] for tag, each in page.elements if tag == "meta" and "http-equiv" in each]
    assert policy.startswith("default-src 'none'; ") and "unsafe-eval" not in policy
    digests = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]
    ]
    allowed = re.search(r"script-src ([^;]*);", policy).group(1).split()
    assert allowed == [f"'sha256-{digest}'" for digest in digests]


def test_page_names_the_charts_library_and_its_licence():
    vendored = asset("vendor/echarts.min.js")
    version = re.search(r'\.version="([\d.]+)"', vendored).group(1)
    assert f"Apache ECharts {version}" in asset("assets/template.html")
    assert "Apache License" in vendored[:1000]
    assert "Apache License" in asset("vendor/LICENSE") and "Apache ECharts" in asset("vendor/NOTICE")


@pytest.mark.parametrize("count, listed", [(3, False), (4, True)])
def test_page_lists_its_sections_where_they_are_many(count, listed):
    page = reading(*[Prose(f"title {number}", []) for number in range(count)])
    assert any(tag == "nav" for tag, _ in page.elements) == listed


@pytest.mark.parametrize("count, folded", [(24, False), (25, True)])
def test_page_folds_long_contents(count, folded):
    page = reading(*[Prose(f"title {number}", []) for number in range(count)])
    folds = [attributes for tag, attributes in page.elements if tag == "details"]
    assert folds == ([{}] if folded else [])
    assert (f"Contents ({count})" in page.texts) == folded
    assert len([1 for tag, _ in page.elements if tag == "li"]) == count


def test_page_without_numbers_says_so():
    page = reading(
        Bars("bars", [], {"stock": []}, MS),
        Lines("lines", {}, MS, MS),
        Sheet("sheet", ["name"], []),
        HeatMaps("maps", {}),
    )
    texts = "".join(page.texts)
    assert (texts.count("No data."), texts.count("No rows."), texts.count("No maps.")) == (2, 1, 1)
    assert not [1 for _, attributes in page.elements if "data-drawing" in attributes]


def test_page_leaves_out_what_is_not_a_number():
    values = [1.0, None, math.nan, math.inf, -math.inf, 0.0]
    bars = Bars("bars", list("abcdef"), {"stock": values}, MS)
    lines = Lines("lines", {"stock": list(enumerate(values))}, MS, MS)
    drawings = reading(bars, lines).drawings
    assert drawings["0"]["series"] == [["stock", [1.0, None, None, None, None, 0.0]]]
    assert [y for _, y in drawings["1"]["series"][0][1]] == [1.0, None, None, None, None, 0.0]


def test_page_lines_stand_in_one_table_by_length():
    sheet = Lines("lines", {"b": [(2, 20.0), (1, 10.0)], "a": [(3, 30.0)]}, Axis("length"), MS).sheet()
    assert sheet.columns == [">length", ">b", ">a"]
    assert sheet.rows == [(1, 10.0, None), (2, 20.0, None), (3, None, 30.0)]


def test_page_bars_refuse_values_without_a_name():
    with pytest.raises(ValueError, match="bars 'time': 2 names, but 1 values of 'stock'"):
        Bars("time", ["a", "b"], {"stock": [1.0]}, MS)


def test_page_bars_say_their_mark_in_their_table():
    speedup, plain = Axis("speedup", "x"), Axis("ratio")
    values = {"pyarch": [2.0]}
    marked = Bars("bars", ["a"], values, speedup, mark=1.0)
    assert reading(marked).drawings["0"]["mark"] == 1.0
    assert marked.sheet().note == "speedup (x); the line in the chart is at 1 x"
    assert (
        Bars("bars", ["a"], values, plain, mark=0.75).sheet().note
        == "ratio; the line in the chart is at 0.75"
    )
    unmarked = Bars("bars", ["a"], values, speedup)
    assert reading(unmarked).drawings["0"]["mark"] is None and unmarked.sheet().note == "speedup (x)"


@pytest.mark.parametrize("mark, log", [(math.nan, False), (math.inf, True), (0.0, True), (-1.0, True)])
def test_page_bars_refuse_a_mark_that_has_no_place(mark, log):
    with pytest.raises(ValueError, match=f"bars 'bars': no place for the mark {mark} on a "):
        Bars("bars", ["a"], {"pyarch": [2.0]}, Axis("speedup", log=log), mark=mark)
    assert Bars("bars", ["a"], {"pyarch": [2.0]}, Axis("change"), mark=-1.0).mark == -1.0


def test_page_sheet_shows_numbers_by_their_format():
    sheet = Sheet(
        "sheet",
        ["name", ">time", ">share"],
        [["a", 1.23456, 0.5]],
        formats={"time": "{:.1f} ms", ">share": "{:.0%}"},
    )
    shown = [sheet.shown(number, cell) for number, cell in enumerate(sheet.rows[0])]
    assert shown == ["a", "1.2 ms", "50%"]
    assert [sheet.shown(0, cell) for cell in (None, True, 123456, 0.000123456, 1234567.0)] == [
        "-",
        "yes",
        "123456",
        "0.0001235",
        "1.235e+06",
    ]
    assert sheet.shown(1, math.inf) == "inf"


def test_page_sheet_keeps_the_number_that_a_cell_sorts_by():
    rows = [[value] for value in (1.5, 2, None, math.nan, -math.inf, "text", True)]
    cells = [each for tag, each in reading(Sheet("sheet", [">x"], rows)).elements if tag == "td"]
    assert [each.get("data-sort") for each in cells] == ["1.5", "2", "", "", "-Infinity", None, None]


def test_page_sheet_refuses_ragged_rows_and_unknown_formats():
    with pytest.raises(ValueError, match=re.escape("sheet 'times': 2 columns, but a row of 1: ['a']")):
        Sheet("times", ["name", "time"], [["a"]])
    with pytest.raises(ValueError, match=re.escape("formats for ['tim'], the columns are ['name', 'time']")):
        Sheet("times", ["name", ">time"], [], formats={"tim": "{:.1f}"})


@pytest.mark.parametrize("rows, columns", [(5, 9), (64, 64), (65, 130), (1, 200)])
def test_page_maps_show_the_largest_weight_of_each_block(rows, columns):
    weights = [[random.random() for _ in range(columns)] for _ in range(rows)]
    row_step, column_step = -(-rows // 64), -(-columns // 64)
    expected = {}
    for row in range(rows):
        for column in range(columns):
            block = row // row_step, column // column_step
            expected[block] = max(expected.get(block, 0.0), weights[row][column])
    found = pooled(weights, 64)
    assert {(r, c): value for r, line in enumerate(found) for c, value in enumerate(line)} == expected


def test_page_maps_hold_rounded_weights_and_the_mean_of_heads():
    heads = [[[0.123456, 1.0], [0.0, math.nan]], [[0.2, 0.0], [0.000012344, math.nan]]]
    (layer,) = reading(HeatMaps("maps", {"layer": heads})).drawings["0"]["layers"]
    assert layer["heads"] == [
        ["head 0", [0.123, 1, 0, None]],
        ["head 1", [0.2, 0, 1.23e-05, None]],
        ["mean of heads", [0.162, 0.5, 6.17e-06, None]],
    ]
    assert (layer["rows"], layer["columns"], layer["row_step"], layer["column_step"]) == (2, 2, 1, 1)
    (alone,) = reading(HeatMaps("maps", {"layer": heads[:1]})).drawings["0"]["layers"]
    assert [name for name, _ in alone["heads"]] == ["head 0"]
    assert mean([[[1.0, 2.0]], [[3.0, 6.0]]]) == [[2.0, 4.0]]


@pytest.mark.parametrize("maps", [0, 1, 36, 37, 144, 1000, 10**6])
def test_page_maps_share_the_room_of_the_page(maps):
    side = side_for(maps)
    assert SMALLEST_SIDE <= side <= LARGEST_SIDE
    assert side == SMALLEST_SIDE or side**2 * maps <= MOST_CELLS
    assert side == LARGEST_SIDE or (side + 1) ** 2 * maps > MOST_CELLS


@pytest.mark.parametrize(
    "heads", [[], [[]], [[[]]], [[[1.0], [1.0, 0.0]]], [[[1.0]], [[1.0], [1.0]]], [[[1.0]], []]]
)
def test_page_maps_refuse_heads_of_different_shapes(heads):
    with pytest.raises(ValueError, match="layer 'a': needs heads that are all of one shape"):
        HeatMaps("maps", {"a": heads})


def test_page_maps_refuse_negative_weights():
    with pytest.raises(ValueError, match="layer 'a': a weight is negative"):
        HeatMaps("maps", {"a": [[[0.5, -0.1]]]})


def test_page_of_a_whole_model_stays_small():
    """Twelve layers of twelve heads twice, 600 rows of ten columns, and 300 bars."""
    weights = [[random.random() for _ in range(64)] for _ in range(64)]
    maps = {f"encoder.layers.{number}": [weights] * 12 for number in range(12)}
    rows = [[f"case {number}", *(random.random() for _ in range(9))] for number in range(600)]
    values = [random.random() for _ in range(300)]
    page = Page(
        "title",
        "lead",
        [
            HeatMaps("maps", maps),
            HeatMaps("more maps", maps),
            Sheet("sheet", ["case", *(f">{number}" for number in range(9))], rows),
            Bars(
                "bars", [f"case {number}" for number in range(300)], {"stock": values, "pyarch": values}, MS
            ),
        ],
    )
    assert len(page.html().encode()) < MAX_BYTES


def test_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "page.html"
    first = Page("first", "lead", [])
    first.write(path)
    assert path.read_text(encoding="utf-8") == first.html()

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Page("second", "lead", []).write(path)
    assert path.read_text(encoding="utf-8") == first.html()
    assert os.listdir(path.parent) == [path.name]
    Page("second", "lead", []).write(str(path))
    assert "<h1>second</h1>" in path.read_text(encoding="utf-8")


def test_page_writes_names_that_are_no_unicode(tmp_path):
    Page("title", "lead", every_section("layer\udcff")).write(tmp_path / "page.html")
    assert "layer\\udcff" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("ci, outcome", [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_page_needs_a_browser_in_ci_only(monkeypatch, ci, outcome):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(browser.shutil, "which", lambda name: None)
    with pytest.raises(outcome, match=browser.REFUSAL):
        browser.executable()
    assert any(reason.fullmatch(browser.REFUSAL) for reason in allowed_skips(ALLOWED_SKIPS.read_text()))
