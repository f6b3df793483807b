"""Which backend each layer of a model, or one operator, would use on given inputs, and why not the others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from pyarch.attention_context import answering
from pyarch.copies import duplicate, same_randomness, swapped_layers
from pyarch.dispatch import Backend, Call, Op, Verdict, recording, requested_backend
from pyarch.in_context import has_context
from pyarch.nested import as_arguments, floating_tensors, map_tensors, positional
from pyarch.nn.drop_in import DropIn, left_to_torch
from pyarch.observation import PLAIN_ATTENTION
from pyarch.ops import scaled_dot_product_attention
from pyarch.report import Table, as_json
from pyarch.swap import checked_model, swap

SCHEMA = "pyarch.explain/1"


@dataclass(frozen=True)
class Choice:
    """One pass of one layer.

    Args:
        layer: its name in the model; "" is the model or operator itself.
        inputs: shapes and dtype of the call.
        operation: "forward", "backward", or an operator's name.
        backend: the one that runs it, or "none" where the one asked for by name refuses.
        verdicts: what every backend says, in order of preference.
    """

    layer: str
    inputs: str
    operation: str
    backend: str
    verdicts: tuple[Verdict, ...]

    @property
    def why_not(self) -> str:
        """The reasons of the backends that come before the chosen one."""
        given = []
        for verdict in self.verdicts:
            if verdict.backend == self.backend:
                break
            given.append(f"{verdict.backend}: {verdict.reason or 'not asked for'}")
        return " | ".join(given)


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: choices in the order of the calls, and the layers that were never called."""

    choices: tuple[Choice, ...]
    never_called: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def table(self) -> Table:
        """The explanation as a table; `str(explanation)` is its plain text."""
        causes = list(dict.fromkeys(choice.why_not for choice in self.choices if choice.why_not))
        notes = [f"[{number}] not {cause}" for number, cause in enumerate(causes, 1)]
        if self.never_called:
            notes.append(f"never called: {', '.join(self.never_called)}")
        return Table(
            "backends as these inputs choose them",
            ("layer", "inputs", "pass", "backend", "why not others"),
            [_row(choice, causes) for choice in self.choices],
            [*notes, *self.notes],
        )

    def __str__(self) -> str:
        return str(self.table())

    def as_dict(self) -> dict:
        """The explanation as plain lists, dicts and texts."""
        return {"schema": SCHEMA, **asdict(self)}

    def to_json(self) -> str:
        return as_json(self.as_dict())


def explain(model_or_op: nn.Module | Callable, *inputs) -> Explanation:
    """Say which backend every layer of pyarch would use, pass by pass, and why not the ones before it.

    Args:
        model_or_op: a model, swapped or stock (then a copy is swapped); it runs once without gradients on a
            copy that shares its parameters and is itself untouched. Or a function such as
            `pyarch.ops.depthwise_conv`, which runs once forward and backward.
        *inputs: the arguments of the call; for a model also one dict of named arguments.

    Returns:
        Explanation. Print it.

    Raises:
        TypeError: neither a model nor callable.
        ValueError: a stock model in which nothing can be swapped.
    """
    if isinstance(model_or_op, nn.Module):
        return _explain_model(model_or_op, inputs)
    if callable(model_or_op):
        return _explain_operator(model_or_op, inputs)
    raise TypeError(f"explain needs a model or a function, got {type(model_or_op).__name__}")


