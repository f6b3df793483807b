"""The user's own model from the shell: MODULE:FACTORY and the shapes of its inputs, verified and shown."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pyarch.demo import machine_of
from pyarch.maps_page import PageMaps, page_maps
from pyarch.report import Table, as_json
from pyarch.swap import swap
from pyarch.swap_report import Record
from pyarch.verify import verify
from pyarch.verify_report import VerifyReport

if TYPE_CHECKING:
    from pyarch.page import Page

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INDEX_DTYPE = "int64"


# What stands between the user's shell and the user's files in a traceback.
NOT_THE_USERS = sys.stdlib_module_names | {"__main__", "pyarch", "torch"}


class SpecError(ValueError):
    """What was typed on the command line is not understood; the text says what is needed."""


@dataclass(frozen=True)
class InputSpec:
    """One input: its shape, and for integers the bound below which they are drawn."""

    shape: tuple[int, ...]
    bound: int | None = None

    def draw(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Random numbers: normal ones, or integers from 0 to below the bound."""
        if self.bound is not None:
            return torch.randint(self.bound, self.shape, device=device)
        return torch.randn(self.shape, device=device).to(dtype)


@dataclass(frozen=True)
class Checked:
    """The user's model verified: what is printed, as a table, as JSON, as a page.

    Args:
        spec: what was asked for, MODULE:FACTORY.
        proof: the verification.
        skipped: what `swap` left alone.
        machine: where it ran.
        maps: attention weights, where they were asked for.
    """

    spec: str
    proof: VerifyReport
    skipped: tuple[Record, ...]
    machine: dict[str, str]
    maps: PageMaps

    @property
    def ok(self) -> bool:
        return self.proof.ok

    def table(self) -> Table:
        return self.proof.table()

    def to_json(self) -> str:
        skipped = [asdict(record) for record in self.skipped]
        return as_json({**self.proof.as_dict(), "machine": self.machine, "skipped": skipped})

    def page(self) -> Page:
        """The same as a page to look at, of a model whose layers were timed."""
        from pyarch.page import Page
        from pyarch.verify_page import facts, sections, summary

        parts = [*sections(self.proof, self.skipped, self.maps), facts(self.machine, self.proof.ceilings)]
        return Page(f"{self.spec}: torch and pyarch", summary(self.proof), parts)


def check(
    spec: str,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    backward: bool,
    layer_times: bool = False,
    maps: bool = False,
) -> Checked:
    """Verify a model, as `find_model` gives it, and keep what a page shows of it.

    Args:
        spec: its name, for the title.
        model: it may be swapped already; with `maps` it is afterwards.
        inputs: of its forward.
        backward: also compare and time gradients.
        layer_times: also time each swapped layer by itself.
        maps: also keep attention weights.
    """
    proof = verify(model, inputs, backward=backward, layer_times=layer_times)
    skipped = swap(model, dry_run=not maps, min_swaps=0).skipped
    skipped = tuple(each for each in skipped if each.code != "already")
    weights = page_maps(model, inputs) if maps else PageMaps()
    device = next((each.device for each in (*model.parameters(), *inputs)), torch.device("cpu"))
    return Checked(spec, proof, skipped, machine_of(device), weights)


def read_input(text: str) -> InputSpec:
    """Read "8,3,224,224", or "2,16:int64:1000" for integers below 1000.

    Raises:
        SpecError: anything else; the text says what is needed.
    """
    shape, *kind = text.split(":")
    need = f"--input {text}: needs SHAPE such as 8,3,224,224, or SHAPE:int64:BOUND for integers"
    try:
        sizes = tuple(int(size) for size in shape.split(","))
        bound = int(kind[1]) if len(kind) == 2 and kind[0] == INDEX_DTYPE else None
    except ValueError as error:
        raise SpecError(need) from error
    if any(size < 0 for size in sizes) or (kind and (bound is None or bound < 1)):
        raise SpecError(need)
    return InputSpec(sizes, bound)


def find_model(spec: str) -> Callable[[], nn.Module]:
    """Import MODULE from the current folder or the path, find FACTORY in it, and return what gives the model.

    FACTORY may be a model, or a function or class without required arguments. What it raises when called, and
    what the module raises when imported, is their own.

    Raises:
        SpecError: the text is not MODULE:FACTORY, there is no such module or name, or it needs arguments;
            from what is returned: the factory gave no model.
    """
    module_name, _, path = spec.partition(":")
    if not module_name or not path:
        raise SpecError(f"{spec!r}: needs MODULE:FACTORY, such as mypackage.net:build")
    target: object = _import(module_name)
    for name in path.split("."):
        if not hasattr(target, name):
            raise SpecError(f"{spec!r}: {getattr(target, '__name__', target)} has no {name!r}")
        target = getattr(target, name)
    if isinstance(target, nn.Module):
        return lambda: target
    if not callable(target):
        raise SpecError(f"{spec!r}: is {type(target).__name__}, needs a model or what makes one")
    try:
        inspect.signature(target).bind()
    except TypeError as error:
        raise SpecError(f"{spec!r}: {error}; needs a factory without required arguments") from error
    return lambda: _made(spec, target)


def _made(spec: str, factory: Callable[[], object]) -> nn.Module:
    model = factory()
    if not isinstance(model, nn.Module):
        raise SpecError(f"{spec!r}: gave {type(model).__name__}, needs a torch.nn.Module")
    return model


def _import(name: str):
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that is there, but imports another that is not, shows its own traceback.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise SpecError(f"no module {error.name!r} in {os.getcwd()} or on the path") from error


# -------------------------------------------------------------------------------- errors of the user's


class EndingInTheUsersError:
    """A block that runs the user's code: what that raises ends the command, shown from the user's file on.

    One line above the traceback says what was tried. An error that no file of the user's or of torch's is
    part of is ours, and goes on as it is. One of ours inside the model's run is cut too; its note says that
    the swapped copy raised it.

    Args:
        tried: that line, such as "making net:build".

    Raises:
        SystemExit: 1, after the traceback went to stderr.
    """

    def __init__(self, tried: str):
        self.tried = tried

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, Exception) or isinstance(error, SpecError):
            return
        theirs = _users_part(trace)
        if theirs is None and not isinstance(error, SyntaxError):  # which says its file itself
            return
        print(f"{self.tried} raised {kind.__name__}:", file=sys.stderr)
        traceback.print_exception(kind, error, theirs)
        raise SystemExit(1) from None


def _users_part(trace: TracebackType | None) -> TracebackType | None:
    """A traceback from the first file on that is the user's, else from torch's first, else None."""
    torchs = None
    while trace is not None:
        package = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in NOT_THE_USERS:
            return trace
        if package == "torch" and torchs is None:
            torchs = trace
        trace = trace.tb_next
    return torchs
