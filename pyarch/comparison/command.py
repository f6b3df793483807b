"""The command: python -m pyarch compare."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from pyarch.check import DTYPES
from pyarch.comparison.question import Question

if TYPE_CHECKING:
    from pyarch.comparison.report import Report

DEFAULT = Question()
# Option -> least, default and meaning.
NUMBERS = {
    "--batch": (1, DEFAULT.batch, "sequences of a call"),
    "--width": (1, DEFAULT.width, "features of a token"),
    "--window": (0, DEFAULT.window, "tokens before its own that one of windowed attention sees"),
    "--kernel": (1, DEFAULT.kernel, "taps of a convolution"),
}


def add_compare(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's own options; `compared` runs it."""
    compare = commands.add_parser("compare", help="compare architectures over sequences on your numbers")
    compare.add_argument(
        "--seq",
        type=_lengths,
        default=DEFAULT.lengths,
        metavar="T,...",
        help="lengths in tokens, 128,512,2048 by default",
    )
    compare.add_argument(
        "--heads",
        type=_numbers,
        default=DEFAULT.heads,
        metavar="H,...",
        help="heads of attention, 1,8,16 by default",
    )
    for name, (least, default, meaning) in NUMBERS.items():
        meaning = f"{meaning}, {default} by default"
        compare.add_argument(name, type=_at_least(least), default=default, metavar="N", help=meaning)
    compare.add_argument(
        "--budget",
        type=_seconds,
        default=DEFAULT.budget,
        metavar="SECONDS",
        help=f"timing of each kind of call, {DEFAULT.budget} by default; longer runs know the spread better",
    )
    compare.add_argument("--dtype", default="float32", choices=tuple(DTYPES))
    return compare


def compared(options: argparse.Namespace, device: torch.device) -> Report:
    """What the command measures, to be shown."""
    # Only this command needs them, and every command reads the options.
    from pyarch.comparison.report import Report
    from pyarch.comparison.run import compare

    return Report(
        compare(
            Question(
                lengths=options.seq,
                batch=options.batch,
                width=options.width,
                heads=options.heads,
                window=options.window,
                kernel=options.kernel,
                budget=options.budget,
                dtype=DTYPES[options.dtype],
                device=device,
            )
        )
    )


# -------------------------------------------------------------------------------- reading numbers


def _numbers(text: str) -> tuple[int, ...]:
    """Ascending whole numbers of "1,8,16", each once and at least 1."""
    try:
        numbers = sorted({int(each) for each in text.split(",")})
    except ValueError:
        numbers = [0]
    if numbers[0] < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, needs whole numbers such as 1,8,16, each at least 1")
    return tuple(numbers)


def _lengths(text: str) -> tuple[int, ...]:
    """Ascending lengths of "128,512", each once and at least 2."""
    try:
        lengths = _numbers(text)
    except argparse.ArgumentTypeError:
        lengths = (0,)
    if lengths[0] < 2:
        raise argparse.ArgumentTypeError(f"got {text!r}, needs lengths such as 128,512,2048, each at least 2")
    return lengths


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, needs a number of seconds")
    return seconds


def _at_least(least: int) -> Callable[[str], int]:
    """A reader of whole numbers from `least` on."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text!r}, needs a whole number of at least {least}")
        return int(text)

    return read
