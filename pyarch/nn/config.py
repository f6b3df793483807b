"""What a rule of `swap` may say about one layer."""

from __future__ import annotations

from dataclasses import dataclass

from pyarch.dispatch import checked_backend


@dataclass(frozen=True)
class Config:
    """How one swapped layer runs.

    Args:
        backend: "auto" or a backend's name. A `pyarch.backend(...)` block around the call goes before it.
        recompute: recurrent layers keep only their states for the backward and compute the gates again there:
            less memory for a little time. Other layers have nothing to recompute.

    Raises:
        ValueError: `backend` is not one of the names.
        TypeError: `recompute` is not a bool.
    """

    backend: str = "auto"
    recompute: bool = False

    def __post_init__(self) -> None:
        checked_backend(self.backend)
        if not isinstance(self.recompute, bool):
            raise TypeError(f"recompute should be of type bool, got {type(self.recompute).__name__}")


DEFAULT = Config()
