"""What is learned: the flow, the potential of mean force, and how the fast atoms follow."""

__all__: list[str] = []
