"""Slow z and fast y from positions and back: Z-matrices, volume elements, handedness, thermal widths, features."""

__all__: list[str] = []
