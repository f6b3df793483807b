"""Attention maps as figures: a grid of heads on one colour scale, drawn by matplotlib.

matplotlib is an optional extra; its global state (pyplot) is not used.
"""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

try:
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError(
        "drawing attention maps needs matplotlib: pip install 'pyarch-kernels[plots]', or matplotlib itself"
    ) from error

MOST_COLUMNS = 4
PANEL = 2.3  # inches
MARGIN = 1.1
FEWEST_INCHES = 4.0
RESOLUTION = 150  # dots per inch
COLOURS = "viridis"
# A panel has about as many dots a side.
MOST_DOTS = 300


def draw(layer: str, maps: Tensor, head: int | None, sample: int) -> Figure:
    """Draw the maps of one layer.

    Colours follow the square root of the weights, or one weight of 1 would leave all others dark. Where there
    are more queries or keys than dots, a dot is the largest weight of those that it stands for.

    Args:
        layer: its name, for the title.
        maps: (heads, Tq, Tk), or (Tq, Tk), the mean of the heads.
        head: the number of the only head in `maps`, or None for all from 0.
        sample: the number in the batch, for the title.
    """
    if maps.dim() == 2:
        maps, titles = maps[None], ["mean of heads"]
    else:
        titles = [f"head {number}" for number in range(head or 0, (head or 0) + len(maps))]
    columns = min(MOST_COLUMNS, math.ceil(math.sqrt(len(maps))))
    rows = math.ceil(len(maps) / columns)
    size = (max(FEWEST_INCHES, columns * PANEL + MARGIN), max(FEWEST_INCHES, rows * PANEL + MARGIN) - 0.3)
    figure = Figure(size, dpi=RESOLUTION, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    values = _dots(maps.float()).numpy()
    colours = PowerNorm(0.5, 0.0, float(values.max()) or 1.0)
    extent = (-0.5, maps.shape[2] - 0.5, maps.shape[1] - 0.5, -0.5)
    for number, panel in enumerate(grid.flat):
        if number >= len(maps):
            panel.axis("off")
            continue
        options = {"cmap": COLOURS, "norm": colours, "extent": extent, "interpolation": "nearest"}
        image = panel.imshow(values[number], aspect="auto", **options)
        panel.set_box_aspect(1)
        panel.set_title(titles[number], fontsize="medium")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        if number % columns == 0:
            panel.set_ylabel("query")
        if number + columns >= len(maps):
            panel.set_xlabel("key")
            panel.tick_params(labelbottom=True)
    figure.colorbar(image, ax=grid, label="attention weight (square-root colours)", shrink=0.8)
    figure.suptitle(f"{layer or 'the model'}, sample {sample}")
    return figure


def _dots(maps: Tensor) -> Tensor:
    """At most MOST_DOTS a side of maps (heads, Tq, Tk)."""
    return F.adaptive_max_pool2d(maps, tuple(min(size, MOST_DOTS) for size in maps.shape[1:]))


def write(figure: Figure, path: Path) -> None:
    """Write a figure; the ending of `path` chooses the format."""
    figure.savefig(path)
