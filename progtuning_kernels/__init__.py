"""Progressive fine-tuning of Transformers, with the cost of the frozen rest removed.

`patch_model(model, schedule)` makes a Hugging Face model train only the blocks that its schedule
says; see README.md for the manual.

Nothing is imported before one of the names is used, so that `progtuning --help` needs no torch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .public import *  # noqa: F403 - type checkers see the names that __getattr__ gives

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if not name.startswith("_") and find_spec(path := f"{__name__}.{name}"):
        return import_module(path)
    if name == "__all__" or not name.startswith("_"):
        public = import_module(f"{__name__}.public")
        if name in (*public.__all__, "__all__"):
            return getattr(public, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__getattr__("__all__"), "__version__"]
