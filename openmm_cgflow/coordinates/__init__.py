"""Slow coordinates z and fast coordinates y of a molecule, to positions and back."""

__all__: list[str] = []
