"""The README's generated sections: speed from committed results, the support matrix from the dispatcher.

A section stands between `<!-- generated:NAME -->` and `<!-- end:NAME -->`; everything outside is left alone.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import results
from benchmarks.environment import ROOT, cpu_words
from benchmarks.goals import METRICS
from benchmarks.markdown import markdown_table
from benchmarks.suites import SUITES

README = ROOT / "README.md"
NOT_MEASURED = "Not measured yet."
SECTION = re.compile(r"<!-- generated:([\w-]+) -->\n(.*?)<!-- end:\1 -->", re.DOTALL)
MARKER = re.compile(r"<!-- (?:generated|end):([\w-]+) -->")
PASS_TITLES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward + backward"}


class ReadmeError(ValueError):
    """A README that cannot be generated: its markers cannot be followed."""


def regenerate(check: bool = False, readme: Path | None = None) -> int:
    """Write the generated sections; with `check` only compare, and return 1 with a diff when stale."""
    readme = readme or README
    old = readme.read_text(encoding="utf-8")
    new = with_sections(old, SECTIONS)
    if old == new:
        return 0
    if check:
        lines = (old.splitlines(keepends=True), new.splitlines(keepends=True))
        sys.stdout.writelines(difflib.unified_diff(*lines, str(readme), "generated"))
        print(f"{readme.name} is stale: run `python -m benchmarks readme`", file=sys.stderr)
        return 1
    readme.write_text(new, encoding="utf-8")
    print(f"{readme.name} rewritten")
    return 0


def with_sections(text: str, sections: dict[str, Callable[[], str]]) -> str:
    """`text` with each marked section replaced by what its generator gives.

    Raises ReadmeError when a marker names no section or has no partner.
    """
    unknown = set(MARKER.findall(text)) - set(sections)
    if unknown:
        raise ReadmeError(f"unknown sections {sorted(unknown)}, there are {', '.join(sections)}")
    whole = SECTION.findall(text)
    if 2 * len(whole) != len(MARKER.findall(text)):
        raise ReadmeError("a marker has no partner: write <!-- generated:NAME --> ... <!-- end:NAME -->")

    def filled(match: re.Match) -> str:
        name = match[1]
        return f"<!-- generated:{name} -->\n{sections[name]().strip()}\n<!-- end:{name} -->"

    return SECTION.sub(filled, text)


def speed_section(suite: str, on_gpu: bool, folder: Path = results.RESULTS) -> str:
    """A suite's speed on every device of one kind, from its newest committed results."""
    documents = [
        document
        for document in results.newest_per_device(suite, folder)
        if bool(document["environment"]["gpu"]) == on_gpu
    ]
    return "\n\n".join(device_tables(document) for document in documents) or NOT_MEASURED


def device_tables(document: dict) -> str:
    """One table for each instruction set a device was measured with, and where the figures come from."""
    instruction_sets = list(dict.fromkeys(row["isa"] for row in document["rows"]))
    parts = [provenance(document["environment"]) + share_words(document), *pictures(document)]
    for isa in instruction_sets:
        rows = [row for row in document["rows"] if row["isa"] == isa]
        ours_only = (
            f"Our {isa} library beside torch under ATEN_CPU_CAPABILITY={isa} (which does not limit oneDNN "
            "and MKL, torch's libraries for most convolutions and matrix products):"
        )
        parts += [ours_only] * (isa != "native") + [speed_table(rows)]
    return "\n\n".join(parts)


def pictures(document: dict) -> list[str]:
    """The committed picture of a device's speedups, where there is one."""
    path = f"docs/plots/{document['environment']['device']}-{document['suite']}-speedup.png"
    return [f"![times faster than torch, case by case]({path})"] if (ROOT / path).exists() else []


def provenance(environment: dict) -> str:
    gpu = environment["gpu"]
    device = gpu["name"] if gpu else f"{cpu_words(environment['cpu'])} (`{environment['device']}`)"
    dirty = " with uncommitted changes" if environment["dirty"] else ""
    return (
        f"{device}, {environment['threads']} threads, torch {environment['torch']}, "
        f"{environment['date'][:10]}, commit {environment['commit'][:12]}{dirty}. "
        "Median milliseconds a call, stock -> pyarch, and the median of the paired ratios."
    )


def share_words(document: dict) -> str:
    """What the percentages of a table are shares of, where it has any."""
    if not any("matmul_share" in row for row in document["rows"]):
        return ""
    ceilings = document["environment"]["ceilings"]
    rates = [
        f"{ceilings[name]:.0f} GFLOP/s in {dtype}"
        for name, dtype in (("matmul_fp32_gflop_per_s", "fp32"), ("matmul_bf16_gflop_per_s", "bf16"))
        if name in ceilings
    ]
    return (
        " The percentage is the rate of the layer's matrix products, as a share of the highest that torch.mm "
        f"reached in the same run ({', '.join(rates)})."
    )


def speed_table(rows: list[dict]) -> str:
    """Cases downward; for each pass and allocator the times and the speedup."""
    rows = [row for row in rows if row["pass"] != "overhead"]
    measured = {(row["case"], row["pass"], row["allocator"]): row for row in rows}
    columns = list(dict.fromkeys((row["pass"], row["allocator"]) for row in rows if not row.get("failure")))
    columns.sort(key=lambda column: (list(PASS_TITLES).index(column[0]), column[1] != "steady"))
    failed = {row["case"]: "absent" if row.get("absent") else "failed" for row in rows if row.get("failure")}
    titles = [f"{PASS_TITLES[name]}, {allocator} allocator" for name, allocator in columns]
    body = [
        [case, *(speed_cell(measured.get((case, *column)), failed.get(case, "-")) for column in columns)]
        for case in dict.fromkeys(row["case"] for row in rows)
    ]
    return markdown_table(["case", *titles], body)


def speed_cell(row: dict | None, otherwise: str) -> str:
    if row is None:
        return otherwise
    stock, ours = (f"{row[side]['median_ms']:.3g}" for side in ("stock", "ours"))
    words = [f"{stock} -> {ours}", f"**{row['speedup']['median']:.2f}x**"]
    if "matmul_share" in row:
        words.append(f"{row['matmul_share']:.0%}")
    if "of_padded" in row:
        words.append(f"{row['of_padded']['ours']['median']:.2f} of its time on a padded batch")
    if "opponent_share" in row:
        words.append(f"{METRICS['of_itself'].figure(row):.2f} of its time for as much work")
    if "peak_mib" in row:
        words.append(" -> ".join(f"{row['peak_mib'][side]:.3g}" for side in ("stock", "ours")) + " MiB")
    return ", ".join(words)


def support_section() -> str:
    from benchmarks.support import support_matrix

    return support_matrix()


SECTIONS: dict[str, Callable[[], str]] = {
    f"speed-{suite}-{kind}": partial(speed_section, suite, on_gpu=kind == "gpu")
    for suite in SUITES
    for kind in ("cpu", "gpu")
} | {"support": support_section}
