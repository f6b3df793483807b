"""What a rule of `swap` may say about one layer, and which options pyarch.nn has that torch.nn has not."""

from __future__ import annotations

from dataclasses import dataclass

from pyarch.dispatch import checked_backend

Window = tuple[int | None, int | None]


@dataclass(frozen=True)
class Config:
    """How one swapped layer runs.

    `window`, `window_dilation` and `global_tokens` are for attention: a rule states with them what the masks
    that the model gives mean, so that the kernels pass over what is hidden. They hold beside the masks of a
    call. Query i sees key j = i + window_dilation * m for -left <= m <= right, and whatever one of both is
    global. In a decoder layer they are for the attention of the sequence to itself.

    Args:
        backend: "auto" or a backend's name. A `pyarch.backend(...)` block around the call goes before it.
        recompute: recurrent layers keep only their states for the backward and compute the gates again there:
            less memory for a little time. Other layers have nothing to recompute.
        window: (left, right), how many keys a query sees before and after its own, None for all of that side;
            one number for both sides; None for no window. Kept as a pair.
        window_dilation: the distance between the keys of a window.
        global_tokens: the first so many tokens see every token and are seen by every token.

    Raises:
        ValueError: `backend` is not one of the names; a negative number of keys or tokens; a dilation
            below 1; a window that is no pair.
        TypeError: `recompute` is not a bool, or a number is not an int.
    """

    backend: str = "auto"
    recompute: bool = False
    window: Window | int | None = None
    window_dilation: int = 1
    global_tokens: int = 0

    def __post_init__(self) -> None:
        checked_backend(self.backend)
        if not isinstance(self.recompute, bool):
            raise TypeError(f"recompute should be of type bool, got {type(self.recompute).__name__}")
        object.__setattr__(self, "window", _checked_window(self.window))
        _check_number("window_dilation", self.window_dilation, least=1)
        _check_number("global_tokens", self.global_tokens, least=0)

    @property
    def has_pattern(self) -> bool:
        """Whether queries see less than the masks of a call let them."""
        return self.window is not None or self.window_dilation != 1


def _checked_window(window: Window | list | int | None) -> Window | None:
    if window is None:
        return None
    sides = tuple(window) if isinstance(window, tuple | list) else (window, window)
    if len(sides) != 2:
        raise ValueError(f"window should be (left, right), one number or None, got {window!r}")
    for side in sides:
        if side is not None:
            _check_number("window", side, least=0)
    return sides


def _check_number(name: str, number: int, least: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} should be of type int, got {type(number).__name__}")
    if number < least:
        raise ValueError(f"{name} should be at least {least}, got {number}")


class Options(Config):
    """The Config of a layer that was built with options which torch's class has not.

    Such a layer computes what no stock layer does, so it stands for none.
    """


DEFAULT = Config()
