"""What `swap` looks for, and why a layer that looks like it is left alone.

`FAMILIES` is the table: a stock class, its drop-in, what else a layer must fulfil, and a nominal call for the
report.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

import pyarch.nn as ours
from pyarch.dispatch import requested_backend
from pyarch.nn.config import Config
from pyarch.nn.conv import is_depthwise
from pyarch.nn.drop_in import DropIn
from pyarch.retype import is_parametrized_class

# Names that a subclass may not redefine, beside all that the drop-in itself defines.
COMPUTATION = {"forward", "__call__", "_call_impl", "__reduce__", "__init_subclass__"}
_NOMINAL_SIZE = 32


@dataclass(frozen=True)
class Obstacle:
    """Why a layer is left alone: a code for programs, the reason and the way out for people."""

    code: str
    reason: str
    hint: str = ""


def _accepts_any(module: nn.Module) -> Obstacle | None:
    return None


@dataclass(frozen=True)
class Family:
    """A stock class and its drop-in.

    Args:
        stock, drop_in: the classes.
        overridable: methods of `stock` that hold its computation, beside `forward`.
        obstacle: what keeps a layer of this class from being swapped, or None.
        nominal: inputs that a layer of this class could be called with; they tell the report its likely
            backend.
    """

    stock: type[nn.Module]
    drop_in: type[DropIn]
    overridable: frozenset[str] = frozenset()
    obstacle: Callable[[nn.Module], Obstacle | None] = _accepts_any
    nominal: Callable[[nn.Module], tuple[Tensor, ...]] | None = None

    @property
    def protected(self) -> set[str]:
        """Every name that a subclass must not redefine for the drop-in to mean the same."""
        return COMPUTATION | self.overridable | _names_between(self.drop_in, self.stock)


def _not_depthwise(module: nn.Module) -> Obstacle | None:
    if not is_depthwise(module):
        return Obstacle("not-depthwise", "not depthwise (groups != in_channels)")
    if module.in_channels == 1:
        return Obstacle("not-depthwise", "one input channel: a dense convolution")
    return None


def _nominal_image(module: nn.Module) -> tuple[Tensor, ...]:
    """An input (1, C, *spatial) of the weight's kind that holds one element."""
    weight = module.weight
    reaches = (d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    sizes = [max(_NOMINAL_SIZE, reach) for reach in reaches]
    return (_element_like(weight, 1, module.in_channels, *sizes),)


def _nominal_sequence(module: nn.RNNBase) -> tuple[Tensor, ...]:
    """One sequence (T, I) of the weights' kind that holds one element."""
    return (_element_like(next(module.parameters()), _NOMINAL_SIZE, module.input_size),)


def _nominal_step(module: nn.RNNCellBase) -> tuple[Tensor, ...]:
    """One step (1, I) of the weights' kind that holds one element."""
    return (_element_like(next(module.parameters()), 1, module.input_size),)


def _nominal_attention(module: nn.MultiheadAttention) -> tuple[Tensor, ...]:
    """Query, key and value of one sequence, (L, E) each, of the weights' kind that hold one element."""
    weight = module.out_proj.weight
    widths = module.embed_dim, module.kdim, module.vdim
    return tuple(_element_like(weight, _NOMINAL_SIZE, width) for width in widths)


def _nominal_tokens(module: nn.TransformerEncoderLayer) -> tuple[Tensor, ...]:
    """One sequence (L, E) of the weights' kind that holds one element."""
    return (_nominal_attention(module.self_attn)[0],)


def _nominal_tokens_and_memory(module: nn.TransformerDecoderLayer) -> tuple[Tensor, ...]:
    """A sequence and its memory, (L, E) each, of the weights' kind that hold one element."""
    return _nominal_attention(module.multihead_attn)[:2]


def _element_like(weight: Tensor, *shape: int) -> Tensor:
    return torch.empty((1,) * len(shape), dtype=weight.dtype, device=weight.device).expand(shape)


# Methods of torch's recurrent layers beside forward that say what a call means.
_RECURRENT_STEPS = frozenset(
    {
        "check_forward_args",
        "check_hidden_size",
        "check_input",
        "get_expected_cell_size",
        "get_expected_hidden_size",
        "permute_hidden",
        "_init_flat_weights",
        "_update_flat_weights",
        "_weights_have_changed",
    }
)


# Methods of torch's transformer layers beside forward that hold their computation.
_TRANSFORMER_STEPS = frozenset({"_ff_block", "_mha_block", "_sa_block"})


def _convolution(stock: type[nn.Module], drop_in: type[DropIn]) -> Family:
    return Family(stock, drop_in, frozenset({"_conv_forward"}), _not_depthwise, _nominal_image)


def _recurrent(stock: type[nn.Module], drop_in: type[DropIn]) -> Family:
    return Family(stock, drop_in, _RECURRENT_STEPS, nominal=_nominal_sequence)


def _cell(stock: type[nn.Module], drop_in: type[DropIn]) -> Family:
    return Family(stock, drop_in, nominal=_nominal_step)


FAMILIES = (
    _convolution(nn.Conv1d, ours.Conv1d),
    _convolution(nn.Conv2d, ours.Conv2d),
    _convolution(nn.Conv3d, ours.Conv3d),
    _recurrent(nn.RNN, ours.RNN),
    _recurrent(nn.LSTM, ours.LSTM),
    _recurrent(nn.GRU, ours.GRU),
    _cell(nn.RNNCell, ours.RNNCell),
    _cell(nn.LSTMCell, ours.LSTMCell),
    _cell(nn.GRUCell, ours.GRUCell),
    Family(
        nn.MultiheadAttention,
        ours.MultiheadAttention,
        frozenset({"merge_masks"}),
        nominal=_nominal_attention,
    ),
    Family(
        nn.TransformerEncoderLayer,
        ours.TransformerEncoderLayer,
        _TRANSFORMER_STEPS,
        nominal=_nominal_tokens,
    ),
    Family(
        nn.TransformerDecoderLayer,
        ours.TransformerDecoderLayer,
        _TRANSFORMER_STEPS,
        nominal=_nominal_tokens_and_memory,
    ),
)


def family_of(module: nn.Module) -> Family | None:
    """The row of FAMILIES that a module belongs to, or None where pyarch has nothing for it."""
    return next((family for family in FAMILIES if isinstance(module, family.stock)), None)


def obstacle_to(module: nn.Module, family: Family) -> Obstacle | None:
    """Why a layer of this family cannot be re-typed, or None."""
    cls = type(module)
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        hint = "run the model once on an input, then swap"
        return Obstacle("lazy", f"{cls.__name__} has no shapes before its first call", hint)
    return family.obstacle(module) or _obstacle_in_class(cls, family) or _obstacle_in_instance(module)


def _obstacle_in_class(cls: type, family: Family) -> Obstacle | None:
    if any(base.__name__ == "FSDPModule" for base in cls.__mro__):
        hint = "call pyarch.swap(model) before fully_shard(...)"
        return Obstacle("fully-sharded", f"{cls.__name__} is a class of fully_shard", hint)
    if type(cls) is not type:
        return Obstacle("metaclass", f"{cls.__name__} has the metaclass {type(cls).__name__}")
    for base in cls.__mro__[: cls.__mro__.index(family.stock)]:
        overridden = sorted(family.protected & set(vars(base)))
        if overridden and not is_parametrized_class(base):
            reason = f"{base.__name__} overrides {', '.join(overridden)}"
            return Obstacle("overridden", reason, f"derive from pyarch.nn.{family.drop_in.__name__} instead")
    return None


def _obstacle_in_instance(module: nn.Module) -> Obstacle | None:
    if "forward" in vars(module):
        return Obstacle("patched", "the instance has a forward of its own", "swap before it is patched")
    return None


def expected_backend(module: nn.Module, family: Family, config: Config) -> tuple[str, str]:
    """The backend that a layer's dtype and device allow, and why it is none of ours."""
    if family.nominal is None or parametrize.is_parametrized(module):
        return "decided at the call", ""
    requested = requested_backend()
    requested = config.backend if requested == "auto" else requested
    verdicts = family.drop_in.explain(module, *family.nominal(module))["forward"]
    if requested != "auto":
        refused = "; ".join(each.reason for each in verdicts if each.backend == requested and each.refusals)
        return requested, f"{requested} refuses: {refused}" if refused else ""
    kernels = [each for each in verdicts if each.backend not in ("torch", "reference")]
    if not kernels:
        weight = next(module.parameters())
        return "torch", f"{weight.dtype} on {weight.device.type}: torch's own operator runs it directly"
    able = [each for each in kernels if not each.refusals]
    if able and able[0].concessions:
        return f"{able[0].backend} or torch, by shape", ""
    if able:
        return able[0].backend, ""
    return "torch", " | ".join(f"{each.backend}: {each.reason}" for each in kernels)


def _names_between(cls: type, stock: type) -> set[str]:
    """The methods and properties that the classes of a drop-in before its stock class define."""
    before = cls.__mro__[: cls.__mro__.index(stock)]
    members = {name: value for base in before for name, value in vars(base).items()}
    kinds = (property, classmethod, staticmethod)
    return {name for name, value in members.items() if callable(value) or isinstance(value, kinds)} - {
        "__init__"
    }
