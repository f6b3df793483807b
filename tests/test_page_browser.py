"""The page in a real browser: everything is drawn, sorts, filters and switches, and nothing is loaded."""

from __future__ import annotations

import math
import re

import pytest

from pyarch.page import Axis, Bars, Facts, HeatMaps, Lines, Page, Point, Prose, Scatter, Sheet

HOSTILE = """</script><img src=x onerror="document.title='taken'">&amp;'\N{SNOWMAN}{a|b}"""
LENGTHS = (128, 256, 512)
PHONE = {"width": 390, "height": 844}
LONG_SHEET = 600


def heads(count: int, length: int) -> list:
    """Causal maps, each head with a reach of its own."""
    maps = []
    for head in range(count):
        scores = [
            [math.exp(-(q - k) / (head + 1)) if k <= q else 0.0 for k in range(length)] for q in range(length)
        ]
        maps.append([[score / sum(row) for score in row] for row in scores])
    return maps


PAGE = Page(
    f"a page of {HOSTILE}",
    f"led by {HOSTILE}",
    [
        Facts("Machine", {"device": "a CPU", HOSTILE: HOSTILE}),
        Prose("Result", ["All agree.", HOSTILE]),
        Bars(
            "Time",
            ["encoder.layers.0.self_attn", HOSTILE, "a" * 120],
            {"stock": [3.0, 2.0, 1.0], "pyarch": [1.0, None, 0.5]},
            Axis("median", "ms"),
            note=HOSTILE,
        ),
        Bars(
            "Many bars",
            [f"case {number}" for number in range(100)],
            {"pyarch": [0.0, *(10.0**-number for number in range(99))]},
            Axis("error", log=True),
        ),
        Scatter(
            "Roofline",
            {
                "before": [Point(1.0, 10.0, HOSTILE), Point(0.0, 1.0, "not on a logarithmic axis")],
                "after": [Point(1.0, 20.0, "conv")],
            },
            Axis("intensity", "FLOP/byte", log=True),
            Axis("attained", "GFLOP/s", log=True),
            {"roof": [(0.5, 15.0), (4.0, 120.0), (100.0, 120.0)]},
        ),
        Lines(
            "Growth",
            {name: [(n, n / 100 + number) for n in LENGTHS] for number, name in enumerate(["lstm", HOSTILE])},
            Axis("length", "tokens", log=True),
            Axis("step", "ms"),
        ),
        HeatMaps("Maps", {"first": heads(2, 10), HOSTILE: heads(3, 150), "alone": heads(1, 5)}),
        Sheet(
            "Few",
            ["name", ">number", "mixed"],
            [
                ["layer 10", 10.0, "b"],
                ["layer 9", -2.5, 3.0],
                [HOSTILE, None, None],
                ["Layer 1", 100, 20.0],
            ],
            formats={"number": "{:.1f} ms"},
        ),
        Sheet("Many", ["case", ">time"], [[f"case {n} of {n % 7}", n * 37 % 600] for n in range(LONG_SHEET)]),
    ],
)
CHARTS, FEW, MANY = 5, "#section-7", "#section-8"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    PAGE.write(path)
    return path


def seen(reader):
    """The page after a reader saw all of it, back at its top."""
    reader.page.evaluate("""async () => {
        for (const place of document.querySelectorAll('.drawing')) {
            place.scrollIntoView({ behavior: 'instant', block: 'center' });
            while (!place.firstChild) await new Promise(requestAnimationFrame);
        }
        scrollTo({ top: 0, behavior: 'instant' });
    }""")
    return reader.page


def section(number: int) -> str:
    return f"#section-{number}"


def column(page, table: str, number: int) -> list[str]:
    """The texts of a column's rows that are shown, from the top."""
    cells = page.locator(f"{table} .sheet tbody tr:not([hidden]) td:nth-child({number})")
    return cells.all_text_contents()


def fills(page) -> set[str]:
    """The colours of what is drawn in SVG."""
    return set(
        page.eval_on_selector_all(
            ".chart svg path[fill]", "paths => paths.map(path => path.getAttribute('fill'))"
        )
    )


def map_picture(page) -> str:
    # Two frames later, because the canvas is painted in one.
    return page.evaluate("""async () => {
        for (let frame = 0; frame < 2; frame++) await new Promise(requestAnimationFrame);
        return Array.from(document.querySelectorAll('.heat-map canvas'), each => each.toDataURL()).join();
    }""")


