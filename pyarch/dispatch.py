"""Which backend runs a call, and why the others do not.

A `Call` is metadata only (shapes, dtypes, flags, device), so the decision for a GPU can be tested on a
machine without one. A `Backend` yields every reason for which it cannot run a call (`refusals`), and every
measured reason for which `auto` should leave the call to a faster one (`concessions`). An `Op` walks its
backends in order and takes the first that yields nothing. The same texts serve `explain`, errors, skipped
tests and the support matrix.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property

import torch

BACKENDS = ("triton", "cuda", "cpu", "torch", "reference")
CHOICES = ("auto", *BACKENDS)
_CACHED_CHOICES = 4096

Call = Hashable
Reasons = Iterator[str]


def checked_backend(name: str) -> str:
    """Return `name` when it is a backend's name or "auto"; raise ValueError with the choices otherwise."""
    if name not in CHOICES:
        raise ValueError(f"unknown backend {name!r}, choose one of {', '.join(CHOICES)}")
    return name


_FROM_ENVIRONMENT = checked_backend(os.environ.get("PYARCH_BACKEND") or "auto")
_requested = ContextVar("pyarch_backend", default=_FROM_ENVIRONMENT)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the layers called inside the block, and their backward, on one backend.

    Args:
        name: "auto" (fastest that accepts the call), "triton", "cuda", "cpu", "torch" or "reference".

    Raises:
        ValueError: `name` is none of these.
        NotImplementedError: at the call, when the named backend refuses it; nothing falls back silently.
    """
    token = _requested.set(checked_backend(name))
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backend() -> str:
    """The backend asked for by the innermost `backend(...)` block, else by PYARCH_BACKEND, else "auto".

    A traced graph holds "auto", which `Op.choose` reads again when the graph runs.
    """
    return "auto" if torch.compiler.is_compiling() else _requested.get()


def settled_backend(name: str) -> str:
    """A layer's or call's own choice, with "auto" giving way to an enclosing `backend(...)` block."""
    return _requested.get() if name == "auto" else name


def accepts_all(call: Call) -> Reasons:
    """The refusals (or concessions) of a backend that has none."""
    return iter(())


@dataclass(frozen=True)
class Backend:
    """One way to run an operator; `target` is its function, "module:function", imported at the first use."""

    name: str
    target: str
    refusals: Callable[[Call], Reasons]
    concessions: Callable[[Call], Reasons] = accepts_all

    @cached_property
    def run(self) -> Callable:
        module, function = self.target.split(":")
        return getattr(importlib.import_module(module), function)


@dataclass(frozen=True)
class Verdict:
    """What one backend says of one call: the reasons it gives, or none when it accepts."""

    backend: str
    refusals: tuple[str, ...]
    concessions: tuple[str, ...]

    @property
    def accepts(self) -> bool:
        return not self.refusals and not self.concessions

    @property
    def reason(self) -> str:
        return "; ".join(self.refusals + self.concessions)


@dataclass(frozen=True)
class Op:
    """An operator's backends in order of preference, and the decisions already taken."""

    name: str
    backends: tuple[Backend, ...]

    @cached_property
    def _choices(self) -> dict[tuple[Call, str], Backend]:
        return {}

    def choose(self, call: Call, requested: str = "auto") -> Backend:
        """Return the backend that runs `call`; "auto" follows an enclosing `backend(...)` block.

        Raises:
            NotImplementedError: the requested backend refuses the call; the message holds all its reasons.
        """
        requested = settled_backend(requested)
        chosen = self._choices.get((call, requested))
        if chosen is None:
            if len(self._choices) >= _CACHED_CHOICES:
                self._choices.clear()
            chosen = self._choices[call, requested] = self._decide(call, requested)
        if _recorder is not None:
            _recorder(self, call, chosen)
        return chosen

    def explain(self, call: Call) -> tuple[Verdict, ...]:
        """What every backend says of `call`, in order of preference; `auto` takes the first that accepts."""
        return tuple(
            Verdict(each.name, tuple(each.refusals(call)), tuple(each.concessions(call)))
            for each in self.backends
        )

    def _decide(self, call: Call, requested: str) -> Backend:
        verdicts = dict(zip(self.backends, self.explain(call), strict=True))
        if requested != "auto":
            return self._named(requested, verdicts)
        chosen = next(each for each, verdict in verdicts.items() if verdict.accepts)
        _count_fallback(self.name, call, chosen, verdicts)
        return chosen

    def _named(self, name: str, verdicts: dict[Backend, Verdict]) -> Backend:
        for each, verdict in verdicts.items():
            if each.name == name:
                if verdict.refusals:
                    raise NotImplementedError(
                        f"{self.name}: backend {name!r} refuses this call: {'; '.join(verdict.refusals)}"
                    )
                return each
        raise NotImplementedError(f"{self.name} has no backend {name!r}")


fallbacks: Counter[tuple[str, str]] = Counter()


def _count_fallback(op: str, call: Call, chosen: Backend, verdicts: dict[Backend, Verdict]) -> None:
    """Count, and warn once about, a call on a GPU that no kernel of ours accepts."""
    if getattr(call, "device", "cpu") != "cuda" or chosen.name not in ("torch", "reference"):
        return
    reason = " | ".join(
        f"{verdict.backend}: {verdict.reason}" for verdict in verdicts.values() if not verdict.accepts
    )
    fallbacks[op, reason] += 1
    if fallbacks[op, reason] == 1:
        warnings.warn(f"{op} runs on torch's own kernel: {reason}", RuntimeWarning, stacklevel=4)


_recorder: Callable[[Op, Call, Backend], None] | None = None


def is_recorded() -> bool:
    """Whether somebody is told of every decision, so that none may be taken from memory."""
    return _recorder is not None


@contextmanager
def recording(recorder: Callable[[Op, Call, Backend], None]) -> Iterator[None]:
    """Tell `recorder(op, call, backend)` of every decision taken inside the block, in any thread."""
    global _recorder
    outer, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = outer
