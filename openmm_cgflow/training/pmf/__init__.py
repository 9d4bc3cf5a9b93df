"""The default method, phase by phase: rounds, anchors, last fit, polish, and the fits that they make."""

__all__: list[str] = []
