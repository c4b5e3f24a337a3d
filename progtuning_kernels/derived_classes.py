"""Changes how one instance runs, by moving it to a fixed subclass of its own class.

Flipping `module.__class__` leaves every `__dict__` as it was, survives `torch.compile` and FSDP2,
and is undone by flipping back. Nothing is written into a class or module of another library. There
is one class per base and key, however many instances use it: compiled code is guarded by the class.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

_classes: dict[tuple[type, Hashable], type] = {}
_bases: dict[type, type] = {}


def base_of(cls: type) -> type | None:
    """The class that `cls` was derived from by `derive`, None for any other class."""
    return _bases.get(cls)


def root_of(cls: type) -> type:
    """The class that an instance had at first: `cls` without anything derived here."""
    while cls in _bases:
        cls = _bases[cls]
    return cls


def derived_classes() -> list[type]:
    """Every class made here."""
    return list(_bases)


def _new_instance(cls: type) -> Any:
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

    # the name stays: transformers' `_no_split_modules` and regional compilation go by it
    made = type(
        base.__name__,
        (base,),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": reduce_ex,
            **members,
        },
    )
    _classes[base, key] = made
    _bases[made] = base
    return made
