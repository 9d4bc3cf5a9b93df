"""How it is learned: the contract of a method, the ladder of temperatures, and the paper's two methods."""

__all__: list[str] = []
