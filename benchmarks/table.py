"""Results as a table on a terminal: cases in order, or the whole sweep worst first."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from benchmarks.environment import cpu_words
from benchmarks.goals import METRICS, goal_text
from benchmarks.results import is_beside_stock, merged

WIDTH_ELSEWHERE = 400
LOSS_BELOW = 0.95
LOSS_OVER_US = 15.0
SWEEP_ROWS_SHOWN = 40
BUSY_SHARE = 0.5
# Below the rows that several processes measured.
OF_VISITS = "times are of the first process, the speedup and its interval of all that measured the row"
# What became of a peer without a time.
PEER_KINDS = {"failure": "FAILED", "absent": "absent"}
CEILINGS = {
    "copy_gb_per_s": "copy {:.1f} GB/s",
    "matmul_fp32_gflop_per_s": "torch.mm fp32 {:.0f} GFLOP/s",
    "matmul_bf16_gflop_per_s": "torch.mm bf16 {:.0f} GFLOP/s",
}


def print_results(document: dict) -> None:
    """Print the table of a run, its failures, and one line that sums it up."""
    console = console_here()
    measured, failures = measured_and_failed(document)
    sweep = document.get("extent") == "sweep"
    shown = sorted(measured, key=worst_first)[:SWEEP_ROWS_SHOWN] if sweep else beside_each_other(measured)
    if shown:
        console.print(as_table(document, shown, console))
    if any("visits" in row for row in shown):
        console.print(OF_VISITS, markup=False)
    for row in failures:
        console.print(
            f"{'ABSENT' if row.get('absent') else 'FAILED'} {row['case']} "
            f"[{row['allocator']}, {row['isa']}]: {row['failure']}",
            markup=False,
        )
    for line in peer_lines(measured):
        console.print(line, markup=False)
    for line in variant_lines(document["environment"]):
        console.print(line, markup=False)
    console.print(sum_up(measured, failures, sweep), markup=False)


def console_here() -> Console:
    """The terminal; elsewhere as wide as every table needs."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=WIDTH_ELSEWHERE, highlight=False)


def measured_and_failed(document: dict) -> tuple[list[dict], list[dict]]:
    rows = document["rows"]
    return [row for row in rows if not row.get("failure")], [row for row in rows if row.get("failure")]


def as_table(document: dict, rows: list[dict], console: Console) -> Table:
    """The rows under every column that some row fills, or under fewer where those do not fit."""
    columns = COLUMNS | {name: peer_cell(name) for row in rows for name in row.get("peers", {})}
    cells = {title: [cell(row) for row in rows] for title, cell in columns.items()}
    filled = [title for title in columns if set(cells[title]) != {"-"}]
    middle = [title for title in filled if title not in WIDE_COLUMNS]
    narrow = [title for title in NARROW_COLUMNS if title in filled]
    for titles in (filled, middle, narrow):
        table = table_of({title: cells[title] for title in titles}, heading(document))
        unbounded = console.options.update(width=10 * WIDTH_ELSEWHERE)
        if Measurement.get(console, unbounded, table).maximum <= console.width:
            break
    return table


def table_of(columns: dict[str, list[str]], caption: str) -> Table:
    table = Table(title=caption, box=box.SIMPLE_HEAD)
    for title in columns:
        table.add_column(title, justify="left" if title in LEFT_COLUMNS else "right", no_wrap=True)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def heading(document: dict) -> str:
    environment = document["environment"]
    gpu = environment["gpu"]
    device = gpu_words(gpu) if gpu else f"{cpu_words(environment['cpu'])} ({environment['device']})"
    dirty = " with changes" if environment["dirty"] else ""
    compiled = " (stock compiled)" if document.get("versus") == "compile" else ""
    return (
        f"{device}, {environment['threads']} threads{core_words(environment)}, "
        f"torch {environment['torch']}{compiled}, "
        f"{ceiling_words(environment['ceilings'])}, "
        f"commit {environment['commit'][:12]}{dirty}, {environment['date']}"
    )


def gpu_words(gpu: dict) -> str:
    """A GPU's name and, where nvidia-smi told them, its clock at the start and its driver."""
    state = gpu.get("state")
    return gpu["name"] + (f" at {state['sm_mhz']} MHz, driver {state['driver']}" if state else "")


def core_words(environment: dict) -> str:
    """The cores that the process may run on, where they are known."""
    cores = ",".join(map(str, environment.get("affinity", ())))
    return f" on cores {cores}" if cores else ""


def ceiling_words(ceilings: dict[str, float]) -> str:
    """What the machine reaches at best, as measured in the run."""
    return ", ".join(CEILINGS[name].format(figure) for name, figure in ceilings.items())


