"""The command line: python -m pyarch info | demo | check | compare."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pyarch import models
from pyarch.check import DTYPES, EndingInTheUsersError, SpecError, check, find_model, read_input
from pyarch.comparison.command import add_compare, compared
from pyarch.demo import demonstrate
from pyarch.info import info

INTERRUPTED = 130
# Layers whose attention maps a page holds, when it shows one model and when it shows several.
MAPS_OF_ONE, MAPS_OF_MANY = 4, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 where a verification failed, 130 after Ctrl-C.

    Raises:
        SystemExit: 1, the user's model raised; 2, the arguments are not understood.
    """
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

    own = commands.add_parser("check", help="swap, verify and time a model of your own")
    own.add_argument("model", metavar="MODULE:FACTORY", help="a model, or a function or class that makes one")
    own.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="SHAPE",
        help="8,3,224,224 of normal numbers, or 2,16:int64:1000 of integers below 1000; once an argument",
    )
    own.add_argument("--dtype", default="float32", choices=tuple(DTYPES))
    own.add_argument("--eval", action="store_true", help="in evaluation mode")
    own.add_argument("--forward-only", action="store_true", help="no gradients")
    own.set_defaults(command=_check)

    compare = add_compare(commands)
    compare.set_defaults(command=_compare)

    for command in (demo, own, compare):
        command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
        command.add_argument(
            "--html",
            metavar="FILE",
            type=_new_file,
            help="also write the result as a page to look at, which needs no network",
        )
    for command in (facts, demo, own, compare):
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _info(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    _print(info(), options.json)
    return 0


def _demo(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    names = models.names() if options.model == "all" else (options.model,)
    maps = 0
    if options.html:
        maps = MAPS_OF_ONE if len(names) == 1 else MAPS_OF_MANY
    device = _device(options.device, parser)
    demo = demonstrate(names, device, options.size, layer_times=_closely(options), maps=maps)
    return _shown(demo, options, parser)


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    device, dtype = _device(options.device, parser), DTYPES[options.dtype]
    try:
        specs = [read_input(text) for text in options.input]
        with EndingInTheUsersError(f"importing {options.model}"):
            make = find_model(options.model)
        torch.manual_seed(0)
        with EndingInTheUsersError(f"making {options.model}"):
            model = make().to(device, dtype)
    except SpecError as error:
        parser.error(str(error))
    if options.eval:
        model.eval()
    inputs = tuple(spec.draw(dtype, device) for spec in specs)
    with EndingInTheUsersError(f"running {options.model} with --input {' --input '.join(options.input)}"):
        checked = check(
            options.model,
            model,
            inputs,
            backward=not options.forward_only,
            layer_times=_closely(options),
            maps=bool(options.html),
        )
    return _shown(checked, options, parser)


def _compare(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    return _shown(compared(options, _device(options.device, parser)), options, parser)


def _closely(options: argparse.Namespace) -> bool:
    """Whether to time each layer by itself too, which takes a while and has no place in a table."""
    return bool(options.html) or options.json


def _device(name: str, parser: argparse.ArgumentParser) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _new_file(text: str) -> Path:
    """A file that can be written, or is at least in a place where that may be so."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder, needs the name of a file")
    # The folders between the two are made when the file is written.
    place = next(each for each in path.absolute().parents if each.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: {place} is no folder that can be written to")
    return path


def _shown(result, options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print what was verified, write its page, and return the exit status."""
    _print(result, options.json)
    if options.html:
        try:
            result.page().write(options.html)
        except OSError as error:
            parser.error(f"argument --html: {options.html}: {error.strerror or error}")
        print(f"page: {options.html}", file=sys.stderr if options.json else sys.stdout)
    return 0 if result.ok else 1


def _print(result, as_json: bool) -> None:
    if as_json:
        print(result.to_json())
    else:
        result.table().show()


if __name__ == "__main__":
    sys.exit(main())
