"""Re-type the layers of a model in place: find, decide, re-type, report.

`module.__class__` becomes a drop-in subclass of the layer's own class: the same parameters, buffers, hooks
and state_dict, another computation. Nothing else of the model, and nothing of torch, is touched.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from pyarch.candidates import FAMILIES, Family, Obstacle, expected_backend, family_of, obstacle_to
from pyarch.in_context import class_in_context, obstacle_to_context
from pyarch.nn.config import DEFAULT, Config
from pyarch.nn.drop_in import CONFIG_ATTRIBUTE, DropIn, Retyped
from pyarch.retype import swapped_class
from pyarch.rules import Rule, first_match, read_rules, warn_of_idle_rules
from pyarch.swap_report import CONTEXT, Instruction, Record, SwapReport, read_instructions, undo

Where = Callable[[str, nn.Module], bool]
SDPA_HINT = "pyarch.swap(model, sdpa=True)"


def swap(
    model: nn.Module,
    *,
    rules: Mapping[str, Config | None] | None = None,
    where: Where | None = None,
    backend: str = "auto",
    sdpa: bool = False,
    dry_run: bool = False,
    min_swaps: int = 1,
) -> SwapReport:
    """Make the layers of `model` that pyarch has kernels for run on them, in place.

    What looks for layers by exact type, such as torch.ao.quantization.quantize_dynamic, finds swapped ones no
    more: restore first.

    Args:
        model: any torch.nn.Module; a layer itself and a torch.compile'd model too.
        rules: pattern -> Config, or None to leave the layer alone; the first that fits decides. Patterns are
            globs over whole layer names, or regular expressions after "re:".
        where: called with (name, layer); only layers for which it is true are swapped.
        backend: for the layers that no rule names: "auto" or a backend's name.
        sdpa: also run the model's forward inside `pyarch.attention_context()`, whose costs and limits hold:
            what calls torch.nn.functional.scaled_dot_product_attention runs on pyarch, on the backend that
            `pyarch.backend(...)` says. Neither `rules`, `where` nor `backend` speak of it; of the model's
            methods only its forward is served.
        dry_run: report what would happen and change nothing.
        min_swaps: how many layers must be pyarch's in the end, those swapped before included; the model
            itself counts as one with `sdpa`.

    Returns:
        SwapReport. Print it; `report.restore()` undoes everything.

    Raises:
        TypeError: `model` is no module, or a TorchScript module.
        ValueError: fewer than `min_swaps` layers can be swapped (not in a dry run), with the reasons; a bad
            rule.
    """
    model = checked_model(model)
    read = read_rules(rules)
    default = Config(backend=backend)
    decisions = [_decide(each, read, where, default) for each in _found(model)]
    warn_of_idle_rules(read, (name for decision in decisions for name in decision.record.names))
    if sdpa:
        decisions.insert(0, _decide_context(model))
    if not dry_run:
        _check_enough(decisions, min_swaps, sdpa)
    return _carried_out(decisions, dry_run)


@contextmanager
def swapped(
    model: nn.Module,
    *,
    rules: Mapping[str, Config | None] | None = None,
    where: Where | None = None,
    backend: str = "auto",
    sdpa: bool = False,
    min_swaps: int = 1,
) -> Iterator[SwapReport]:
    """`swap` for the length of a block; the model is restored at its end, also after an error."""
    report = swap(model, rules=rules, where=where, backend=backend, sdpa=sdpa, min_swaps=min_swaps)
    try:
        yield report
    finally:
        report.restore()


def apply_report(model: nn.Module, report: str | dict) -> SwapReport:
    """Swap again exactly what a stored report says, in this or another process.

    Args:
        model: a model in which the same names hold layers of the same classes.
        report: the text of `SwapReport.to_json()`, or the same parsed.

    Raises:
        ValueError: not such a report, or a layer is missing, of another class or cannot be swapped; the model
            is then unchanged.
    """
    model = checked_model(model)
    found = {name: each for each in _found(model) for name in each.names}
    decisions = [
        _follow_context(instruction, model) if instruction.in_context else _follow(instruction, found)
        for instruction in read_instructions(report)
    ]
    return _carried_out(decisions, dry_run=False)


# -------------------------------------------------------------------------------- find


@dataclass(frozen=True)
class _Found:
    """A layer of a family, under all its names."""

    names: tuple[str, ...]
    module: nn.Module
    family: Family | None


def checked_model(model: nn.Module) -> nn.Module:
    """The model to work on: inside the wrapper of torch.compile the model that it compiles.

    Raises:
        TypeError: no module, or one of TorchScript.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"{type(model).__name__}: TorchScript holds compiled code, not layers; swap the model that it "
            "was made from, and use torch.compile"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap needs a torch.nn.Module, got {type(model).__name__}")
    # Reaching for torch._dynamo would import it, which takes seconds; a wrapper exists only after its import.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        return model._orig_mod
    return model


