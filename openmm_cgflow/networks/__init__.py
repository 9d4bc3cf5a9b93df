"""What is learned: spline flow, potential of mean force, response of the fast atoms; and importance weights."""

__all__: list[str] = []
