"""Results as static pictures: the speedup of every case with its interval, and the roofline.

One picture of speedups for a suite and device, one roofline where the run measured both ceilings, each as PNG
and SVG. The same results give the same bytes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import results
from benchmarks.environment import ROOT, cpu_words
from benchmarks.results import is_beside_stock
from benchmarks.suites import SUITES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTS = ROOT / "docs" / "plots"
FORMATS = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
# As wide as a README's column when shown at half its pixels.
WIDTH, ROW_HEIGHT, HEAD_HEIGHT, DOTS_PER_INCH = 9.0, 0.19, 1.35, 160
LONGEST_NAME = 62
# Colours that stay apart for colour-blind eyes, on white and on black paper alike (Okabe, Ito 2008).
COLOURS = {"fwd": "#0072b2", "bwd": "#cc79a7", "fwd+bwd": "#56b4e9"}
SLOWER, GOAL, INK, FAINT = "#d55e00", "#111111", "#222222", "#999999"
PASS_WORDS = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward + backward"}
STYLE = {
    "svg.hashsalt": "pyarch",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.edgecolor": FAINT,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def write(folder: str | Path, documents: Sequence[dict]) -> Iterator[Path]:
    """Draw every suite of the documents into `folder`; give the path of each file that is there."""
    import matplotlib

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for document in documents:
            for name, figure in figures_of(document):
                for extension, metadata in FORMATS.items():
                    path = folder / f"{name}.{extension}"
                    with results.replacing(path) as temporary:
                        figure.savefig(temporary, format=extension, dpi=DOTS_PER_INCH, metadata=metadata)
                    yield path


def figures_of(document: dict) -> Iterator[tuple[str, Figure]]:
    """The figures of a document under their names: speedups, and a roofline, of each suite."""
    device = document["environment"]["device"]
    for suite in suites_of(document):
        rows = timed_rows(document, suite)
        beside_stock = [row for row in rows if is_beside_stock(row)]
        if beside_stock:
            yield f"{device}-{suite}-speedup", speedup_figure(document, suite, beside_stock)
        if any("roofline" in row for row in rows):
            yield f"{device}-{suite}-roofline", roofline_figure(document, suite, rows)


def suites_of(document: dict) -> list[str]:
    return list(dict.fromkeys(row.get("suite", document["suite"]) for row in document["rows"]))


def timed_rows(document: dict, suite: str) -> list[dict]:
    """The suite's measured rows of the first variant; overhead is told in microseconds, not as a speedup."""
    measured = [
        row
        for row in document["rows"]
        if row.get("suite", document["suite"]) == suite and not row.get("failure") and "added_us" not in row
    ]
    first = measured[0] if measured else {}
    return [row for row in measured if all(row[name] == first[name] for name in ("allocator", "isa"))]


def is_slower(row: dict) -> bool:
    """Slower than torch, where torch stands on the other side."""
    return is_beside_stock(row) and row["speedup"]["median"] < 1


