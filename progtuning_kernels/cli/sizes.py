"""Sizes of memory on the command line."""

from __future__ import annotations

import re

from .errors import UserError

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str) -> int:
    """Bytes of "24GiB", "80GB" or "17179869184"; `UserError` for what is no positive size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    size = 0
    if match:
        number, unit, binary = match.groups()
        power = _POWERS[unit.upper()]
        # float makes an infinity of 400 digits
        size = int(min(float(number) * (1024 if binary else 1000) ** power, 2**63))
    if not 1 <= size < 2**63:
        raise UserError(f"{text!r} is no size of memory: give one such as 24GiB")
    if match and not match[2] and size < 1000:  # "--memory 24" means a card of 24 GB
        raise UserError(f"{text!r} would be {size} bytes: give a unit, such as {size}GiB")
    return size
