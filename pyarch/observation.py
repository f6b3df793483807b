"""Which layers of a model ran, on what, and on which backend each pass of theirs went."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pyarch.attention_context import answering
from pyarch.dispatch import Backend, Call, Op, recording
from pyarch.nested import Arguments, floating_tensors, map_tensors
from pyarch.ops import scaled_dot_product_attention

# A layer whose operator never asked dispatch went straight to torch's own.
STRAIGHT_TO_TORCH = "torch"
# Stands for the plain calls of attention in a model that was swapped with sdpa=True.
PLAIN_ATTENTION = "F.scaled_dot_product_attention"


@dataclass
class Observed:
    """What one layer did.

    Args:
        calls: how often it ran.
        arguments: of its first call, detached, asking for gradients where those did, or None.
        cast: device type, dtype and whether autocast was on in that call.
        forward, backward: names of the backends that ran it, in order of appearance.
        gradients_arrived: whether a gradient of its output came.
        around: the watched layers inside which it last ran; what ran here ran there too.
    """

    calls: int = 0
    arguments: Arguments | None = None
    cast: tuple[str, torch.dtype, bool] = ("cpu", torch.bfloat16, False)
    forward: list[str] = field(default_factory=list)
    backward: list[str] = field(default_factory=list)
    gradients_arrived: bool = False
    around: tuple[Observed, ...] = ()

    def autocast(self) -> torch.autocast:
        """The autocast under which the first call ran."""
        kind, dtype, enabled = self.cast
        return torch.autocast(kind, dtype=dtype, enabled=enabled)

    @property
    def forward_backend(self) -> str:
        return "+".join(self.forward) or (STRAIGHT_TO_TORCH if self.calls else "-")

    @property
    def backward_backend(self) -> str:
        return "+".join(self.backward) or (STRAIGHT_TO_TORCH if self.gradients_arrived else "-")


@contextmanager
def observing(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Observed]]:
    """Watch the layers (of a copy) during the block; the dict fills while they run.

    Under `PLAIN_ATTENTION` it also holds the calls that an `attention_context` answers, as one layer.
    """
    observed = {name: Observed() for name in (*layers, PLAIN_ATTENTION)}
    # The layers whose pass this thread is in, innermost last: autograd runs a backward in threads of its own.
    current = threading.local()

    def record(op: Op, call: Call, backend: Backend) -> None:
        for layer in getattr(current, "layers", ()):
            used = layer.backward if current.backward else layer.forward
            if backend.name not in used:
                used.append(backend.name)

    def watch(layer: Observed) -> list:
        def enter(module, args, kwargs):
            if not layer.calls:
                layer.arguments = map_tensors(_cut, (args, kwargs))
                layer.cast = _autocast_state(layer.arguments)
            layer.calls += 1
            is_inside = not getattr(current, "backward", True)
            layer.around = current.layers if is_inside else ()
            current.layers, current.backward = (*layer.around, layer), False

        def leave(module, args, kwargs, output):
            current.layers = layer.around
            for _, tensor in floating_tensors(output, "output"):
                if tensor.requires_grad:
                    tensor.register_hook(arrive)

        def arrive(gradient):
            layer.gradients_arrived = True
            current.layers, current.backward = (*layer.around, layer), True

        return [enter, leave]

    enter_plain, leave_plain = watch(observed[PLAIN_ATTENTION])

    def attend(*args, **kwargs):
        enter_plain(None, args, kwargs)
        output = scaled_dot_product_attention(*args, **kwargs)
        leave_plain(None, args, kwargs, output)
        return output

    handles = []
    for name, module in layers.items():
        enter, leave = watch(observed[name])
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        with recording(record), answering(attend):
            yield observed
    finally:
        for handle in handles:
            handle.remove()


def _cut(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _autocast_state(arguments: Arguments) -> tuple[str, torch.dtype, bool]:
    tensors = [*floating_tensors(arguments[0], ""), *floating_tensors(arguments[1], "")]
    kind = tensors[0][1].device.type if tensors else "cpu"
    return kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
