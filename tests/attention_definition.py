"""Attention by definition, in plain torch and apart from pyarch.reference: what every backend is held to.

A result is a dict: "out", "lse", then "grad query", "grad key", "grad value", "grad bias", "grad sinks" and
"grad distance bias"; None where there is none. Float64 by definition is the truth; torch's own operator in
the dtype, or float32 by definition rounded to it where torch has no such operator, is what the tolerance rule
compares with.
B batch, H query heads, Hk key heads, Tq queries, Tk keys, D width of queries and keys, Dv of values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyarch.reference.attention import Extras, Settings
from pyarch.tolerance import scale as magnitude
from tests.compare import check

RESULTS = ("out", "lse")
GRADIENTS = ("grad query", "grad key", "grad value", "grad bias", "grad sinks", "grad distance bias")
NEGATIVE_INFINITY = float("-inf")
# torch's fused CPU kernel takes the exponentials of a 16-bit call to about 14 bits; its float32 lse shows it.
ERROR_OF_TORCHS_LSE_OF_16_BITS = 2**-14


class Operands(NamedTuple):
    """What a forward and a backward take."""

    query: Tensor
    key: Tensor
    value: Tensor
    extras: Extras
    settings: Settings
    grad_out: Tensor
    grad_lse: Tensor | None

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """In the order of GRADIENTS."""
        extras = self.extras
        return self.query, self.key, self.value, extras.bias, extras.sinks, extras.distance_bias

    @property
    def needs(self) -> list[bool]:
        return [each is not None for each in self.differentiable]

    def with_leaves(self, leaves: Sequence[Tensor | None]) -> Operands:
        query, key, value, bias, sinks, distance_bias = leaves
        extras = self.extras._replace(bias=bias, sinks=sinks, distance_bias=distance_bias)
        return self._replace(query=query, key=key, value=value, extras=extras)

    def as_dtype(self, dtype: torch.dtype) -> Operands:
        """The same numbers, contiguous, in another dtype."""

        def cast(tensor):
            floating = tensor is not None and tensor.is_floating_point()
            return tensor.to(dtype).contiguous() if floating else tensor

        return Operands(
            *map(cast, self[:3]), Extras(*map(cast, self.extras)), self.settings, *map(cast, self[5:])
        )


# ------------------------------------------------------------------------------------ dropout's stream


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al. 2011) on int64 tensors that hold 32-bit words."""
    words, low = [each.clone() for each in counter], 0xFFFFFFFF
    for turn in range(10):
        keys = [(each + turn * step) & low for each, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            (second >> 32 & low) ^ words[1] ^ keys[0],
            second & low,
            (first >> 32 & low) ^ words[3] ^ keys[1],
            first & low,
        ]
    return words


def kept(shape: Sequence[int], dropout_p: float, seed: int) -> Tensor:
    """Which probabilities (B, H, Tq, Tk) dropout keeps."""
    batch, heads, queries, keys = shape
    word = torch.arange(keys)
    counter = [
        (word // 4).expand(shape),
        torch.arange(queries)[:, None].expand(shape),
        torch.arange(batch * heads).view(batch, heads, 1, 1).expand(shape),
        torch.zeros(shape, dtype=torch.int64),
    ]
    words = torch.stack(philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)), -1)
    drawn = words.gather(-1, (word % 4).expand(shape).unsqueeze(-1)).squeeze(-1)
    return drawn >= min(round(dropout_p * 2**32), 2**32 - 1)


# ------------------------------------------------------------------------------------ the definition


def spread(distance_bias: Tensor, queries: int, keys: int) -> Tensor:
    """A bias of distances for every pair, (B or 1, H or 1, Tq, Tk), a query after the other."""
    rows = [distance_bias[..., queries - 1 - i : queries - 1 - i + keys] for i in range(queries)]
    none = distance_bias[..., :0, None].expand(*distance_bias.shape[:2], 0, keys)
    return torch.stack(rows, -2) if rows else none


class Composed(NamedTuple):
    """Results by plain torch; `passed` is what dropout multiplies the probabilities by."""

    out: Tensor
    lse: Tensor
    probabilities: Tensor
    passed: Tensor | float
    visible: Tensor


def visible_of(operands: Operands) -> Tensor:
    """Which keys each query sees, (B, H, Tq, Tk), one pair of positions after the other."""
    (batch, heads, queries, _), keys = operands.query.shape, operands.key.shape[2]
    extras, settings = operands.extras, operands.settings
    visible = torch.zeros(batch, queries, keys, dtype=torch.bool)
    position = torch.arange(queries)[:, None] + settings.query_offset
    key = torch.arange(keys)[None, :]
    steps, remainder = (
        torch.div(key - position, settings.dilation, rounding_mode="floor"),
        (key - position) % settings.dilation,
    )
    windowed = torch.ones(queries, keys, dtype=torch.bool)
    if settings.left is not None or settings.right is not None or settings.dilation != 1:
        windowed = remainder == 0
    if settings.left is not None:
        windowed = windowed & (steps >= -settings.left)
    if settings.right is not None:
        windowed = windowed & (steps <= settings.right)
    for sample in range(batch):
        chosen = None if extras.global_mask is None else extras.global_mask[sample]
        visible[sample] = (
            windowed
            | is_global(key, settings.global_tokens, chosen)
            | is_global(position, settings.global_tokens, chosen)
        )
    if settings.is_causal:
        visible &= key <= position
    visible = visible.unsqueeze(1).expand(batch, heads, queries, keys)
    if extras.mask is not None:
        visible = visible & extras.mask
    if extras.padding is not None:
        visible = visible & ~extras.padding[:, None, None, :]
    return visible


