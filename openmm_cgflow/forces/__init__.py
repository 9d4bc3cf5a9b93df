"""What is measured: mean forces on the slow coordinates, and works of switching between conformations."""

__all__: list[str] = []
