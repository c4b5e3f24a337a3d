"""Frameworks that run the loop themselves."""