def is_global(positions: Tensor, first: int, chosen: Tensor | None) -> Tensor:
    """Whether each position is a global token's; `chosen` (T,) bool."""
    found = (positions >= 0) & (positions < first)
    if chosen is None:
        return found
    inside = (positions >= 0) & (positions < len(chosen))
    return found | (inside & chosen[positions.clamp(0, len(chosen) - 1)])


def composed(operands: Operands) -> Composed:
    """The definition, differentiable, in the operands' dtype; what nobody sees counts as zero."""
    query, key, value, extras, settings = operands[:5]
    group = query.shape[1] // key.shape[1]
    visible = visible_of(operands)
    key, value = (
        each.repeat_interleave(group, 1).where(visible.any(-2)[..., None], 0) for each in (key, value)
    )
    scores = settings.scale * query.where(visible.any(-1)[..., None], 0) @ key.mT
    if settings.softcap:
        scores = settings.softcap * torch.tanh(scores / settings.softcap)
    if extras.bias is not None:
        scores = scores + extras.bias
    if extras.distance_bias is not None:
        scores = scores + spread(extras.distance_bias, *scores.shape[2:])
    scores = scores.masked_fill(~visible, NEGATIVE_INFINITY)
    sinks = None if extras.sinks is None else extras.sinks[:, None, None].to(scores.dtype)
    peak = scores.new_full((*scores.shape[:3], 1), NEGATIVE_INFINITY)
    peak = torch.cat([peak, scores] + ([] if sinks is None else [sinks.expand_as(peak)]), -1).amax(-1, True)
    peak = peak.detach().nan_to_num(neginf=0.0)
    terms = (scores - peak).exp()
    total = terms.sum(-1, True) + (0 if sinks is None else (sinks - peak).exp())
    sees = total > 0
    total = total.where(sees, 1)
    probabilities = terms / total
    passed = 1.0
    if settings.dropout_p == 1:
        passed = 0.0
    elif settings.dropout_p > 0:
        passed = kept(scores.shape, settings.dropout_p, int(extras.seed)) / (1 - settings.dropout_p)
        passed = passed.to(scores.dtype)
    lse = (total.log() + peak).masked_fill(~sees, NEGATIVE_INFINITY).squeeze(-1)
    return Composed((probabilities * passed) @ value, lse, probabilities, passed, visible)


def with_gradients(operands: Operands, run: Callable[[Operands], tuple[Tensor, Tensor | None]]):
    """Results of `run` and their gradients by autograd."""
    leaves = [None if each is None else each.detach().requires_grad_() for each in operands.differentiable]
    out, lse = run(operands.with_leaves(leaves))
    arriving = [(out, operands.grad_out)]
    if operands.grad_lse is not None:
        arriving.append((lse, operands.grad_lse.to(lse.dtype)))
    wanted = [each for each in leaves if each is not None]
    found = iter(
        torch.autograd.grad(
            [result for result, _ in arriving],
            wanted,
            [grad for _, grad in arriving],
            materialize_grads=True,
            allow_unused=True,
        )
    )
    gradients = [None if each is None else next(found) for each in leaves]
    return {"out": out.detach(), "lse": None if lse is None else lse.detach()} | dict(
        zip(GRADIENTS, gradients, strict=True)
    )


def by_definition(operands: Operands) -> dict[str, Tensor | None]:
    return with_gradients(operands, lambda given: composed(given)[:2])


# ------------------------------------------------------------------------------------ torch's answers


def is_stocks(operands: Operands, visible: Tensor) -> bool:
    """Whether torch's own operator computes this call as we define it."""
    settings = operands.settings
    return (
        not settings.softcap
        and not settings.dropout_p
        and operands.extras.sinks is None
        and operands.grad_lse is None
        and bool(visible.any(-1).all())
    )


