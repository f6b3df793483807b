"""The tolerance rule, in one place: as close to float64 as twice torch's own error, plus a floor of rounding.

    err(ours) <= 2 * err(torch's own operator, same dtype) + floor,   err = max |difference| to float64

The floor is 2 ulp of the dtype at the reference's largest value. A gradient whose reference is under a millionth of
the same layer's largest gradient takes its floor from that largest one: below it there is only cancellation noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

STOCK_ERRORS_ALLOWED = 2
FLOOR_ULPS = 2
NEGLIGIBLE = 1e-6


def floor(reference: Tensor, dtype: torch.dtype, layer_scale: float = 0.0) -> float:
    """The absolute error granted whatever torch's own operator does."""
    scale = reference.abs().max().item() if reference.numel() else 0.0
    if scale < NEGLIGIBLE * layer_scale:
        scale = layer_scale
    return FLOOR_ULPS * torch.finfo(dtype).eps * scale


def error(result: Tensor, reference: Tensor) -> float:
    """The largest absolute difference to the float64 reference; NaN and infinity must stand in the same places."""
    result, reference = result.detach().double(), reference.detach().double()
    if result.shape != reference.shape:
        return float("inf")
    same = (result == reference) | (result.isnan() & reference.isnan())
    difference = torch.where(same, 0.0, (result - reference).abs())
    return difference.nan_to_num(nan=float("inf")).max().item() if result.numel() else 0.0


def check(name: str, ours: Tensor, stock: Tensor, reference: Tensor, layer_scale: float = 0.0) -> None:
    """Raise AssertionError with the figures unless `ours` keeps the rule.

    Args:
        name: what is compared, for the message.
        ours, stock: results of pyarch and of torch's operator in one dtype. Where torch has no operator of that
            dtype, its float32 result rounded to it.
        reference: the float64 result, same shape.
        layer_scale: the largest gradient of the same layer, for gradients.
    """
    assert ours.dtype == stock.dtype, f"{name}: dtype {ours.dtype}, torch gives {stock.dtype}"
    assert ours.shape == stock.shape, f"{name}: shape {tuple(ours.shape)}, torch gives {tuple(stock.shape)}"
    got, torchs = error(ours, reference), error(stock, reference)
    allowed = STOCK_ERRORS_ALLOWED * torchs + floor(reference, ours.dtype, layer_scale)
    assert got <= allowed, f"{name}: error {got:.3e}, torch's own {torchs:.3e}, allowed {allowed:.3e}"