def test_page_browser_draws_every_chart_in_its_place(read, file):
    page = seen(read(file))
    charts = page.locator(".chart .drawing svg")
    assert charts.count() == CHARTS - 1
    for number in range(CHARTS - 1):
        box = charts.nth(number).bounding_box()
        assert box["width"] > 300 and box["height"] > 100
        assert charts.nth(number).locator("path").count() > 5
    box = page.locator(".heat-map canvas").first.bounding_box()
    assert box["width"] > 300 and box["height"] > 300


def test_page_browser_charts_and_data_say_what_they_are(read, file):
    page = seen(read(file))
    labels = page.eval_on_selector_all(
        ".drawing", "all => all.map(each => [each.getAttribute('role'), each.ariaLabel])"
    )
    assert len(labels) == CHARTS and {role for role, _ in labels} == {"img"}
    assert labels[0][1].startswith("Time: bars of median (ms) for stock, pyarch.")
    page.locator(f"{section(2)} summary").click()
    assert column(page, section(2), 3) == ["1", "-", "0.5"]
    page.locator(f"{section(6)} summary").click()
    rows = page.locator(f"{section(6)} .map-data tbody tr")
    rows.first.wait_for()  # filled when the browser says that it was opened
    assert rows.count() == 10


def test_page_browser_loads_nothing_and_allows_nothing(read, file):
    reader = read(file)
    assert reader.requests == [reader.address]
    assert file.stat().st_size < 3_000_000
    # The policy refuses what a text might smuggle in: a script of its own, and a picture from elsewhere.
    reader.page.evaluate("""() => {
        const script = document.createElement('script');
        script.textContent = "document.title = 'taken'";
        document.body.append(script);
    }""")
    assert reader.page.title() == PAGE.title
    refused = [error for error in reader.errors if "Content Security Policy" in error]
    assert len(refused) == len(reader.errors) == 1
    reader.errors.clear()


def test_page_browser_shows_hostile_names_as_text(read, file):
    page = seen(read(file))
    assert page.title() == PAGE.title
    assert page.locator("h1").text_content() == PAGE.title
    assert page.locator("img").count() == 0
    assert column(page, FEW, 1)[2] == HOSTILE
    assert HOSTILE in page.locator(".layer option").all_text_contents()
    assert HOSTILE in page.locator(f"{section(5)} .legend button").all_text_contents()
    page.set_viewport_size({"width": 1600, "height": 900})
    drawn = page.locator(f"{section(2)} svg text").all_text_contents()
    assert any(text.startswith("</script><img") for text in drawn)


def test_page_browser_tells_a_bar_under_the_pointer(read, file):
    page = seen(read(file))
    page.locator(f"{section(2)} .drawing").scroll_into_view_if_needed()
    box = page.locator(f"{section(2)} .drawing").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.43)
    tip = page.locator(f"{section(2)} .tip")
    tip.wait_for()
    assert tip.locator("strong").text_content() == HOSTILE
    assert tip.locator("div").all_text_contents() == ["stock2 ms", "pyarch-"]


def test_page_browser_sorts_by_click_and_by_keyboard(read, file):
    page = seen(read(file))

    def sort(number, way):
        button = page.locator(f"{FEW} thead th:nth-child({number}) button")
        if way == "click":
            button.click()
        else:
            button.press(way)
        assert page.locator(f"{FEW} th[aria-sort]").count() == 1
        return button.locator("..").get_attribute("aria-sort")

    for way, other in (("click", "Enter"), ("Enter", "Space"), ("Space", "click")):
        assert sort(2, way) == "ascending"
        assert column(page, FEW, 2) == ["-2.5 ms", "10.0 ms", "100.0 ms", "-"]
        assert sort(2, way) == "descending"
        assert column(page, FEW, 2) == ["100.0 ms", "10.0 ms", "-2.5 ms", "-"]
        assert sort(1, way) == "ascending"
        assert column(page, FEW, 1) == [HOSTILE, "Layer 1", "layer 9", "layer 10"]
        assert sort(3, other) == "ascending"
        assert column(page, FEW, 3) == ["3", "20", "b", "-"]


def test_page_browser_filters_long_sheets_only(read, file):
    page = seen(read(file))
    assert page.locator(f"{FEW} .filter").count() == 0
    field, told = page.locator(f"{MANY} .filter input"), page.locator(f"{MANY} .filter output")
    assert told.text_content() == f"{LONG_SHEET} rows"
    field.fill("CASE 59 of")
    found = [row[0] for row in PAGE.sections[-1].rows if "59" in f"{row[0]} {row[1]}"]
    assert column(page, MANY, 1) == found
    assert told.text_content() == f"{len(found)} of {LONG_SHEET} rows"
    field.fill("")
    assert len(column(page, MANY, 1)) == LONG_SHEET


