"""Attention in plain torch: the meaning that every kernel is held to.

    s = scale * q k^T;  s = c tanh(s / c) with a softcap c;  s[i, j] += bias[i, j] + distance_bias[j - i]
    P = exp(s - lse),  lse = log(sum over visible keys of exp(s)  (+ exp(sinks[h]))),  out = dropout(P) v
    (Vaswani et al., 2017, arXiv:1706.03762; softcap: Gemma Team, 2024, arXiv:2408.00118; sinks: Xiao et al.,
    2023, arXiv:2309.17453, in the learned form of a logit for each head)

and backward, with dP = dropout(dout v^T) and delta[i] = sum_d dout[i, d] out[i, d] - dlse[i]:

    dv = dropout(P)^T dout,  ds = P (dP - delta),  dbias = ds,  ddistance_bias[r] = sum of ds over j - i = r,
    dsinks[h] = -sum_i exp(sinks[h] - lse[i]) delta[i],
    ds = ds (1 - tanh^2) with a softcap,  dq = scale * ds k,  dk = scale * ds^T q

A query that sees no key, or whose every bias is -inf, gives zeros, zero gradients and lse = -inf (with sinks
lse = sink). Keys and values that no query sees and queries that see nothing have no influence, not even as
NaN: they are zeroed before any product. Dropout keeps what the random stream of philox.py says and scales it
by 1 / (1 - dropout_p); lse is of the probabilities before it.

For 16-bit inputs everything is float32 up to the last rounding, for float64 it is float64. Query head h reads
key and value head h // (H / Hk).

Legend: B batch, H query heads, Hk key heads, Tq queries, Tk keys, D width of queries and keys, Dv of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyarch.reference.attention_distance import of_pairs, sums_of_distances
from pyarch.reference.attention_mask import Extras, Settings, used_keys, visible
from pyarch.reference.philox import keep_mask

__all__ = ["Extras", "Gradients", "Settings", "attention", "backward", "empty_output", "forward", "lse_of"]
__all__ += ["visible", "weights", "weights_backward", "weights_from"]

# Of query, key, value, bias, sinks and distance_bias.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_INFINITY = float("inf")


# -------------------------------------------------------------------------------- scores


class _Scores(NamedTuple):
    """The scores of a call and what made them, wide; key and value already one for each query head."""

    query: Tensor  # (B, H, Tq, D), zero where the query sees nothing
    key: Tensor  # (B, H, Tk, D), zero where no query of the head sees the key
    value: Tensor | None  # (B, H, Tk, Dv), likewise
    capped: Tensor | None  # (B, H, Tq, Tk), tanh(s / softcap)
    scores: Tensor  # (B, H, Tq, Tk), -inf where invisible

    @property
    def blind(self) -> Tensor:
        """Which queries see nothing, by pattern or by bias: (B, H, Tq, 1)."""
        return (self.scores == -_INFINITY).all(-1, keepdim=True)


def _scores(query, key, value, extras: Extras, settings: Settings) -> _Scores:
    groups = query.shape[1] // key.shape[1]
    query, key, value = widen(query), widen(key), None if value is None else widen(value)
    seen = visible(extras, settings, query.shape[2], key.shape[2], query.device)
    if seen is not None:
        used = used_keys(seen, key.shape[1])[..., None]
        query = torch.where(seen.any(-1, keepdim=True), query, 0.0)
        key = torch.where(used, key, 0.0)
        value = None if value is None else torch.where(used, value, 0.0)
    key, value = _each_head(key, groups), None if value is None else _each_head(value, groups)
    scores = settings.scale * (query @ key.transpose(-1, -2))
    capped = None
    if settings.softcap:
        capped = (scores / settings.softcap).tanh()
        scores = settings.softcap * capped
    if extras.bias is not None:
        scores = scores + extras.bias.to(scores.dtype)
    if extras.distance_bias is not None:
        scores = scores + of_pairs(extras.distance_bias.to(scores.dtype), *scores.shape[2:])
    if seen is not None:
        scores = torch.where(seen, scores, -_INFINITY)
    return _Scores(query, key, value, capped, scores)


def _probabilities(made: _Scores, lse: Tensor) -> Tensor:
    return (made.scores - _finite(lse)).exp()


def _finite(lse: Tensor) -> Tensor:
    """lse as (B, H, Tq, 1), zero where there was nothing to add up."""
    return torch.where(lse == -_INFINITY, 0.0, lse)[..., None]


def widen(tensor: Tensor) -> Tensor:
    """A 16-bit tensor in float32, any other as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _each_head(tensor: Tensor, groups: int) -> Tensor:
    """Key or value heads repeated for the query heads that read them: (B, Hk, Tk, D) to (B, H, Tk, D)."""
    return tensor if groups == 1 else tensor.repeat_interleave(groups, 1)


