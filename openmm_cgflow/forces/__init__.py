"""What is measured with an engine: chains of the fast atoms, mean forces with their errors, works of switching."""

__all__: list[str] = []
