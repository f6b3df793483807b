"""A model whose forward runs in an `attention_context`: its class, and why some models can have none.

The class is derived from the model's own, under the same name, and remembers it.
"""

from __future__ import annotations

from abc import ABCMeta
from functools import cache, wraps

from torch import nn

from pyarch.attention_context import attention_context
from pyarch.candidates import Obstacle, family_of, obstacle_in_instance, obstacle_of_sharding
from pyarch.nn.drop_in import REPLACES, Retyped
from pyarch.retype import is_parametrized_class, rebuilt

# Names by which a model says itself how it is copied, pickled or scripted.
_COPYING = {
    "__copy__",
    "__deepcopy__",
    "__getstate__",
    "__setstate__",
    "__reduce__",
    "__reduce_ex__",
    "__prepare_scriptable__",
}


class InContext(Retyped):
    """Mixed in before the class of a model whose forward runs in an `attention_context`."""

    def __init_subclass__(cls) -> None:
        """Keeps a class that is made here from the registry that a base class of the user's may have."""


def class_in_context(cls: type[nn.Module]) -> type[InContext]:
    """The class under which a model of class `cls` runs its forward in an `attention_context`."""
    if is_parametrized_class(cls):
        return rebuilt(cls, class_in_context(cls.__bases__[0]), remembers=cls)
    return _derived(cls)


@cache
def _derived(cls: type[nn.Module]) -> type[InContext]:
    """A class with its forward in a context, under the same signature."""

    @wraps(cls.forward)
    def forward(self, *args, **kwargs):
        with attention_context():
            return cls.forward(self, *args, **kwargs)

    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls)(cls.__name__, (InContext, cls), {**named, "forward": forward, REPLACES: cls})


def has_context(model: nn.Module) -> bool:
    """Whether the forward of a model, or of a part of it, runs in an `attention_context`."""
    return any(isinstance(module, InContext) for module in model.modules())


def obstacle_to_context(model: nn.Module) -> Obstacle | None:
    """Why a model's forward cannot be made to run in an `attention_context`, or None."""
    cls = type(model)
    if isinstance(model, InContext):
        return Obstacle("already", "its forward runs in pyarch.attention_context() already")
    if family_of(model) is not None:
        return Obstacle("layer", f"{cls.__name__} is itself a layer that swap looks for")
    if cls.forward is nn.Module.forward:
        return Obstacle("no-forward", f"{cls.__name__} has no forward", "swap the modules that it holds")
    return obstacle_of_sharding(cls) or _obstacle_to_deriving(cls) or obstacle_in_instance(model)


def _obstacle_to_deriving(cls: type[nn.Module]) -> Obstacle | None:
    hint = "call it inside pyarch.attention_context()"
    if type(cls) not in (type, ABCMeta):
        return Obstacle("metaclass", f"{cls.__name__} has the metaclass {type(cls).__name__}", hint)
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        overridden = sorted(_COPYING & set(vars(base)))
        if overridden and not is_parametrized_class(base):
            return Obstacle("overridden", f"{base.__name__} overrides {', '.join(overridden)}", hint)
    return None