def test_page_browser_sorts_a_long_sheet_quickly(read, file):
    page = seen(read(file))
    seconds = page.evaluate("""() => {
        const start = performance.now();
        document.querySelector('#section-8 thead th:nth-child(2) button').click();
        document.body.offsetHeight;
        return (performance.now() - start) / 1000;
    }""")
    assert column(page, MANY, 2) == [str(number) for number in range(LONG_SHEET)]
    assert seconds < 1


def test_page_browser_switches_layer_and_head(read, file):
    page = seen(read(file))
    layer, head = page.locator(".layer"), page.locator(".head")
    said = page.locator(".heat-map figcaption")
    pictures = [map_picture(page)]
    assert head.locator("option").all_text_contents() == ["head 0", "head 1", "mean of heads"]
    for choice in ("head 1", "mean of heads"):
        head.select_option(choice)
        pictures.append(map_picture(page))
    assert said.text_content() == "first, mean of heads: 10 by 10 weights."
    layer.select_option(HOSTILE)
    pictures.append(map_picture(page))
    assert (
        said.text_content()
        == f"{HOSTILE}, mean of heads: 150 by 150 weights, a cell is the largest of 3 by 3."
    )
    layer.focus()
    page.keyboard.press("ArrowDown")
    pictures.append(map_picture(page))
    assert said.text_content() == "alone, head 0: 5 by 5 weights."
    assert len(set(pictures)) == len(pictures)


def test_page_browser_tells_the_weight_under_the_pointer(read, file):
    page = seen(read(file))
    page.locator(".layer").select_option("alone")
    page.locator(".heat-map .drawing").scroll_into_view_if_needed()
    # The middle of query 3, key 1, as the chart itself places it.
    x, y = page.evaluate("""() => {
        const place = document.querySelector('.heat-map .drawing');
        const [x, y] = echarts.getInstanceByDom(place).convertToPixel({ seriesIndex: 0 }, [1, 3]);
        const box = place.getBoundingClientRect();
        return [box.x + x, box.y + y];
    }""")
    page.mouse.move(x, y)
    page.locator(".heat-map .tip").wait_for()
    weight = math.exp(-2) / sum(math.exp(-n) for n in range(4))
    assert page.locator(".heat-map .tip").text_content() == f"query 3, key 1: {weight:.3g}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_browser_follows_the_system_and_the_button(read, file, scheme):
    page = seen(read(file, color_scheme=scheme))
    ground = "getComputedStyle(document.body).backgroundColor"
    first, drawn, picture = page.evaluate(ground), fills(page), map_picture(page)
    dark = sum(map(int, first.removeprefix("rgb(").removesuffix(")").split(","))) < 3 * 128
    assert dark == (scheme == "dark")
    page.locator("button.theme").click()
    assert page.evaluate(ground) != first
    assert fills(page) != drawn and map_picture(page) != picture
    page.locator("button.theme").click()
    assert page.evaluate(ground) == first and fills(page) == drawn
    page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
    assert page.evaluate(ground) == first  # a choice made stands


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_browser_keeps_enough_contrast(read, file, scheme):
    page = seen(read(file, color_scheme=scheme))
    shares = page.evaluate("""() => {
        const light = (name) => {
            const [r, g, b] = colour(name).match(/\\d+/g).map(Number).map((value) => value / 255)
                .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const ground = light('surface') + 0.05;
        const contrast = (name) => {
            const share = (light(name) + 0.05) / ground;
            return Math.max(share, 1 / share);
        };
        const texts = ['ink', 'quiet', 'accent'].map((name) => [name, contrast(name) / 4.5]);
        const marks = ['stock', ...OTHERS].map((name) => [name, contrast(name) / 3]);
        return [...texts, ...marks];
    }""")
    assert not {name: share for name, share in shares if share < 1}


def test_page_browser_fits_a_phone(read, file):
    page = seen(read(file, viewport=PHONE))
    page.eval_on_selector_all("details", "all => all.forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    for box in page.eval_on_selector_all(
        ".drawing > div", "all => all.map(each => each.getBoundingClientRect().right)"
    ):
        assert box <= PHONE["width"]


