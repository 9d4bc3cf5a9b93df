"""A trained model in use: densities, free energies, samples, forces for OpenMM."""

__all__: list[str] = []
