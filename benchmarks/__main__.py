"""Command line of the benchmarks: `python -m benchmarks SUITE|import|readme|device|audit`."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys

from benchmarks.environment import ALLOCATORS, INSTRUCTION_SETS
from benchmarks.plan import OPPONENTS, Settings
from benchmarks.readme import ReadmeError
from benchmarks.results import ResultsError
from benchmarks.suites import SUITES, Suite

BACKENDS = ("auto", "triton", "cuda", "cpu", "torch", "reference")


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
        add_suite(commands.add_parser(suite.name, help=suite.what), suite)
    add_import(commands.add_parser("import", help="what `import pyarch` adds to `import torch`"))
    add_readme(commands.add_parser("readme", help="regenerate the README's tables from committed results"))
    add_device(commands.add_parser("device", help="this machine's folder name under benchmarks/results"))
    commands.add_parser("audit", help="compile every Triton kernel for every target, no GPU needed")
    return top


def add_suite(command: argparse.ArgumentParser, suite: Suite) -> None:
    extent = command.add_mutually_exclusive_group()
    for name, what in (
        ("quick", "the table of cases, 0.3 s a pass"),
        ("full", "the table of cases, 3 s a pass"),
        ("sweep", "a wide grid of shapes, worst first"),
    ):
        extent.add_argument(f"--{name}", dest="extent", action="store_const", const=name, help=what)
    command.set_defaults(extent="table", start=start_suite, suite=suite.name)
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="only cases of this dtype")
    command.add_argument("--filter", default="", metavar="TEXT", help="only cases whose name holds TEXT")
    command.add_argument("--pass", dest="passes", action="append", choices=suite.all_passes, default=[])
    command.add_argument("--backend", choices=BACKENDS, default="auto")
    command.add_argument(
        "--vs", dest="versus", choices=OPPONENTS, default="eager", help="how the stock side runs"
    )
    command.add_argument(
        "--allocator", choices=(*ALLOCATORS, "both"), default="steady", help="state of malloc"
    )
    command.add_argument("--isa", choices=tuple(INSTRUCTION_SETS), action="append", help="may be repeated")
    command.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    command.add_argument("--budget", type=float, metavar="SECONDS", help="timing of each pass of each case")
    command.add_argument("--json", metavar="FILE", help="write the results there")
    command.add_argument(
        "--save", action="store_true", help="write them under benchmarks/results/<device> too"
    )
    command.add_argument("--commit", help="the commit measured, where there is no git checkout")


def start_suite(options: argparse.Namespace) -> int:
    from benchmarks.run import run

    settings = Settings(
        options.suite,
        extent=options.extent,
        device=options.device,
        dtype=options.dtype,
        filter=options.filter,
        passes=tuple(options.passes),
        backend=options.backend,
        versus=options.versus,
        commit=options.commit,
        budget_seconds=options.budget,
    )
    # Being terminated ends a run as Ctrl-C does: finished rows are written, the measuring process ends too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    allocators = list(ALLOCATORS) if options.allocator == "both" else [options.allocator]
    return run(settings, allocators, options.isa or ["native"], options.json, options.save, options.threads)


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


def add_readme(command: argparse.ArgumentParser) -> None:
    command.set_defaults(start=start_readme)
    command.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 with a diff when it is stale"
    )


def start_readme(options: argparse.Namespace) -> int:
    from benchmarks.readme import regenerate

    return regenerate(check=options.check)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
