"""Samples held against a reference: states, maps, populations, plots."""

__all__: list[str] = []