def _dropout(tensor: Tensor, extras: Extras, settings: Settings) -> Tensor:
    """Dropout of probabilities, and of their gradients alike."""
    if settings.dropout_p == 0:
        return tensor
    if settings.dropout_p >= 1:
        return _nothing_of(tensor)
    kept = keep_mask(extras.seed, settings.dropout_p, *tensor.shape)
    return torch.where(kept, tensor / (1 - settings.dropout_p), 0.0)


def _nothing_of(tensor: Tensor) -> Tensor:
    """Zeros in place of a tensor, which gets a gradient of zeros."""
    return torch.where(torch.zeros((), dtype=torch.bool, device=tensor.device), tensor, 0.0)


# -------------------------------------------------------------------------------- forward


def attention(
    query: Tensor, key: Tensor, value: Tensor, extras: Extras, settings: Settings
) -> tuple[Tensor, Tensor]:
    """`forward` in operations that autograd, its second order and functorch's transforms follow."""
    made = _scores(query, key, value, extras, settings)
    probabilities, lse = _softmax(made.scores, extras.sinks)
    value = _nothing_of(made.value) if settings.dropout_p >= 1 else made.value
    out = _dropout(probabilities, extras, settings) @ value
    return torch.where(made.blind, 0.0, out).to(query.dtype), lse


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities (B, H, Tq, Tk) and lse (B, H, Tq) of scores; zeros and -inf where nothing is seen."""
    if sinks is None:
        sink = scores.new_full((1, 1, 1, 1), -_INFINITY)
    else:
        sink = sinks.to(scores.dtype)[:, None, None]
    logits = torch.cat([scores, sink.expand(*scores.shape[:3], 1)], -1)
    shift = logits.detach().amax(-1, keepdim=True)
    shift = torch.where(shift == -_INFINITY, 0.0, shift)
    powers = (logits - shift).exp()
    total = powers.sum(-1, keepdim=True)
    # Where there is nothing to add up, nothing is divided by one: its gradient is zero and not 0 / 0.
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -_INFINITY, total.log() + shift).squeeze(-1)
    return powers[..., :-1] / total, lse


def lse_of(query: Tensor, key: Tensor, extras: Extras, settings: Settings) -> Tensor:
    """lse of `forward` alone."""
    made = _scores(query, key, None, extras, settings)
    return _softmax(made.scores, extras.sinks)[1].contiguous()


def forward(
    query: Tensor, key: Tensor, value: Tensor, extras: Extras, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        query: (B, H, Tq, D), any floating dtype and strides; every size may be 0.
        key: (B, Hk, Tk, D), H a multiple of Hk.
        value: (B, Hk, Tk, Dv).

    Returns:
        out (B, H, Tq, Dv) in the query's dtype and the layout of `empty_output`; lse (B, H, Tq), contiguous,
        in float32, for float64 in float64.
    """
    out, lse = attention(query, key, value, extras, settings)
    return empty_output(query, value.shape[-1]).copy_(out), lse.contiguous()


def empty_output(query: Tensor, value_dim: int) -> Tensor:
    """An unwritten (B, H, Tq, Dv), laid out as torch's own: like the query, or contiguous.

    torch keeps the query's order of dimensions where Dv is D and the query's innermost dimension is dense.
    """
    if query.shape[-1] == value_dim and query.stride(-1) == 1:
        return torch.empty_like(query)
    return torch.empty((*query.shape[:-1], value_dim), dtype=query.dtype, device=query.device)