def _explain_model(model: nn.Module, inputs: tuple) -> Explanation:
    copied = duplicate(checked_model(model), share_parameters=True)
    notes = ()
    if not swapped_layers(copied) and not has_context(copied):
        swap(copied)
        notes = ("the model is not swapped; this is what swap would bring",)
    layers = swapped_layers(copied)
    choices: list[Choice] = []
    seen: set[tuple[str, str]] = set()
    for name, layer in layers.items():

        def note(module: DropIn, args: tuple, kwargs: dict, name: str = name) -> None:
            given = positional(module, (args, kwargs))
            described = _described(given)
            if (name, described) not in seen:
                seen.add((name, described))
                choices.extend(_choices_of_layer(name, described, module, given))

        layer.register_forward_pre_hook(note, with_kwargs=True)

    def attend(*args, **kwargs):
        described = _described((args, kwargs))
        if (PLAIN_ATTENTION, described) not in seen:
            seen.add((PLAIN_ATTENTION, described))
            choices.extend(explain_plain_attention(args, kwargs))
        return scaled_dot_product_attention(*args, **kwargs)

    named = len(inputs) == 1 and isinstance(inputs[0], Mapping)
    args, kwargs = as_arguments(inputs[0] if named else inputs)
    with same_randomness(), torch.no_grad(), answering(attend):
        copied(*args, **kwargs)
    called = {name for name, _ in seen}
    expected = [*layers, PLAIN_ATTENTION] if has_context(copied) else layers
    return Explanation(tuple(choices), tuple(name for name in expected if name not in called), notes)


def explain_plain_attention(args: tuple, kwargs: Mapping) -> list[Choice]:
    """The choices for a call of torch's scaled_dot_product_attention inside an `attention_context`."""
    given = inspect.signature(scaled_dot_product_attention).bind(*args, **kwargs).arguments
    inputs = [given.pop(name) for name in ("query", "key", "value")]
    explained = _explain_operator(partial(scaled_dot_product_attention, **given), tuple(inputs))
    described = _described((args, kwargs))
    if not explained.choices:
        verdicts = left_to_torch(described)["forward"]
        return [Choice(PLAIN_ATTENTION, described, "forward", "torch", verdicts)]
    named = {"layer": PLAIN_ATTENTION, "inputs": described}
    return [
        replace(choice, **named, operation=choice.operation.removeprefix("attention_"))
        for choice in explained.choices
    ]


def _choices_of_layer(name: str, described: str, layer: DropIn, args: tuple) -> list[Choice]:
    requested = layer.requested_backend()
    return [
        Choice(name, described, operation, _chosen(verdicts, requested), verdicts)
        for operation, verdicts in layer.explain(*args).items()
    ]


def _chosen(verdicts: tuple[Verdict, ...], requested: str) -> str:
    """The backend that `Op.choose` would take."""
    if requested == "auto":
        return next((each.backend for each in verdicts if each.accepts), verdicts[0].backend)
    able = {each.backend for each in verdicts if not each.refusals}
    return requested if requested in able else "none"


def _explain_operator(operator: Callable, inputs: tuple) -> Explanation:
    """Run a function on copies of its inputs and note every decision."""
    choices: list[Choice] = []
    described = _described(inputs)

    def note(op: Op, call: Call, backend: Backend) -> None:
        choices.append(Choice("", described, op.name, backend.name, op.explain(call)))

    def leaf(tensor: Tensor) -> Tensor:
        copied = tensor.detach().clone()
        return copied.requires_grad_() if copied.is_floating_point() else copied

    args, _ = map_tensors(leaf, (inputs, {}))
    with same_randomness(), torch.enable_grad(), recording(note):
        outputs = [each for _, each in floating_tensors(operator(*args), "output") if each.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(each) for each in outputs])
    notes = (
        ()
        if choices
        else (f"no operator of pyarch was asked: torch's own ran (backend {requested_backend()})",)
    )
    return Explanation(tuple(choices), notes=notes)


def _described(args: tuple) -> str:
    tensors = [tensor for _, tensor in floating_tensors(args, "")]
    shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors)
    return f"{shapes} {str(tensors[0].dtype).removeprefix('torch.')}" if tensors else "no floating tensor"


def _row(choice: Choice, causes: list[str]) -> tuple[str, ...]:
    number = f"[{causes.index(choice.why_not) + 1}]" if choice.why_not else ""
    return choice.layer or "-", choice.inputs, choice.operation, choice.backend, number
