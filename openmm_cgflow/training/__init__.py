"""How it is learned: the contract of a training method, the ladder of temperatures, the paper's two methods."""

__all__: list[str] = []