# -------------------------------------------------------------------------------- backward


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    extras: Extras,
    settings: Settings,
    needs: Sequence[bool],
) -> Gradients:
    """The gradients of query, key, value, bias, sinks and distance_bias.

    Args:
        grad_out: as `out`, any strides.
        grad_lse: as `lse`, or None for zeros.
        out, lse: results of `forward` on the same arguments.
        needs: for each of the six whether it is wanted.

    Returns:
        Each gradient in the shape and dtype of its tensor, dense, in the tensor's order of dimensions (the
        strides of torch.empty_like); None where not wanted.
    """
    made = _scores(query, key, value, extras, settings)
    blind, probabilities = made.blind, _probabilities(made, lse)
    grad_out = torch.where(blind, 0.0, widen(grad_out))
    delta = (grad_out * widen(out)).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse[..., None]
    of_kept = _dropout(grad_out @ made.value.transpose(-1, -2), extras, settings)
    grad_scores = torch.where(blind, 0.0, probabilities * (of_kept - delta))

    grad_bias = grad_sinks = grad_distance = None
    if needs[3]:
        grad_bias = grad_scores.sum_to_size(extras.bias.shape)
    if needs[4]:
        sinks = extras.sinks.to(delta.dtype)[:, None, None]
        grad_sinks = -((sinks - _finite(lse)).exp() * delta).sum((0, 2, 3))
    if needs[5]:
        grad_distance = sums_of_distances(grad_scores).sum_to_size(extras.distance_bias.shape)
    if settings.softcap:
        grad_scores = grad_scores * (1 - made.capped.square())
    grad_scores = grad_scores * settings.scale
    heads = key.shape[1]
    kept = _dropout(probabilities, extras, settings)
    return (
        _like(grad_scores @ made.key, query, needs[0]),
        _like(_summed(grad_scores.transpose(-1, -2) @ made.query, heads), key, needs[1]),
        _like(_summed(kept.transpose(-1, -2) @ grad_out, heads), value, needs[2]),
        _like(grad_bias, extras.bias, needs[3]),
        _like(grad_sinks, extras.sinks, needs[4]),
        _like(grad_distance, extras.distance_bias, needs[5]),
    )


def _summed(grad: Tensor, heads: int) -> Tensor:
    """The gradient of each key or value head: the sum over the query heads that read it."""
    return grad if grad.shape[1] == heads else grad.unflatten(1, (heads, -1)).sum(2)


def _like(grad: Tensor | None, tensor: Tensor | None, wanted: bool) -> Tensor | None:
    return torch.empty_like(tensor).copy_(grad) if wanted else None


# -------------------------------------------------------------------------------- weights


def weights_from(
    query: Tensor, key: Tensor, lse: Tensor, extras: Extras, settings: Settings, mean: bool
) -> Tensor:
    """`weights` in operations that autograd follows; lse is an argument with a gradient of its own."""
    made = _scores(query, key, None, extras, settings)
    found = _dropout(_probabilities(made, lse), extras, settings)
    return (found.mean(1) if mean else found).to(query.dtype)


def weights(
    query: Tensor, key: Tensor, lse: Tensor, extras: Extras, settings: Settings, mean: bool
) -> Tensor:
    """The probabilities that `forward` weighs values with, dropout included.

    Args:
        lse: of `forward` on the same arguments.
        mean: whether to average over heads.

    Returns:
        (B, H, Tq, Tk), with `mean` (B, Tq, Tk), contiguous, in the query's dtype.
    """
    return weights_from(query, key, lse, extras, settings, mean).contiguous()


def weights_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    extras: Extras,
    settings: Settings,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of query, key, lse, bias and distance_bias from that of `weights`.

    That is (B, H, Tq, Tk) or (B, Tq, Tk). Autograd follows it. `needs` says of each of the five
    whether it is wanted.
    """
    made = _scores(query, key, None, extras, settings)
    heads = query.shape[1]
    grad = grad if grad.dim() == 4 else (grad[:, None] / heads).expand(-1, heads, -1, -1)
    grad_scores = _probabilities(made, lse) * _dropout(widen(grad), extras, settings)
    grad_scores = torch.where(made.blind, 0.0, grad_scores)
    grad_lse = -grad_scores.sum(-1)
    grad_bias = grad_distance = None
    if needs[3]:
        grad_bias = grad_scores.sum_to_size(extras.bias.shape)
    if needs[4]:
        grad_distance = sums_of_distances(grad_scores).sum_to_size(extras.distance_bias.shape)
    if settings.softcap:
        grad_scores = grad_scores * (1 - made.capped.square())
    grad_scores = grad_scores * settings.scale
    return (
        _like(grad_scores @ made.key, query, needs[0]),
        _like(_summed(grad_scores.transpose(-1, -2) @ made.query, key.shape[1]), key, needs[1]),
        _like(grad_lse, lse, needs[2]),
        _like(grad_bias, extras.bias, needs[3]),
        _like(grad_distance, extras.distance_bias, needs[4]),
    )
