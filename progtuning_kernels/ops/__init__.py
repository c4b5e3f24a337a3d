"""The ops, a folder each: reference.py, triton.py, native.py, and the public function.

Importing this package registers every op with `backend`.
"""

from .activation import bias_gelu, geglu, gelu, swiglu
from .dropout import dropout
from .linear_cross_entropy import linear_cross_entropy
from .masked_norm import masked_norm
from .masked_update import masked_update
from .norm import layer_norm, rms_norm
from .report import backend_report

__all__ = [
    "backend_report",
    "bias_gelu",
    "dropout",
    "geglu",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "masked_norm",
    "masked_update",
    "rms_norm",
    "swiglu",
]
