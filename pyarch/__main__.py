"""The command line: python -m pyarch info | demo | check."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from pyarch import models
from pyarch.check import DTYPES, SpecError, find_model, read_input
from pyarch.demo import demonstrate
from pyarch.info import info
from pyarch.verify import verify

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 1 where a verification failed, or 130 after Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.command(options, parser)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pyarch", description="Faster layers for PyTorch models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    facts = commands.add_parser("info", help="versions, devices, backends, and the fix for what is missing")
    facts.set_defaults(command=_info)

    demo = commands.add_parser("demo", help="swap, verify and time known architectures")
    demo.add_argument("model", nargs="?", default="all", choices=("all", *models.names()))
    demo.add_argument("--size", default="real", choices=tuple(models.SIZES))
    demo.set_defaults(command=_demo)

    check = commands.add_parser("check", help="swap, verify and time a model of your own")
    check.add_argument(
        "model", metavar="MODULE:FACTORY", help="a model, or a function or class that makes one"
    )
    check.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="SHAPE",
        help="8,3,224,224 of normal numbers, or 2,16:int64:1000 of integers below 1000; once an argument",
    )
    check.add_argument("--dtype", default="float32", choices=tuple(DTYPES))
    check.add_argument("--eval", action="store_true", help="in evaluation mode")
    check.add_argument("--forward-only", action="store_true", help="no gradients")
    check.set_defaults(command=_check)

    for command in (demo, check):
        command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    for command in (facts, demo, check):
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _info(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    _show(info(), options.json)
    return 0


def _demo(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    names = models.names() if options.model == "all" else (options.model,)
    demo = demonstrate(names, _device(options.device, parser), options.size)
    _show(demo, options.json)
    return 0 if demo.ok else 1


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    device, dtype = _device(options.device, parser), DTYPES[options.dtype]
    try:
        specs = [read_input(text) for text in options.input]
        make = find_model(options.model)
    except SpecError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    model = make().to(device, dtype)
    if options.eval:
        model.eval()
    inputs = tuple(spec.draw(dtype, device) for spec in specs)
    report = verify(model, inputs, backward=not options.forward_only)
    _show(report, options.json)
    return 0 if report.ok else 1


def _device(name: str, parser: argparse.ArgumentParser) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _show(result, as_json: bool) -> None:
    if as_json:
        print(result.to_json())
    else:
        result.table().show()


if __name__ == "__main__":
    sys.exit(main())
