"""The verbs of the command line, and what they build: init, check, train, sample, evaluate, export, info."""

__all__: list[str] = []
