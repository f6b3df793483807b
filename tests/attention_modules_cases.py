"""Attention and transformer layers as data: ours and torch's with the same numbers, masks, one run of both.

A result is a dict: "output", "weights" where the layer gives any, then "grad <argument>" and
"grad <parameter>", which are None where autograd gives no gradient. Letters: N batch, H heads, L queries,
S keys, E width.
"""

from __future__ import annotations

import copy
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import pyarch
from pyarch import dispatch, native
from pyarch.copies import jitter
from tests.compare import check, error

OUTPUTS = ("output", "weights")
# Below this many elements torch's largest error is a poor sample; its worst of the same call stands in.
FEW = 64
# How many further runs of torch's layer, with parameters off by a rounding, tell how large its error may be.
SAMPLES = 2
N, H, L, S, E = 2, 2, 7, 9, 16

_missing = native.serving()[1]
CPU = pytest.param("cpu", marks=pytest.mark.skipif(bool(_missing), reason=_missing or "never"))
each_backend = pytest.mark.parametrize("backend", [CPU, "reference"])
with_or_without_weights = pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "output"])

# ------------------------------------------------------------------------------------ layers

SETTINGS = {
    "plain": {},
    "no bias": {"bias": False},
    "kdim and vdim": {"kdim": 6, "vdim": 10},
    "vdim": {"vdim": 10},
    "kdim, no bias": {"kdim": 6, "bias": False},
    "bias of keys and values": {"add_bias_kv": True},
    "bias of keys and values, no bias": {"add_bias_kv": True, "bias": False},
    "zero attention": {"add_zero_attn": True},
    "both further keys": {"add_bias_kv": True, "add_zero_attn": True},
    "both further keys, kdim": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6},
    "batch first": {"batch_first": True},
    "one head": {"num_heads": 1},
    "heads of width 1": {"num_heads": 16},
}


def filled(layer: nn.Module) -> nn.Module:
    """The layer with random numbers in what torch starts at 0 or 1, so that a forgotten bias shows."""
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def pair(name: str, *arguments, **settings) -> tuple[nn.Module, nn.Module]:
    """Our layer of torch's class `name` and torch's, with the same numbers."""
    stock = filled(getattr(nn, name)(*arguments, **settings))
    ours = getattr(pyarch.nn, name)(*arguments, **settings)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def attention(**settings) -> tuple[nn.Module, nn.Module]:
    """MultiheadAttention of width E, with H heads where the settings name no others."""
    return pair("MultiheadAttention", E, settings.pop("num_heads", H), **settings)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape).to(dtype)


def operands(layer: nn.MultiheadAttention, batch: int | None = N, dtype=torch.float32) -> tuple[Tensor, ...]:
    """Query, key and value as the layer wants them: (L, N, E), batch first, or without a batch."""
    batches = () if batch is None else (batch,)
    shapes = ((L, layer.embed_dim), (S, layer.kdim), (S, layer.vdim))
    if layer.batch_first:
        return tuple(drawn(*batches, length, width, dtype=dtype) for length, width in shapes)
    return tuple(drawn(length, *batches, width, dtype=dtype) for length, width in shapes)


INNER = 24
STOCK = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
TAKES = {nn.MultiheadAttention: 3, nn.TransformerEncoderLayer: 1, nn.TransformerDecoderLayer: 2}
each_class = pytest.mark.parametrize("stock", STOCK, ids=lambda cls: cls.__name__)


def built(stock, **settings):
    """A layer of one of torch's classes, without dropout."""
    if stock is nn.MultiheadAttention:
        return filled(stock(E, H, **settings))
    return filled(stock(E, H, INNER, 0.0, **settings))


def data(stock):
    return [drawn(L, N, E) for _ in range(TAKES[stock])]


def first_of(results):
    return results[0] if isinstance(results, tuple) else results


class Translator(nn.Module):
    """Two encoder layers, a decoder layer and an attention over what both gave, with dropout."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, H, INNER, 0.25, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.decoder = nn.TransformerDecoderLayer(E, H, INNER, 0.25, batch_first=True)
        self.pooling = nn.MultiheadAttention(E, H, batch_first=True)
        self.head = nn.Linear(E, 3)

    def forward(self, source, target):
        memory = self.encoder(source)
        states = self.decoder(target, memory, tgt_mask=causal(target.shape[1]), tgt_is_causal=True)
        pooled, weights = self.pooling(states[:, -1:], states, states)
        return self.head(pooled), weights


def sentences():
    return drawn(N, S, E), drawn(N, L, E)


# ------------------------------------------------------------------------------------ masks


def hidden(*shape: int) -> Tensor:
    """A bool mask as torch's modules read it, True = may not attend; every row sees its first key."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


def as_infinities(mask: Tensor) -> Tensor:
    """The same mask in numbers to be added."""
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


def learned(*shape: int) -> Tensor:
    """Random numbers to be added, with a gradient."""
    return torch.randn(shape, requires_grad=True)


def every_other_column(mask: Tensor) -> Tensor:
    """The same numbers, its last dimension with a stride of two."""
    return torch.stack([mask, mask], -1).flatten(-2)[..., ::2]