def speedup_figure(document: dict, suite: str, rows: Sequence[dict]) -> Figure:
    """A bar a case and pass, from stock's time at 1, with the 95 % interval and a mark at its goal."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    cases = list(dict.fromkeys(row["case"] for row in rows))
    passes = [name for name in COLOURS if any(row["pass"] == name for row in rows)]
    height = HEAD_HEIGHT + ROW_HEIGHT * len(passes) * len(cases)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    thickness = 0.8 / len(passes)
    for number, case in enumerate(cases):
        of_case = [row for row in rows if row["case"] == case]
        for place, row in enumerate(of_case):
            draw_bar(axes, number + (place - (len(of_case) - 1) / 2) * thickness, thickness, row)
    axes.axvline(1.0, color=INK, linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_yticks(range(len(cases)), [shortened(case) for case in cases])
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.xaxis.set_minor_formatter(lambda *_: "")
    axes.grid(axis="x", color=FAINT, alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("times faster than torch, paired in one run (logarithmic); the line at 1x is torch")
    slower = sum(map(is_slower, rows))
    handles = [Patch(color=COLOURS[name], label=PASS_WORDS[name]) for name in passes]
    handles += [Patch(color=SLOWER, label=f"slower than torch ({slower} of {len(rows)})")] * (slower > 0)
    handles.append(Line2D([], [], color=GOAL, marker="|", linestyle="", markersize=9, label="goal"))
    handles.append(Line2D([], [], color=FAINT, linewidth=1.2, label="95 % interval"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(title(document, f"{suite}: speedup over torch"), fontsize=9)
    return figure


def draw_bar(axes, place: float, thickness: float, row: dict) -> None:
    speedup = row["speedup"]
    marked = is_slower(row)
    colour = SLOWER if marked else COLOURS[row["pass"]]
    axes.barh(place, speedup["median"] - 1.0, left=1.0, height=thickness * 0.9, color=colour)
    axes.plot([speedup["low"], speedup["high"]], [place, place], color=INK, linewidth=0.9, alpha=0.7)
    goal = row.get("goal")
    if goal and goal["metric"] == "speedup":
        axes.plot(
            [goal["value"]] * 2, [place - thickness / 2, place + thickness / 2], color=GOAL, linewidth=1.6
        )
    axes.annotate(
        f"{speedup['median']:.2f}",
        (1.0, place),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=6.5,
        color=SLOWER if marked else INK,
        fontweight="bold" if marked else "normal",
    )


def roofline_figure(document: dict, suite: str, rows: Sequence[dict]) -> Figure:
    """Every row at its intensity and rate, under the ceilings that the run measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = figure.add_subplot()
    shown = [row for row in rows if "roofline" in row]
    for name, colour in COLOURS.items():
        points = [(row["roofline"]["intensity"], row["gflop_per_s"]) for row in shown if row["pass"] == name]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=4.5, label=PASS_WORDS[name])
    for (label, corners), style in zip(roofs(document, shown).items(), ("-", "--", ":"), strict=False):
        axes.plot(*zip(*corners, strict=True), style, color=INK, linewidth=1.1, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("floating-point operations a byte that must move")
    axes.set_ylabel("GFLOP/s")
    axes.grid(color=FAINT, alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title(document, f"{suite}: roofline"), fontsize=9)
    return figure


def roofs(document: dict, rows: Sequence[dict]) -> dict[str, list[tuple[float, float]]]:
    """The corners of a roof for each dtype that rows have and whose products were measured."""
    ceilings = document["environment"].get("ceilings", {})
    words = {word for row in rows for word in row["case"].split()}
    peaks = {dtype: ceilings.get(f"matmul_{dtype}_gflop_per_s") for dtype in ("fp32", "bf16", "fp16")}
    peaks = {dtype: peak for dtype, peak in peaks.items() if peak and dtype in words}
    copy = ceilings.get("copy_gb_per_s")
    if not copy or not peaks:
        return {}
    intensities = [row["roofline"]["intensity"] for row in rows]
    left = min(intensities) / 2
    right = 2 * max(*intensities, *(peak / copy for peak in peaks.values()))
    found = {}
    for dtype, peak in peaks.items():
        ridge = peak / copy
        corners = [(left, copy * left), (ridge, peak)] if left < ridge else [(left, peak)]
        found[f"{dtype}: copy {copy:.0f} GB/s, torch.mm {peak:.0f} GFLOP/s"] = [*corners, (right, peak)]
    return found


def shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3] + "..."


def title(document: dict, what: str) -> str:
    """What is shown, and the machine and commit it was measured with."""
    environment = document["environment"]
    gpu = environment.get("gpu")
    device = gpu["name"] if gpu else cpu_words(environment["cpu"])
    dirty = " with changes" if environment.get("dirty") else ""
    return (
        f"{what}\n{device}, {environment['threads']} threads, torch {environment['torch']}, "
        f"commit {environment['commit'][:12]}{dirty}, {environment['date'][:10]}"
    )


def newest(folder: Path = results.RESULTS) -> list[dict]:
    """The newest committed table of every suite on every device."""
    return [document for suite in SUITES for document in results.newest_per_device(suite, folder)]


def regenerate(check: bool = False, folder: Path = PLOTS, source: Path = results.RESULTS) -> int:
    """Draw the newest committed tables into docs/plots and drop pictures of tables that are gone.

    With `check` only compare names and, of the SVG files, contents; return 1 where something is stale. (A PNG
    may differ in its compression between machines.)
    """
    with tempfile.TemporaryDirectory(prefix="pyarch-plots-") as scratch:
        drawn = {path.name: path.read_bytes() for path in write(scratch, newest(source))}
    folder.mkdir(parents=True, exist_ok=True)
    there = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix[1:] in FORMATS}
    stale = sorted(name for name in drawn.keys() | there.keys() if is_stale(name, drawn, there))
    if check:
        if stale:
            words = ", ".join(stale)
            print(f"{folder.name} is stale ({words}): run `python -m benchmarks plots`", file=sys.stderr)
        return int(bool(stale))
    for name in there.keys() - drawn.keys():
        (folder / name).unlink()
    for name in stale:
        if name in drawn:
            (folder / name).write_bytes(drawn[name])
    print(f"{len(drawn)} pictures in {folder.name}, {len(stale)} of them new or dropped")
    return 0


def is_stale(name: str, drawn: dict[str, bytes], there: dict[str, bytes]) -> bool:
    if name not in drawn or name not in there:
        return True
    return name.endswith(".svg") and drawn[name] != there[name]
