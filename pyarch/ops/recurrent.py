"""Recurrent stacks and cells: autocast, checks, torch's own route, layer after layer.

Whatever no kernel of ours computes (float64, complex, forward-mode and functorch transforms, bad input) goes
to torch's own operator, whose results and error texts are then the user's. So does a layer that every choice
leaves to torch; a stack of nothing else runs as one call of torch's.

The public functions are in recurrent_functions.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import attrgetter, or_

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop

from pyarch.dispatch import Op, Verdict, settled_backend
from pyarch.ops.kernel_refusals import KERNEL_DTYPES
from pyarch.ops.plain_calls import Decisions, is_ordinary, is_plain, under_transform
from pyarch.ops.recurrent_call import (
    BACKWARD,
    FORWARD,
    RecurrentCall,
    count_of_weights,
    describe,
    fits,
    remembered_fits,
)
from pyarch.ops.recurrent_layer import (
    forward_layer,
    packs,
    run_tracked_cell,
    run_tracked_layer,
)
from pyarch.ops.recurrent_torch import run_stock, run_stock_cell

__all__ = [
    "BACKWARD",
    "FORWARD",
    "KERNEL_DTYPES",
    "RecurrentCall",
    "explain",
    "explain_cell",
    "run",
    "run_cell",
]


# -------------------------------------------------------------------------------- a stack


def run(
    mode: str,
    input: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    *,
    num_layers: int,
    bidirectional: bool,
    dropout: float,
    training: bool,
    backend: str,
    recompute: bool = False,
    like: tuple | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a stack of recurrent layers, differentiably.

    Args:
        mode: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        input: (T, B, I) of any strides, or packed (N, I) with `batch_sizes`.
        hx: h0 (L D, B, P), for an lstm also c0 (L D, B, H).
        weights: torch's flat list over layers and directions.
        batch_sizes: (T,) int64 on the CPU, as PackedSequence's, or None.
        dropout: probability between layers, when `training`.
        backend: a backend's name or "auto".
        recompute: save no gates for the backward, which makes them again from the output.
        like: what the caller found of the call with `likeness`, or None.

    Returns:
        output (T, B, D P) or (N, D P), h_n (L D, B, P), c_n (L D, B, H) or None.

    Raises:
        RuntimeError, ValueError, TypeError: as torch's own operator, in its words.
        NotImplementedError: a backend asked for by name refuses the call.
    """

    def stock():
        has_biases = count_of_weights(weights, num_layers, bidirectional) >= 4
        settings = has_biases, num_layers, dropout, training, bidirectional
        return run_stock(mode, input, hx, weights, batch_sizes, *settings)

    tensors = input, *hx, *weights
    if like is None and batch_sizes is None:
        like = likeness(tensors, mode, backend, num_layers, bidirectional)
    known = decided.get(like)
    if known is None:
        tensors = _as_autocast_casts(mode, tensors, batch_sizes is not None, False)
        if tensors is None or not _carries(mode, tensors, len(hx), batch_sizes, num_layers, bidirectional):
            return stock()
    layers = _split(tensors, len(hx), num_layers, bidirectional)
    if known is None:
        saves = _saves(tensors[0], layers)
        kernels = [None] * num_layers
        if is_plain(tensors):
            kernels = _choose_kernels(mode, tensors[0], layers, batch_sizes, saves, backend)
        known = decided.remember(like, (kernels, saves))
    kernels, saves = known
    if all(kernel is not None and kernel.name == "torch" for kernel in kernels):
        return stock()
    output, of_states = tensors[0], []
    for index, ((h0, c0, own), save, kernel) in enumerate(zip(layers, saves, kernels, strict=True)):
        if index and dropout and training:
            output = drop(output, dropout, True)
        if kernel is not None and kernel.name == "torch":
            settings = len(own) // h0.shape[0] >= 4, 1, 0.0, training, bidirectional
            results = run_stock(mode, output, (h0,) if c0 is None else (h0, c0), own, batch_sizes, *settings)
        elif save:
            copies = index == num_layers - 1 and _may_be_changed(mode, input.device)
            settings = kernel, mode, backend, recompute, copies
            results = run_tracked_layer(*settings, output, h0, c0, batch_sizes, *own)
        else:
            results = forward_layer(kernel, mode, output, h0, c0, own, batch_sizes, False, backend)
        output, *states = results[: 1 + len(hx)]
        of_states.append(states)
    if num_layers == 1:
        h_n, *c_n = of_states[0]
    else:
        h_n, *c_n = (torch.cat(states) for states in zip(*of_states, strict=True))
    return output, h_n, c_n[0] if c_n else None