def by_stock(operands: Operands) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention with everything spelled out as one mask."""
    query, key, value, extras, settings = operands[:5]
    visible = visible_of(operands)
    mask = None if visible.all() else visible
    bias = extras.bias
    if extras.distance_bias is not None:
        of_distance = spread(extras.distance_bias, *visible.shape[2:])
        bias = of_distance if bias is None else bias + of_distance
    if bias is not None:
        mask = bias.expand(visible.shape).masked_fill(~visible, NEGATIVE_INFINITY)
    return F.scaled_dot_product_attention(
        query, key, value, mask, scale=settings.scale, enable_gqa=query.shape[1] != key.shape[1]
    )


class Answers(NamedTuple):
    """What a call has to give: torch's results in its dtype, float64's, and what its rounding is measured by.

    `terms` is each result's largest sum of absolute terms; `carries` how far one rounding of a score goes: a
    score of a thousand, rounded, moves its probability by a thousand roundings.
    """

    stock: dict[str, Tensor | None]
    truth: dict[str, Tensor | None]
    terms: dict[str, float]
    carries: float
    dtype: torch.dtype


def answers_to(operands: Operands) -> Answers:
    """By torch's operator in the dtype where it computes the call, else float32 rounded to the dtype."""
    wide = operands.as_dtype(torch.float64)
    truth = by_definition(wide)
    near = by_definition(operands.as_dtype(torch.float32))
    like = dict(zip(GRADIENTS, operands.differentiable, strict=True)) | {"out": operands.query}
    stock = {
        name: each if each is None or name == "lse" else each.to(like[name].dtype)
        for name, each in near.items()
    }
    if is_stocks(operands, visible_of(operands)):
        stock |= {
            name: each
            for name, each in with_gradients(operands, lambda given: (by_stock(given), None)).items()
            if name != "lse"
        }
    return Answers(stock, truth, *absolute_terms(wide), operands.query.dtype)


def absolute_terms(operands: Operands) -> tuple[dict[str, float], float]:
    """`terms` and `carries` of Answers."""
    result = composed(operands)
    query, key, value, grad = (each.nan_to_num().abs() for each in (*operands[:3], operands.grad_out))
    group = query.shape[1] // key.shape[1]
    many_key, many_value = (each.repeat_interleave(group, 1) for each in (key, value))
    factor = abs(operands.settings.scale)
    scores = factor * query @ many_key.mT
    if operands.extras.bias is not None:
        scores = scores + operands.extras.bias.abs()
    distance_bias = operands.extras.distance_bias
    if distance_bias is not None:
        scores = scores + spread(distance_bias.abs(), *scores.shape[2:])
    carries = 1 + largest(scores.where(result.visible, 0))
    dropped = result.probabilities * result.passed
    out = dropped @ many_value
    delta = (grad * out).sum(-1, True)
    if operands.grad_lse is not None:
        delta = delta + operands.grad_lse.abs()[..., None]
    of_scores = result.probabilities * (result.passed * (grad @ many_value.mT) + delta)

    def gathered(of_heads):
        return of_heads.unflatten(1, (-1, group)).sum(2) if of_heads.numel() else of_heads

    terms = {
        "out": largest(out),
        "lse": 1.0,
        "grad query": largest(factor * of_scores @ many_key),
        "grad key": largest(gathered(factor * of_scores.mT @ query)),
        "grad value": largest(gathered(dropped.mT @ grad)),
    }
    if operands.extras.bias is not None:
        terms["grad bias"] = largest(of_scores.sum_to_size(operands.extras.bias.shape))
    if distance_bias is not None:
        every = distance_bias.detach().expand(*query.shape[:2], -1).requires_grad_()
        spread(every, *scores.shape[2:]).backward(of_scores)
        terms["grad distance bias"] = largest(every.grad.sum_to_size(distance_bias.shape))
    if operands.extras.sinks is not None:
        share = (operands.extras.sinks[:, None] - result.lse).exp()
        terms["grad sinks"] = largest((share * delta.squeeze(-1)).sum((0, 2)))
    return terms, carries


def largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


# ------------------------------------------------------------------------------------ the rule


def hold(results: dict[str, Tensor | None], expected: Answers) -> None:
    """Hold whatever results there are to the tolerance rule; those that are None were not asked for.

    Torch may be right by luck on a sum of few elements, so one float32 rounding of the sum of absolute terms
    counts as torch's error too. The gradients of a 16-bit call, that of a float32 bias among them, are made
    from an output that was rounded to 16 bits, and of its difference to something as large: one such rounding
    of their absolute terms counts there.
    """
    truth = expected.truth
    layer = max(largest(each) for name, each in truth.items() if name in GRADIENTS and each is not None)
    for name, ours in results.items():
        if ours is None:
            continue
        exact, stock = truth[name], expected.stock[name]
        if name == "lse":
            nothing = exact == NEGATIVE_INFINITY
            assert torch.equal(ours == NEGATIVE_INFINITY, nothing), (
                "lse: -inf where nothing is seen, only there"
            )
            ours, stock, exact = (each.masked_fill(nothing, 0) for each in (ours, stock, exact))
        layer_scale = layer if name in GRADIENTS else 0.0
        rounding = torch.finfo(torch.float32).eps * expected.carries
        if name in GRADIENTS and expected.dtype in (torch.bfloat16, torch.float16):
            rounding += torch.finfo(expected.dtype).eps / 2
        if name == "lse" and expected.dtype in (torch.bfloat16, torch.float16):
            rounding += ERROR_OF_TORCHS_LSE_OF_16_BITS
        noise = rounding * expected.terms[name] / (magnitude(exact, layer_scale) or 1.0)
        check(name, ours, stock, exact, layer_scale, noise)