def test_page_browser_redraws_for_another_width_and_for_paper(read, file):
    page = seen(read(file, viewport={"width": 1200, "height": 800}, color_scheme="dark"))
    widths = "[...document.querySelectorAll('.drawing svg')].map(svg => svg.getBoundingClientRect().width)"
    dark = fills(page)
    page.set_viewport_size({"width": 600, "height": 800})
    page.wait_for_function(f"() => Math.max(...{widths}) < 600")
    page.set_viewport_size({"width": 1200, "height": 800})
    page.wait_for_function(f"() => Math.min(...{widths}) > 600")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert fills(page) != dark and max(page.evaluate(widths)) < 700
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert fills(page) == dark and min(page.evaluate(widths)) > 900
    assert len(page.pdf(format="A4")) > 10_000


def test_page_browser_hides_series_and_shows_all_bars(read, file):
    page = seen(read(file))
    button = page.locator(f"{section(2)} .legend button").first
    before = page.locator(f"{section(2)} svg path").count()
    button.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    fewer = "before => document.querySelectorAll('#section-2 svg path').length < before"
    page.wait_for_function(fewer, arg=before)
    height = page.locator(f"{section(3)} .drawing svg").bounding_box()["height"]
    page.locator(f"{section(3)} button.more").click()
    assert page.locator(f"{section(3)} .drawing svg").bounding_box()["height"] > 2 * height


def test_page_browser_is_walked_by_keyboard(read, file):
    page = seen(read(file))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    links = page.locator(".contents a")
    assert [page.locator(f"{link.get_attribute('href')} h2").text_content() for link in links.all()] == [
        each.title for each in PAGE.sections
    ]


def test_page_browser_shows_the_numbers_without_scripts(read, file):
    page = read(file, java_script_enabled=False).page
    assert page.locator("noscript").is_visible()
    page.locator(f"{section(2)} summary").click()
    assert page.locator(f"{section(2)} table").is_visible()


MARKED = [
    Bars("below", ["a", "b"], {"stock": [0.5, 0.25], "mark": [0.1, 0.2]}, Axis("speedup", "x"), mark=1.0),
    Bars("above", ["a", "b"], {"stock": [3.0, 2.0]}, Axis("speedup", "x"), mark=1.0),
    Bars("logarithmic", ["a", "b"], {"stock": [30.0, 200.0]}, Axis("speedup", "x", log=True), mark=1.0),
    Bars("none", ["a", "b"], {"stock": [1.5, 1.0]}, Axis("speedup", "x")),
]


@pytest.mark.parametrize("viewport", [{"width": 1280, "height": 720}, PHONE])
def test_page_browser_shows_the_mark_of_bars(read, tmp_path, viewport):
    Page("marks", "lead", MARKED).write(tmp_path / "marks.html")
    page = seen(read(tmp_path / "marks.html", viewport=viewport))
    for number, bars in enumerate(MARKED):
        line = page.locator(f"{section(number)} .drawing svg path[stroke-dasharray]")
        label = page.locator(f"{section(number)} .drawing svg text", has_text=re.compile(r"^1 x$"))
        assert line.count() == label.count() == (bars.mark is not None)
        assert page.locator(f"{section(number)} .legend button").count() == len(bars.series)
        if bars.mark is None:
            continue
        room, drawing = line.bounding_box(), page.locator(f"{section(number)} .drawing svg").bounding_box()
        x = page.evaluate(
            "number => echarts.getInstanceByDom(document.querySelector(`#section-${number} .drawing`))"
            ".convertToPixel({ xAxisIndex: 0 }, 1)",
            number,
        )
        assert abs(room["x"] + room["width"] / 2 - drawing["x"] - x) < 2 and room["height"] > 40
        said = label.bounding_box()
        assert said["y"] >= drawing["y"] and said["y"] + said["height"] <= room["y"] + 1
        assert drawing["x"] < said["x"] < said["x"] + said["width"] <= drawing["x"] + drawing["width"]


def test_page_browser_keeps_the_mark_of_hidden_bars(read, tmp_path):
    Page("marks", "lead", MARKED[:1]).write(tmp_path / "marks.html")
    page = seen(read(tmp_path / "marks.html"))
    for button in page.locator(".legend button").all():
        button.click()
    page.wait_for_function("() => !document.querySelector(\".drawing svg path[fill='rgb(139,147,161)']\")")
    assert page.locator(".drawing svg path[stroke-dasharray]").count() == 1
    page.locator(".drawing").hover()