def variant_lines(environment: dict) -> list[str]:
    """A warning where other work was running; for each variant which kernels served and what was loaded."""
    load, cores = environment["load_average"][0], environment["cpu"]["cores"]
    busy = [f"WARNING: load {load} on {cores} cores at the start, other work distorts these figures"]
    return busy * (load > BUSY_SHARE * cores) + [
        f"{each['allocator']}, {each['isa']}: pyarch of the {source_of(environment)}, CPU kernels "
        f"{each['cpu_kernels']}, torch {each['torch_cpu_capability']}, "
        f"{ceiling_words(each['ceilings'])}, libraries {', '.join(each['libraries'])}"
        for each in environment["variants"]
    ]


def source_of(environment: dict) -> str:
    found = environment["pyarch"]
    return "clone (which shadows an installed build)" if found == "clone" else found


def speedup_cell(row: dict) -> str:
    if "added_us" in row:
        return f"{row['added_us']['median']:+.1f} us"
    speedup = row["speedup"]
    mark = " LOSS" if is_loss(row) else " slower" if is_slower(row) else ""
    return f"{speedup['median']:.2f} [{speedup['low']:.2f}-{speedup['high']:.2f}]{mark}"


def time_cell(side: str) -> Callable[[dict], str]:
    """The median of a side's times and, where they are known, its quantiles at 20 and 80 %."""

    def cell(row: dict) -> str:
        times = row[side]
        between = f" [{times['p20_ms']:.4g}-{times['p80_ms']:.4g}]" if "p20_ms" in times else ""
        return f"{times['median_ms']:.4g}{between}"

    return cell


def peer_cell(name: str) -> Callable[[dict], str]:
    """A peer's time and how many times faster ours is; or in a word why there is none."""

    def cell(row: dict) -> str:
        peer = row.get("peers", {}).get(name)
        if peer is None:
            return "-"
        if "speedup" not in peer:
            return PEER_KINDS["absent" if "absent" in peer else "failure"]
        return f"{peer['median_ms']:.4g}, {peer['speedup']['median']:.2f}x"

    return cell


def peer_lines(rows: list[dict]) -> list[str]:
    """Why peers have no time: a line a peer and reason, failures first."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for name, peer in row.get("peers", {}).items():
            for kind in {"failure", "absent"} & peer.keys():
                place = f"{row['case']} {row['pass']} [{row['allocator']}, {row['isa']}]"
                where.setdefault((PEER_KINDS[kind], name, peer[kind]), []).append(place)
    return [
        f"{kind} {name}, {rows_words(places)}: {reason}"
        for (kind, name, reason), places in sorted(where.items(), key=lambda each: each[0][0] != "FAILED")
    ]


def rows_words(places: list[str]) -> str:
    return places[0] if len(places) == 1 else f"{len(places)} rows, first {places[0]}"


def roofline_cell(row: dict) -> str:
    """The share of what the machine allows, and which of its ceilings that is."""
    if "roofline" not in row:
        return "-"
    return f"{row['roofline']['share']:.0%} of {row['roofline']['bound']}"


def graph_cell(row: dict) -> str:
    """The speedup where both sides are replayed as CUDA graphs."""
    graph = row.get("graph", {})
    return f"{graph['speedup']['median']:.2f}" if "speedup" in graph else "-"


def goal_cell(row: dict) -> str:
    return goal_text(row["goal"]) if row["goal"] else "-"


def figure_cell(name: str, form: str) -> Callable[[dict], str]:
    """The cell of a figure that only some rows have."""
    return lambda row: "-" if row.get(name) is None else form.format(row[name])


def of_padded_cell(row: dict) -> str:
    """Time on packed sequences over the same side's on a padded batch, ours beside stock's."""
    if "of_padded" not in row:
        return "-"
    return " / ".join(f"{row['of_padded'][side]['median']:.2f}" for side in ("ours", "stock"))


def of_itself_cell(row: dict) -> str:
    """Time over that of our own call for as much work, where that was the opponent."""
    return f"{METRICS['of_itself'].figure(row):.2f}" if "opponent_share" in row else "-"


def peak_cell(row: dict) -> str:
    """The most MiB that a call of either side allocates."""
    if "peak_mib" not in row:
        return "-"
    return " / ".join(f"{row['peak_mib'][side]:.3g}" for side in ("ours", "stock"))


def error_cell(errors: dict) -> str:
    """The error of ours beside stock's, where ours compares worst; or the one that stock has wrong."""
    wrong = [f"{each['ours']:.1e} / wrong" for each in errors.values() if each["stock"] is None]
    if wrong or not errors:
        return wrong[0] if wrong else "-"
    worst = max(errors.values(), key=lambda each: each["ours"] / max(each["stock"], 1e-30))
    return f"{worst['ours']:.1e} / {worst['stock']:.1e}"


