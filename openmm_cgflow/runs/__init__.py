"""The verbs: train, load, evaluate, check."""

__all__: list[str] = []
