"""The HTML of sections. Every text passes `escape`; what is drawn later has an empty place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from pyarch.page.charts import Bars, Lines, Scatter
from pyarch.page.heat_maps import HeatMaps
from pyarch.page.texts import Cell, Facts, Prose, Sheet

# Fewer rows are seen at a glance.
FEWEST_FILTERED = 13
MOST_LISTED_OPEN = 24


def contents(sections: Sequence[object]) -> str:
    """The list of the sections at the top of a page, folded where it is long."""
    entries = "".join(
        f'<li><a href="#section-{number}">{escape(each.title)}</a></li>'
        for number, each in enumerate(sections)
    )
    listed = f"<ol>{entries}</ol>"
    if len(sections) > MOST_LISTED_OPEN:
        listed = f"<details><summary>Contents ({len(sections)})</summary>{listed}</details>"
    return f'<nav class="contents" aria-label="Contents">{listed}</nav>'


def section(given: object, number: int) -> str:
    """A section with its heading and, where it has one, its note."""
    note = getattr(given, "note", "")
    return (
        f'<section id="section-{number}" class="{KINDS[type(given)]}" aria-labelledby="title-{number}">\n'
        f'<h2 id="title-{number}">{escape(given.title)}</h2>\n'
        f"{paragraph(note, 'note') if note else ''}{body(given, number)}\n</section>"
    )


def body(given: object, number: int) -> str:
    """What stands under the heading."""
    match given:
        case Prose(lines=lines):
            return "".join(map(paragraph, lines))
        case Facts(pairs=pairs):
            entries = "".join(
                f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs.items()
            )
            return f"<dl>{entries}</dl>"
        case Sheet():
            return table(given)
        case HeatMaps():
            return heat_maps(given, number) if given.maps else paragraph("No maps.", "note")
        case _:
            return chart(given, number)


def chart(given: Bars | Scatter | Lines, number: int) -> str:
    """The place of a chart, and its data as a table that the reader opens."""
    data = given.sheet()
    if not data.rows:
        return paragraph("No data.", "note")
    return (
        f'<figure class="chart" data-drawing="{number}"><div class="legend"></div><div class="drawing"></div>'
        "</figure>"
        f"<details><summary>Data of this chart</summary>{paragraph(data.note, 'note') if data.note else ''}"
        f"{table(data)}</details>"
    )


def heat_maps(given: HeatMaps, number: int) -> str:
    """The choosers, the place of the map, and the place of its numbers."""
    layers = "".join(f"<option>{escape(layer)}</option>" for layer in given.maps)
    return (
        f'<figure class="heat-map" data-drawing="{number}"><div class="choosers">'
        f'<label>Layer <select class="layer">{layers}</select></label>'
        '<label>Head <select class="head"></select></label></div>'
        '<div class="drawing"></div><figcaption class="note" aria-live="polite"></figcaption></figure>'
        '<details class="map-data"><summary>Data of this map</summary>'
        f'<div class="box" tabindex="0" role="region" aria-label="{escape(given.title)}, data"></div>'
        "</details>"
    )


def table(sheet: Sheet) -> str:
    """A table in a box of its own, which scrolls where the page is narrower or the table is long."""
    if not sheet.rows:
        return paragraph("No rows.", "note")
    sides = ["number" if column.startswith(">") else "text" for column in sheet.columns]
    heads = "".join(
        f'<th scope="col" class="{side}"><button type="button">{escape(heading) or "name"}</button></th>'
        for side, heading in zip(sides, sheet.headings, strict=True)
    )
    rows = "\n".join(
        "<tr>"
        + "".join(
            f'<td class="{side}"{sort_key(cell)}>{escape(sheet.shown(number, cell))}</td>'
            for number, (side, cell) in enumerate(zip(sides, row, strict=True))
        )
        + "</tr>"
        for row in sheet.rows
    )
    wanted = len(sheet.rows) >= FEWEST_FILTERED
    return (
        f'<div class="sheet">{FILTER if wanted else ""}<div class="box" tabindex="0" role="region" '
        f'aria-label="{escape(sheet.title)}, table"><table><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div></div>"
    )


def sort_key(cell: Cell) -> str:
    """The attribute by which a number sorts; none for texts, an empty one for nothing, which sorts last."""
    if isinstance(cell, str | bool):
        return ""
    absent = cell is None or math.isnan(cell)
    return f' data-sort="{"" if absent else f"{cell:.9g}".replace("inf", "Infinity")}"'


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


FILTER = (
    '<div class="filter"><label>Filter <input type="search" spellcheck="false" autocomplete="off"></label>'
    '<output aria-live="polite"></output></div>'
)
KINDS = {
    Prose: "prose",
    Facts: "facts",
    Sheet: "table",
    Bars: "figure",
    Scatter: "figure",
    Lines: "figure",
    HeatMaps: "figure",
}