COLUMNS: dict[str, Callable[[dict], str]] = {
    "case": lambda row: row["case"],
    "pass": lambda row: row["pass"],
    "variant": lambda row: f"{row['allocator']} {row['isa']}",
    "stock ms (p20-p80)": time_cell("stock"),
    "ours ms (p20-p80)": time_cell("ours"),
    "speedup [95 %]": speedup_cell,
    "goal": goal_cell,
    "met": lambda row: {True: "yes", False: "NO", None: "-"}[row["met"]],
    "GB/s": figure_cell("gb_per_s", "{:.1f}"),
    "of copy": figure_cell("copy_share", "{:.0%}"),
    "us/step": figure_cell("us_a_step", "{:.2f}"),
    "GFLOP/s": figure_cell("gflop_per_s", "{:.3g}"),
    "of mm": figure_cell("matmul_share", "{:.0%}"),
    "of padded": of_padded_cell,
    "of itself": of_itself_cell,
    "of roofline": roofline_cell,
    "in graphs": graph_cell,
    "launch us": figure_cell("launch_us", "{:.1f}"),
    # What our first call took more than a warm one; of GPUs alone, kernels for CPUs are compiled beforehand.
    "compile s": figure_cell("compile_s", "{:.3f}"),
    "peak MiB ours / stock": peak_cell,
    "error ours / stock": lambda row: error_cell(row.get("error", {})),
    "matches": lambda row: {True: "yes", False: "NO", None: "-"}[row.get("matches")],
    "backend": lambda row: ", ".join(row.get("backend", {}).values()) or "-",
}
LEFT_COLUMNS = ("case", "pass", "variant", "backend")
NARROW_COLUMNS = ("case", "pass", "speedup [95 %]", "met")
# Those that go first where a terminal is too narrow for all.
WIDE_COLUMNS = (
    "variant",
    "goal",
    "GB/s",
    "us/step",
    "GFLOP/s",
    "of padded",
    "of itself",
    "launch us",
    "compile s",
    "matches",
    "backend",
)


def is_loss(row: dict) -> bool:
    """Slower than stock by more than 5 % and by more than 15 us a call."""
    lost_us = (row["ours"]["median_ms"] - row["stock"]["median_ms"]) * 1e3
    return is_beside_stock(row) and row["speedup"]["median"] < LOSS_BELOW and lost_us > LOSS_OVER_US


def is_slower(row: dict) -> bool:
    """Slower than stock beyond the interval, by whatever amount."""
    return is_beside_stock(row) and row["speedup"]["high"] < 1.0


def worst_first(row: dict) -> tuple[bool, float]:
    return not is_loss(row), row["speedup"]["median"]


def beside_each_other(rows: list[dict]) -> list[dict]:
    """The rows of all variants, those of one case and pass together, in order of first appearance."""
    order: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        order.setdefault((row["case"], row["pass"]), []).append(row)
    return [row for group in order.values() for row in group]


def sum_up_all(documents: list[dict], wall_seconds: float) -> str:
    """One line for a run: what all its suites come to, where there are several, and the time that it took."""
    minutes, rest = divmod(round(wall_seconds), 60)
    took = f"measured in {minutes} min {rest} s"
    if len(documents) == 1:
        return took
    names = ", ".join(document["suite"] for document in documents)
    return f"{names}: {sum_up(*measured_and_failed(merged(documents)), sweep=False)}; {took}"


def sum_up(measured: list[dict], failures: list[dict], sweep: bool) -> str:
    losses = sum(is_loss(row) for row in measured)
    slower = sum(is_slower(row) and not is_loss(row) for row in measured)
    goals = [row["met"] for row in measured if row["met"] is not None]
    rule = f"below {LOSS_BELOW}x of stock by more than {LOSS_OVER_US:g} us"
    words = [f"{len(measured)} rows, {losses} losses ({rule})"]
    words += [f"{slower} more slower than stock by less"] * (slower > 0)
    words += [f"goals met {sum(goals)} of {len(goals)}"] * bool(goals)
    words += [f"{min(SWEEP_ROWS_SHOWN, len(measured))} worst shown"] * sweep
    absent = sum(bool(row.get("absent")) for row in failures)
    words += [f"{len(failures) - absent} failed"] * (len(failures) > absent)
    words += [f"{absent} without an opponent here"] * (absent > 0)
    return "; ".join(words)
