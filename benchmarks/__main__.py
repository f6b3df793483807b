"""Command line of the benchmarks: `python -m benchmarks SUITE|all|import|readme|plots|device|audit`."""

from __future__ import annotations

import argparse
import importlib
import math
import signal
import sys

from benchmarks.environment import ALLOCATORS, INSTRUCTION_SETS
from benchmarks.peers import PEERS
from benchmarks.plan import Settings
from benchmarks.readme import ReadmeError
from benchmarks.results import ResultsError
from benchmarks.suites import PASSES, SUITES

BACKENDS = ("auto", "triton", "cuda", "cpu", "torch", "reference")
DTYPES = {name: name for name in ("fp32", "bf16", "fp16")}
# What a command makes from committed results; the module of its name does it.
GENERATED = {"readme": "the README's tables", "plots": "the pictures of docs/plots"}
PASS_NAMES = {"full": "fwd+bwd"} | {name: name for name in PASSES}


def main(argv: list[str]) -> int:
    if argv[:1] == ["audit"]:
        return importlib.import_module("benchmarks.audit").main(argv[1:])
    options = parser().parse_args(argv)
    try:
        return options.start(options)
    except (ReadmeError, ResultsError) as error:
        print(error, file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Microbenchmarks of pyarch beside stock torch."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for suite in SUITES.values():
        add_suites(commands.add_parser(suite.name, help=suite.what), (suite.name,))
    add_suites(commands.add_parser("all", help="these suites one after another"), tuple(SUITES))
    add_import(commands.add_parser("import", help="what `import pyarch` adds to `import torch`"))
    for name, what in GENERATED.items():
        add_generated(commands.add_parser(name, help=f"regenerate {what} from committed results"), name)
    add_device(commands.add_parser("device", help="this machine's folder name under benchmarks/results"))
    commands.add_parser("audit", help="compile every Triton kernel for every target, no GPU needed")
    return top


def add_suites(command: argparse.ArgumentParser, suites: tuple[str, ...]) -> None:
    extent = command.add_mutually_exclusive_group()
    for name, what in (
        ("quick", "the shorter cases of the table, 0.3 s a pass"),
        ("full", "the table of cases, 3 s a pass"),
        ("sweep", "a wide grid of shapes, worst first"),
    ):
        extent.add_argument(f"--{name}", dest="extent", action="store_const", const=name, help=what)
    command.set_defaults(extent="table", start=start_suites, suites=suites, command=command)
    what = command.add_argument_group("what is measured")
    what.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_list(what, "--dtype", "dtypes", DTYPES, "only cases of these dtypes")
    what.add_argument("--filter", default="", metavar="TEXT", help="only cases whose name holds TEXT")
    add_list(what, "--pass", "passes", PASS_NAMES, "full: forward and backward together")
    what.add_argument("--backend", choices=BACKENDS, default="auto")
    add_list(what, "--vs", "peers", opponents(), "timed in turn with stock, which always is")
    how = command.add_argument_group("how")
    how.add_argument("--allocator", choices=(*ALLOCATORS, "both"), default="steady", help="state of malloc")
    how.add_argument("--isa", choices=tuple(INSTRUCTION_SETS), action="append", help="may be repeated")
    how.add_argument("--threads", type=threads, help="of torch and every peer (default: torch's choice)")
    how.add_argument("--budget", type=seconds, metavar="SECONDS", help="timing of each pass of each case")
    how.add_argument(
        "--patience", type=patience, metavar="SECONDS", help="without a row before a case is given up"
    )
    how.add_argument("--commit", help="the commit measured, where there is no git checkout")
    where = command.add_argument_group("where results go")
    where.add_argument("--json", metavar="FILE", help="all rows, with the environment")
    where.add_argument("--csv", metavar="FILE", help="a line a row")
    where.add_argument("--html", metavar="FILE", help="a page that needs no network")
    where.add_argument("--plot", metavar="DIR", help="charts as PNG and SVG")
    where.add_argument("--save", action="store_true", help="a file a suite under benchmarks/results/<device>")
    demands = command.add_argument_group("what the run is held to")
    demands.add_argument("--compare", metavar="OLD.json", help="exit 1 where a case became slower")
    demands.add_argument("--force", action="store_true", help="compare with another device's results too")
    demands.add_argument(
        "--fail-under", type=ratio, metavar="X", help="exit 1 where a speedup over stock is below X"
    )


def add_list(group, flag: str, dest: str, choices: dict[str, str | None], what: str) -> None:
    """An option that takes a comma list and repeats; `choices` gives what each name stands for."""

    def names(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in choices]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(map(repr, unknown))}, there are {known}")
        return [choices[name] for name in text.split(",") if choices[name]]

    known = ", ".join(choices)
    group.add_argument(
        flag, dest=dest, type=names, action="extend", default=[], metavar="A,B", help=f"{what}: {known}"
    )


def opponents() -> dict[str, str | None]:
    """What --vs takes; stock stands on its side whether it is named or not."""
    return {"stock": None, "eager": None} | {name: name for name in PEERS}


def number(text: str, kind: type, least: float, what: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no {what}")
    return value


def threads(text: str) -> int:
    return number(text, int, 1, "number of threads, 1 or more")


def seconds(text: str) -> float:
    return number(text, float, 0.0, "number of seconds")


def patience(text: str) -> float:
    return number(text, float, math.ulp(0.0), "number of seconds above 0")


def ratio(text: str) -> float:
    return number(text, float, 0.0, "ratio")


def start_suites(options: argparse.Namespace) -> int:
    from benchmarks.command import run
    from benchmarks.outputs import Outputs
    from benchmarks.run import Machine
    from benchmarks.verdict import Demands

    if options.force and not options.compare:
        options.command.error("--force needs --compare OLD.json")
    plans = [
        Settings(
            suite,
            extent=options.extent,
            device=options.device,
            dtypes=tuple(dict.fromkeys(options.dtypes)),
            filter=options.filter,
            passes=tuple(name for name in PASSES if name in options.passes),
            backend=options.backend,
            peers=tuple(dict.fromkeys(options.peers)),
            commit=options.commit,
            budget_seconds=options.budget,
            patience_seconds=options.patience,
        )
        for suite in options.suites
    ]
    # These end a run as Ctrl-C does: finished rows are written, the measuring process ends too.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) != signal.SIG_IGN:
            signal.signal(ending, signal.default_int_handler)
    allocators = tuple(ALLOCATORS) if options.allocator == "both" else (options.allocator,)
    return run(
        plans,
        Machine(allocators, tuple(options.isa or ["native"]), options.threads),
        Outputs(options.json, options.csv, options.html, options.plot, options.save),
        Demands(options.compare, options.force, options.fail_under),
    )


def add_import(command: argparse.ArgumentParser) -> None:
    command.set_defaults(start=start_import)
    command.add_argument("--json", metavar="FILE")


def start_import(options: argparse.Namespace) -> int:
    from benchmarks.import_time import report_import_time

    return report_import_time(options.json)


def add_device(command: argparse.ArgumentParser) -> None:
    command.set_defaults(start=start_device)
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def start_device(options: argparse.Namespace) -> int:
    from benchmarks.environment import cpu_facts, device_slug

    print(device_slug(options.device, cpu_facts()))
    return 0


def add_generated(command: argparse.ArgumentParser, name: str) -> None:
    command.set_defaults(start=start_generated, name=name)
    command.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 and say what is stale where something is"
    )


def start_generated(options: argparse.Namespace) -> int:
    return importlib.import_module(f"benchmarks.{options.name}").regenerate(check=options.check)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