def masks_of(queries: int, keys: int, heads: int = H, batch: int = N) -> dict[str, dict[str, Tensor]]:
    """Every kind of mask of a batched call, as named arguments."""
    square, stacked, ends = (queries, keys), (batch * heads, queries, keys), (batch, keys)
    return {
        "none": {},
        "bool (L, S)": {"attn_mask": hidden(*square)},
        "float (L, S)": {"attn_mask": learned(*square)},
        "infinities (L, S)": {"attn_mask": as_infinities(hidden(*square))},
        "bool (N H, L, S)": {"attn_mask": hidden(*stacked)},
        "float (N H, L, S)": {"attn_mask": learned(*stacked)},
        "rows of one (L, S)": {"attn_mask": hidden(1, keys).expand(square)},
        "strided (L, S)": {"attn_mask": every_other_column(hidden(*square))},
        "strided (N H, L, S)": {"attn_mask": every_other_column(torch.randn(stacked))},
        "bool padding": {"key_padding_mask": hidden(*ends)},
        "float padding": {"key_padding_mask": learned(*ends)},
        "infinite padding": {"key_padding_mask": as_infinities(hidden(*ends))},
        "bool both": {"attn_mask": hidden(*square), "key_padding_mask": hidden(*ends)},
        "float both": {"attn_mask": learned(*square), "key_padding_mask": learned(*ends)},
        "bool (N H, L, S) and padding": {"attn_mask": hidden(*stacked), "key_padding_mask": hidden(*ends)},
        "float (N H, L, S), padding": {"attn_mask": learned(*stacked), "key_padding_mask": learned(*ends)},
    }


def unbatched_masks_of(queries: int, keys: int, heads: int = H) -> dict[str, dict[str, Tensor]]:
    """Every kind of mask of a call without a batch."""
    square, stacked = (queries, keys), (heads, queries, keys)
    return {
        "none": {},
        "bool (L, S)": {"attn_mask": hidden(*square)},
        "float (H, L, S)": {"attn_mask": learned(*stacked)},
        "bool (H, L, S)": {"attn_mask": hidden(*stacked)},
        "bool padding": {"key_padding_mask": hidden(keys)},
        "float padding": {"key_padding_mask": learned(keys)},
        "bool both": {"attn_mask": hidden(*stacked), "key_padding_mask": hidden(keys)},
    }


def causal(length: int, keys: int | None = None) -> Tensor:
    """The bool mask of a sequence that never looks ahead; query 0 sees key 0 alone, as torch has it."""
    return torch.ones(length, keys or length, dtype=torch.bool).triu(1)


def window_mask(
    queries: int, keys: int, window: tuple[int | None, int | None], dilation: int = 1, global_tokens: int = 0
) -> Tensor:
    """What a windowed layer hides, for torch's layer: True where query i may not see key j.

    Query i sees key j = i + dilation m for -left <= m <= right, and where one of both is global.
    """
    left, right = (keys + queries if side is None else side for side in window)
    mask = torch.ones(queries, keys, dtype=torch.bool)
    for i in range(queries):
        for j in range(keys):
            step, rest = divmod(j - i, dilation)
            near = rest == 0 and -left <= step <= right
            mask[i, j] = not (near or i < global_tokens or j < global_tokens)
    return mask


# ------------------------------------------------------------------------------------ one run


def outcome(layer: nn.Module, *inputs: Tensor, rounded: torch.dtype | None = None, **keywords) -> dict:
    """Outputs and gradients of one call, with random dense gradients of every output.

    Args:
        inputs: those that are one tensor stay one; each floating one gets a gradient.
        rounded: the dtype that the gradients of the outputs are rounded to, the first input's unless given.
        keywords: masks and flags; a mask that requires a gradient gets one.
    """
    leaves: dict[int, Tensor] = {}

    def leaf(tensor: Tensor) -> Tensor:
        return leaves.setdefault(id(tensor), tensor.detach().requires_grad_())

    arguments = [leaf(each) for each in inputs]
    named = {name: leaf(each) if is_learned(each) else each for name, each in keywords.items()}
    outputs = named_outputs(layer(*arguments, **named))
    wanted = {f"grad argument {place}": each for place, each in enumerate(arguments)}
    wanted |= {f"grad {name}": each for name, each in named.items() if is_learned(each)}
    wanted |= {f"grad {name}": each for name, each in layer.named_parameters() if each.requires_grad}
    grads = [cotangent(each, rounded or inputs[0].dtype) for each in outputs.values()]
    found = torch.autograd.grad(list(outputs.values()), list(wanted.values()), grads, allow_unused=True)
    results = {name: each.detach() for name, each in outputs.items()}
    return results | dict(zip(wanted, found, strict=True))


def named_outputs(results: Tensor | tuple) -> dict[str, Tensor]:
    """What a layer gave: its output, and its weights where it has them."""
    results = results if isinstance(results, tuple) else (results,)
    return {name: each for name, each in zip(OUTPUTS, results, strict=False) if each is not None}