def _split(tensors, states: int, num_layers: int, bidirectional: bool) -> list[tuple]:
    """For each layer (h0, c0 or None, weights) out of the flat (input, *hx, *weights)."""
    h0, c0 = tensors[1], tensors[2] if states == 2 else None
    weights = tensors[1 + states :]
    if num_layers == 1:
        return [(h0, c0, weights)]
    directions = 2 if bidirectional else 1
    count = len(weights) // num_layers
    return list(
        zip(
            h0.split(directions),
            (None,) * num_layers if c0 is None else c0.split(directions),
            (weights[first : first + count] for first in range(0, len(weights), count)),
            strict=True,
        )
    )


def _saves(input: Tensor, layers: list[tuple]) -> list[bool]:
    """For each layer whether a backward may come: something up to it requires a gradient."""
    if not torch.is_grad_enabled():
        return [False] * len(layers)
    own = [
        h0.requires_grad
        or (c0 is not None and c0.requires_grad)
        or any(weight.requires_grad for weight in weights)
        for h0, c0, weights in layers
    ]
    own[0] = own[0] or input.requires_grad
    return list(accumulate(own, or_))


def likeness(tensors: Sequence[Tensor], mode: str, backend: str, *others) -> tuple | None:
    """What a plain eager call has in common with those that are decided as it is; None for any other call.

    Every other setting that a decision depends on is among `others`, each caller's own in kind and number.
    """
    if not is_ordinary(tensors):
        return None
    return mode, settled_backend(backend), torch.is_grad_enabled(), *others, *map(_KIND, tensors)


decided = Decisions()
_KIND = attrgetter("shape", "dtype", "device", "layout", "requires_grad")


def _may_be_changed(mode: str, device: torch.device) -> bool:
    """Whether torch lets a user change its output in place before the backward."""
    return mode != "lstm" and device.type == "cpu"


def _choose_kernels(mode, input, layers, batch_sizes, saves, backend):
    return [
        FORWARD.choose(describe(mode, input, h0, weights, batch_sizes, save), backend)
        for (h0, _, weights), save in zip(layers, saves, strict=True)
    ]


# -------------------------------------------------------------------------------- a cell


def run_cell(
    mode: str,
    input: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    backend: str,
    like: tuple | None = None,
) -> tuple[Tensor, ...]:
    """Run one step: (h,), for an lstm (h, c), each (B, H) or (H,).

    Args:
        mode, backend, like: as of `run`, whose errors are raised.
        input: (B, I) or (I,).
        hx: h, for an lstm also c, each (B, H) or (H,).
        weights: weight_ih, weight_hh, then bias_ih and bias_hh or neither.
    """
    tensors = input, *hx, *weights
    if like is None:
        like = likeness(tensors, mode, backend, "cell")
    known = decided.get(like)
    if known is None:
        tensors = _as_autocast_casts(mode, tensors, False, True)
        layer = None if tensors is None else _one_step(mode, tensors, len(hx))
        if layer is None:
            return run_stock_cell(mode, input, hx, weights)
        step, states, own = layer
        save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        kernel = None
        if is_plain(tensors):
            kernel = FORWARD.choose(describe(mode, step, states[0], own, None, save, cell=True), backend)
        known = decided.remember(like, (kernel, save))
    kernel, save = known
    if kernel is not None and kernel.name == "torch":
        return run_stock_cell(mode, input, hx, weights)
    own = tensors[1 + len(hx) :]
    if save:
        given = *tensors[: 1 + len(hx)], *(None,) * (2 - len(hx))
        results = run_tracked_cell(kernel, mode, backend, *given, *own)
        return results if isinstance(results, tuple) else (results,)
    step, h0, *c0 = layered(tensors[: 1 + len(hx)])
    c0 = c0[0] if c0 else None
    _, *new, _, _ = forward_layer(kernel, mode, step, h0, c0, own, None, False, backend)
    return tuple(state.view(old.shape) for state, old in zip(new, tensors[1 : 1 + len(hx)], strict=False))


def _one_step(mode: str, tensors, states: int):
    """The cell's flat (input, *hx, *weights) as a layer of one step; None if no kernel carries it."""
    if any(not isinstance(tensor, Tensor) for tensor in tensors):
        return None
    dimensions = tensors[0].dim()
    if dimensions not in (1, 2) or any(state.dim() != dimensions for state in tensors[1 : 1 + states]):
        return None
    step, *of_states = layered(tensors[: 1 + states])
    own = tensors[1 + states :]
    if not _carries(mode, (step, *of_states, *own), states, None, 1, False):
        return None
    return step, of_states, own


