"""The default method, phase by phase: a potential of mean force learned on the fly, and the flow on it."""

__all__: list[str] = []
