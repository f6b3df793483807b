"""What every module that `swap` re-types shares, and every drop-in layer: its stock class computed otherwise.

A drop-in adds no parameter, buffer or state_dict entry; at most one private attribute, its `Config`. A deep
copy stays a drop-in, while a pickle holds the stock class, so that it loads where pyarch is not installed.
A layer that was built with options which torch's class has not stands for no stock class, and is pickled as
what it is.
"""

from __future__ import annotations

import copy

import torch

from pyarch.dispatch import Verdict, requested_backend
from pyarch.nn.config import DEFAULT, Config, Options

CONFIG_ATTRIBUTE = "_pyarch_config"
# On a class that `swap` built over a drop-in: the class that it replaces.
REPLACES = "_pyarch_replaces"


def config_of(module: torch.nn.Module) -> Config:
    """How a layer runs, of torch or of ours."""
    return module.__dict__.get(CONFIG_ATTRIBUTE, DEFAULT)


def backend_of(config: Config) -> str:
    """The backend of a layer's next call: an enclosing `pyarch.backend(...)`, else that of its Config."""
    requested = requested_backend()
    return config.backend if requested == "auto" else requested


class Retyped:
    """Mixed in before the class of a module: copies stay what they are, pickles hold the stock class."""

    has_own_options = False

    @classmethod
    def stock_class(cls) -> type[torch.nn.Module]:
        """The class that this one stands in for: torch.nn's, or a user's subclass that `swap` re-typed.

        A class that a user derived from a drop-in stands for itself, and so does one of ours that no class of
        torch.nn has the name of.
        """
        if REPLACES in vars(cls):
            return vars(cls)[REPLACES]
        if not cls.__module__.startswith("pyarch.nn."):
            return cls
        bases = (base for base in cls.__mro__ if base.__module__.startswith("torch.nn.modules."))
        stock = next(bases)
        return cls if stock is torch.nn.Module else stock

    def __prepare_scriptable__(self) -> Retyped:
        """Called by torch.jit.script, which compiles the source of a layer and knows no operator of ours."""
        raise TypeError(
            f"torch.jit.script compiles only torch's own layers, and this {type(self).__name__} is pyarch's; "
            "restore the model first (report.restore()), or use torch.compile"
        )

    def __copy__(self) -> Retyped:
        duplicate = self.__class__.__new__(self.__class__)
        duplicate.__dict__.update(_without_compiled_call(self.__dict__))
        return duplicate

    def __deepcopy__(self, memo: dict) -> Retyped:
        duplicate = self.__class__.__new__(self.__class__)
        memo[id(self)] = duplicate
        duplicate.__dict__.update(copy.deepcopy(_without_compiled_call(self.__dict__), memo))
        return duplicate

    def __reduce_ex__(self, protocol: int) -> tuple:
        stock = self.stock_class()
        if stock is type(self) or self.has_own_options:
            return super().__reduce_ex__(protocol)
        state = {name: value for name, value in self.__getstate__().items() if name != CONFIG_ATTRIBUTE}
        return object.__new__, (stock,), state


class DropIn(Retyped):
    """Mixed in before a torch.nn class by a subclass of the same name."""

    @property
    def pyarch_config(self) -> Config:
        return config_of(self)

    @property
    def has_own_options(self) -> bool:
        """Whether this layer was built to compute what no stock layer does."""
        return isinstance(config_of(self), Options)

    def requested_backend(self) -> str:
        """The backend for the next call: an enclosing `pyarch.backend(...)`, else this layer's Config."""
        return backend_of(self.pyarch_config)

    def _keep_options(self, **options) -> None:
        """Check options that torch's class has not, and keep them unless they say nothing."""
        config = Options(**options)
        if config != Options():
            self.__dict__[CONFIG_ATTRIBUTE] = config

    def explain(self, *inputs) -> dict[str, tuple[Verdict, ...]]:
        """What each backend says of a call on `inputs`, for "forward" and "backward"."""
        raise NotImplementedError


def left_to_torch(kind: str) -> dict[str, tuple[Verdict, ...]]:
    """What `explain` says of a call that no operator of pyarch is asked for."""
    only_stock = (Verdict("torch", (), (f"{kind}: torch's own operator runs it directly",)),)
    return {"forward": only_stock, "backward": only_stock}


def _without_compiled_call(state: dict) -> dict:
    """A module's state without the function that `module.compile()` made; torch never copies it either."""
    return {name: value for name, value in state.items() if name != "_compiled_call_impl"}
