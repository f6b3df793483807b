"""Attention weights for a page: a few layers and heads of a model, on the first sequence of its inputs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyarch.copies import duplicate, same_randomness, swapped_layers
from pyarch.in_context import has_context
from pyarch.maps import ATTENTION_LAYERS, WINDOW_LAYERS, attention_maps
from pyarch.nested import as_arguments, map_tensors, positional
from pyarch.observation import PLAIN_ATTENTION, observing
from pyarch.ops import scaled_dot_product_attention

# A map with more rows or columns is reduced to so many: the page itself shows fewer.
MOST_SIDE = 512
# Weights of one layer, all heads and sequences: 1 GiB in float32. Beyond that a page is not worth the memory.
MOST_WEIGHTS = 1 << 28


@dataclass(frozen=True)
class PageMaps:
    """Weights by layer, [head][query][key], and what a reader must know of their choice."""

    weights: Mapping[str, Sequence] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def page_maps(model: nn.Module, inputs: object, layers: int = 4, heads: int = 8) -> PageMaps:
    """The weights of some layers, evenly spread over the model, one layer in memory at a time.

    Args:
        model: swapped; it is left alone.
        inputs: of its forward, as for `attention_maps`.
        layers, heads: the most that are kept.

    Returns:
        PageMaps: empty for a model without attention of pyarch, or with that of transformers' layers alone;
        with only a note where its attention did not run, gives no weights, or would give too many to hold.
    """
    in_context = has_context(model)
    kinds = (nn.MultiheadAttention, *WINDOW_LAYERS)
    names = [name for name, each in model.named_modules() if isinstance(each, kinds)]
    swapped = any(isinstance(each, ATTENTION_LAYERS) for each in swapped_layers(model).values())
    if not in_context and not (swapped and names):
        return PageMaps()
    kept: dict[str, Tensor] = {}
    notes: dict[str, None] = {}
    most = _most_weights(model, inputs)
    if most > MOST_WEIGHTS:
        return PageMaps(
            notes=(f"Left out: a layer has {most:.1e} weights, a page {MOST_WEIGHTS:.1e} at most.",)
        )
    # The modules that call torch's function themselves are known once they have run.
    chosen = [None] if in_context else [f"re:{re.escape(name)}" for name in _spread(names, layers)]
    for pattern in chosen:
        try:
            maps = attention_maps(model, inputs, layers=pattern)
        except (ValueError, NotImplementedError) as error:
            notes[str(error)] = None
            continue
        for name in _spread([name for name, each in maps.items() if each.numel()], layers):
            notes[f"The first sequence or window, {layers} layers at most, spread over the model."] = None
            notes.update(dict.fromkeys(_left_out(maps[name], heads)))
            kept[name] = _small(maps[name][0, :heads])
    shown = _spread(list(kept), layers)
    return PageMaps({name: kept[name].tolist() for name in shown}, tuple(notes))


def _most_weights(model: nn.Module, inputs: object) -> int:
    """How many weights the first call of each layer would give, the largest number of them.

    Attention inside windows is left out: its weights grow as its input does.
    """
    copied = duplicate(model, share_parameters=True)
    args, kwargs = map_tensors(Tensor.clone, as_arguments(inputs))
    layers = {name: each for name, each in copied.named_modules() if isinstance(each, nn.MultiheadAttention)}
    with same_randomness(), torch.no_grad(), observing(layers) as observed:
        copied(*args, **kwargs)
    sizes = [0]
    for name, layer in layers.items():
        if observed[name].arguments is not None:
            query, key = positional(layer, observed[name].arguments)[:2]
            tokens = key.shape[1] if layer.batch_first and key.dim() == 3 else key.shape[0]
            sizes.append(0 if key.is_nested else layer.num_heads * query.numel() // layer.embed_dim * tokens)
    if observed[PLAIN_ATTENTION].arguments is not None:
        args, kwargs = observed[PLAIN_ATTENTION].arguments
        given = inspect.signature(scaled_dot_product_attention).bind(*args, **kwargs).arguments
        query, key = given["query"], given["key"]
        sizes.append(0 if key.is_nested else query.shape[:-1].numel() * key.shape[-2])
    return max(sizes)


def _spread(names: list[str], most: int) -> list[str]:
    """So many of the names at equal distances, the first and the last among them."""
    if len(names) <= most:
        return names
    step = (len(names) - 1) / max(1, most - 1)
    return [names[round(number * step)] for number in range(most)]


def _small(maps: Tensor) -> Tensor:
    """(heads, queries, keys); of too many, a dot is the largest weight of its neighbourhood."""
    rows, columns = (min(size, MOST_SIDE) for size in maps.shape[1:])
    return F.adaptive_max_pool2d(maps.float(), (rows, columns)) if maps.numel() else maps.float()


def _left_out(maps: Tensor, heads: int) -> Iterator[str]:
    if maps.shape[1] > heads:
        yield f"The first {heads} of {maps.shape[1]} heads."
    if max(maps.shape[2:]) > MOST_SIDE:
        yield f"Maps of more than {MOST_SIDE} tokens are reduced to {MOST_SIDE}, by their largest weights."
