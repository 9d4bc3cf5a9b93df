"""A trained model in use: its density, all-atom samples drawn from it, free energies, forces for OpenMM."""

__all__: list[str] = []
