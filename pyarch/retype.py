"""Which class makes a module run as a drop-in, and which class it had before.

A plain torch.nn layer takes the drop-in itself. A subclass that overrides nothing of the computation, a class
of another package, and the dynamic class of a parametrized layer, take a class rebuilt over the drop-in that
remembers the one it replaces.
"""

from __future__ import annotations

from functools import cache

from torch import nn

from pyarch.nn.drop_in import REPLACES, DropIn, Retyped

_PARAMETRIZE = "torch.nn.utils.parametrize"
_OWN_SLOTS = ("__dict__", "__weakref__", REPLACES)


def swapped_class(cls: type[nn.Module], stock: type[nn.Module], drop_in: type[DropIn]) -> type[DropIn]:
    """The class under which a module of class `cls`, a kind of `stock`, runs as `drop_in`."""
    if cls is stock and issubclass(drop_in, stock):
        return drop_in
    if is_parametrized_class(cls):
        return rebuilt(cls, swapped_class(cls.__bases__[0], stock, drop_in), remembers=cls)
    return _derived(cls, drop_in)


def unswapped_class(cls: type) -> type | None:
    """The class that a module of class `cls` had before it was swapped; None where it was never swapped.

    A layer that was parametrized after the swap gets its dynamic class rebuilt over the stock one.
    """
    if not issubclass(cls, Retyped):
        return None
    if not is_parametrized_class(cls):
        original = cls.stock_class()
        return None if original is cls else original
    original = vars(cls).get(REPLACES)
    if original is not None and _parametrized_names(original) == _parametrized_names(cls):
        return original
    base = unswapped_class(cls.__bases__[0])
    return None if base is None else rebuilt(cls, base, remembers=None)


def is_parametrized_class(cls: type) -> bool:
    """Whether torch.nn.utils.parametrize made this class for one module."""
    return cls.__module__ == _PARAMETRIZE and len(cls.__bases__) == 1


def _parametrized_names(cls: type) -> set[str]:
    return {name for name, value in vars(cls).items() if isinstance(value, property)}


def rebuilt(cls: type, base: type, remembers: type | None) -> type:
    """The dynamic class of a parametrized module again, over another base; its properties are its own."""
    namespace = {name: value for name, value in vars(cls).items() if name not in _OWN_SLOTS}
    # torch leaves this out over a class that can be deep-copied, such as a drop-in.
    namespace.setdefault("__deepcopy__", Retyped.__deepcopy__)
    if remembers is not None:
        namespace[REPLACES] = remembers
    return type(cls.__name__, (base,), namespace)


@cache
def _derived(cls: type, drop_in: type[DropIn]) -> type[DropIn]:
    """A user's subclass with the drop-in's computation before its own base's."""
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    # The drop-in's constructor has its stock class's arguments, not the user's.
    named["__init__"] = cls.__init__
    return type(cls.__name__, (drop_in, cls), {**named, REPLACES: cls})
