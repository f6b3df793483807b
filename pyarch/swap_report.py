"""What `swap` did: one record a layer, the way back, and the record as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields

from torch import nn
from torch.nn.modules import module as torch_module

from pyarch.nn.config import DEFAULT, Config
from pyarch.nn.drop_in import CONFIG_ATTRIBUTE, Retyped
from pyarch.report import Table, as_json
from pyarch.retype import unswapped_class

SCHEMA = "pyarch.swap/1"
# Layers left alone for these reasons are counted in the table, not listed.
COUNTED_CODES = ("not-depthwise",)
# What a model is now whose forward runs in such a block.
CONTEXT = "pyarch.attention_context"
BACKEND_NOTE = (
    "backend: as dtype and device allow; the shapes of a call decide, see pyarch.explain(model, *inputs)"
)


@dataclass(frozen=True)
class Record:
    """One layer that `swap` considered, or the model itself where it was asked for `sdpa`.

    Args:
        name: its first name in the model; "" is the model itself.
        names: all its names, more than one where the model shares the layer.
        was, now: qualified class names; `now` is "pyarch.attention_context" for a model asked for `sdpa`.
        backend: what its dtype and device allow; "" where the layer was left alone.
        code: "swapped", or why not: "already", "not-depthwise", "overridden", "patched", "lazy",
            "fully-sharded", "metaclass", "scripted", "rule", "where"; of a layer of another package also
            "unknown-version", "attn-implementation"; of a model asked for `sdpa` also "layer", "no-forward".
        reason, hint: the same for people, and the way out.
        config: how the layer runs, or None where it was left alone.
    """

    name: str
    names: tuple[str, ...]
    was: str
    now: str
    backend: str
    code: str
    reason: str = ""
    hint: str = ""
    config: Config | None = None


class SwapReport:
    """The layers that were swapped and those that were not, and how to undo it.

    `swapped` and `skipped` are lists of `Record`. `never_called` is None until a block of `observe` has run,
    then the names of the swapped layers whose forward the model never ran. A dry run's report has changed no
    layer.
    """

    def __init__(self, swapped: dict[Record, nn.Module], skipped: list[Record], dry_run: bool = False):
        self.swapped = list(swapped)
        self.skipped = skipped
        self.dry_run = dry_run
        self.never_called: list[str] | None = None
        self._modules = {record.name: module for record, module in swapped.items()}
        self._active = not dry_run

    def restore(self) -> None:
        """Give every swapped layer its former class back; the model is then bit for bit as before.
        Idempotent.

        A deep copy of the swapped model is another model and stays swapped.

        Raises:
            RuntimeError: a layer got another class since, such as fully_shard's; nothing is changed then.
        """
        if not self._active:
            return
        classes = {name: _class_to_restore(name, module) for name, module in self._modules.items()}
        for name, module in self._modules.items():
            module.__class__ = classes[name]
            vars(module).pop(CONFIG_ATTRIBUTE, None)
        self._active = False

    @contextmanager
    def observe(self) -> Iterator[SwapReport]:
        """Watch which swapped layers run inside the block, and fill `never_called`.

        Layers that a fused operator bypasses, and those whose parameters another layer reads, never run: no
            speedup
        can come from them. Blocks add up: what ran in one of them was called.
        """
        waiting = set(self._modules) if self.never_called is None else set(self.never_called)
        names = {id(module): name for name, module in self._modules.items()}

        def note(module, inputs):
            waiting.discard(names.get(id(module)))

        # A hook on the layers themselves would keep torch's fused encoder layer from its fast path.
        handle = torch_module.register_module_forward_pre_hook(note)
        try:
            yield self
        finally:
            handle.remove()
        self.never_called = [name for name in self._modules if name in waiting]

    def table(self) -> Table:
        """The report as a table; `str(report)` is its plain text."""
        done = "would be swapped" if self.dry_run else "swapped"
        listed = [record for record in self.skipped if record.code not in COUNTED_CODES]
        notes = [BACKEND_NOTE] if self.swapped else []
        counted = Counter((each.was, each.reason) for each in self.skipped if each.code in COUNTED_CODES)
        notes += [f"left alone: {count} x {was}, {reason}" for (was, reason), count in counted.items()]
        if self.never_called:
            notes.append(f"never called: {', '.join(self.never_called)}; no speedup can come from them")
        causes = list(dict.fromkeys(record.reason for record in self.swapped if record.reason))
        notes += [f"[{number}] {cause}" for number, cause in enumerate(causes, 1)]
        layers = [record for record in self.swapped if record.now != CONTEXT]
        beside = f", plain attention {done}" if len(layers) < len(self.swapped) else ""
        return Table(
            f"{len(layers)} of {len(layers) + len(self.skipped)} layers {done}{beside}",
            ("layer", "was", "now", "backend", "remark"),
            [_row(record, causes) for record in (*self.swapped, *listed)],
            notes,
        )

    def __str__(self) -> str:
        return str(self.table())

    def __repr__(self) -> str:
        return f"<SwapReport: {len(self.swapped)} swapped, {len(self.skipped)} skipped>"

    def as_dict(self) -> dict:
        """The report as plain lists, dicts and texts."""
        return {
            "schema": SCHEMA,
            "dry_run": self.dry_run,
            "swapped": [asdict(record) for record in self.swapped],
            "skipped": [asdict(record) for record in self.skipped],
            "never_called": self.never_called,
        }

    def to_json(self) -> str:
        """The report as JSON, which `pyarch.apply_report` reads."""
        return as_json(self.as_dict())


def undo(module: nn.Module) -> bool:
    """Give one layer its former class back; False where it was never swapped.

    Serves deep copies too, for which no report exists.
    """
    original = unswapped_class(type(module))
    if original is None or module.has_own_options:
        return False
    module.__class__ = original
    vars(module).pop(CONFIG_ATTRIBUTE, None)
    return True


def _class_to_restore(name: str, module: nn.Module) -> type:
    original = unswapped_class(type(module))
    if original is not None:
        return original
    if not isinstance(module, Retyped):
        return type(module)
    raise RuntimeError(
        f"layer {name!r} became a {type(module).__name__} after the swap and cannot be restored: "
        "restore before wrapping it"
    )


def _row(record: Record, causes: list[str]) -> tuple[str, ...]:
    """A line of the table; a cause that many layers share stands once, under its number, below the table."""
    backend = record.backend or "-"
    if record.reason in causes:
        backend = f"{backend} [{causes.index(record.reason) + 1}]"
    aliases = f"shared, also {', '.join(record.names[1:])}" if len(record.names) > 1 else ""
    remark = (aliases,) if record.now else (record.reason, record.hint, aliases)
    shown = "; ".join(part for part in remark if part)
    return record.name or "(the model)", record.was, record.now or "-", backend, shown


# -------------------------------------------------------------------------------- reading JSON


@dataclass(frozen=True)
class Instruction:
    """One swap that a stored report asks for: of a layer, or `in_context` of the model itself."""

    name: str
    was: str
    in_context: bool
    config: Config


def read_instructions(report: str | dict) -> tuple[Instruction, ...]:
    """The swaps of a stored report.

    Raises:
        ValueError: not JSON, another schema, or a record without its fields; the text says where.
    """
    if isinstance(report, str):
        try:
            report = json.loads(report)
        except json.JSONDecodeError as error:
            raise ValueError(f"report is not JSON: {error}") from error
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        found = report.get("schema") if isinstance(report, dict) else type(report).__name__
        raise ValueError(f"report has schema {found!r}, needs {SCHEMA!r} as SwapReport.to_json() writes it")
    records = report.get("swapped")
    if not isinstance(records, list):
        raise ValueError(f"report: 'swapped' is {type(records).__name__}, needs a list")
    return tuple(_instruction(record, f"swapped[{index}]") for index, record in enumerate(records))


def _instruction(record: object, where: str) -> Instruction:
    if not isinstance(record, dict):
        raise ValueError(f"report: {where} is {type(record).__name__}, needs an object")
    for key in ("name", "was"):
        if not isinstance(record.get(key), str):
            raise ValueError(f"report: {where}.{key} is {record.get(key)!r}, needs a text")
    config = _config(record.get("config"), f"{where}.config")
    return Instruction(record["name"], record["was"], record.get("now") == CONTEXT, config)


def _config(values: object, where: str) -> Config:
    if values is None:
        return DEFAULT
    known = {each.name for each in fields(Config)}
    if not isinstance(values, dict) or not set(values) <= known:
        raise ValueError(f"report: {where} is {values!r}, needs an object of {', '.join(sorted(known))}")
    try:
        return Config(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"report: {where}: {error}") from error
