"""The page of a model with attention as its reader meets it: charts, maps that switch, sheets that sort."""

from __future__ import annotations

import pytest

import pyarch
from pyarch import __main__ as cli
from pyarch import ceilings, layer_work, native, timing

OPERATOR = "cli"


@pytest.fixture
def page_file(tmp_path, monkeypatch):
    """The page of a tiny gpt, written by the command line."""
    refusal = native.serving()[1]
    if refusal:
        pytest.skip(refusal)
    monkeypatch.setattr(timing, "BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(timing, "FEWEST_ROUNDS", 1)
    monkeypatch.setattr(layer_work, "BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(ceilings, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "PRODUCT_SIZES", {"cpu": (64,)})
    file = tmp_path / "gpt.html"
    with pyarch.backend("cpu"):
        assert cli.main(["demo", "gpt", "--size", "tiny", "--device", "cpu", "--html", str(file)]) == 0
    return file


@pytest.mark.operator("attention", "cpu")
@pytest.mark.parametrize(
    "context",
    [{}, {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}],
    ids=["desktop", "dark telephone"],
)
def test_the_page_of_a_model_in_a_browser(page_file, read, context):
    page = read(page_file, **context).page
    assert page.title() == "gpt: torch and pyarch"
    drawings = page.locator("figure[data-drawing] .drawing")
    assert drawings.count() == 6
    for number in range(drawings.count()):
        drawings.nth(number).scroll_into_view_if_needed()
        drawings.nth(number).locator("canvas, svg").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
        "the page scrolls aside"
    )

    maps = page.locator("figure.heat-map")
    said = maps.locator("figcaption")
    before = said.inner_text()
    maps.locator("select.layer").select_option("layers.1.self_attn")
    maps.locator("select.head").select_option(label="head 2")
    assert "layers.1.self_attn" in said.inner_text() and "head 2" in said.inner_text() != before

    table = page.locator(
        "section", has=page.get_by_role("heading", name="The swapped layers", exact=True)
    ).locator("table")
    names = table.locator("tbody tr td:first-child")
    assert names.all_text_contents() == ["layers.0", "layers.0.self_attn", "layers.1", "layers.1.self_attn"]
    table.get_by_role("button", name="forward, torch ms").click()
    times = [float(each) for each in table.locator("tbody tr td:nth-child(5)").all_text_contents()]
    assert times in (sorted(times), sorted(times, reverse=True)) and len(set(times)) > 1
