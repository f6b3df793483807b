"""Reports as one HTML file: text, charts, heat maps and sortable tables, read from disk without a network.

    from pyarch.page import Axis, Bars, Page, Prose

    page = Page(
        "before and after",
        "Forward time of each layer.",
        [Bars("time", ["conv1", "conv2"], {"stock": [2.0, 1.5], "pyarch": [0.7, 0.8]}, Axis("median", "ms"))],
    )
    page.write("report.html")

Every text may be what a user named: it is shown as text, never read as HTML. Nothing here needs torch. The
charts are drawn by Apache ECharts, which stands whole in the folder `vendor`, beside its licence and notice.
"""

from pyarch.page.charts import Axis, Bars, Lines, Point, Scatter
from pyarch.page.document import Page
from pyarch.page.heat_maps import HeatMaps
from pyarch.page.texts import Facts, Prose, Sheet

__all__ = ["Axis", "Bars", "Facts", "HeatMaps", "Lines", "Page", "Point", "Prose", "Scatter", "Sheet"]
