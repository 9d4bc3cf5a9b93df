"""Frames held against a reference: torsions, states, populations, distances between maps, tables, plots."""

__all__: list[str] = []
