"""Hold results of ours to the tolerance rule of pyarch/tolerance.py."""

from __future__ import annotations

from torch import Tensor

from pyarch.tolerance import NEGLIGIBLE, allowed, error

__all__ = ["NEGLIGIBLE", "check", "error"]


def check(
    name: str, ours: Tensor, stock: Tensor, reference: Tensor, layer_scale: float = 0.0, noise: float = 0.0
) -> None:
    """Raise AssertionError with the figures unless `ours` keeps the rule.

    Args:
        name: what is compared, for the message.
        ours, stock: results of pyarch and of torch's operator in one dtype. Where torch has no operator of
            that dtype, its float32 result rounded to it.
        reference: the float64 result, same shape.
        layer_scale: the largest gradient of the same layer, for gradients.
        noise: torch's relative error where its error here is a poor sample (few elements), as in `allowed`.
    """
    assert ours.dtype == stock.dtype, f"{name}: dtype {ours.dtype}, torch gives {stock.dtype}"
    assert ours.shape == stock.shape, f"{name}: shape {tuple(ours.shape)}, torch gives {tuple(stock.shape)}"
    got, torchs = error(ours, reference), error(stock, reference)
    limit = allowed(torchs, reference, ours.dtype, layer_scale, noise)
    assert got <= limit, f"{name}: error {got:.3e}, torch's own {torchs:.3e}, allowed {limit:.3e}"