def is_learned(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def cotangent(output: Tensor, rounded: torch.dtype) -> Tensor:
    """A random gradient, the same for every run and exact in every dtype."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(output.shape, generator=generator).to(rounded).to(output)


def widened(value: object) -> object:
    """A floating tensor in float64; anything else as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


class Answers(NamedTuple):
    """What torch's layer gives: in its dtype, in float64, and what its roundings may do to each result."""

    stock: dict
    exact: dict
    noise: dict[str, float]


def answers(stock: nn.Module, *inputs: Tensor, **keywords) -> Answers:
    """Torch's results of one call."""
    shared = {id(each): widened(each) for each in inputs}
    exact = outcome(
        copy.deepcopy(stock).double(),
        *(shared[id(each)] for each in inputs),
        rounded=inputs[0].dtype,
        **{name: widened(each) for name, each in keywords.items()},
    )
    theirs = outcome(stock, *inputs, **keywords)
    samples = [theirs]
    if inputs[0].dtype == torch.float32:
        samples += [outcome(jitter(copy.deepcopy(stock)), *inputs, **keywords) for _ in range(SAMPLES)]
    relative = {
        name: max(error(sample[name], each) for sample in samples) / (largest(each) or 1.0)
        for name, each in exact.items()
        if each is not None
    }
    return Answers(theirs, exact, relative)


# ------------------------------------------------------------------------------------ the rule


def compare(ours: nn.Module, stock: nn.Module, *inputs: Tensor, **keywords) -> None:
    """Hold a layer of ours to torch's on one call: the tolerance rule, dtypes, shapes and strides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        hold(outcome(ours, *inputs, **keywords), answers(stock, *inputs, **keywords))


def hold(results: dict, answers: Answers) -> None:
    """Hold outputs and gradients to the tolerance rule, and to torch in which gradients there are.

    A layer is a chain of products and norms, through which two correct float32 runs end further apart than
    twice one of them is from the truth. So torch's error is the largest of a few runs of it, as in
    pyarch.verify: with its parameters, and with each of them off by up to one rounding. On few elements its
    worst relative error of the same call counts.
    """
    stock, truth, noise = answers
    assert results.keys() == stock.keys()
    for name, each in stock.items():
        assert (each is None) == (results[name] is None), f"{name}: torch gives {type(each).__name__}"
    outputs = [name for name in noise if name in OUTPUTS]
    gradients = [name for name in noise if name not in OUTPUTS]
    assert any(largest(truth[name]) for name in gradients), "every gradient is zero, nothing is proven"
    for name in outputs:
        assert strides(results[name]) == strides(stock[name]), f"{name}: strides differ from torch's"
    for group in (outputs, gradients):
        layer = 0.0 if group is outputs else max(largest(truth[name]) for name in group)
        worst = max(noise[name] for name in group)
        for name in group:
            chance = max(torch.finfo(torch.float32).eps, noise[name])
            if truth[name].numel() < FEW:
                chance = max(chance, worst)
            check(name, results[name], stock[name], truth[name], layer, chance)


def assert_same(ours: dict, stock: dict) -> None:
    """Equal but for rounding, a thousand times that of the largest value; strides of outputs too.

    For inputs of any size, where the rule would need several runs: numbers to 9 make scores of hundreds, and
    exp(score - lse) rounds as the score does. Of a gradient far below the layer's largest, as behind a
    saturated softmax, only cancellation is left: a hundredth of the largest counts.
    """
    assert ours.keys() == stock.keys()
    reached = [each for name, each in stock.items() if each is not None and name not in OUTPUTS]
    least = max(map(largest, reached)) / 100
    for name, wanted in stock.items():
        assert (ours[name] is None) == (wanted is None), name
        if wanted is None:
            continue
        assert name not in OUTPUTS or strides(ours[name]) == strides(wanted), f"{name}: strides"
        scale = largest(wanted) if name in OUTPUTS else max(largest(wanted), least)
        near = 1000 * torch.finfo(wanted.dtype).eps * scale
        torch.testing.assert_close(
            ours[name], wanted, rtol=0, atol=near, msg=lambda text, n=name: f"{n}: {text}"
        )


def strides(tensor: Tensor) -> list[int]:
    """The strides that reach anything."""
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


# ------------------------------------------------------------------------------------ what was said, who ran


def said(run) -> tuple[str, str]:
    """The type and text of the error that a call raises."""
    try:
        run()
    except Exception as failure:
        return type(failure).__name__, str(failure)
    return "no error", ""


def warned(run) -> list[str]:
    """The texts of the warnings that a call gives."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in seen]


def operators_of(layer: nn.Module, *inputs: Tensor, **keywords) -> list[tuple[str, str]]:
    """Every (operator, backend) that dispatch chose during a call."""
    chosen = []
    with dispatch.recording(lambda op, call, backend: chosen.append((op.name, backend.name))):
        layer(*inputs, **keywords)
    return chosen


def fresh_dynamo() -> None:
    """Let torch.compile forget what it knows, also torch's functions, which poisoned tests replace."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.trace_rules.clear_lru_cache()
