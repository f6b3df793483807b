"""Who looks at whom: the attention weights of every layer of a swapped model, head by head.

The model runs once, as a copy that shares its parameters. Every nn.MultiheadAttention in it, also one inside
a transformer layer, every attention inside windows, every plain call in an `attention_context`, and every
layer of transformers' models under `attn_implementation="pyarch"` gives its weights beside its output.

Legend: B batch, H heads, Tq queries, Tk keys; n windows of an image, N tokens in a window.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pyarch.attention_context import answering, is_in_context
from pyarch.copies import duplicate, same_randomness, silence_dropout, swapped_layers
from pyarch.in_context import has_context
from pyarch.nested import as_arguments, map_tensors, positional
from pyarch.nn.attention import MultiheadAttention, attend
from pyarch.nn.attention_call import is_fused_by_torch, read
from pyarch.nn.drop_in import backend_of, config_of
from pyarch.nn.swin_attention import SwinAttention, is_served
from pyarch.nn.transformer import KNOWN_FORWARDS, TransformerDecoderLayer, TransformerEncoderLayer
from pyarch.nn.window_attention import WindowAttention
from pyarch.ops import scaled_dot_product_attention
from pyarch.report import Table
from pyarch.rules import Rule, first_match, read_rules
from pyarch.swap import SDPA_HINT, checked_model

TRANSFORMERS_HINT = (
    "a model of transformers: pyarch.integrations.transformers.register() and "
    'model.set_attn_implementation("pyarch"), or its own output_attentions=True under "eager"'
)
WINDOW_LAYERS = WindowAttention, SwinAttention
ATTENTION_LAYERS = MultiheadAttention, TransformerEncoderLayer, TransformerDecoderLayer, *WINDOW_LAYERS


class AttentionMaps(Mapping[str, Tensor]):
    """Attention weights by layer, on the CPU: (B, H, Tq, Tk), or (B, Tq, Tk) where heads were averaged.

    A layer that ran once stands under its name, one that ran several times under "name[0]", "name[1]" and so
    on; "" is the model itself. Each row sums to 1, beside attention sinks to less, and is 0 where a query
    sees no key.
    """

    def __init__(self, maps: Mapping[str, Tensor]):
        self._maps = dict(maps)

    def __getitem__(self, layer: str) -> Tensor:
        if layer not in self._maps:
            raise KeyError(f"no map of {layer!r}; there are {', '.join(map(repr, self._maps))}")
        return self._maps[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)

    def table(self) -> Table:
        """Names and shapes; `str(maps)` is its plain text."""
        rows = [
            (name or "(the model)", "x".join(map(str, each.shape)), str(each.dtype).removeprefix("torch."))
            for name, each in self._maps.items()
        ]
        kind = "batch, heads, queries, keys" if self._by_head() else "batch, queries, keys, mean of heads"
        return Table(f"attention maps ({kind})", ("layer", "shape", "dtype"), rows)

    def __str__(self) -> str:
        return str(self.table())

    def __repr__(self) -> str:
        return f"<AttentionMaps: {', '.join(map(repr, self._maps))}>"

    def plot(self, layer: str | None = None, head: int | None = None, sample: int = 0) -> list:
        """Draw one figure a layer: a panel a head, queries downward, keys to the right, one colour scale.

        Colours follow the square root of the weights. Of more than 300 queries or keys a dot is the largest
        weight of its neighbourhood.

        Args:
            layer: a key of these maps; None for all of them.
            head: one head alone; None for all of them.
            sample: which of the batch.

        Returns:
            The matplotlib.figure.Figure of each layer, which notebooks show.

        Raises:
            ImportError: matplotlib is not installed.
            KeyError: no such layer.
            IndexError: no such head or sample.
            ValueError: `head` of maps that hold the mean.
        """
        from pyarch.maps_picture import draw

        return [draw(name, self._chosen(name, head, sample), head, sample) for name in self._names(layer)]

    def save(
        self, path: str | Path, layer: str | None = None, head: int | None = None, sample: int = 0
    ) -> list[Path]:
        """Write the figures of `plot` into files.

        Args:
            path: its ending chooses the format: .png, .svg, .pdf. The figures of several layers get their
                names before it: maps.png becomes maps-layers.0.self_attn.png.
            layer, head, sample: as for `plot`.

        Returns:
            The files.

        Raises:
            OSError, ValueError: `path` cannot be written, or its ending is no format.
            ImportError, KeyError, IndexError, ValueError: as `plot`.
        """
        from pyarch.maps_picture import write

        path, names = Path(path), self._names(layer)
        paths = [path.with_name(f"{path.stem}-{name or 'model'}{path.suffix}") for name in names]
        paths = [path] if len(names) == 1 else paths
        for figure, each in zip(self.plot(layer, head, sample), paths, strict=True):
            write(figure, each)
        return paths

    def _by_head(self) -> bool:
        return all(each.dim() == 4 for each in self._maps.values())

    def _names(self, layer: str | None) -> list[str]:
        return list(self._maps) if layer is None else [layer]

    def _chosen(self, name: str, head: int | None, sample: int) -> Tensor:
        """The maps (heads, Tq, Tk) of one sample, or (Tq, Tk) where heads were averaged."""
        maps = self[name]
        if not 0 <= sample < len(maps):
            raise IndexError(f"sample {sample} of {name!r}, whose batch is {len(maps)}")
        if head is None:
            return maps[sample]
        if maps.dim() == 3:
            raise ValueError(f"head {head} of {name!r}, whose maps are the mean of its heads")
        if not 0 <= head < maps.shape[1]:
            raise IndexError(f"head {head} of {name!r}, which has {maps.shape[1]}")
        return maps[sample, head : head + 1]


def attention_maps(
    model: nn.Module,
    inputs: Tensor | tuple | list | Mapping,
    *,
    heads: bool = True,
    layers: str | Iterable[str] | None = None,
) -> AttentionMaps:
    """Run a swapped model once and return the attention weights of its layers.

    They are the probabilities that the model multiplies its values with: of every nn.MultiheadAttention, by
    its name, inside a transformer layer too; of every attention inside windows (`pyarch.nn.WindowAttention`,
    and torchvision's and Hugging Face's Swin as swapped); and where the model was swapped with `sdpa=True` of
    every plain call of torch's scaled_dot_product_attention, by the name of the module that makes it; and of
    the layers of a Hugging Face model under attn_implementation="pyarch", which needs no swap. Windows
    stand in the batch, (B * n, H, N, N): those of an image follow each other row by row, `sample` of a plot
    counts them, and those of a shifted layer are cut from the rolled image, where a token gives 0 to those
    that lie in another part of it. Other attention gives none, such as that of a Hugging Face model under
    "eager" (which has output_attentions=True), and jagged nested tensors are refused: pad them. The model
    runs in the mode that it is in, but without dropout, and is itself left alone: a copy that shares its
    parameters runs, without gradients, and no random number of yours is drawn.

    Every map is a dense tensor: B * H * Tq * Tk elements a call, of the dtype of its layer, all of them on
    the CPU at once (12 layers of 12 heads over 1024 tokens in float32: 600 MB a sequence). `layers` keeps
    only what you look at; `heads=False` divides the size by H, also on the device of the model.

    Args:
        model: swapped, with attention among its layers, or with `sdpa=True`; or under "pyarch".
        inputs: a tensor, a tuple or list of arguments, or a dict of named arguments.
        heads: False for the mean over heads, (B, Tq, Tk).
        layers: which layers, by patterns over their names as in the rules of `swap`: globs, or regular
            expressions after "re:"; None for all.

    Returns:
        AttentionMaps, in the order in which the layers ran first. Print it; `maps.plot()` draws it.

    Raises:
        TypeError: `inputs` is none of these, or `model` is no module.
        ValueError: the model has no such attention of pyarch, or ran none; a pattern fits no layer that ran.
    """
    patterns = (layers,) if isinstance(layers, str) else layers
    wanted = None if patterns is None else read_rules(dict.fromkeys(patterns))
    args, kwargs = map_tensors(torch.clone, as_arguments(inputs))
    copied = duplicate(checked_model(model), share_parameters=True)
    if not _has_attention(copied):
        raise ValueError(
            f"{type(copied).__name__} has no attention layer of pyarch: swap it first, "
            f"pyarch.swap(model), or, where it calls F.scaled_dot_product_attention itself, {SDPA_HINT}"
            + (f"; {TRANSFORMERS_HINT}" if _implementations(copied) else "")
        )
    silence_dropout(copied)
    found: dict[str, list[Tensor]] = {}
    running: list[str] = []  # modules, innermost last
    ran: list[str] = []

    def is_wanted(name: str) -> bool:
        ran.append(name)
        return wanted is None or first_match(wanted, (name,)) is not None

    def keep(name: str, weights: Tensor) -> None:
        found.setdefault(name, []).append(weights.cpu())

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        running.append(names[module])
        if _is_attention(module) and is_wanted(names[module]):
            keep(names[module], _weights_of_module(module, args, kwargs, heads))

    def leave(module: nn.Module, args: tuple, output: object) -> None:
        running.pop()

    def attend_plainly(*args, **kwargs) -> Tensor | tuple[Tensor, Tensor]:
        name = running[-1]
        if not is_wanted(name):
            return scaled_dot_product_attention(**_without_dropout(args, kwargs))
        is_asked = kwargs.get("return_weights") is not None  # by a layer of transformers: those of each head
        output, weights = _attended_plainly(args, kwargs, heads or is_asked)
        keep(name, weights if heads or not is_asked else weights.mean(1))
        return (output, weights) if is_asked else output

    names = {module: name for name, module in copied.named_modules()}
    for module in names:
        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave, always_call=True)
    with same_randomness(), torch.no_grad(), answering(attend_plainly, also_ours=True):
        copied(*args, **kwargs)
    _check_ran(list(dict.fromkeys(ran)), wanted or ())
    return AttentionMaps({key: each for name, maps in found.items() for key, each in _numbered(name, maps)})


def _has_attention(model: nn.Module) -> bool:
    if has_context(model) or is_in_context():
        return True
    if any(isinstance(layer, ATTENTION_LAYERS) for layer in swapped_layers(model).values()):
        return True
    registered = sys.modules.get("pyarch.integrations.transformers_attention")
    return registered is not None and any(map(registered.is_registered_as, _implementations(model)))


def _implementations(model: nn.Module) -> set[str]:
    """The attention implementations that a model of transformers and its parts have chosen."""
    configs = (getattr(module, "config", None) for module in model.modules())
    chosen = (getattr(config, "_attn_implementation", None) for config in configs)
    return {name for name in chosen if isinstance(name, str)}


def _check_ran(ran: list[str], wanted: tuple[Rule, ...]) -> None:
    if not ran:
        raise ValueError("the model ran none of its attention on these inputs")
    for rule in wanted:
        if not rule.matches(ran):
            raise ValueError(f"layers: {rule.pattern!r} fits none that ran: {', '.join(map(repr, ran))}")


def _numbered(name: str, maps: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    if len(maps) == 1:
        yield name, maps[0]
    else:
        yield from ((f"{name}[{number}]", each) for number, each in enumerate(maps))


# -------------------------------------------------------------------------------- weights of one call


def _is_attention(module: nn.Module) -> bool:
    if isinstance(module, WINDOW_LAYERS):
        known = {kind.forward for kind in WINDOW_LAYERS}
        return type(module).forward in known and (not isinstance(module, SwinAttention) or is_served(module))
    return isinstance(module, nn.MultiheadAttention) and type(module).forward in KNOWN_FORWARDS


def _weights_of_module(module: nn.Module, args: tuple, kwargs: Mapping, heads: bool) -> Tensor:
    """What a module without dropout weighs values with in this call, with one dimension for the batch."""
    given = positional(module, (args, kwargs))
    if isinstance(module, WINDOW_LAYERS):
        return module.attention_weights(*given, heads=heads)
    return _weights_of_layer(module, given, heads)


def _weights_of_layer(module: nn.MultiheadAttention, given: tuple, heads: bool) -> Tensor:
    """What a MultiheadAttention without dropout would give for need_weights=True, of the call as it is."""
    query, key, value, padding, need_weights, mask, _, is_causal = given
    is_causal = is_causal and not is_fused_by_torch(module, query, key, value, padding, mask)
    call = read(module, query, key, value, padding, need_weights, mask, is_causal)
    if call is None:
        weights = module.forward(query, key, value, padding, True, mask, not heads, is_causal)[1]
    else:
        config = config_of(module)
        wish = "heads" if heads else "mean"
        weights = attend(module, query, key, value, call, config, backend_of(config), wish)[1]
    return weights if query.dim() == 3 else weights[None]


def _attended_plainly(args: tuple, kwargs: Mapping, heads: bool) -> tuple[Tensor, Tensor]:
    """Output, and weights with one dimension for the batch, of a plain call; without its dropout."""
    given = _without_dropout(args, kwargs)
    output, weights = scaled_dot_product_attention(**given | {"return_weights": "heads" if heads else "mean"})
    rank = given["query"].dim()
    if rank == 2:
        return output, weights[None, None] if heads else weights[None]
    if rank == 3:
        return output, weights[:, None] if heads else weights
    return output, weights.flatten(0, rank - 4)


def _without_dropout(args: tuple, kwargs: Mapping) -> dict[str, object]:
    """The arguments of a plain call by their names."""
    given = inspect.signature(scaled_dot_product_attention).bind(*args, **kwargs).arguments
    return given | {"dropout_p": 0.0}
