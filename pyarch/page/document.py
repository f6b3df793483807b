"""A page: its sections put into the template, with styles, scripts and data inside, written as one file."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from pyarch.page import markup
from pyarch.page.charts import Bars, Lines, Scatter
from pyarch.page.heat_maps import HeatMaps, side_for
from pyarch.page.texts import Facts, Prose, Sheet

Section = Prose | Facts | Bars | Scatter | Lines | HeatMaps | Sheet
CHARTS = (Bars, Scatter, Lines, HeatMaps)
ECHARTS = "vendor/echarts.min.js"
SCRIPTS = ("theme.js", "numbers.js", "charts.js", "heat_maps.js", "figures.js", "sheets.js", "start.js")
# Fewer sections are seen at a glance.
FEWEST_LISTED = 4


@dataclass(frozen=True)
class Page:
    """A report for people.

    Args:
        title: of the page and of its window.
        lead: one or two sentences that say what the page shows.
        sections: what stands on it, from the top.
    """

    title: str
    lead: str
    sections: Sequence[Section]

    def html(self) -> str:
        """The whole page. It needs no other file and no network, and its policy forbids both."""
        scripts = [asset(ECHARTS), "\n".join(asset(f"assets/{name}") for name in SCRIPTS)]
        return Template(asset("assets/template.html")).substitute(
            policy=policy(scripts),
            title=escape(self.title),
            lead=escape(self.lead),
            style=asset("assets/page.css"),
            contents=markup.contents(self.sections) if len(self.sections) >= FEWEST_LISTED else "",
            sections="\n".join(markup.section(each, number) for number, each in enumerate(self.sections)),
            data=data_block(self.drawings()),
            scripts="\n".join(f"<script>{script}</script>" for script in scripts),
        )

    def drawings(self) -> dict[str, dict]:
        """What the scripts draw, by the number of its section."""
        side = side_for(sum(each.count for each in self.sections if isinstance(each, HeatMaps)))
        return {
            str(number): each.drawing(side) if isinstance(each, HeatMaps) else each.drawing()
            for number, each in enumerate(self.sections)
            if isinstance(each, CHARTS)
        }

    def write(self, path: str | Path) -> None:
        """Write the page under `path`: to a temporary folder beside it first, then renamed over it."""
        path = Path(path)
        # A name that came from a file system may hold what UTF-8 cannot.
        content = self.html().encode("utf-8", "backslashreplace")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as elsewhere:
            finished = Path(elsewhere) / path.name
            finished.write_bytes(content)
            os.replace(finished, path)


def asset(name: str) -> str:
    """A text file of this package."""
    return resources.files("pyarch.page").joinpath(name).read_text(encoding="utf-8")


def policy(scripts: Sequence[str]) -> str:
    """A Content-Security-Policy that runs these scripts and no others, and loads nothing at all.

    Styles are free, because the drawn charts and their tooltips carry their own.
    """
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def data_block(data: object) -> str:
    """Data as JSON that no text in it can end early."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
