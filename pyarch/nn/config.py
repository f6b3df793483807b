"""What a rule of `swap` may say about one layer."""

from __future__ import annotations

from dataclasses import dataclass

from pyarch.dispatch import checked_backend


@dataclass(frozen=True)
class Config:
    """How one swapped layer runs.

    Args:
        backend: "auto" or a backend's name. A `pyarch.backend(...)` block around the call goes before it.

    Raises:
        ValueError: `backend` is not one of the names.
    """

    backend: str = "auto"

    def __post_init__(self) -> None:
        checked_backend(self.backend)


DEFAULT = Config()
