"""Reads what frozen units computed in an earlier epoch instead of computing it again."""

from .prefix_cache import CacheReport, PrefixCache, automatic_cache
from .serving import PrefixServer

__all__ = ["CacheReport", "PrefixCache", "PrefixServer", "automatic_cache"]