def layered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """(B, *) or (*,) as the operator's (1, B, *)."""
    missing = (None,) * (3 - tensors[0].dim())
    return [tensor[missing] for tensor in tensors]


# -------------------------------------------------------------------------------- which calls are ours


def _carries(mode, tensors, states: int, batch_sizes, num_layers: int, bidirectional: bool) -> bool:
    """Whether the kernels carry a call on the flat (input, *hx, *weights), by dtypes, devices and shapes."""
    input = tensors[0]
    dtype, device = input.dtype, input.device
    if dtype not in KERNEL_DTYPES:
        return False
    for tensor in tensors:
        if tensor.dtype != dtype or tensor.device != device or tensor.layout != torch.strided:
            return False
    compiling = torch.compiler.is_compiling()
    if not compiling and under_transform():
        return False
    packed = batch_sizes is not None
    shapes = tuple(tensor.shape for tensor in tensors)
    settings = shapes[0], shapes[1 : 1 + states], shapes[1 + states :], num_layers, bidirectional, packed
    if compiling or torch.SymInt in map(type, (*shapes[0], *shapes[1])):
        return fits(mode, *settings)
    if not remembered_fits(mode, *settings):
        return False
    return not packed or packs(batch_sizes, shapes[0][0], shapes[1][1])


def _as_autocast_casts(mode: str, tensors: tuple, packed: bool, cell: bool) -> tuple | None:
    """The tensors as torch's autocast would have them; None where only torch itself does as torch does.

    On a GPU everything is cast. On a CPU torch casts whole the calls that are one operator of its own: rnn,
    and an lstm over padded sequences without projection. The others compute in the dtype of their states.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    target = torch.get_autocast_dtype(device)
    if any(tensor.dtype not in (torch.float32, target) for tensor in tensors):
        return None
    if device == "cpu" and not mode.startswith("rnn"):
        state = tensors[1].dtype
        projects = mode == "lstm" and not cell and tensors[1].shape[-1:] != tensors[2].shape[-1:]
        if mode == "lstm" and not packed and not cell and not projects:
            if target != torch.bfloat16:
                return None
        elif state == torch.float32 and not projects:
            target = state
        elif state != target:
            return None
    return tuple(tensor.to(target) for tensor in tensors)


# -------------------------------------------------------------------------------- explaining


def explain(
    mode: str,
    input: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    *,
    num_layers: int,
    bidirectional: bool,
) -> dict[str, tuple[Verdict, ...]]:
    """What every backend says of a call that a backward follows, for "forward" and "backward".

    Arguments as of `run`. Where the layers of a stack differ, a reason names its layer.
    """
    tensors = (input, *hx, *weights)
    if not _carries(mode, tensors, len(hx), batch_sizes, num_layers, bidirectional):
        return _left_to_torch(input, weights)
    calls = [
        describe(mode, input, h0, own, batch_sizes, True)
        for h0, _, own in _split(tensors, len(hx), num_layers, bidirectional)
    ]
    return {"forward": _verdicts(FORWARD, calls), "backward": _verdicts(BACKWARD, calls)}


def explain_cell(
    mode: str, input: Tensor, hx: Sequence[Tensor], weights: Sequence[Tensor]
) -> dict[str, tuple[Verdict, ...]]:
    """What every backend says of a cell's call, by the arguments of `run_cell`."""
    layer = _one_step(mode, (input, *hx, *weights), len(hx))
    if layer is None:
        return _left_to_torch(input, weights)
    step, states, own = layer
    call = describe(mode, step, states[0], own, None, True, cell=True)
    return {"forward": FORWARD.explain(call), "backward": BACKWARD.explain(call)}


def _left_to_torch(input: Tensor, weights: Sequence[Tensor]) -> dict[str, tuple[Verdict, ...]]:
    kind = f"{input.dtype} input {tuple(input.shape)} on weight_ih {tuple(weights[0].shape)}"
    only_stock = (Verdict("torch", (), (f"{kind}: torch's own operator runs it directly",)),)
    return {"forward": only_stock, "backward": only_stock}


def _verdicts(op: Op, calls: list[RecurrentCall]) -> tuple[Verdict, ...]:
    """What each backend says of a stack: what it says of every layer, or of which."""
    of_layers = [op.explain(call) for call in calls]
    return tuple(
        said[0]
        if len(set(said)) == 1
        else Verdict(
            said[0].backend,
            tuple(f"layer {index}: {reason}" for index, each in enumerate(said) for reason in each.refusals),
            tuple(
                f"layer {index}: {reason}" for index, each in enumerate(said) for reason in each.concessions
            ),
        )
        for said in zip(*of_layers, strict=True)
    )
