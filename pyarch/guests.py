"""Layers of other packages that `swap` knows by name: they are never imported, only recognised.

`GUESTS` is the table: where a class is defined, and the drop-in that is mixed in before it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from pyarch.family import Family, Obstacle, accepts_any, element_like
from pyarch.nn.drop_in import DropIn
from pyarch.nn.swin_attention import SwinAttention, is_served
from pyarch.nn.window_attention import WindowAttention


@dataclass(frozen=True)
class Guest:
    """A class of another package whose computation a drop-in repeats.

    Args:
        drop_in: mixed in before it.
        takes: the arguments of its forward.
        holds: the attributes that the drop-in reads.
        nominal: as in `Family`.
        obstacle: what else keeps a layer from being swapped, or None.
    """

    drop_in: type[DropIn]
    takes: tuple[str, ...]
    holds: tuple[str, ...]
    nominal: Callable[[nn.Module], tuple[Tensor, ...]]
    obstacle: Callable[[nn.Module], Obstacle | None] = accepts_any


def _nominal_window(module: nn.Module) -> tuple[Tensor, ...]:
    """An image of one window, (1, Wh, Ww, C), of the weights' kind that holds one element."""
    weight = module.proj.weight
    return (element_like(weight, 1, *module.window_size, weight.shape[1]),)


def _nominal_tokens(module: nn.Module) -> tuple[Tensor, ...]:
    """The tokens of one window, (1, N, C), of the weights' kind that hold one element."""
    weight = module.o_proj.weight
    return (element_like(weight, 1, module.relative_position_bias.window_area, weight.shape[1]),)


def _not_served(module: nn.Module) -> Obstacle | None:
    if is_served(module):
        return None
    chosen = module.config._attn_implementation
    hint = "model.set_attn_implementation('sdpa') before the swap"
    return Obstacle("attn-implementation", f"attn_implementation is {chosen!r}, not 'sdpa'", hint)


_WINDOW_ATTENTION = Guest(
    WindowAttention,
    takes=("x",),
    holds=(
        "attention_dropout",
        "dropout",
        "num_heads",
        "proj",
        "qkv",
        "relative_position_bias_table",
        "relative_position_index",
        "shift_size",
        "window_size",
    ),
    nominal=_nominal_window,
)

GUESTS = {
    "torchvision.models.swin_transformer.ShiftedWindowAttention": _WINDOW_ATTENTION,
    # Has the attributes of torchvision's, and stands for it in the demo.
    "pyarch.models.swin.WindowAttention": _WINDOW_ATTENTION,
    "transformers.models.swin.modeling_swin.SwinAttention": Guest(
        SwinAttention,
        takes=("hidden_states", "attention_mask", "kwargs"),
        holds=(
            "attention_dropout",
            "config",
            "head_dim",
            "k_proj",
            "num_attention_heads",
            "o_proj",
            "q_proj",
            "relative_position_bias",
            "v_proj",
        ),
        nominal=_nominal_tokens,
        obstacle=_not_served,
    ),
}


def family_of_guest(cls: type[nn.Module]) -> Family | None:
    """The family of a class that is a guest or derived from one, or None."""
    for base in reversed(cls.__mro__):
        guest = GUESTS.get(f"{base.__module__}.{base.__qualname__}")
        if guest is not None:
            obstacle = partial(_obstacle, base, guest)
            return Family(base, guest.drop_in, obstacle=obstacle, nominal=guest.nominal)
    return None


def _obstacle(stock: type[nn.Module], guest: Guest, module: nn.Module) -> Obstacle | None:
    """A version of the class that its drop-in was not written for, or what the guest itself names."""
    if type(module).forward is not stock.forward:
        return None  # a subclass that computes something else, which `swap` finds by itself
    takes = tuple(inspect.signature(stock.forward).parameters)[1:]
    missing = [name for name in guest.holds if not hasattr(module, name)]
    hint = "pyarch does not know this version of the package: please report it"
    if takes != guest.takes:
        reason = f"forward of this {stock.__name__} takes {', '.join(takes)}, needs {', '.join(guest.takes)}"
        return Obstacle("unknown-version", reason, hint)
    if missing:
        return Obstacle("unknown-version", f"this {stock.__name__} has no {', '.join(missing)}", hint)
    return guest.obstacle(module)
