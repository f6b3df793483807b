"""A long page in a real browser: charts are drawn when they come near the view, the contents are folded."""

from __future__ import annotations

import pytest

from pyarch.page import Axis, Bars, HeatMaps, Lines, Page
from tests.test_page_browser import PHONE, fills, heads, seen

LONG_CHARTS = 60
LONG_PAGE = Page(
    "long",
    "Sixty charts.",
    [
        each
        for number in range(0, LONG_CHARTS, 3)
        for each in (
            Bars(
                f"model {number}: speedup", ["a", "b"], {"pyarch": [0.5, 0.8]}, Axis("speedup", "x"), mark=1.0
            ),
            Lines(
                f"model {number}: growth",
                {"pyarch": [(1, 1.0), (2, 2.0)]},
                Axis("length"),
                Axis("time", "ms"),
            ),
            HeatMaps(f"model {number}: maps", {"layer": heads(1, 5)}),
        )
    ],
)
STATE = """() => {
    const places = Array.from(document.querySelectorAll('.drawing'));
    const boxes = places.map((place) => place.getBoundingClientRect());
    return {
        drawn: places.flatMap((place, number) => place.firstChild ? [number] : []),
        near: boxes.flatMap(({ top, bottom }, number) =>
            bottom > -300 && top < innerHeight + 300 ? [number] : []),
        tops: boxes.map(({ top }) => top + scrollY),
        height: document.documentElement.scrollHeight,
    };
}"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "long.html"
    LONG_PAGE.write(path)
    return path


def settled(page, condition: str = "true") -> dict:
    """What is drawn and where, some frames after a condition holds: those near the view are drawn by then."""
    page.wait_for_function(f"() => document.querySelector('.drawing').firstChild && ({condition})")
    page.evaluate("""async () => {
        for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame);
    }""")
    return page.evaluate(STATE)


@pytest.mark.parametrize("viewport", [{"width": 1280, "height": 720}, PHONE])
def test_page_browser_draws_what_comes_near_the_view(read, file, viewport):
    reader = read(file, viewport=viewport)
    page = reader.page
    first = settled(page)
    assert first["drawn"] == first["near"] and 1 < len(first["drawn"]) < 10
    page.evaluate("document.querySelector('#section-30').scrollIntoView({ behavior: 'instant' })")
    middle = settled(page, "document.querySelector('#section-30 .drawing').firstChild")
    assert middle["drawn"] == sorted({*first["drawn"], *middle["near"]})
    assert set(middle["drawn"]) < set(range(LONG_CHARTS))
    seen(reader)
    last = settled(page)
    assert last["drawn"] == list(range(LONG_CHARTS))
    # The room was there before.
    assert (
        (first["tops"], first["height"])
        == (middle["tops"], middle["height"])
        == (last["tops"], last["height"])
    )


def test_page_browser_leaves_undrawn_what_is_far_when_colours_and_width_change(read, file):
    reader = read(file, color_scheme="light")
    page = reader.page
    before = settled(page)
    page.locator("button.theme").click()
    assert settled(page)["drawn"] == before["drawn"]
    page.set_viewport_size({"width": 500, "height": 720})
    narrow = settled(page, "document.querySelector('.drawing svg').getBoundingClientRect().width < 500")
    assert narrow["drawn"] == sorted({*before["drawn"], *narrow["near"]}) and len(narrow["drawn"]) < 10
    seen(reader)
    assert settled(page)["tops"] == narrow["tops"]
    # What is drawn late has the colours and the width of now.
    colours = page.eval_on_selector_all(
        ".legend path[fill]", "paths => [...new Set(paths.map(path => path.getAttribute('fill')))]"
    )
    assert colours == [page.evaluate("colour('accent')")] and set(colours) <= fills(page)
    widths = page.eval_on_selector_all(
        ".drawing > div", "all => all.map(each => [each.offsetWidth, each.parentElement.offsetWidth])"
    )
    assert all(width == room for width, room in widths)


def test_page_browser_prints_every_chart(read, file):
    page = read(file).page
    assert len(settled(page)["drawn"]) < 10
    page.pdf(format="A4")
    assert settled(page)["drawn"] == list(range(LONG_CHARTS))


def test_page_browser_draws_all_at_once_where_nothing_tells_what_is_near(read, file):
    page = read(file).page
    page.add_init_script("delete window.IntersectionObserver")
    page.reload()
    assert page.evaluate(STATE)["drawn"] == list(range(LONG_CHARTS))


def test_page_browser_keeps_the_focus_on_a_legend_that_is_drawn(read, file):
    page = read(file).page
    button = page.locator("#section-30 .legend button")
    assert 30 not in settled(page)["drawn"]
    button.focus()
    settled(page, "document.querySelector('#section-30 .drawing').firstChild")
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"


def test_page_browser_unfolds_long_contents_by_keyboard(read, file):
    page = read(file).page
    fold = page.locator(".contents summary")
    links = page.locator(".contents a")
    assert fold.text_content() == f"Contents ({LONG_CHARTS})" and not links.first.is_visible()
    for _ in range(3):  # past the way to the content and the colours
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert links.count() == LONG_CHARTS and links.last.is_visible()
    lefts = "new Set([...document.querySelectorAll('.contents li')].map(each => each.offsetLeft)).size"
    assert page.evaluate(lefts) >= 3
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#section-0"
    links.nth(50).press("Enter")
    page.wait_for_function("() => document.querySelector('#section-50 .drawing').firstChild")
    page.wait_for_function(
        "() => Math.abs(document.querySelector('#section-50').getBoundingClientRect().top - 16) < 2"
    )
    assert not {20, 30, 40} & set(settled(page)["drawn"])  # the way there is not drawn
    page.set_viewport_size(PHONE)
    assert page.evaluate(lefts) == 1
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
