"""The page of the demo: an overview where there are several models, then one part a model."""

from __future__ import annotations

from collections.abc import Iterator

from pyarch.demo import Demo, Shown
from pyarch.page import Axis, Bars, Page, Prose, Sheet
from pyarch.page.document import Section
from pyarch.verify_page import facts, sections, summary


def page_of(demo: Demo) -> Page:
    """The page of models that were shown with their layers timed."""
    several = len(demo.shown) > 1
    parts: list[Section] = list(_overview(demo)) if several else []
    for each in demo.shown:
        parts += sections(each.proof, each.skipped, each.maps, f"{each.model}: " if several else "", several)
    ceilings = next((each.proof.ceilings for each in demo.shown if each.proof.ceilings), None)
    parts.append(facts(demo.machine, ceilings))
    if several:
        return Page("Known architectures, torch and pyarch", _verdict(demo), parts)
    (only,) = demo.shown
    return Page(f"{only.model}: torch and pyarch", summary(only.proof), parts)


def _verdict(demo: Demo) -> str:
    failed = [each.model for each in demo.shown if not each.proof.ok]
    if failed:
        return f"FAILED: {len(failed)} of {len(demo.shown)} models are not proven: {', '.join(failed)}."
    return f"{len(demo.shown)} models, each swapped, verified against float64 and timed beside torch."


def _overview(demo: Demo) -> Iterator[Section]:
    problems = [f"{each.model}: {problem}" for each in demo.shown for problem in each.proof.problems]
    if problems:
        yield Prose("Overview: verification FAILED", problems)
    passes = ("forward", "step")
    speedups = {
        name: [each.proof.timing[name].speedup if name in each.proof.timing else None for each in demo.shown]
        for name in passes
    }
    note = "torch's time over pyarch's, of the whole model. Step: forward and backward."
    names = [each.model for each in demo.shown]
    yield Bars("Overview: speedup of each model", names, speedups, Axis("speedup", "x"), note, mark=1.0)
    columns = ["model", ">layers", "backend"]
    columns += [f">{name}{unit}" for name in passes for unit in (", torch ms", ", pyarch ms", " speedup")]
    formats = {column: "{:.2f}x" if "speedup" in column else "{:.3g}" for column in columns[3:]}
    yield Sheet(
        "Overview: times and errors",
        [*columns, ">worst of allowed", "verified"],
        [_row(each, passes) for each in demo.shown],
        "Worst of allowed: the largest error in units of its tolerance, at most 1.",
        {**formats, "worst of allowed": "{:.2f}"},
    )


def _row(shown: Shown, passes: tuple[str, ...]) -> list[str | float | None]:
    cells: list[str | float | None] = [shown.model, shown.layers, shown.backends]
    for name in passes:
        timing = shown.proof.timing.get(name)
        cells += [timing.stock * 1e3, timing.swapped * 1e3, timing.speedup] if timing else [None] * 3
    worst = shown.proof.worst
    return [*cells, worst.ratio if worst else None, "yes" if shown.proof.ok else "NO"]