def _found(model: nn.Module) -> list[_Found]:
    """Every layer that belongs to a family, and every scripted part, in the order of the model."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    found = []
    for key, module in modules.items():
        family = family_of(module)
        if family is not None or _is_scripted_layer(module):
            found.append(_Found(tuple(names[key]), module, family))
    return found


def _is_scripted_layer(module: nn.Module) -> bool:
    stock = {family.stock.__name__ for family in FAMILIES}
    return isinstance(module, torch.jit.ScriptModule) and getattr(module, "original_name", None) in stock


# -------------------------------------------------------------------------------- decide


@dataclass(frozen=True)
class _Decision:
    """What becomes of one layer: its new class, or None where it stays."""

    record: Record
    module: nn.Module
    cls: type[Retyped] | None = None


def _decide(found: _Found, rules: tuple[Rule, ...], where: Where | None, default: Config) -> _Decision:
    rule = first_match(rules, found.names)
    config = rule.config if rule else default
    obstacle = _obstacle(found, config) or _exclusion(found, rule, where)
    return _to_swap(found, config) if obstacle is None else _left(found.names, found.module, obstacle)


def _left(names: tuple[str, ...], module: nn.Module, obstacle: Obstacle) -> _Decision:
    was = _qualified(type(module))
    record = Record(names[0], names, was, "", "", obstacle.code, obstacle.reason, obstacle.hint)
    return _Decision(record, module)


def _decide_context(model: nn.Module) -> _Decision:
    """Whether the model's forward will run in an `attention_context`."""
    obstacle = obstacle_to_context(model)
    if obstacle is not None:
        return _left(("",), model, obstacle)
    cls = type(model)
    record = Record("", ("",), _qualified(cls), CONTEXT, "decided at the call", "swapped", config=DEFAULT)
    return _Decision(record, model, class_in_context(cls))


def _to_swap(found: _Found, config: Config) -> _Decision:
    module, family = found.module, found.family
    backend, reason = expected_backend(module, family, config)
    record = Record(
        found.names[0],
        found.names,
        _qualified(type(module)),
        f"pyarch.nn.{family.drop_in.__name__}",
        backend,
        "swapped",
        reason,
        config=config,
    )
    return _Decision(record, module, swapped_class(type(module), family.stock, family.drop_in))


def _obstacle(found: _Found, config: Config | None) -> Obstacle | None:
    """What keeps a layer from being swapped whatever the user wants."""
    if found.family is None:
        hint = "swap what it was made from, and use torch.compile"
        return Obstacle("scripted", "a part compiled by TorchScript", hint)
    if not isinstance(found.module, DropIn):
        return obstacle_to(found.module, found.family)
    hint = ""
    if config not in (None, found.module.pyarch_config):
        hint = "restore it first to change its Config"
    return Obstacle("already", "a layer of pyarch already", hint)


def _exclusion(found: _Found, rule: Rule | None, where: Where | None) -> Obstacle | None:
    """The user's own wish to leave a layer alone."""
    if rule is not None and rule.config is None:
        return Obstacle("rule", f"rule {rule.pattern!r} leaves it alone")
    if where is not None and not any(where(name, found.module) for name in found.names):
        return Obstacle("where", "where(name, layer) is false")
    return None


def _follow(instruction: Instruction, found: dict[str, _Found]) -> _Decision:
    """The decision that a stored report asks for; ValueError where the model does not allow it."""
    layer = f"report: layer {instruction.name!r}"
    if instruction.name not in found:
        raise ValueError(f"{layer} is none of this model's {len(found)} layers that swap considers")
    each = found[instruction.name]
    if _qualified(type(each.module)) != instruction.was:
        raise ValueError(f"{layer} is a {_qualified(type(each.module))}, the report needs {instruction.was}")
    obstacle = _obstacle(each, instruction.config)
    if obstacle is not None:
        raise ValueError(f"{layer} cannot be swapped: {obstacle.reason}")
    decision = _to_swap(each, instruction.config)
    return replace(decision, record=replace(decision.record, name=instruction.name))


def _follow_context(instruction: Instruction, model: nn.Module) -> _Decision:
    """The same where the report asks for `sdpa`."""
    was = _qualified(type(model))
    if instruction.name or was != instruction.was:
        named = repr(instruction.name) if instruction.name else "the model"
        raise ValueError(f"report: {named} was a {instruction.was} with sdpa=True, this model is a {was}")
    decision = _decide_context(model)
    if decision.cls is None:
        raise ValueError(f"report: the model cannot be swapped with sdpa=True: {decision.record.reason}")
    return decision


# -------------------------------------------------------------------------------- re-type


def _check_enough(decisions: list[_Decision], min_swaps: int, sdpa: bool) -> None:
    count = sum(each.cls is not None or each.record.code == "already" for each in decisions)
    if count >= min_swaps:
        return
    reasons = Counter(
        (each.record.was, "; ".join(part for part in (each.record.reason, each.record.hint) if part))
        for each in decisions
        if each.cls is None
    )
    kinds = ", ".join(family.stock.__name__ for family in FAMILIES)
    lines = [f"  {number} x {was}: {reason}" for (was, reason), number in reasons.items()]
    if not decisions:
        lines.append(f"  the model holds no {kinds}")
    if not sdpa:
        lines.append(f"  if it calls F.scaled_dot_product_attention itself: {SDPA_HINT}")
    why = "\n".join(lines)
    raise ValueError(f"{count} layers to swap, min_swaps={min_swaps} asks for more:\n{why}")


def _carried_out(decisions: list[_Decision], dry_run: bool) -> SwapReport:
    """Re-type what was decided, all or nothing."""
    changed: list[nn.Module] = []
    try:
        for each in decisions:
            if each.cls is not None and not dry_run:
                each.module.__class__ = each.cls
                changed.append(each.module)
                if each.record.config != DEFAULT:
                    vars(each.module)[CONFIG_ATTRIBUTE] = each.record.config
    except TypeError:
        for module in changed:
            undo(module)
        raise
    chosen = {each.record: each.module for each in decisions if each.cls is not None}
    return SwapReport(chosen, [each.record for each in decisions if each.cls is None], dry_run)


def _qualified(cls: type) -> str:
    """A class's public name: torch.nn.Conv2d, not torch.nn.modules.conv.Conv2d."""
    if cls.__module__.startswith("torch.nn.modules."):
        return f"torch.nn.{cls.__qualname__}"
    if cls.__module__.startswith("pyarch.nn."):
        return f"pyarch.nn.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"
