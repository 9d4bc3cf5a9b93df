"""What is simulated: input files to an OpenMM System, its bonds and checks, and which of its atoms are slow."""

__all__: list[str] = []
