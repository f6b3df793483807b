"""What `swap` looks for, and why a layer that looks like it is left alone.

`FAMILIES` is the table: a stock class, its drop-in, what else a layer must fulfil, and a nominal call for the
report. Classes of other packages are in guests.py.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

import pyarch.nn as ours
from pyarch.dispatch import requested_backend
from pyarch.family import Family, Obstacle, element_like
from pyarch.guests import family_of_guest
from pyarch.nn.config import Config
from pyarch.nn.conv import is_depthwise
from pyarch.nn.drop_in import DropIn
from pyarch.retype import is_parametrized_class

_NOMINAL_SIZE = 32


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
    return (element_like(weight, 1, module.in_channels, *sizes),)


def _nominal_sequence(module: nn.RNNBase) -> tuple[Tensor, ...]:
    """One sequence (T, I) of the weights' kind that holds one element."""
    return (element_like(next(module.parameters()), _NOMINAL_SIZE, module.input_size),)


def _nominal_step(module: nn.RNNCellBase) -> tuple[Tensor, ...]:
    """One step (1, I) of the weights' kind that holds one element."""
    return (element_like(next(module.parameters()), 1, module.input_size),)


def _nominal_attention(module: nn.MultiheadAttention) -> tuple[Tensor, ...]:
    """Query, key and value of one sequence, (L, E) each, of the weights' kind that hold one element."""
    weight = module.out_proj.weight
    widths = module.embed_dim, module.kdim, module.vdim
    return tuple(element_like(weight, _NOMINAL_SIZE, width) for width in widths)


def _nominal_tokens(module: nn.TransformerEncoderLayer) -> tuple[Tensor, ...]:
    """One sequence (L, E) of the weights' kind that holds one element."""
    return (_nominal_attention(module.self_attn)[0],)


def _nominal_tokens_and_memory(module: nn.TransformerDecoderLayer) -> tuple[Tensor, ...]:
    """A sequence and its memory, (L, E) each, of the weights' kind that hold one element."""
    return _nominal_attention(module.multihead_attn)[:2]


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
    # Of no stock class: `swap` says of it that it is pyarch's already.
    Family(ours.WindowAttention, ours.WindowAttention),
)


def family_of(module: nn.Module) -> Family | None:
    """The family that a module belongs to, or None where pyarch has nothing for it."""
    families = (family for family in FAMILIES if isinstance(module, family.stock))
    return next(families, None) or family_of_guest(type(module))


def obstacle_to(module: nn.Module, family: Family) -> Obstacle | None:
    """Why a layer of this family cannot be re-typed, or None."""
    cls = type(module)
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        hint = "run the model once on an input, then swap"
        return Obstacle("lazy", f"{cls.__name__} has no shapes before its first call", hint)
    return (
        family.obstacle(module)
        or obstacle_of_sharding(cls)
        or _obstacle_in_class(cls, family)
        or obstacle_in_instance(module)
    )


def obstacle_of_sharding(cls: type) -> Obstacle | None:
    """Why a class of fully_shard cannot be re-typed, or None for any other."""
    if any(base.__name__ == "FSDPModule" for base in cls.__mro__):
        hint = "call pyarch.swap(model) before fully_shard(...)"
        return Obstacle("fully-sharded", f"{cls.__name__} is a class of fully_shard", hint)
    return None


def _obstacle_in_class(cls: type, family: Family) -> Obstacle | None:
    if type(cls) is not type:
        return Obstacle("metaclass", f"{cls.__name__} has the metaclass {type(cls).__name__}")
    for base in cls.__mro__[: cls.__mro__.index(family.stock)]:
        overridden = sorted(family.protected & set(vars(base)))
        if overridden and not is_parametrized_class(base):
            reason = f"{base.__name__} overrides {', '.join(overridden)}"
            can_derive = issubclass(family.drop_in, family.stock)
            hint = f"derive from pyarch.nn.{family.drop_in.__name__} instead" if can_derive else ""
            return Obstacle("overridden", reason, hint)
    return None


def obstacle_in_instance(module: nn.Module) -> Obstacle | None:
    """Why a module that was patched cannot be re-typed, or None."""
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
