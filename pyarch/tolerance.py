"""The tolerance rule, in one place: as close to float64 as twice torch's own error, plus a floor of rounding.

    err(ours) <= 2 * err(torch's own operator, same dtype) + floor,   err = max |difference| to float64

The floor is 2 ulp of the dtype at the reference's largest value. A gradient whose reference is under a
millionth of the same layer's largest gradient takes its floor from that largest one: below it there is only
cancellation noise.

Inside a whole model one more estimate is needed: the largest error of few elements is a poor sample of
torch's error (a lone scalar may be right by luck), so `verify` passes torch's typical relative error there as
`noise`.
"""

from __future__ import annotations

import torch
from torch import Tensor

STOCK_ERRORS_ALLOWED = 2
FLOOR_ULPS = 2
NEGLIGIBLE = 1e-6


def scale(reference: Tensor, layer_scale: float = 0.0) -> float:
    """The magnitude that rounding is measured by: the reference's largest finite value, or the layer's."""
    own = reference.abs().nan_to_num(0.0, posinf=0.0).max().item() if reference.numel() else 0.0
    return layer_scale if own < NEGLIGIBLE * layer_scale else own


def floor(reference: Tensor, dtype: torch.dtype, layer_scale: float = 0.0) -> float:
    """The absolute error granted whatever torch's own operator does."""
    return FLOOR_ULPS * torch.finfo(dtype).eps * scale(reference, layer_scale)


def error(result: Tensor, reference: Tensor) -> float:
    """The largest absolute difference to the float64 reference; infinite where NaN or inf is misplaced."""
    result, reference = result.detach().double(), reference.detach().double()
    if result.shape != reference.shape:
        return float("inf")
    same = (result == reference) | (result.isnan() & reference.isnan())
    difference = torch.where(same, 0.0, (result - reference).abs())
    return (
        difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item() if result.numel() else 0.0
    )


def allowed(
    stock_error: float, reference: Tensor, dtype: torch.dtype, layer_scale: float = 0.0, noise: float = 0.0
) -> float:
    """The largest error that the rule grants.

    Args:
        stock_error: error of torch's own operator in the same dtype.
        reference: the float64 result.
        dtype: of the results.
        layer_scale: the largest gradient of the same layer, for gradients.
        noise: torch's relative error where `stock_error` is a poor sample of it, else 0.
    """
    expected = max(stock_error, noise * scale(reference, layer_scale))
    return STOCK_ERRORS_ALLOWED * expected + floor(reference, dtype, layer_scale)
