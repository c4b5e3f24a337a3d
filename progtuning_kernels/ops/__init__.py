"""The ops, one file each: contract, reference, Triton, native, registration, in that order.

Importing this package registers every op with `_backend`.
"""

from .masked_norm import masked_norm
from .masked_update import masked_update

__all__ = ["masked_norm", "masked_update"]
