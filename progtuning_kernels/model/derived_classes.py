"""Changes how one instance runs, by moving it to a fixed subclass of its own class.

Flipping `module.__class__` leaves every `__dict__` as it was, survives `torch.compile` and FSDP2,
and is undone by flipping back. No code of another library runs when a class is made here: none that
registers subclasses gets it. There is one class per base and key, however many instances use it:
compiled code is guarded by the class.
"""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Hashable, Mapping
from typing import Any

from torch import nn

_classes: dict[tuple[type, Hashable], type] = {}
_bases: dict[type, type] = {}
_settled: dict[type, type] = {}


def base_of(cls: type) -> type | None:
    """The class that `cls` was derived from by `derive`, None for any other class."""
    return _bases.get(cls)


def root_of(cls: type) -> type:
    """The class that an instance had at first: `cls` without anything derived here."""
    while cls in _bases:
        cls = _bases[cls]
    return cls


def without_derived_ancestors(cls: type) -> type:
    """The class that `cls` would be, had it been made from the original classes.

    FSDP2 makes a class out of the one that a module has at that moment: what is derived here would
    stay in it for good.
    """
    if cls in _bases or not any(ancestor in _bases for ancestor in cls.__mro__):
        return cls
    if cls not in _settled:
        bases = tuple(without_derived_ancestors(root_of(base)) for base in cls.__bases__)
        # without `forward`: `__init_subclass__` of transformers' blocks has put our own into it.
        # FSDP2 adds nothing but `__deepcopy__`.
        own = {
            name: value
            for name, value in vars(cls).items()
            if name.startswith("__") and name not in ("__dict__", "__weakref__")
        }
        _settled[cls] = _unnoticed(type(cls), cls.__name__, bases, own)
    return _settled[cls]


def derived_classes() -> list[type]:
    return list(_bases)


class _Deaf(nn.Module):
    """First base of a new class: no `__init_subclass__` behind it is called."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def _unnoticed(
    metaclass: type, name: str, bases: tuple[type, ...], namespace: dict[str, Any]
) -> type:
    """A class made without any code of its bases and metaclass, which may register it, refuse a
    second class of one name, or want arguments unknown here.
    """
    # of the metaclasses, `ABCMeta` alone keeps something in a class that its instances need
    new = ABCMeta.__new__ if issubclass(metaclass, ABCMeta) else type.__new__
    made = new(metaclass, name, (_Deaf, *bases), namespace)
    type.__setattr__(made, "__bases__", bases)  # which calls no code of theirs
    return made


def _new_instance(cls: type) -> Any:  # `copyreg.__newobj__` wants the class of what is pickled
    return cls.__new__(cls)


def derive(base: type, key: Hashable, members: Mapping[str, Any]) -> type:
    """The subclass of `base` with these members: always the same one for the same key.

    Copies and pickles of its instances are instances of the root class, because this one cannot be
    found by name.
    """
    if (base, key) in _classes:
        return _classes[base, key]

    def reduce_ex(self: Any, protocol: int) -> tuple:
        _, _, *state = root_of(base).__reduce_ex__(self, protocol)
        return (_new_instance, (root_of(base),), *state)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        # code that finds this class among `__subclasses__()` and calls it wants the original
        self.__class__ = root_of(base)
        self.__init__(*args, **kwargs)

    # the name stays: transformers' `_no_split_modules` and regional compilation go by it
    made = _unnoticed(
        type(base),
        base.__name__,
        (base,),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__init__": init,
            "__reduce_ex__": reduce_ex,
            **members,
        },
    )
    _classes[base, key] = made
    _bases[made] = base
    return made
